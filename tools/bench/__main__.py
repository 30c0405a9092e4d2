"""``python -m tools.bench NAME [arguments]``; without a name: step_overhead, import_time and startup."""

from __future__ import annotations

import subprocess
import sys

from tools.workspace import ROOT

NAMES = (
    "step_overhead",
    "ddp_overhead",
    "import_time",
    "startup",
    "memory",
    "instructions",
    "gpu_overhead",
    "paired",
    "deepspeed",
    "float8",
    "scaling",
    "async_save",
    "checkpoint",
    "logging",
    "sinks",
)


def main(args: list[str]) -> int:
    """Run one measurement, or the short ones."""
    if args and args[0] not in NAMES:
        raise SystemExit(f"no measurement is named {args[0]!r}; there are: {', '.join(NAMES)}")
    commands = [args] if args else [["step_overhead"], ["import_time"], ["startup"]]
    codes = []
    for name, *arguments in commands:
        print(f"===== {name} =====", flush=True)
        command = [sys.executable, "-m", f"tools.bench.{name}", *arguments]
        codes.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Run everything, what takes long too, and end with a table: ``python -m tools.full [step ...]``."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tools.workspace import ROOT

PY = sys.executable
STEPS: dict[str, list[list[str]]] = {
    "tests": [
        [
            PY,
            "-m",
            "pytest",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "--durations=80",
            "packages",
            "integration_tests",
            "tools",
        ]
    ],
    "types": [[PY, "-m", "tools.check_types"]],
    "lint": [[PY, "-m", "ruff", "check", "."], [PY, "-m", "ruff", "format", "--check", "."]],
    "layers": [[PY, "-m", "tools.check_layers"]],
    "api": [[PY, "-m", "tools.api"]],
    "alone": [[PY, "-m", "tools.alone", "--whole"]],
    "deepspeed": [[PY, "-m", "tools.deepspeed_session"]],
    "downstream": [[PY, "-m", "tools.downstream"]],
    "xla": [[PY, "-m", "tools.xla"]],
    "docs": [[PY, "-m", "tools.docs"]],
    "demo": [
        [PY, "docs/examples/digits.py", "--no-resume", "--out", "build/full/digits"],
        [PY, "docs/examples/digits.py", "--out", "build/full/digits"],
        [PY, "docs/examples/digits.py", "--no-resume", "--devices", "2", "--out", "build/full/digits-ddp"],
    ],
    "examples": [[PY, "-m", "tools.examples"]],
    "bench": [
        [PY, "-m", "tools.bench.step_overhead", "--markdown"],
        [PY, "-m", "tools.bench.import_time"],
        [PY, "-m", "tools.bench.startup"],
    ],
    "drills": [[PY, "-m", "tools.drills"]],
    "memory": [[PY, "-m", "tools.bench.memory"]],
}


def table(rows: list[tuple[str, float, bool]]) -> str:
    """One line a step: name, seconds, result."""
    lines = [f"{name:10} {seconds:7.0f} s  {'passed' if passed else 'FAILED'}" for name, seconds, passed in rows]
    return "\n".join(["step          seconds  result", *lines])


def main(names: list[str]) -> int:
    """Run the named steps, or all; a failure does not stop the others; return 0 if none failed."""
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise SystemExit(f"no step is named {', '.join(unknown)}; there are: {', '.join(STEPS)}")
    rows = []
    for name in names or STEPS:
        print(f"===== {name} =====", flush=True)
        started = time.perf_counter()
        env = {**os.environ, "OMP_NUM_THREADS": "1"} if name == "tests" else None
        passed = all(subprocess.run(command, cwd=ROOT, env=env, check=False).returncode == 0 for command in STEPS[name])
        rows.append((name, time.perf_counter() - started, passed))
    print(table(rows))
    return int(not all(passed for *_, passed in rows))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

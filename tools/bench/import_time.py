"""How long an import takes in a fresh process, on top of ``import torch``, with the modules and memory it adds.

Targets take turns; medians of ``--rounds``. fulmen_protocols is measured without torch: it must not import it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from tools.bench.child import environment, print_table

TARGETS = {
    "fulmen_protocols (no torch)": ("", "import fulmen_protocols"),
    "fulmen_fabric": ("import torch", "import fulmen_fabric"),
    "fulmen": ("import torch", "import fulmen"),
    "fulmen.Trainer": ("import torch", "from fulmen import Trainer, LightningModule"),
    "lightning": ("import torch", "import lightning"),
    "torchmetrics": ("import torch", "import torchmetrics"),
}
PROGRAM = """
import json, sys, time
def rss_mib():
    try:
        return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
    except OSError:
        return float("nan")
{before}
modules, memory, wall, cpu = len(sys.modules), rss_mib(), time.perf_counter(), time.process_time()
{target}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps([wall * 1e3, cpu * 1e3, len(sys.modules) - modules, rss_mib() - memory, "torch" in sys.modules]))
"""


def measure(before: str, target: str) -> list[float] | None:
    """Wall ms, CPU ms, modules, MiB and whether torch is imported; None if the import fails."""
    program = PROGRAM.format(before=before or "pass", target=target)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment(), cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> int:
    """Measure every target that can be imported and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # The first pass is not counted: it writes the .pyc files and fills the page cache.
    targets = {name: target for name, target in TARGETS.items() if measure(*target) is not None}
    taken: dict[str, list[list[float]]] = {name: [] for name in targets}
    for _ in range(arguments.rounds):
        for name, target in targets.items():
            reading = measure(*target)
            if reading is not None:
                taken[name].append(reading)
    rows, figures = [], {}
    for name, readings in taken.items():
        wall, cpu, modules, memory, torch = (median(column) for column in zip(*readings, strict=True))
        figures[name] = {"wall_ms": wall, "cpu_ms": cpu, "modules": modules, "rss_mib": memory, "torch": bool(torch)}
        rows.append(
            [name, f"{wall:+.0f}", f"{cpu:+.0f}", f"{modules:+.0f}", f"{memory:+.1f}", "yes" if torch else "no"]
        )
    print_table(["import", "wall ms", "CPU ms", "modules", "MiB", "torch"], rows, markdown=arguments.markdown)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

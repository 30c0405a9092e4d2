"""Time from the start of a process to the end of its first training step, raw and with each contestant, in turns."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from statistics import median

from tools.bench.child import (
    MeasurementFailed,
    contestant_parser,
    finish,
    installed,
    print_table,
    pythons,
    spawn,
)

CONTESTANTS = ["fulmen", "fulmen-fabric", "lightning", "lightning-fabric"]


def child(arguments: argparse.Namespace) -> None:
    """Train until the second forward begins, and report the clocks."""
    from tools.bench.contestants import contestant

    readings: list[tuple[float, float, int]] = []

    def tick() -> None:
        readings.append((time.clock_gettime(time.CLOCK_MONOTONIC), time.process_time(), len(sys.modules)))

    [name] = arguments.contestants
    contestant(name).run(arguments.config, 2, tick)
    finish(arguments.child, readings[1])


def main() -> int:
    """Measure each contestant ``--rounds`` times, the raw loop in every round."""
    parser = contestant_parser(__doc__, CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="bare")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return 0
    everyone = ["raw", *(n for n in arguments.contestants if installed(n, pythons(arguments).get(n, sys.executable)))]
    cases = [
        (name, config)
        for name in everyone
        for config in (["bare", "default"] if "-" not in name and name != "raw" else ["bare"])
    ]
    taken: dict[str, list[tuple[float, float, float]]] = {f"{name} {config}": [] for name, config in cases}
    for turn in range(arguments.rounds + 1):
        for name, config in cases:
            started = time.clock_gettime(time.CLOCK_MONOTONIC)
            try:
                end, cpu, modules = spawn(
                    __spec__.name, name, "--config", config, python=pythons(arguments).get(name, sys.executable)
                )
            except MeasurementFailed as error:
                print(f"{name} {config} failed:\n{error}", file=sys.stderr)
                continue
            if turn:  # the first turn fills the page cache
                taken[f"{name} {config}"].append((end - started, cpu, modules))
    base = taken["raw bare"]
    rows, figures = [], {}
    for case, readings in taken.items():
        if not readings:
            continue
        wall, cpu, modules = (median(column) for column in zip(*readings, strict=True))
        ratio = median([mine[1] / raw[1] for mine, raw in zip(readings, base, strict=False)])
        figures[case] = {"wall_s": wall, "cpu_s": cpu, "ratio_cpu": ratio, "modules": modules}
        rows.append([case, f"{wall:.2f}", f"{cpu:.2f}", f"{ratio:.2f}", f"{modules:.0f}"])
    print_table(["case", "wall s", "CPU s", "ratio (CPU)", "modules"], rows, markdown=arguments.markdown)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(f"load average {os.getloadavg()[0]:.1f}: ratios scatter by 0.1 on a busy machine", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

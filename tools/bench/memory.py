"""Does a long run's memory grow? Resident memory over ``--steps`` tiny steps: its peak, and its slope at the end.

The slope is the least-squares line through the readings of the last three quarters; the data are 1,000 batches walked
again and again. A raw loop's own slope is measured too: the allocator's noise is in both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from tools.bench.child import MeasurementFailed, contestant_parser, finish, installed, print_table, pythons, spawn

CONTESTANTS = ["fulmen", "fulmen-fabric", "lightning"]
DISTINCT_BATCHES = 1000


def rss_kib() -> int:
    """This process's resident memory."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the least-squares line through ``points``."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def child(arguments: argparse.Namespace) -> None:
    """Train and read the memory a hundred times on the way."""
    from tools.bench.contestants import contestant

    every = max(1, arguments.steps // 100)
    count = 0
    readings: list[tuple[float, float]] = []

    def tick() -> None:
        nonlocal count
        count += 1
        if count % every == 0:
            readings.append((count, rss_kib()))

    [name] = arguments.contestants
    contestant(name).run(arguments.config, arguments.steps, tick, distinct=min(DISTINCT_BATCHES, arguments.steps))
    finish(arguments.child, readings)


def main() -> int:
    """Measure each contestant in a fresh process."""
    parser = contestant_parser(__doc__, CONTESTANTS)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--config", default="log")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return 0
    cases = [("raw", "bare")]
    for name in arguments.contestants:
        if installed(name, pythons(arguments).get(name, sys.executable)):
            cases += [(name, "bare")] if name.endswith("-fabric") else [(name, arguments.config), (name, "default")]
    rows, figures = [], {}
    raw_peak = 0.0
    for name, config in cases:
        python = pythons(arguments).get(name, sys.executable)
        try:
            readings = spawn(__spec__.name, name, "--config", config, "--steps", arguments.steps, python=python)
        except MeasurementFailed as error:
            print(f"{name} {config} failed:\n{error}", file=sys.stderr)
            continue
        peak = max(kib for _, kib in readings) / 1024
        raw_peak = raw_peak or peak
        growth = 1000 * slope(readings[len(readings) // 4 :])
        figures[f"{name} {config}"] = {"peak_mib": peak, "kib_per_1000_steps": growth}
        rows.append([f"{name} {config}", f"{peak:.0f}", f"{peak - raw_peak:+.0f}", f"{growth:+.2f}"])
    print_table(["case", "peak MiB", "over raw MiB", "KiB per 1,000 steps"], rows, markdown=arguments.markdown)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What a framework adds to a training, validation or prediction step, as a ratio to the raw loop and in microseconds.

For every contestant a fresh process, in which the raw loop and each of its configurations take turns
(raw, a, raw, b, ...), ``--rounds`` times ``--steps`` steps each. Two readings: the median step's wall time, which a
neighbour's burst does not move, and the mean CPU time, which sees what is done only now and then.
Configurations: bare (everything off), log (one ``self.log`` a step, CSV every 50), default (as a user gets it: bar,
checkpoint, logger, log), val, predict, metrics10 (ten logs a step), and any of them
with +idle10: ten callbacks that override nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from statistics import median
from typing import Any

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
WARM_UP = 200
RAW_TWIN = {"val": "val", "predict": "predict"}


def child(arguments: argparse.Namespace) -> None:
    """Measure one contestant against the raw loop."""
    from tools.bench.contestants import Raw, contestant
    from tools.bench.workload import Clock

    [name] = arguments.contestants
    raw, other = Raw(), contestant(name)
    configs = [config for config in other.configs if not arguments.configs or config in arguments.configs]
    failed: dict[str, str] = {}
    for config in configs:  # not measured: imports and whatever is built lazily
        try:
            other.run(config, 120, Clock())
        except Exception as error:  # noqa: BLE001 - a contestant may lack a configuration; the others still count
            failed[config] = f"{type(error).__name__}: {error}"
    for config in ("bare", "val", "predict"):
        raw.run(config, 120, Clock())

    samples: dict[str, list[list[float]]] = {config: [] for config in configs if config not in failed}
    total = arguments.steps + WARM_UP
    for _ in range(arguments.rounds):
        for config, taken in samples.items():
            readings: list[float] = []
            for who, what in ((raw, RAW_TWIN.get(config.partition("+")[0], "bare")), (other, config)):
                clock = Clock()
                who.run(what, total, clock)
                skip = len(clock.wall_s) - arguments.steps
                readings += [clock.median_step_us(skip), clock.mean_cpu_us(skip)]
            taken.append(readings)
    finish(arguments.child, {"samples": samples, "failed": failed})


def summary(taken: list[list[float]]) -> dict[str, float]:
    """Medians over the rounds; differences and quotients are taken within a round first."""
    return {
        "raw_us": median([raw for raw, _, _, _ in taken]),
        "us": median([wall for _, _, wall, _ in taken]),
        "overhead_us": median([wall - raw for raw, _, wall, _ in taken]),
        "ratio": median([wall / raw for raw, _, wall, _ in taken]),
        "cpu_overhead_us": median([cpu - raw for _, raw, _, cpu in taken]),
        "cpu_ratio": median([cpu / raw for _, raw, _, cpu in taken]),
    }


def main() -> int:
    """Measure every contestant that is installed and print one table."""
    parser = contestant_parser(__doc__, CONTESTANTS)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--configs", nargs="+", default=[])
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return 0
    figures: dict[str, Any] = {}
    rows: list[list[str]] = []
    for name in arguments.contestants:
        python = pythons(arguments).get(name, sys.executable)
        if not installed(name, python):
            print(f"{name}: not installed for {python}, left out", file=sys.stderr)
            continue
        configs = ["--configs", *arguments.configs] if arguments.configs else []
        try:
            result = spawn(
                __spec__.name, name, "--steps", arguments.steps, "--rounds", arguments.rounds, *configs, python=python
            )
        except MeasurementFailed as error:
            print(f"{name} failed:\n{error}", file=sys.stderr)
            continue
        for config, why in result["failed"].items():
            print(f"{name} {config} failed: {why}", file=sys.stderr)
        figures[name] = {config: summary(taken) for config, taken in result["samples"].items()}
        for config, f in figures[name].items():
            rows.append(
                [
                    f"{name} {config}",
                    f"{f['raw_us']:.0f}",
                    f"{f['us']:.0f}",
                    f"{f['overhead_us']:+.1f}",
                    f"{f['ratio']:.2f}",
                    f"{f['cpu_overhead_us']:+.1f}",
                    f"{f['cpu_ratio']:.2f}",
                ]
            )
        print(f"{name}: measured", file=sys.stderr)
        if arguments.json:  # after each: a run that is cut off keeps what it has
            arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    head = ["contestant", "raw µs", "µs", "over raw µs", "ratio", "over raw µs (CPU)", "ratio (CPU)"]
    print_table(head, rows, markdown=arguments.markdown)
    return int(not rows)


if __name__ == "__main__":
    raise SystemExit(main())

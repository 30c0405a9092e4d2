"""``python -m tools.drills [NAME [COUNT]]``: run one drill, or all; without a count, the short ones of CI.

    mutated   COUNT mutated checkpoint files: none runs code, ends the interpreter or loads with other content
    flips     COUNT single-byte flips in checkpoints of every format: verification finds each
    kills     COUNT SIGKILLs during saves, local and S3, file and folder: a whole checkpoint is always there
    faults    COUNT storage faults during saves: the last good checkpoint stays, and the error says what happened
    failures  COUNT of 12 x 4 runs of four ranks, one of which fails: it is named last, with its step, and all end
    train     COUNT trainings killed at random moments and resumed: each ends with the bits of an unbroken one

``full`` in place of a count takes the numbers of docs/reliability.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tools.drills import checkpoint_faults, checkpoint_kills, checkpoint_mutations, failures, train
from tools.drills.table import Row, table

# Name: what runs it, count in CI, count of the full run.
DRILLS: dict[str, tuple[Callable[[int], list[Row]], int, int]] = {
    "mutated": (checkpoint_mutations.mutated, 200, 10_000),
    "flips": (checkpoint_mutations.flips, 100, 1_000),
    "kills": (checkpoint_kills.kills, 12, 500),
    "faults": (checkpoint_faults.faults, 40, 200),
    "failures": (failures.failures, 3, 48),
    "train": (train.rows, 8, 200),
}


def main(arguments: list[str]) -> int:
    """Run what is asked for and print a table; return 1 if anything went wrong."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    asked = arguments[-1] if arguments and (arguments[-1].isdigit() or arguments[-1] == "full") else ""
    names = (arguments[:-1] if asked else arguments) or list(DRILLS)
    unknown = [name for name in names if name not in DRILLS]
    if unknown:
        raise SystemExit(f"no drill is named {', '.join(unknown)}; there are: {', '.join(DRILLS)}")
    rows: list[Row] = []
    for name in names:
        run, short, full = DRILLS[name]
        count = full if asked == "full" else int(asked or short)
        started = time.perf_counter()
        rows += run(count)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

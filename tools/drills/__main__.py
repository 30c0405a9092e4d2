"""``python -m tools.drills [NAME ...] [COUNT | short | full]``: run drills, or all of them; ``short`` is for CI.

    flips     COUNT single-byte flips in checkpoints of each format: verification finds every one
    faults    COUNT storage faults during saves: the last good checkpoint stays, and the error says what happened
    mutated   COUNT mutated checkpoint files: none runs code, ends the interpreter or loads with other content
    kills     COUNT SIGKILLs during saves, local and S3, file and folder: a whole checkpoint is always there
    failures  COUNT of 13 x 4 runs of four ranks, one of which fails: it is named last, with its step, and all end
    train     COUNT trainings killed at random moments and resumed: each ends with the bits of an unbroken one

``full`` takes the numbers of docs/reliability.md. That takes hours, which need not be in one piece: with ``--resume``
every outcome is appended to build/drills.jsonl, what is there counts, and the table at the end is of all of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

from tools.drills import checkpoint_faults, checkpoint_kills, checkpoint_mutations, failures, train
from tools.drills.drill import Drill
from tools.drills.table import Row, added, append, read, table
from tools.workspace import ROOT

DRILLS: dict[str, Drill] = {
    "flips": checkpoint_mutations.FLIPS,
    "faults": checkpoint_faults.FAULTS,
    "mutated": checkpoint_mutations.MUTATED,
    "kills": checkpoint_kills.KILLS,
    "failures": failures.FAILURES,
    "train": train.TRAIN,
}
RESULTS = ROOT / "build" / "drills.jsonl"


def run(name: str, count: int, jobs: int, results: Path | None) -> list[Row]:
    """Run one drill, or what ``results`` says is left of it; return its rows, one a setting."""
    rows = [row for row in read(results) if row.drill == name] if results is not None else []

    def tell(row: Row) -> None:
        rows.append(row)
        if results is not None:
            append(results, row)

    done = {row.setting: row.tried for row in added(rows)}
    started = time.perf_counter()
    DRILLS[name].run(count, done, jobs, tell)
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return added(rows)


def main(arguments: list[str]) -> int:
    """Run what is asked for and print a table; return 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.drills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", metavar="NAME | COUNT", help="which drills; a count, short or full")
    parser.add_argument("--resume", action="store_true", help=f"go on where {RESULTS.relative_to(ROOT)} ends")
    parser.add_argument("--results", type=Path, default=RESULTS, help="that file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    asked = parser.parse_args(arguments)
    names: list[str] = asked.what
    amount = names.pop() if names and (names[-1].isdigit() or names[-1] in ("short", "full")) else "short"
    unknown = [name for name in names if name not in DRILLS]
    if unknown:
        raise SystemExit(f"no drill is named {', '.join(unknown)}; there are: {', '.join(DRILLS)}")
    do = partial(run, jobs=asked.jobs, results=asked.results if asked.resume else None)
    rows: list[Row] = []
    for name in names or DRILLS:
        drill = DRILLS[name]
        rows += do(name, {"short": drill.short, "full": drill.full}.get(amount) or int(amount))
    print(table(rows))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

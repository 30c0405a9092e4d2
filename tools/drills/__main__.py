"""``python -m tools.drills [NAME [COUNT]]``: run one drill, or all with short counts."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tools.drills import train

# Name: what runs it with a count, and the short count.
DRILLS: dict[str, tuple[Callable[[int], int], int]] = {
    "train": (train.main, 8),
}


def main(arguments: list[str]) -> int:
    """Run what is asked for; return 1 if anything went wrong."""
    name, *rest = arguments or [""]
    if name and name not in DRILLS:
        raise SystemExit(f"no drill is named {name!r}; there are: {', '.join(DRILLS)}")
    codes = [run(int(rest[0]) if rest else short) for each, (run, short) in DRILLS.items() if name in ("", each)]
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

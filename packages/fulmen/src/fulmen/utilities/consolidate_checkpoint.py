"""``python -m fulmen.utilities.consolidate_checkpoint FOLDER``, as ``fulmen checkpoint consolidate``."""

from __future__ import annotations

import sys

from fulmen_protocols import COMMANDS, load

__all__ = ["main"]


def main() -> int:
    """Run it with this process's arguments, and return the exit status."""
    return load(COMMANDS, "checkpoint")(["consolidate", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())

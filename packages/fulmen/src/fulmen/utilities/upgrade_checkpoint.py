"""``python -m fulmen.utilities.upgrade_checkpoint PATH``, as ``fulmen checkpoint upgrade``."""

from __future__ import annotations

import sys

from fulmen_protocols import COMMANDS, load

__all__ = ["main"]


def main() -> int:
    """Run it with this process's arguments, and return the exit status."""
    arguments = [word for word in sys.argv[1:] if word != "--map-to-cpu"]  # Lightning's; here it is always done
    return load(COMMANDS, "checkpoint")(["upgrade", *arguments])


if __name__ == "__main__":
    raise SystemExit(main())

"""Move sources from Lightning to fulmen, with the command that the guide tells users."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tools.workspace import ROOT

GUIDE = ROOT / "docs" / "guides" / "from-lightning.md"


def command() -> str:
    """The shell command of the guide."""
    blocks = [block.partition("```")[0] for block in GUIDE.read_text(encoding="utf-8").split("```sh\n")[1:]]
    [found] = [block for block in blocks if block.startswith("grep")]
    return found


def move(folder: Path) -> None:
    """Change every import of Lightning in the folder."""
    subprocess.run(["bash", "-c", command()], cwd=folder, check=True)

"""The note that a process overwrites: what others read of it, also when it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from fulmen_protocols import PHASES, Whereabouts, current_whereabouts, read_positions

if TYPE_CHECKING:
    from pathlib import Path


def test_what_was_written_last_is_read_by_rank(tmp_path: Path) -> None:
    first, second = (Whereabouts(str(tmp_path / f"at.{rank}")) for rank in (0, 10))
    first.at(1, 2, 3, 40)
    second.at(1, 9, 9, 9)
    second.at(2, 2, 5, 41)
    second.pulse(7)
    second.pulse(3)

    found = read_positions(str(tmp_path))

    assert list(found) == [0, 10]
    assert found[0][:6] == (1, 2, 3, 40, os.getpid(), 0)
    assert found[10][:6] == (2, 2, 5, 41, os.getpid(), 7), "a group that was left takes its count with it"
    assert abs(found[10].seen_s - time.time()) < 60
    assert found[10] == second.read()


def test_a_position_reads_as_a_place_in_the_run(tmp_path: Path) -> None:
    note = Whereabouts(str(tmp_path / "at.0"))
    assert str(note.read()) == "outside of a run"
    note.at(PHASES.index("validation"), 1, 4, 30)
    assert str(note.read()) == "step 30, in validation, epoch 1, batch 4"
    note.leave()
    assert str(note.read()) == "outside of a run, after optimizer step 30"


def test_a_killed_process_leaves_where_it_was(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from fulmen_protocols import Whereabouts\n"
        f"note = Whereabouts.open({str(tmp_path)!r}, 3)\n"
        "for batch in range(6):\n"
        "    note.at(1, 0, batch, batch)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)

    assert done.returncode == -signal.SIGKILL
    assert str(read_positions(str(tmp_path))[3]) == "step 5, in training, epoch 0, batch 5"


def test_only_the_process_that_opened_a_note_has_it(tmp_path: Path) -> None:
    assert current_whereabouts() is None
    script = (
        "import os\n"
        "from fulmen_protocols import Whereabouts, current_whereabouts\n"
        f"note = Whereabouts.open({str(tmp_path)!r}, 0)\n"
        "assert current_whereabouts() is note\n"
        "if os.fork() == 0:\n"
        "    os._exit(int(current_whereabouts() is not None))\n"
        "assert os.wait()[1] == 0\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


def test_other_files_of_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "at.one").write_bytes(bytes(56))
    (tmp_path / "at.2").write_bytes(b"half")
    assert read_positions(str(tmp_path)) == {}

"""Which of several processes an agent takes for the cause, and how a process knows that another one has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fulmen_strategies._marks import ended_unseen, exit_code_of, has_ended, process_exists
from fulmen_strategies.launchers._failure import record_exception

if TYPE_CHECKING:
    from pathlib import Path

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system has no /proc")


def failure(file: Path, exit_code: int) -> ProcessFailure:
    return ProcessFailure(local_rank=0, pid=4711, exitcode=exit_code, error_file=str(file))


@pytest.mark.proves("4.34")
def test_torchs_agent_takes_a_lost_connection_for_a_consequence_though_it_was_noticed_first(tmp_path: Path) -> None:
    record_exception(str(tmp_path / "lost"), RuntimeError("Connection reset by peer"))
    record_exception(str(tmp_path / "own"), LookupError("sample 7 is missing"))
    lost = failure(tmp_path / "lost", 1)
    time.sleep(1.1)  # an agent counts in whole seconds
    killed = failure(tmp_path / "nothing", -signal.SIGKILL)

    assert ChildFailedError("train.py", {0: lost, 1: killed}).get_first_failure() == (1, killed)
    own = failure(tmp_path / "own", 1)
    assert ChildFailedError("train.py", {0: lost, 1: killed, 2: own}).get_first_failure() == (2, own)


@needs_proc
@pytest.mark.parametrize(
    ("end", "exit_code"),
    [("os.kill(os.getpid(), 9)", -signal.SIGKILL), ("os._exit(7)", 7), ("os._exit(0)", None)],
)
def test_a_process_that_its_parent_has_not_waited_for_is_known_to_have_ended_and_how(
    end: str, exit_code: int | None
) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", f"import os; input(); {end}"], stdin=subprocess.PIPE)
    assert not has_ended(process.pid)
    assert exit_code_of(process.pid) is None

    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # leaves it as it is
    assert process_exists(process.pid)
    assert (has_ended(process.pid), ended_unseen(process.pid)) == (True, True)
    assert exit_code_of(process.pid) == exit_code

    process.wait()
    assert (has_ended(process.pid), ended_unseen(process.pid)) == (True, False)
    assert exit_code_of(process.pid) is None

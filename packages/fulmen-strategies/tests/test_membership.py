"""Joining the process group and leaving it at once, by real processes that have to share one processor.

This file is also a script: ``python test_membership.py RANK RANKS PORT ROUNDS``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from fulmen_protocols import Topology
from fulmen_strategies._meeting import meet
from fulmen_strategies._process_group import ProcessGroupMembership

pytestmark = pytest.mark.processes


def main(rank: int, ranks: int, port: int, rounds: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    topology = Topology(
        devices=(torch.device("cpu"),) * ranks, rank=rank, local_rank=rank, world_size=ranks, main_port=port
    )
    for _ in range(rounds):
        membership = ProcessGroupMembership()
        membership.join(topology, "gloo", timedelta(seconds=30))
        membership.leave()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_rank_finds_a_connection_closed_because_another_one_has_left_already(ranks: int) -> None:
    port, busy = free_port(), "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"
    load = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(2)]
    command = [sys.executable, __file__, *map(str, (ranks, port, 40))]
    processes = [
        subprocess.Popen([*command[:2], str(rank), *command[2:]], stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in [*load, *processes]:
            process.kill()
            process.wait()

    for rank, (process, error) in enumerate(zip(processes, errors, strict=True)):
        assert process.returncode == 0, f"rank {rank}: {error[-3000:]}"


def test_a_meeting_ends_with_an_error_when_one_rank_does_not_come() -> None:
    store = HashStore()

    with pytest.raises(RuntimeError, match=r"[Tt]imeout|timed out"):
        meet(store, "here", rank=0, world_size=2, timeout=timedelta(milliseconds=200))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))

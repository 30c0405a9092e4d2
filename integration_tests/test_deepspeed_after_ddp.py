"""Strategies of two packages take turns in the same processes, which meet the others at one store for both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import sys, time
from datetime import timedelta
import torch
from fulmen_deepspeed import DeepSpeedStrategy
from fulmen_protocols import Topology
from fulmen_strategies import DDPStrategy

rank, port = int(sys.argv[1]), int(sys.argv[2])
cpu = torch.device("cpu")
topology = Topology(devices=(cpu, cpu), rank=rank, local_rank=rank, world_size=2, main_port=port)
sums = []
for make in (DDPStrategy, DeepSpeedStrategy, DDPStrategy):
    time.sleep(3 * rank)  # whoever comes first must wait for the others, and not find them where they were before
    strategy = make(timeout=timedelta(seconds=60))
    strategy.setup_environment(topology)
    sums.append(strategy.collectives.all_reduce(torch.tensor(rank + 1.0), "sum").item())
    strategy.collectives.patient_barrier("turn")
    strategy.teardown()
assert sums == [3.0, 3.0, 3.0], sums
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_groups_of_two_packages_meet_one_after_the_other_at_one_store(tmp_path: Path) -> None:
    script = tmp_path / "turns.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), port],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()

    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(told)

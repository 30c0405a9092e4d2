"""Folders of shards that real ranks write while training goes on: the bits, and every way in which it fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from fulmen_checkpoint import AsyncCheckpointIO, ShardedCheckpointIO, TorchCheckpointIO
from fulmen_protocols import SupportsShardedSave

pytestmark = [pytest.mark.proves("5.13"), pytest.mark.processes]

_SCRIPT = Path(__file__).with_name("async_shards_script.py")


def _run(case: str, world: int, folder: Path | str, *, killed: int | None = None, **env: str) -> list[dict[str, Any]]:
    """What each rank reports; ``killed`` is the rank that ends by SIGKILL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(_SCRIPT), case, str(folder)],
            env={**os.environ, **env, **place, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=150) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (rank, (_, errors)) in enumerate(zip(ranks, said, strict=True)):
        assert rank.returncode == (-signal.SIGKILL if number == killed else 0), errors[-3000:]
    own = [
        "".join(line for line in out.splitlines() if not line.startswith("[Gloo]")) for out, _ in said
    ]  # torch 2.9's
    return [json.loads(out) if out else {} for out in own]


def _check_bits(reports: list[dict[str, Any]], world: int) -> None:
    for rank, report in enumerate(reports):
        assert report["same"] == [True, True], "other bytes than a synchronous save writes"
        assert report["process"], "it was not a process of its own that wrote"
        assert report["buffers"] <= 2, "each save takes new memory"
        assert report["rank"] == 0
        assert report["again"] == 9
        assert report["removed"] == reports[0]["removed"] is True
        assert report["files"] == world + 3, "something is left of the first save"
        assert rank == 0 or report["digests"] == reports[0]["digests"]
    assert len(set(reports[0]["digests"])) == world + 1, "not every rank has written"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_files_are_those_of_synchronous_saves_of_that_moment(tmp_path: Path, world: int) -> None:
    _check_bits(_run("bits", world, tmp_path), world)
    assert TorchCheckpointIO().load_checkpoint(tmp_path / "a2")["list"] == [1, 2]
    into = {"shards.rows": torch.zeros(7, 6), "t": torch.zeros(4, 3)}
    dcp.load(into, checkpoint_id=tmp_path / "a2", no_dist=True)  # torch's own reader
    assert torch.equal(into["shards.rows"], torch.arange(42.0).reshape(7, 6) + 2)
    assert torch.equal(into["t"], (torch.arange(12.0).reshape(3, 4) + 2).t())


def test_a_fault_of_one_rank_is_raised_by_all_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    first, second = _run("faults", 2, tmp_path)
    assert "File too large" in second["wait"]
    assert "rank 1 failed (write)" in first["next save"]
    assert "File too large" in first["next save"]
    assert "earlier save failed on rank 0" in second["next save"]
    for report in (first, second):
        assert report["done"] == [], "what waits for a save that failed must not happen"
        assert (report["kept"], report["files"]) == (0, 5)
        assert report["last"] == 4, "the next save works"
        assert "tensors that are spread over several ranks" in report["alone"]
        assert "rank 1 holds 'only one', which rank 0 does not" in report["strange"]
    assert "rank 1 failed (prepare)" in first["unsafe"]
    assert "it holds odd: builtins.object" in second["unsafe"]


def test_a_storage_that_does_not_answer_one_rank_holds_nobody_up_for_longer_than_timeout_s(tmp_path: Path) -> None:
    for report in _run("hangs", 2, tmp_path):
        assert "has taken longer than timeout_s=1 and is given up" in report["wait"]
        assert report["seconds"] < 30
        assert report["kept"] == 0


def test_the_death_of_a_rank_is_told_to_the_others_and_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    survivor, _ = _run("ends", 2, tmp_path, killed=1)
    assert "the other ranks cannot be reached (write)" in survivor["wait"]
    assert "cannot be reached" in survivor["save"]
    TorchCheckpointIO().verify_checkpoint(tmp_path / "c")
    assert TorchCheckpointIO().load_checkpoint(tmp_path / "c")["epoch"] == 0


def test_one_process_writes_folders_asynchronously_too(tmp_path: Path) -> None:
    io = AsyncCheckpointIO(ShardedCheckpointIO())
    assert isinstance(io, SupportsShardedSave)
    content = {"state_dict": {"w": torch.ones(300_000)}, "epoch": 3}
    io.save_checkpoint(content, tmp_path / "a")
    io.save_sharded(content, tmp_path / "b")
    content["state_dict"]["w"].zero_()  # type: ignore[index]  # a dict
    assert io.will_exist(tmp_path / "b")
    for name in ("a", "b"):
        found = io.load_checkpoint(tmp_path / name)
        assert torch.equal(found["state_dict"]["w"], torch.ones(300_000))  # type: ignore[index]
        assert found["epoch"] == 3
    io.teardown()
    assert io._process.pid is None


def test_only_an_io_that_all_ranks_write_makes_it_one() -> None:
    io = AsyncCheckpointIO()
    assert not isinstance(io, SupportsShardedSave)
    io.checkpoint_io = ShardedCheckpointIO()
    assert isinstance(io, SupportsShardedSave)
    io.checkpoint_io = TorchCheckpointIO()
    assert not isinstance(io, SupportsShardedSave)

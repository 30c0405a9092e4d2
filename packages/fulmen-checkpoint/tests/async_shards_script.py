"""One rank of a process group that saves folders of shards asynchronously: ``async_shards_script.py CASE FOLDER``."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import time
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fulmen_checkpoint import AsyncCheckpointIO, FsspecStorage, ShardedCheckpointIO, TorchCheckpointIO
from fulmen_protocols import CheckpointError, SupportsShardedSave

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
OPTIONS: dict[str, Any] = json.loads(os.environ.get("STORAGE", "{}"))


def checkpoint(number: int, *, big: int = 0, more: bool = False) -> dict[str, Any]:
    """Shards, copies, what the ranks have alike, views, and plain data; all told apart by ``number``."""
    line = init_device_mesh("cpu", (WORLD,))
    grid = init_device_mesh("cpu", (2, WORLD // 2))
    shards = {
        "rows": distribute_tensor(torch.arange(7.0 * 6).reshape(7, 6) + number, line, [Shard(0)]),
        "columns": distribute_tensor(torch.arange(5.0 * 9).reshape(5, 9) * 2 + number, line, [Shard(1)]),
        "both": distribute_tensor(torch.arange(10.0 * 12).reshape(10, 12) + number, grid, [Shard(0), Shard(1)]),
        "twice": distribute_tensor(torch.arange(11) + number, grid, [Replicate(), Shard(0)]),
        "big": distribute_tensor(torch.full((WORLD, big), float(number)), line, [Shard(0)]),
    }
    whole = torch.arange(12.0).reshape(3, 4) + number
    state = {"t": whole.t(), "view": whole[1:, ::2], "half": whole.to(torch.bfloat16), "none": torch.empty(0, 3)}
    if more:
        state["more"] = torch.full((300, 300), float(number))
    optimizer = {"state": {0: {"step": torch.tensor(float(number))}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    plain = {"epoch": number, "rank": RANK, "rng": torch.arange(10) + number, "list": [1, number]}
    return {"state_dict": state, "optimizer_states": [optimizer], "shards": shards, **plain}


def spoil(value: Any) -> None:
    """Change every tensor in place, as the next steps do."""
    if isinstance(value, torch.Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        local.zero_()
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            spoil(item)
        if isinstance(value, list):
            value.clear()


def digests(folder: str) -> list[str]:
    """Of all files with content, in the order of their ranks."""
    storage = FsspecStorage(OPTIONS)
    found: list[str] = []
    for path in sorted(storage.list(folder)):
        if path.endswith((".distcp", ".safetensors")):
            with storage.open_read(path) as stream:
                found.append(hashlib.sha256(stream.read()).hexdigest())
    return found


def told(call: Any, *arguments: Any) -> str:
    """The error of a call, or nothing."""
    try:
        call(*arguments)
    except CheckpointError as error:
        return str(error).replace("\n", " ")
    return ""


def bits(folder: str) -> dict[str, Any]:
    """Asynchronous saves beside synchronous ones, with other content each time, and over an old one."""
    inner = ShardedCheckpointIO(FsspecStorage(OPTIONS))
    io: Any = AsyncCheckpointIO(inner)
    assert isinstance(io, SupportsShardedSave)
    for number in range(5):
        content = checkpoint(number, big=300_000, more=number > 2)
        io.save_sharded(content, f"{folder}/a{number % 4}")
        spoil(content)
        assert io.will_exist(f"{folder}/a{number % 4}") in (True, None)
    buffers = Path("/proc/self/maps").read_text().count("fulmen-snapshot")
    io.wait()
    for number in range(5):
        inner.save_sharded(checkpoint(number, big=300_000, more=number > 2), f"{folder}/s{number % 4}")
    dist.barrier()
    into = {"shards": {name: torch.zeros_like(value) for name, value in checkpoint(7)["shards"].items()}}
    into["shards"]["big"] = torch.zeros_like(checkpoint(7, big=300_000)["shards"]["big"])
    rest = io.load_sharded(f"{folder}/a2", into)
    assert torch.equal(into["shards"]["both"].full_tensor(), checkpoint(2)["shards"]["both"].full_tensor())
    process = io._process.pid
    io.teardown()
    io.teardown()
    io.save_sharded(checkpoint(9), f"{folder}/a0")
    io.remove_checkpoint(f"{folder}/a1")
    assert io.will_exist(f"{folder}/a1") is not True
    io.teardown()
    dist.barrier()
    return {
        "buffers": buffers,
        "process": process is not None,
        "rank": rest["rank"],
        "same": [digests(f"{folder}/a{number}") == digests(f"{folder}/s{number}") for number in (2, 3)],
        "digests": digests(f"{folder}/a2"),
        "again": TorchCheckpointIO(FsspecStorage(OPTIONS)).load_checkpoint(f"{folder}/a0")["epoch"],
        "removed": not FsspecStorage(OPTIONS).exists(f"{folder}/a1"),
        "files": len(FsspecStorage(OPTIONS).list(f"{folder}/a0")),
    }


def faults(folder: str) -> dict[str, Any]:
    """A disk that is full for the writer of rank 1; then what is wrong on one rank before anything is written."""
    io: Any = AsyncCheckpointIO(ShardedCheckpointIO())
    io.save_sharded(checkpoint(0, big=300_000), f"{folder}/c")
    io.wait()
    done: list[int] = []
    limit = resource.RLIMIT_FSIZE
    if RANK == 1:
        resource.prlimit(io._process.pid, limit, (100_000, 100_000))
    io.save_sharded(checkpoint(1, big=300_000), f"{folder}/c")
    io.after_saves(lambda: done.append(1))
    report: dict[str, Any] = {}
    if RANK == 1:  # the other one is not told before its next save
        report["wait"] = told(io.wait)
    dist.barrier()
    if RANK == 0:
        time.sleep(0.2)
    report["next save"] = told(io.save_sharded, checkpoint(2), f"{folder}/c")
    report["done"] = done
    report["kept"] = TorchCheckpointIO().load_checkpoint(f"{folder}/c")["epoch"]
    report["files"] = len(os.listdir(f"{folder}/c"))
    if RANK == 1:
        os.kill(io._process.pid, signal.SIGKILL)
    dist.barrier()
    unsafe = {**checkpoint(3), **({"odd": object()} if RANK == 1 else {})}
    report["unsafe"] = told(io.save_sharded, unsafe, f"{folder}/c")
    strange = checkpoint(3)
    strange["state_dict"] |= {"only one": torch.ones(1)} if RANK == 1 else {}
    report["strange"] = told(io.save_sharded, strange, f"{folder}/c")
    report["alone"] = told(io.save_checkpoint, checkpoint(3), f"{folder}/c")
    io.save_sharded(checkpoint(4, big=300_000), f"{folder}/c")
    io.teardown()
    report["last"] = TorchCheckpointIO().load_checkpoint(f"{folder}/c")["epoch"]
    return report


class Slow(FsspecStorage):
    """A storage that does not answer rank 1, until it is let."""

    closed = True

    def write_atomic(self, path: str) -> Any:
        while RANK == 1 and self.closed:
            time.sleep(0.01)
        return super().write_atomic(path)


def hangs(folder: str) -> dict[str, Any]:
    """Nobody waits longer than it should; the ranks go on when the storage does."""
    storage = Slow()
    storage.closed = False
    io: Any = AsyncCheckpointIO(ShardedCheckpointIO(storage), timeout_s=1.0)
    io.save_sharded(checkpoint(0), f"{folder}/c")
    io.wait()
    storage.closed = True
    io.save_sharded(checkpoint(1), f"{folder}/c")
    begun = time.monotonic()
    report: dict[str, Any] = {"wait": told(io.wait), "seconds": time.monotonic() - begun}
    report["kept"] = TorchCheckpointIO().load_checkpoint(f"{folder}/c")["epoch"]
    storage.closed = False
    with suppress(CheckpointError):
        io.teardown()
    return report


def ends(folder: str) -> dict[str, Any]:
    """Rank 1 is killed while its shard is on the way."""
    io: Any = AsyncCheckpointIO(ShardedCheckpointIO())
    io.save_sharded(checkpoint(0, big=5_000_000), f"{folder}/c")
    io.wait()
    io.save_sharded(checkpoint(1, big=5_000_000), f"{folder}/c")
    if RANK == 1:
        os.kill(io._process.pid, signal.SIGSTOP)
        os.kill(io._process.pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    report: dict[str, Any] = {"wait": told(io.wait), "save": told(io.save_sharded, {"a": 1}, f"{folder}/c")}
    io.teardown()
    return report


def main(case: str, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    cases = {"bits": bits, "faults": faults, "hangs": hangs, "ends": ends}
    print(json.dumps(cases[case](folder)), flush=True)
    if case not in ("ends", "hangs"):
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

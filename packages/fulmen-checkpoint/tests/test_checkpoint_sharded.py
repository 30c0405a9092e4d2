"""ShardedCheckpointIO: what it writes, on one process and on several real ones, and what a crash leaves."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from fulmen_checkpoint import (
    FsspecStorage,
    SafetensorsCheckpointIO,
    ShardedCheckpointIO,
    TorchCheckpointIO,
    find_last,
)
from fulmen_protocols import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIO,
    CheckpointUnsafe,
    SupportsShardedSave,
    missing_members,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import IO


def _trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(8, 5)).square().mean().backward()
    optimizer.step()
    return module, optimizer


def _checkpoint(seed: int = 0) -> dict[str, object]:
    module, optimizer = _trained(seed)
    return {
        "epoch": seed,
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "ranks": [{"rng": torch.get_rng_state()}],
        "note": ("größe", 2.5, None),
    }


def _same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(_same, left, right))
    return left == right


# ---- one process --------------------------------------------------------------------------------------------------


def test_it_has_every_member_of_its_protocols() -> None:
    assert missing_members(CheckpointIO, ShardedCheckpointIO()) == []
    assert missing_members(SupportsShardedSave, ShardedCheckpointIO()) == []


def test_tensors_of_training_go_to_shards_and_the_rest_to_one_file_of_plain_data(tmp_path: Path) -> None:
    ShardedCheckpointIO().save_checkpoint(_checkpoint(), tmp_path / "c")
    names = sorted(entry.name.split("-")[0] for entry in (tmp_path / "c").iterdir())
    assert names == [".metadata", "__0_0", "manifest.json", "state"]
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert "0.weight" in manifest["tensors"]
    assert "optimizer_states.0.state.0.exp_avg" in manifest["tensors"]
    assert not any("rng" in name for name in manifest["tensors"])


def test_torchs_own_reader_finds_the_tensors(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    ShardedCheckpointIO().save_checkpoint(_checkpoint(), tmp_path / "c")
    module, _ = _trained(seed=1)
    state = module.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.load(state, checkpoint_id=tmp_path / "c")
    assert _same(dict(state), dict(_checkpoint()["state_dict"]))  # type: ignore[call-overload]


def test_a_second_save_replaces_the_first_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    io = ShardedCheckpointIO()
    for seed in range(3):
        io.save_checkpoint(_checkpoint(seed), tmp_path / "c")
        assert _same(io.load_checkpoint(tmp_path / "c"), _checkpoint(seed))
        assert len(list((tmp_path / "c").iterdir())) == 4
        io.verify_checkpoint(tmp_path / "c")


class _FailingAt(FsspecStorage):
    """Fails in the n-th file that is written, before or after it became visible."""

    def __init__(self, countdown: int, *, after: bool = False) -> None:
        super().__init__()
        self.countdown = countdown
        self.after = after

    def write_atomic(self, path: str) -> AbstractContextManager[IO[bytes]]:
        self.countdown -= 1
        if self.countdown == 0 and not self.after:
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.countdown == 0:
            with super().write_atomic(path) as stream:
                stream.write(b"x")
            raise OSError(errno.EIO, "Input/output error")
        return super().write_atomic(path)


@pytest.mark.proves("5.11")
@pytest.mark.parametrize("written", [1, 2, 3])
@pytest.mark.parametrize("known", [True, False])
def test_a_save_that_fails_in_any_file_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, written: int, known: bool
) -> None:
    path, io = tmp_path / "run" / "c", ShardedCheckpointIO()
    path.parent.mkdir()
    if known:
        io.save_checkpoint(_checkpoint(1), path)
    before = sorted(os.listdir(path)) if known else []
    with pytest.raises(
        CheckpointError, match=r"cannot be written: OSError.*No space left.*is untouched; check free space"
    ):
        ShardedCheckpointIO(_FailingAt(written)).save_checkpoint(_checkpoint(2), path)
    if known:
        # torch's own index goes before the manifest is replaced; ours do not need it
        assert {".metadata", *os.listdir(path)} == {".metadata", *before}
        assert _same(io.load_checkpoint(path), _checkpoint(1))
        io.verify_checkpoint(path)
    else:
        assert os.listdir(path.parent) == []


def test_a_folder_without_its_manifest_is_told_from_a_checkpoint_and_passed_over(tmp_path: Path) -> None:
    io = ShardedCheckpointIO()
    io.save_checkpoint(_checkpoint(1), tmp_path / "a.ckpt")
    io.save_checkpoint(_checkpoint(2), tmp_path / "b.ckpt")
    (tmp_path / "b.ckpt" / "manifest.json").unlink()
    with pytest.raises(
        CheckpointCorrupt, match=r"b\.ckpt' is a folder, but no whole checkpoint: manifest\.json is missing"
    ):
        io.load_checkpoint(tmp_path / "b.ckpt")
    found = find_last(tmp_path)
    assert found.path == str(tmp_path / "a.ckpt")
    assert "manifest.json is missing" in found.report()
    io.save_checkpoint(_checkpoint(3), tmp_path / "b.ckpt")
    assert len(list((tmp_path / "b.ckpt").iterdir())) == 4, "the half one's files are gone"


def test_damage_of_every_kind_is_named_by_its_file(tmp_path: Path) -> None:
    io = ShardedCheckpointIO()
    io.save_checkpoint(_checkpoint(), tmp_path / "c")
    for file in sorted((tmp_path / "c").iterdir()):
        whole = file.read_bytes()
        for damaged in (whole[:-1], b"", whole[: len(whole) // 2] + b"\1" + whole[len(whole) // 2 + 1 :], None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            if damaged is None and file.name == ".metadata":
                io.verify_checkpoint(tmp_path / "c")  # ours do not read it
            else:
                with pytest.raises(CheckpointCorrupt) as caught:
                    io.verify_checkpoint(tmp_path / "c")
                assert file.name in str(caught.value)
                assert "c'" in str(caught.value)
        file.write_bytes(whole)
    io.verify_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"fulmen":1', '"fulmen":2', "has layout 2; this fulmen-checkpoint reads 1. Update fulmen-checkpoint"),
        ('"files":{"__0_0', '"files":{"../__0_0', r"no file of this folder"),
        ('"dtype":"float32"', '"dtype":"system"', r"damaged: manifest\.json"),
    ],
)
def test_a_manifest_of_a_newer_version_or_with_nonsense_is_refused(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    import hashlib

    ShardedCheckpointIO().save_checkpoint(_checkpoint(), tmp_path / "c")
    manifest = tmp_path / "c" / "manifest.json"
    body = "{" + manifest.read_text()[len('{"digest":"","') + 64 - 1 :].replace(old, new)
    assert new in body
    manifest.write_text(f'{{"digest":"{hashlib.sha256(body.encode()).hexdigest()}",{body[1:]}')
    with pytest.raises(CheckpointError, match=told):
        ShardedCheckpointIO().load_checkpoint(tmp_path / "c")


def test_what_is_no_plain_data_is_refused_with_its_place(tmp_path: Path) -> None:
    for io in (ShardedCheckpointIO(), SafetensorsCheckpointIO()):
        with pytest.raises(
            CheckpointUnsafe, match=r"callbacks\.Mine\[0\]: pathlib\.\w+, and this format keeps tensors"
        ):
            io.save_checkpoint({"callbacks": {"Mine": [Path("x")]}}, tmp_path / "c")
        with pytest.raises(CheckpointUnsafe, match=r"holds a: a torch\.sparse_coo tensor"):
            io.save_checkpoint({"a": torch.eye(3).to_sparse()}, tmp_path / "c")
        loop: dict[str, object] = {}
        loop["self"] = loop
        with pytest.raises(CheckpointUnsafe, match="a container that holds itself"):
            io.save_checkpoint({"a": loop}, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path: Path) -> None:
    TorchCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"a file is where its folder should be\. Remove it"):
        ShardedCheckpointIO().save_checkpoint({"a": 2}, tmp_path / "c")
    assert TorchCheckpointIO().load_checkpoint(tmp_path / "c") == {"a": 1}


def test_loading_into_a_model_fills_it_in_place_and_refuses_another_model(tmp_path: Path) -> None:
    io = ShardedCheckpointIO()
    io.save_checkpoint(_checkpoint(), tmp_path / "c")
    module, optimizer = _trained(seed=1)
    rest = io.load_sharded(
        tmp_path / "c", {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    )
    assert _same(dict(module.state_dict()), dict(_checkpoint()["state_dict"]))  # type: ignore[call-overload]
    assert _same(rest, _checkpoint())
    with pytest.raises(
        CheckpointError, match=r"state_dict\.weight of shape \[2, 2\], but has none\. Load it into the model"
    ):
        io.load_sharded(tmp_path / "c", {"state_dict": nn.Linear(2, 2).state_dict()})
    with pytest.raises(CheckpointError, match=r"0\.weight of shape \[9, 9\], but has one of shape \[7, 5\]"):
        io.load_sharded(tmp_path / "c", {"state_dict": {"0.weight": torch.zeros(9, 9)}})


def test_removing_a_checkpoint_removes_its_folder_in_one_step(tmp_path: Path) -> None:
    io = ShardedCheckpointIO()
    io.save_checkpoint(_checkpoint(), tmp_path / "c")
    io.remove_checkpoint(tmp_path / "c")
    io.remove_checkpoint(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", ["torch", "sharded", "safetensors"])
def test_every_io_reads_every_format(tmp_path: Path, first: str) -> None:
    ios = {"torch": TorchCheckpointIO(), "sharded": ShardedCheckpointIO(), "safetensors": SafetensorsCheckpointIO()}
    ios[first].save_checkpoint(_checkpoint(), tmp_path / "c")
    for io in ios.values():
        assert _same(io.load_checkpoint(tmp_path / "c"), _checkpoint())
        io.verify_checkpoint(tmp_path / "c")


# ---- several ranks ------------------------------------------------------------------------------------------------

_RANKS = """
import json, os, sys, torch
import torch.distributed as dist
from datetime import timedelta
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from fulmen_checkpoint import FsspecStorage, ShardedCheckpointIO
from fulmen_protocols import CheckpointError

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
RANK, WORLD = dist.get_rank(), dist.get_world_size()
PATH, OPTIONS = sys.argv[1], json.loads(os.environ.get("STORAGE", "{}"))
io = ShardedCheckpointIO(FsspecStorage(OPTIONS))
line = init_device_mesh("cpu", (WORLD,))
grid = init_device_mesh("cpu", (2, WORLD // 2))

def full(kind):
    return {"rows": torch.arange(7.0 * 6).reshape(7, 6), "columns": torch.arange(5.0 * 9).reshape(5, 9) * 2,
            "both": torch.arange(10.0 * 12).reshape(10, 12) * 3, "copies": torch.arange(11.0)}[kind]

def spread(flip=False):
    "The same tensors, laid out in one way or in another."
    where = {"rows": (line, [Shard(0)]), "columns": (line, [Shard(1)]), "both": (grid, [Shard(0), Shard(1)]),
             "copies": (line, [Replicate()])}
    if flip:
        where = {"rows": (line, [Shard(1)]), "columns": (line, [Shard(0)]), "both": (grid, [Shard(1), Replicate()]),
                 "copies": (line, [Shard(0)])}
    return {name: distribute_tensor(full(name), *place) for name, place in where.items()}

def alike():
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 64)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    return module, optimizer
"""

_END = """
# Or a thread of gloo's may be cut off while it drops the tensors of its last collective, which aborts the process.
import time
dist.destroy_process_group()
time.sleep(0.1)
"""


def _run(code: str, world: int, *arguments: str, env: dict[str, str] | None = None) -> list[str]:
    """Run ``code`` on ``world`` processes; returns what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _RANKS + code + _END, *arguments],
            env={
                **os.environ,
                **(env or {}),
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outcomes = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, said) in zip(processes, outcomes, strict=True):
        assert process.returncode == 0, said[-3000:]
    # Older torch announces gloo's connections there.
    return ["".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]")) for out, _ in outcomes]


_SAVE = """
module, optimizer = alike()
io.save_sharded({"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()], "shards": spread(),
                 "rank": RANK, "ranks": [1, 2]}, PATH)
dist.barrier()
"""
_LOAD = """
module, optimizer = alike()
fresh = {name: torch.zeros_like(tensor) for name, tensor in spread(flip=True).items()}
other = torch.nn.Linear(64, 64)
rest = io.load_sharded(PATH, {"shards": fresh, "state_dict": other.state_dict()})
assert rest["rank"] == 0 and rest["ranks"] == [1, 2]
for name, tensor in fresh.items():
    assert torch.equal(tensor.full_tensor(), full(name)), name
    assert rest["shards"][name] is tensor
assert torch.equal(other.weight, module.weight)
mine, saved = optimizer.state_dict()["state"], rest["optimizer_states"][0]["state"]
assert all(torch.equal(mine[i][k], saved[i][k]) for i in mine for k in mine[i])
whole = io.load_checkpoint(PATH)
assert all(torch.equal(whole["shards"][name], full(name)) for name in fresh)
io.verify_checkpoint(PATH)
dist.barrier()
"""


def _check_on_one(path: str, storage: FsspecStorage | None = None) -> None:
    whole = TorchCheckpointIO(storage).load_checkpoint(path)
    shards = whole["shards"]
    assert isinstance(shards, dict)
    assert torch.equal(shards["rows"], torch.arange(42.0).reshape(7, 6))
    assert torch.equal(shards["columns"], torch.arange(45.0).reshape(5, 9) * 2)
    assert torch.equal(shards["both"], torch.arange(120.0).reshape(10, 12) * 3)
    assert torch.equal(shards["copies"], torch.arange(11.0))
    assert all(type(tensor) is torch.Tensor for tensor in shards.values())


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(4, 2), (2, 4)])
@pytest.mark.slow
def test_shards_of_some_ranks_load_on_another_number_in_another_layout(
    tmp_path: Path, saved_by: int, loaded_by: int
) -> None:
    path = str(tmp_path / "c")
    _run(_SAVE, saved_by, path)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["world_size"] == saved_by
    assert sum(name.startswith("__") for name in manifest["files"]) == saved_by, "every rank wrote a file"
    _run(_LOAD, loaded_by, path)
    _check_on_one(path)


def test_ranks_save_to_a_bucket_too(s3_options: dict[str, object], s3_folder: str) -> None:
    env = {"STORAGE": json.dumps(s3_options)}
    _run(_SAVE + _SAVE + _LOAD, 2, f"{s3_folder}/c", env=env)
    storage = FsspecStorage(s3_options)
    _check_on_one(f"{s3_folder}/c", storage)
    assert len(storage.list(f"{s3_folder}/c")) == 5, "nothing is left of the first save"


def test_an_error_of_one_rank_is_raised_by_all_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    said = _run(
        _SAVE
        + """
import errno
class Failing(FsspecStorage):
    def write_atomic(self, path):
        if RANK == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write_atomic(path)
for broken, extra in ((ShardedCheckpointIO(Failing()), {}), (io, {"a": object()} if RANK == 1 else {}),
                      (io, {"state_dict": {"only one": torch.ones(1)}} if RANK == 1 else {})):
    try:
        broken.save_sharded({"state_dict": module.state_dict(), "rank": -1, **extra}, PATH)
        print("no error")
    except CheckpointError as error:
        print(str(error).replace(chr(10), " "))
""",
        2,
        str(tmp_path / "c"),
    )
    first, second = (text.splitlines() for text in said)
    assert "rank 1 failed (write)" in first[0]
    assert "No space left on device" in second[0]
    assert "rank 1 failed (prepare)" in first[1]
    assert "it holds a: builtins.object" in second[1]
    assert all("rank 1 holds 'only one', which rank 0 does not" in lines[2] for lines in (first, second))
    _check_on_one(str(tmp_path / "c"))
    assert len(os.listdir(tmp_path / "c")) == 5


def test_a_spread_tensor_cannot_be_saved_by_one_rank_alone(tmp_path: Path) -> None:
    said = _run(
        """
try:
    io.save_checkpoint({"shards": spread()}, PATH)
except CheckpointError as error:
    print(error)
dist.barrier()
""",
        2,
        str(tmp_path / "c"),
    )
    assert all("tensors that are spread over several ranks" in text and "Call save_sharded" in text for text in said)

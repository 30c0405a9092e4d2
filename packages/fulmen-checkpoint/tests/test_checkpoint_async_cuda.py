"""Snapshots of tensors on CUDA devices: copied beside other work, and before what is queued later changes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fulmen_checkpoint import AsyncCheckpointIO, TorchCheckpointIO

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.proves("5.13"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_what_the_device_does_after_save_is_not_in_the_file(tmp_path: Path) -> None:
    io, weight = AsyncCheckpointIO(max_pending=0), torch.zeros(20_000_000, device="cuda")
    for trial in range(1, 31):
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 100
        weight.fill_(trial)
        temporary = weight[:1000].clone()
        io.save_checkpoint({"w": weight, "t": temporary, "cpu": torch.full((9,), float(trial))}, tmp_path / "a.ckpt")
        weight.fill_(-1)
        del temporary
        torch.full((1000,), -2.0, device="cuda")  # takes the memory of what was dropped
        io.wait()
        found = TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
        assert torch.equal(found["w"], torch.full((20_000_000,), float(trial)))
        assert torch.equal(found["t"], torch.full((1000,), float(trial)))
        assert torch.equal(found["cpu"], torch.full((9,), float(trial)))
    io.teardown()


def test_saving_waits_for_no_kernel(tmp_path: Path) -> None:
    io, weight = AsyncCheckpointIO(), torch.ones(1_000_000, device="cuda")
    io.save_checkpoint({"w": weight}, tmp_path / "a.ckpt")  # makes and pins the buffer
    io.wait()
    began, ended = torch.cuda.Event(), torch.cuda.Event()
    began.record()
    torch.cuda._sleep(2_000_000_000)  # about a second
    io.save_checkpoint({"w": weight}, tmp_path / "b.ckpt")
    ended.record()
    assert not ended.query(), "the save waited until the device was done"
    io.teardown()
    assert torch.equal(TorchCheckpointIO().load_checkpoint(tmp_path / "b.ckpt")["w"], torch.ones(1_000_000))


def test_the_file_names_the_device_as_torch_save_does(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    io.save_checkpoint({"w": torch.ones(5, device="cuda")}, tmp_path / "a.ckpt")
    io.teardown()
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["w"].device.type == "cuda"

"""Loaders that copy ahead give the same batches, and their place counts the batches that were handed out."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fulmen_fabric import Fabric
from fulmen_protocols import MisconfigurationException

DATA = TensorDataset(torch.arange(40.0).reshape(20, 2), torch.arange(20))


def make(accelerator, **options):
    fabric = Fabric(accelerator=accelerator, devices=1)
    loader = DataLoader(DATA, batch_size=3, pin_memory=accelerator == "cuda")
    return fabric, fabric.setup_dataloaders(loader, **options)


def test_on_a_cpu_there_is_nothing_to_copy_and_the_batches_are_the_loaders():
    _, plain = make("cpu")
    fabric, ahead = make("cpu", prefetch=2)
    for _ in range(2):
        for left, right in zip(plain, ahead, strict=True):
            assert torch.equal(left[0], right[0])
    iterator = iter(ahead)
    next(iterator)
    assert ahead.batches_done == 1
    assert fabric.device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefetch": -1}, r"prefetch=-1. Use a number of batches, or 0"),
        ({"prefetch": True}, r"prefetch=True. Use a number of batches"),
        ({"prefetch": 2, "move_to_device": False}, r"prefetch=2 and move_to_device=False.*Drop one of the two"),
    ],
)
def test_what_cannot_be_copied_ahead_is_refused(options, says):
    with pytest.raises(MisconfigurationException, match=says):
        make("cpu", **options)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_cuda_batches_come_in_order_without_waiting_and_resume_at_the_one_in_hand():
    fabric, loader = make("cuda", prefetch=2)
    seen = []
    list(loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, index in loader:
            assert x.is_cuda
            seen.append((x * 2, index))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cat([x for x, _ in seen]).cpu(), DATA.tensors[0] * 2)
    assert torch.equal(torch.cat([index for _, index in seen]).cpu(), DATA.tensors[1])

    iterator = iter(loader)
    next(iterator), next(iterator)
    assert loader.batches_done == 2
    state = fabric.run_state.state_dict()
    other, rest = make("cuda", prefetch=2)
    other.run_state.load_state_dict(state)
    assert rest.batches_done == 2
    assert torch.cat([index for _, index in rest]).tolist() == list(range(6, 20))

"""``Fabric(strategy="dp")``: on several GPUs each forward pass is scattered; on the CPU it is one process as any."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from fulmen_fabric import Fabric

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


class Net(nn.Module):
    """Notes where its calls are computed. A copy on another device is made by a shallow copy: it shares the list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 2)
        self.calls: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.first(x)
        self.calls.append((str(x.device), len(x), y.dtype, threading.current_thread() is threading.main_thread()))
        out: torch.Tensor = self.last(torch.tanh(self.norm(y)))
        return out

    def each_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        losses: torch.Tensor = (self(x) - y).square().mean(dim=1)
        return losses


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(24, 4, generator=generator), torch.randn(24, 2, generator=generator))


def train(fabric: Fabric, folder: Any) -> tuple[Net, Any, Any]:
    """Two epochs; saved after the first, as a user would."""
    fabric.launch()
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    model.mark_forward_method("each_loss")
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=8))
    for epoch in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            fabric.backward(model.each_loss(x, y).mean())
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
        if epoch == 0:
            fabric.save(folder / "half.ckpt", {"model": model, "optimizer": optimizer, "epoch": epoch})
    return net, model, loader


def by_hand(device: str, parts: int) -> Net:
    """The same in plain PyTorch. DataParallel keeps the statistics that the first part of each batch has."""
    net = Net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for x, y in DataLoader(data(), batch_size=8):
            optimizer.zero_grad()
            losses, buffers = [], None
            for part, target in zip(x.to(device).chunk(parts), y.to(device).chunk(parts), strict=True):
                losses.append(net.each_loss(part, target))
                buffers = buffers or copy.deepcopy(dict(net.named_buffers()))
            torch.cat(losses).mean().backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            with torch.no_grad():
                for name, buffer in net.named_buffers():
                    buffer.copy_((buffers or {})[name])
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
    return net


def go_on(fabric: Fabric, path: Any) -> Net:
    """From what ``train`` has saved, in a model that nobody has trained."""
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    model.mark_forward_method("each_loss")
    left = fabric.load(path, {"model": model, "optimizer": optimizer})
    assert left == {"epoch": 0}
    for x, y in fabric.setup_dataloaders(DataLoader(data(), batch_size=8)):
        optimizer.zero_grad()
        fabric.backward(model.each_loss(x, y).mean())
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
    return net


@pytest.mark.proves("4.33")
def test_on_one_device_of_the_cpu_it_trains_as_a_plain_loop_does(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="strategy='dp' splits batches over GPUs, of which a run on the CPU has none"):
        fabric = Fabric(accelerator="cpu", devices=1, strategy="dp")
    net, model, loader = train(fabric, tmp_path)

    expected = by_hand("cpu", parts=1)
    for name, value in expected.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert {call[1:2] for call in net.calls} == {(8,)}
    assert type(loader.sampler) is SequentialSampler
    assert list(model.state_dict()) == list(expected.state_dict())
    assert list(torch.load(tmp_path / "half.ckpt", weights_only=True)["model"]) == list(expected.state_dict())
    again = go_on(fabric, tmp_path / "half.ckpt")
    for name, value in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.cuda
@pytest.mark.proves("4.33")
@needs_two_gpus
@pytest.mark.filterwarnings("ignore:.*there was no current CUDA context")  # in a new thread of torch's DataParallel
def test_on_two_gpus_each_gets_half_of_every_batch_in_one_process(tmp_path: Any) -> None:
    fabric = Fabric(accelerator="cuda", devices=2, strategy="dp")
    net, model, loader = train(fabric, tmp_path)

    assert (fabric.world_size, fabric.global_rank) == (1, 0)
    assert type(loader.sampler) is SequentialSampler
    assert all(len(x) == 8 for x, _ in loader)
    assert sorted((place, size) for place, size, *_ in net.calls) == [("cuda:0", 4)] * 6 + [("cuda:1", 4)] * 6
    expected = by_hand("cuda:0", parts=2)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert {str(parameter.device) for parameter in net.parameters()} == {"cuda:0"}

    assert list(model.state_dict()) == list(expected.state_dict())
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert list(saved["model"]) == list(expected.state_dict()), "no prefix of the wrapper"
    Net().load_state_dict(saved["model"])
    again = go_on(fabric, tmp_path / "half.ckpt")
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.proves("4.33")
@needs_two_gpus
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_autocast_has_the_precision_s_dtype_on_every_gpu(precision: Any, dtype: torch.dtype) -> None:
    fabric = Fabric(accelerator="cuda", devices=2, strategy="dp", precision=precision)
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))

    fabric.backward(model(torch.randn(8, 4, device=fabric.device)).float().square().mean())
    optimizer.step()

    assert sorted((place, found) for place, _, found, _ in net.calls) == [("cuda:0", dtype), ("cuda:1", dtype)]
    assert not any(in_main_thread for *_, in_main_thread in net.calls), "or nothing is proved"


@pytest.mark.cuda
@needs_two_gpus
def test_a_batch_of_one_sample_is_computed_by_the_first_gpu_alone() -> None:
    fabric = Fabric(accelerator="cuda", devices=2, strategy="dp")
    net = Net().eval()
    model = fabric.setup(net)

    out = model(torch.randn(1, 4, device=fabric.device))

    assert [(place, size) for place, size, *_ in net.calls] == [("cuda:0", 1)]
    assert str(out.device) == "cuda:0"

"""Captured steps: on CUDA the bits of the same steps run as they are; elsewhere the step itself, with the reason."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

from fulmen_fabric import Fabric
from fulmen_protocols import MisconfigurationException, MisconfigurationRuntimeError


def prepare(fabric, optimizer=torch.optim.SGD, **options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.3), nn.Tanh(), nn.Linear(32, 4))
    model = fabric.setup_module(module)
    opt = fabric.setup_optimizers(optimizer(model.parameters(), **{"lr": 0.1, **options}))

    def step(x, scale=1.0):
        opt.zero_grad()
        output = model(x)
        loss = output.square().mean() * scale
        fabric.backward(loss)
        opt.step()
        return {"loss": loss.detach(), "output": output}

    return model, opt, step


def batches(device, sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 16, generator=generator).to(device) for size in sizes]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_on_a_cpu_the_step_is_called_and_the_reason_is_told(caplog):
    fabric = Fabric(accelerator="cpu", devices=1)
    _, _, plain = prepare(fabric)
    expected = [plain(x)["loss"].item() for x in batches("cpu", [8] * 6)]
    _, _, step = prepare(fabric)
    with caplog.at_level(logging.INFO):
        captured = fabric.capture(step)
    assert captured.reason == "CUDA graphs need a CUDA device, and this run is on 'cpu'"
    assert f"calls the step as it is: {captured.reason}" in caplog.text
    assert [captured(x)["loss"].item() for x in batches("cpu", [8] * 6)] == expected
    assert captured.graphs == 0


@pytest.mark.parametrize(("name", "value"), [("warmup", 0), ("max_graphs", -1)])
def test_a_number_that_cannot_be_is_refused(name, value):
    with pytest.raises(MisconfigurationException, match=rf"capture got {name}={value}. Use a whole number of at least"):
        Fabric(accelerator="cpu", devices=1).capture(print, **{name: value})


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adam, {"capturable": True}),
        (torch.optim.AdamW, {"capturable": True, "fused": True}),
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_replayed_steps_have_the_bits_of_plain_ones_for_every_shape(optimizer, options, precision):
    sizes = [8] * 5 + [5] * 5 + [8, 5, 8]
    fabric = Fabric(accelerator="cuda", devices=1, precision=precision)
    plain_model, _, plain = prepare(fabric, optimizer, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*capturable=True.*without CUDA graph capture")
        expected = [plain(x) for x in batches(fabric.device, sizes)]
    model, _, step = prepare(fabric, optimizer, **options)
    captured = fabric.capture(step)
    found = [captured(x) for x in batches(fabric.device, sizes)]
    assert captured.reason is None
    assert captured.graphs == 2
    assert equal(model, plain_model)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine["loss"], theirs["loss"])
        assert torch.equal(mine["output"], theirs["output"])


@pytest.mark.cuda
@cuda
def test_a_schedule_is_followed_with_numbers_and_with_a_tensor():
    fabric = Fabric(accelerator="cuda", devices=1)

    def train(lr, capture):
        model, opt, step = prepare(fabric, torch.optim.SGD, lr=lr, **({"fused": True} if lr != 0.1 else {}))
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 4, 0.5)
        captured = fabric.capture(step) if capture else step
        for x in batches(fabric.device, [8] * 12):
            captured(x)
            scheduler.step()
        return model, captured

    def tensor():
        return torch.tensor(0.2, device=fabric.device)

    for make, graphs in ((lambda: 0.1, 3), (tensor, 1)):
        plain, _ = train(make(), False)
        model, captured = train(make(), True)
        assert equal(model, plain)
        assert captured.graphs == graphs


@pytest.mark.cuda
@cuda
def test_evaluation_mode_and_plain_values_are_other_recordings():
    fabric = Fabric(accelerator="cuda", devices=1)
    model, _, step = prepare(fabric)
    captured = fabric.capture(step, warmup=1)
    [x] = batches(fabric.device, [8])
    first = [captured(x) for _ in range(3)]
    assert captured.graphs == 1
    model.eval()
    captured(x)
    assert captured.graphs == 2
    captured(x, scale=2.0), captured(x, scale=2.0)
    assert captured.graphs == 3
    assert not torch.equal(first[1]["output"], first[2]["output"])  # each call has results of its own


@pytest.mark.cuda
@cuda
def test_what_cannot_be_captured_is_one_clear_error():
    fabric = Fabric(accelerator="cuda", devices=1)
    [x] = batches(fabric.device, [8])

    _, _, step = prepare(fabric, torch.optim.Adam)
    with pytest.raises(MisconfigurationException, match=r"Adam\(capturable=False\).*Adam\(..., capturable=True"):
        fabric.capture(step)(x)

    _, _, step = prepare(fabric)
    with pytest.raises(MisconfigurationException, match=r"shape \(8, 16\) on cpu.*to_device"):
        fabric.capture(step)(x.cpu())
    with pytest.raises(MisconfigurationException, match="got a set, of which nobody can tell"):
        fabric.capture(step)(x, {1})

    def waits(x):
        return step(x)["loss"].item()

    captured = fabric.capture(waits, warmup=1)
    captured(x)
    with pytest.raises(MisconfigurationRuntimeError, match=r"waits\(\) cannot be captured.*\.item\(\)"):
        captured(x)
    _, _, plain = prepare(fabric)
    expected = [plain(x)["loss"] for _ in range(3)]
    _, _, step = prepare(fabric)
    again = fabric.capture(step, warmup=1)
    assert [again(x)["loss"].item() for _ in range(3)] == [loss.item() for loss in expected]  # the device works on


@pytest.mark.cuda
@cuda
def test_after_a_recording_that_failed_cached_memory_goes_back_to_the_device():
    fabric = Fabric(accelerator="cuda", devices=1)
    [x] = batches(fabric.device, [8])
    _, _, step = prepare(fabric)
    captured = fabric.capture(lambda x: step(x)["loss"].item(), warmup=1)
    captured(x)
    for _ in range(2):
        with pytest.raises(MisconfigurationRuntimeError, match="cannot be captured"):
            captured(x)
    before = torch.cuda.memory_reserved()
    large = torch.empty(1 << 30, dtype=torch.uint8, device=fabric.device)
    del large
    assert torch.cuda.memory_reserved() >= before + (1 << 30)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.cuda
@cuda
def test_beyond_the_limit_steps_run_as_they_are_with_one_warning():
    fabric = Fabric(accelerator="cuda", devices=1)
    plain_model, _, plain = prepare(fabric)
    for x in batches(fabric.device, [8, 8, 8, 5, 5, 5, 8]):
        plain(x)
    model, _, step = prepare(fabric)
    captured = fabric.capture(step, warmup=1, max_graphs=1)
    given = batches(fabric.device, [8, 8, 8, 5, 5, 5, 8])
    for x in given[:4]:
        captured(x)
    with pytest.warns(UserWarning, match=r"captured 1 times \(max_graphs\)"):
        captured(given[4])
    for x in given[5:]:  # warnings are errors
        captured(x)
    assert equal(model, plain_model)


@pytest.mark.cuda
@cuda
def test_a_gradient_scaler_is_a_reason_not_to_capture():
    fabric = Fabric(accelerator="cuda", devices=1, precision="16-mixed")
    _, _, step = prepare(fabric)
    captured = fabric.capture(step)
    assert "16-mixed" in captured.reason
    [x] = batches(fabric.device, [8])
    assert captured(x)["loss"].isfinite()

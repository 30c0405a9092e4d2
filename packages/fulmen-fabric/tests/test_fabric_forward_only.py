"""Running batches forward only: nothing of a step but what the module itself does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fulmen_fabric import assemble
from fulmen_fabric.steps import Gradients, forward_only_step
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable


def step_of(training_step: Callable[..., Any], precision: str = "32-true", **options: Any) -> Any:
    parts = assemble(accelerator="cpu", devices=1, precision=precision)
    return forward_only_step(training_step, Gradients(parts.strategy, parts.precision, None), **options)


def test_a_batch_moves_running_statistics_and_leaves_no_gradient() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, momentum=None))
    batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    weights = [p.detach().clone() for p in module.parameters()]
    step = step_of(lambda batch, batch_idx: {"loss": module(batch).sum(), "index": batch_idx})

    outputs = [step(batch, index) for index, batch in enumerate(batches)]

    means = [nn.functional.linear(batch, module[0].weight, module[0].bias).mean(0) for batch in batches]
    torch.testing.assert_close(module[1].running_mean, torch.stack(means).mean(0))
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(p, before) for p, before in zip(module.parameters(), weights, strict=True))
    assert [output["index"] for output in outputs] == [0, 1, 2]
    assert not outputs[0]["loss"].requires_grad


def test_it_computes_in_the_precision_of_a_step_and_keeps_no_outputs_unasked() -> None:
    seen: list[torch.dtype] = []
    layer = nn.Linear(2, 1)

    def training_step(batch: Any, batch_idx: int) -> Any:
        output = layer(batch)
        seen.append(output.dtype)
        return output.sum()

    assert step_of(training_step, "bf16-mixed", keep_outputs=False)(torch.randn(2, 2), 0) is None
    assert seen == [torch.bfloat16]
    assert step_of(lambda batch, batch_idx: None)(torch.randn(2, 2), 0) == {}, "as in a step"


def test_a_loss_of_a_wrong_type_is_named_as_in_a_step() -> None:
    with pytest.raises(MisconfigurationException, match="training_step returned str; return a loss tensor"):
        step_of(lambda batch, batch_idx: "loss")(torch.randn(2, 2), 0)

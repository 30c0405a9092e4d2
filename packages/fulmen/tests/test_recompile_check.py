"""RecompileCheck: compilations in the middle of training are named, with their guard; nothing else is."""

from __future__ import annotations

import warnings
from typing import Any, cast

import pytest
import torch
from torch import nn

import fulmen
from fulmen.callbacks import RecompileCheck
from fulmen_protocols import MisconfigurationException


class Compiled(fulmen.LightningModule):
    def __init__(self, dynamic: bool | None = False) -> None:
        super().__init__()
        self.net: Any = torch.compile(nn.Linear(2, 1), backend="eager", dynamic=dynamic)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch["x"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(*sizes: int) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.ones(size, 2), "y": torch.ones(size, dtype=torch.int64)} for size in sizes]


def fit(check: RecompileCheck, data: Any, model: fulmen.LightningModule | None = None, val: Any = None) -> list[str]:
    torch.compiler.reset()
    trainer = fulmen.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, callbacks=[check], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=2,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Compiled() if model is None else model, data, val)
    return [str(each.message) for each in caught if "torch.compile compiled" in str(each.message)]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def test_a_batch_of_a_new_shape_is_named_with_the_guard_that_failed() -> None:
    (said,) = fit(RecompileCheck(warmup=3), batches(4, 8, 4, 8, 4, 5, 5, 8))
    assert "compiled 1 graph in batch 5 of epoch 0, 6 batches into this fit" in said
    assert "float32[5, 2], int64[5]" in said
    assert "size mismatch at index 0" in said
    assert "expected 8, actual 5" in said or "expected 4, actual 5" in said
    assert "dynamic=True" in said


def test_shapes_that_came_up_in_the_first_batches_are_planned() -> None:
    assert fit(RecompileCheck(warmup=3), batches(4, 8, 5, 8, 4, 5, 5, 8)) == []


def test_a_graph_for_any_size_is_compiled_once() -> None:
    assert fit(RecompileCheck(warmup=1), batches(4, 8, 5, 9, 3), Compiled(dynamic=True)) == []


def test_an_evaluation_may_compile() -> None:
    assert fit(RecompileCheck(warmup=1), batches(4, 4, 4, 4), val=batches(7, 9)) == []
    with_error = RecompileCheck(warmup=1, action="raise")
    assert fit(with_error, batches(4, 4, 4, 4), val=batches(7, 9)) == []


def test_the_batch_can_be_made_to_fail_before_it_is_compiled() -> None:
    with pytest.raises(RuntimeError, match="fail_on_recompile") as caught:
        fit(RecompileCheck(warmup=2, action="raise"), batches(4, 4, 4, 5))
    assert "size mismatch at index 0" in str(caught.value)
    (note,) = (note for note in caught.value.__notes__ if "RecompileCheck" in note)
    assert "float32[5, 2], int64[5]" in note
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    compiled: Any = torch.compile(nn.Linear(2, 1), backend="eager", dynamic=False)
    compiled(torch.ones(3, 2))  # what runs later may compile
    compiled(torch.ones(4, 2))


def test_a_step_of_many_batches_without_a_new_shape_passes_with_everything_on() -> None:
    class Logs(Compiled):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=True)
            return loss

    model: Any = torch.compile(Logs(), backend="eager", fullgraph=True, dynamic=False)
    data = batches(*([4, 8, 12, 16] * 250))
    assert fit(RecompileCheck(warmup=4, action="raise"), data, model) == []


def test_a_model_that_is_not_compiled_is_left_alone() -> None:
    class Plain(Compiled):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

    assert fit(RecompileCheck(warmup=1, action="raise"), batches(4, 8, 5), Plain()) == []


def test_arguments_that_cannot_be_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"RecompileCheck\(warmup=0\) must be at least 1"):
        RecompileCheck(warmup=0)
    with pytest.raises(MisconfigurationException, match=r"action='rise'\) is neither.*Did you mean 'raise'\?"):
        RecompileCheck(action=cast("Any", "rise"))

"""When gradients are zeroed: before the forward pass, where old ones only take memory, unless somebody sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fulmen

if TYPE_CHECKING:
    from pathlib import Path

DATA = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


class Model(fulmen.LightningModule):
    """Notes, wherever it is called, whether there are gradients."""

    def __init__(self, left_out: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.left_out = left_out
        self.seen: list[tuple[str, bool]] = []

    def note(self, where: str) -> None:
        self.seen.append((where, self.layer.weight.grad is not None))

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.note("start")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.note("step")
        return None if batch_idx == self.left_out else self.layer(batch).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.note("end")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithHook(Model):
    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.note("before zeroing")


class WithOverride(Model):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        self.note("before zeroing")
        optimizer.zero_grad()


def fit(model: Model, folder: Path, **settings: Any) -> fulmen.Trainer:
    trainer = fulmen.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", default_root_dir=folder, **settings,
    )  # fmt: skip
    trainer.fit(model, DataLoader(DATA, batch_size=2))
    return trainer


def test_the_gradients_of_the_last_step_are_gone_when_the_forward_pass_runs_and_there_before_and_after(
    tmp_path: Path,
) -> None:
    model = Model()
    fit(model, tmp_path)
    first, second, third = model.seen[:3], model.seen[3:6], model.seen[6:]
    assert first == [("start", False), ("step", False), ("end", True)]
    assert second == third == [("start", True), ("step", False), ("end", True)]


def test_gradients_of_a_window_stay_until_its_end(tmp_path: Path) -> None:
    model = Model()
    fit(model, tmp_path, accumulate_grad_batches=2)
    assert [there for where, there in model.seen if where == "step"] == [False, True, False]


@pytest.mark.parametrize("kind", [WithHook, WithOverride])
def test_whoever_has_a_hook_on_the_zeroing_gets_the_documented_order(kind: type[Model], tmp_path: Path) -> None:
    model = kind()
    fit(model, tmp_path)
    assert model.seen[4:8] == [("start", True), ("step", True), ("before zeroing", True), ("end", True)]


def test_a_batch_that_is_left_out_changes_no_weight_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model, raw = Model(left_out=1), Model().layer
    fit(model, tmp_path)
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.1)
    for batch_idx, batch in enumerate(DATA.split(2)):
        if batch_idx == 1:
            continue
        optimizer.zero_grad()
        raw(batch).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.layer.weight, raw.weight)


@pytest.mark.parametrize(("kind", "is_seen"), [(Model, False), (WithHook, True), (WithOverride, True)])
def test_explain_tells_when(kind: type[Model], is_seen: bool, tmp_path: Path) -> None:
    lines = [line.strip() for line in fit(kind(), tmp_path).explain().splitlines()]
    zeroed = next(index for index, line in enumerate(lines) if line.startswith("gradients are zeroed"))
    step = next(index for index, line in enumerate(lines) if "training_step" in line)
    assert (zeroed > step) is is_seen

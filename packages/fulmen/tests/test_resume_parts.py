"""Resume: a run that takes a part of a checkpoint, or other options of its optimizers, and says so."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen import Resume
from fulmen.callbacks import Callback
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(fulmen.LightningModule):
    def __init__(self, lr: float = 0.1, scheduled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)
        self.lr, self.scheduled = lr, scheduled
        self.started: dict[str, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        if not self.scheduled:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def on_train_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        self.started = {
            "weight": self.layer.weight.detach().clone(),
            "momentum": bool(optimizer.state_dict()["state"]),
            "lr": optimizer.param_groups[0]["lr"],
            "step": (self.trainer.current_epoch, self.trainer.global_step),
        }


class Counts(Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def fit(model: Model, ckpt_path: Any = None, epochs: int = 2) -> tuple[fulmen.Trainer, Counts]:
    counts = Counts()
    trainer = fulmen.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[counts], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(torch.arange(32.0).reshape(8, 4) / 32)
    trainer.fit(model, DataLoader(data, 2), ckpt_path=ckpt_path)
    return trainer, counts


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Model]:
    model = Model(scheduled=True)
    fit(model)[0].save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt", model


def test_all_parts_are_what_a_plain_path_takes(saved: tuple[Path, Model]) -> None:
    plain, whole = Model(scheduled=True), Model(scheduled=True)
    assert fit(plain, saved[0], 3)[1].count == fit(whole, Resume(saved[0]), 3)[1].count == 12
    assert torch.equal(plain.layer.weight, whole.layer.weight)
    assert (
        (plain.started["step"], plain.started["lr"]) == (whole.started["step"], whole.started["lr"]) == ((2, 8), 0.025)
    )


def test_a_plain_path_tells_which_options_of_the_code_it_has_replaced(
    saved: tuple[Path, Model], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unscheduled = tmp_path / "b.ckpt"
    fit(Model(lr=0.2))[0].save_checkpoint(unscheduled)
    for path, scheduled, line in (
        (saved[0], True, "optimizer 0, group 0: initial_lr is 0.1, the code has 0.3"),
        (unscheduled, False, "optimizer 0, group 0: lr is 0.2, the code has 0.3"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            fit(Model(lr=0.3, scheduled=scheduled), path, 3)
        (said,) = (record.message for record in caplog.records if "other options" in record.message)
        assert said.splitlines()[1:] == [f"  {line}"]
        assert str(path) in said
        assert "fulmen.Resume" in said


def test_a_plain_path_says_nothing_where_file_and_code_agree(
    saved: tuple[Path, Model], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        fit(Model(scheduled=True), saved[0], 3)
    assert "other options" not in caplog.text, "the schedule has moved the rate, which is no difference"


def test_the_weights_alone_begin_a_new_run(saved: tuple[Path, Model], caplog: pytest.LogCaptureFixture) -> None:
    path, before = saved
    model = Model(lr=0.3)
    with caplog.at_level(logging.INFO):
        trainer, counts = fit(model, Resume(path, parts=["weights"]))
    assert torch.equal(model.started["weight"], before.layer.weight)
    assert model.started["step"] == (0, 0)
    assert not model.started["momentum"]
    assert model.started["lr"] == 0.3
    assert (trainer.global_step, counts.count) == (8, 8)
    assert f"resumed a part of {path}: weights; from the code: optimizers, schedulers, progress" in caplog.text


def test_everything_but_the_optimizers_goes_on_with_fresh_ones(saved: tuple[Path, Model]) -> None:
    path, before = saved
    model = Model(lr=0.3)
    _, counts = fit(model, Resume(path, parts=["weights", "progress", "callbacks"]), 3)
    assert torch.equal(model.started["weight"], before.layer.weight)
    assert (model.started["step"], model.started["lr"], model.started["momentum"]) == ((2, 8), 0.3, False)
    assert counts.count == 12


def test_the_optimizers_alone_leave_the_weights_of_the_code(saved: tuple[Path, Model]) -> None:
    fresh, model = Model(), Model()
    fit(model, Resume(saved[0], parts={"optimizers"}))
    assert torch.equal(model.started["weight"], fresh.layer.weight)
    assert (model.started["step"], model.started["momentum"]) == ((0, 0), True)


def test_an_override_holds_and_every_difference_is_told(
    saved: tuple[Path, Model], caplog: pytest.LogCaptureFixture
) -> None:
    parts = ["weights", "optimizers", "progress"]
    model = Model(lr=0.3)
    with caplog.at_level(logging.INFO):
        trainer, _ = fit(model, Resume(saved[0], parts=parts, override={"momentum": 0.5}), 3)
    assert model.started["lr"] == 0.025, "the checkpoint's, where nothing else is said"
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.5
    assert (
        "optimizer 0, group 0: lr is 0.025, by the checkpoint (the checkpoint has 0.025, the code 0.3)" in caplog.text
    )
    assert "momentum is 0.5, by override (the checkpoint has 0.9, the code 0.9)" in caplog.text

    slower = Model(lr=0.3)
    fit(slower, Resume(saved[0], parts=parts, override={"lr": 1e-3}), 3)
    assert (slower.started["lr"], slower.started["momentum"], slower.started["step"]) == (1e-3, True, (2, 8))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"parts": ["weight"]}, r"parts=\.\.\.\) holds 'weight'\. Did you mean 'weights'\?.*There are: weights, opt"),
        ({"parts": []}, r"takes nothing\. Leave ckpt_path out"),
        ({"parts": ["schedulers", "weights"]}, r"'schedulers' without 'optimizers'.*Take both or neither"),
        ({"parts": "weights", "override": {"lr": 1}}, r"override=\{'lr': 1\}\).*Set the options in configure_optim"),
    ],
)
def test_contradictions_are_refused_at_once(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        Resume("a.ckpt", **arguments)


def test_overrides_that_cannot_hold_are_refused_before_training(saved: tuple[Path, Model]) -> None:
    with pytest.raises(MisconfigurationException, match=r"'lr': 0\.5.*schedulers.*Leave 'schedulers' out of parts"):
        fit(Model(scheduled=True), Resume(saved[0], override={"lr": 0.5}), 3)
    with pytest.raises(
        MisconfigurationException, match=r"'momentun': 1.*SGD\) has no option 'momentun'\. Did you mean"
    ):
        fit(Model(scheduled=True), Resume(saved[0], override={"momentun": 1}), 3)

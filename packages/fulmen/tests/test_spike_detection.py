"""SpikeDetection in a real fit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader

from fulmen import LightningModule, Trainer
from fulmen.callbacks import Callback, SpikeDetection
from fulmen.callbacks.spike import TrainingSpikeException
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from pathlib import Path


class Model(LightningModule):
    """The loss is what the loader gives."""

    def __init__(self, returned: Any = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.returned = returned

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = batch.mean() + 0 * self.weight.sum()
        return loss if self.returned is None else self.returned(loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def losses(*values: float) -> DataLoader[Any]:
    return DataLoader(torch.tensor(values), batch_size=1)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def make(tmp_path: Path, *callbacks: Callback, **flags: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    given = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        **quiet,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **given, **flags})


@pytest.mark.proves("11.17")
@pytest.mark.parametrize("returned", [None, lambda loss: {"loss": loss, "more": 1}])
def test_a_jump_ends_the_fit_and_both_batches_are_written(tmp_path: Path, returned: Any) -> None:
    detection = SpikeDetection()
    trainer = make(tmp_path, detection)
    with pytest.raises(TrainingSpikeException, match="Training spike detected in batch 3"):
        trainer.fit(Model(returned), losses(1.0, 0.9, 1.1, 5.0, 1.0))
    assert trainer.interrupted
    assert json.loads((tmp_path / "skip_batches.json").read_text()) == [2, 3]
    assert detection.bad_batches == [2, 3]
    assert detection.exclude_batches_path == str(tmp_path / "skip_batches.json")


@pytest.mark.proves("11.17")
def test_a_fit_without_a_jump_goes_through(tmp_path: Path) -> None:
    trainer = make(tmp_path, SpikeDetection(exclude_batches_path=tmp_path / "bad.json"), max_epochs=2)
    trainer.fit(Model(), losses(1.0, 0.9, 1.1, 1.2))
    assert trainer.global_step == 8
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.proves("11.17")
def test_its_state_is_in_the_checkpoint_and_comes_back(tmp_path: Path) -> None:
    first = make(tmp_path, SpikeDetection(window=3, rtol=0.5))
    first.fit(Model(), losses(1.0, 1.4, 1.2, 1.3))
    first.save_checkpoint(tmp_path / "run.ckpt")

    second = SpikeDetection(window=3, rtol=0.5, warmup=0)
    with pytest.raises(TrainingSpikeException, match="batch 1"):  # the saved warmup holds
        make(tmp_path, second, max_epochs=2).fit(
            Model(), losses(1.35, 2.0, 1.0, 1.0), ckpt_path=tmp_path / "run.ckpt", weights_only=True
        )
    assert second.bad_batches == [0, 1]
    assert second.state_dict()["losses"] == pytest.approx([1.2, 1.3, 1.35])


@pytest.mark.proves("11.17")
def test_a_step_that_gave_no_loss_is_left_out(tmp_path: Path) -> None:
    class Skips(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    detection = SpikeDetection()
    with pytest.raises(TrainingSpikeException, match="batch 3"):
        make(tmp_path, detection).fit(Skips(), losses(1.0, 50.0, 1.1, 9.0))
    assert detection.state_dict()["losses"] == pytest.approx([1.0, 1.1])


def test_outputs_without_a_loss_are_refused(tmp_path: Path) -> None:
    class Manual(Model):
        def __init__(self, returned: Any) -> None:
            super().__init__(returned)
            self.automatic_optimization = False

    trainer = make(tmp_path, SpikeDetection())
    with pytest.raises(MisconfigurationException, match=r"no tensor under 'loss'.*\['other'\].*return the loss"):
        trainer.fit(Manual(lambda loss: {"other": loss}), losses(1.0, 2.0))


@pytest.mark.parametrize("options", [{"mode": "median"}, {"window": 0}, {"warmup": -1}])
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(MisconfigurationException, match=rf"SpikeDetection\({name}={value!r}\): use"):
        SpikeDetection(**options)

"""A Trainer that saves asynchronously: several fits, failing saves, ends of every kind."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader

from fulmen import LightningModule, Trainer
from fulmen.callbacks import Callback, ModelCheckpoint
from fulmen.plugins import AsyncCheckpointIO, TorchCheckpointIO
from fulmen_protocols import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.proves("5.13")


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Gated(TorchCheckpointIO):
    """Writes when it is let; a subclass, so a thread does it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        assert self.gate.wait(30)
        if "bad" in os.fspath(path):
            raise CheckpointError(f"{path} is bad")
        super().save_checkpoint(checkpoint, path, storage_options)


class At(Callback):
    """Does something before one batch."""

    def __init__(self, batch: int, action: Any) -> None:
        self.batch, self.action = batch, action
        self.reached = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.reached = batch_idx
        if batch_idx == self.batch:
            self.action(trainer)


def _trainer(tmp_path: Path, io: AsyncCheckpointIO, *callbacks: Any, **flags: Any) -> Trainer:
    return Trainer(
        **{"max_epochs": 1, **flags},
        plugins=[io],
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _data() -> DataLoader[torch.Tensor]:
    return DataLoader(torch.randn(16, 4), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


@pytest.mark.parametrize("save_last", [True, "link"])
def test_two_fits_leave_the_files_that_synchronous_saving_leaves(tmp_path: Path, save_last: Any) -> None:
    names: list[list[str]] = []
    for kind in ("sync", "async"):
        torch.manual_seed(0)
        io = AsyncCheckpointIO() if kind == "async" else TorchCheckpointIO()
        model, data = Model(), _data()
        saves = ModelCheckpoint(
            tmp_path / kind, monitor="loss", save_top_k=2, save_last=save_last, every_n_train_steps=2
        )
        trainer = _trainer(tmp_path, io, saves)  # type: ignore[arg-type]  # a stand-in
        trainer.fit(model, data)
        trainer = _trainer(tmp_path, io, saves, max_epochs=2)  # type: ignore[arg-type]  # a stand-in
        trainer.fit(model, data, ckpt_path="last")
        assert trainer.global_step == 16
        for name in os.listdir(tmp_path / kind):
            TorchCheckpointIO().verify_checkpoint(tmp_path / kind / name)
        assert os.path.exists(saves.best_model_path)
        names.append(sorted(os.listdir(tmp_path / kind)))
    assert names[0] == names[1]


def test_the_wrapped_io_comes_from_the_assembly(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    assert io.checkpoint_io is None
    _trainer(tmp_path, io)
    assert isinstance(io.checkpoint_io, TorchCheckpointIO)


def test_a_failed_save_ends_the_fit_at_the_next_step_and_leaves_the_older_file_as_the_best(tmp_path: Path) -> None:
    inner = Gated()
    inner.gate.set()
    io = AsyncCheckpointIO(inner)
    saves = ModelCheckpoint(tmp_path / "saves", filename="{step}", every_n_train_steps=2)

    def break_it(trainer: Trainer) -> None:
        io.wait()
        saves.filename = "bad-{step}"

    broken, drained = At(2, break_it), At(4, lambda trainer: io._courier.drain())
    with pytest.raises(CheckpointError, match=r"bad-step=4\.ckpt is bad"):
        _trainer(tmp_path, io, broken, drained, saves).fit(Model(), _data())
    assert drained.reached in (3, 4), "the error came later than at the step after the save"
    assert os.listdir(tmp_path / "saves") == ["step=2.ckpt"]
    assert saves.best_model_path == str(tmp_path / "saves" / "step=2.ckpt")


def test_a_save_that_fails_last_ends_the_fit(tmp_path: Path) -> None:
    inner = Gated()
    inner.gate.set()
    saves = ModelCheckpoint(tmp_path / "saves", filename="bad", save_on_train_epoch_end=True)
    with pytest.raises(CheckpointError, match="is bad"):
        _trainer(tmp_path, AsyncCheckpointIO(inner), saves).fit(Model(), _data())
    assert saves.best_model_path == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_fit_that_fails_waits_for_what_it_saved(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(trainer: Trainer) -> None:
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        raise error("from the test")

    io = AsyncCheckpointIO()
    with pytest.raises(error, match="from the test"):
        _trainer(tmp_path, io, At(2, fail)).fit(Model(), _data())
    TorchCheckpointIO().verify_checkpoint(tmp_path / "a.ckpt")
    assert io._process.pid is None


def test_a_fit_that_fails_keeps_its_own_error_and_tells_of_the_lost_checkpoint(tmp_path: Path) -> None:
    inner = Gated()

    def fail(trainer: Trainer) -> None:
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
        inner.gate.set()
        raise ValueError("from the test")

    with pytest.raises(ValueError, match="from the test") as raised:
        _trainer(tmp_path, AsyncCheckpointIO(inner), At(2, fail)).fit(Model(), _data())
    assert any("a checkpoint was lost as well" in note and "bad.ckpt" in note for note in raised.value.__notes__)


def test_saving_after_a_fit_returns_when_the_file_is_there(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, AsyncCheckpointIO(), enable_checkpointing=False)
    trainer.fit(Model(), _data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert os.path.exists(tmp_path / "a.ckpt")


def test_names_and_links_reckon_with_files_that_are_still_on_their_way(tmp_path: Path) -> None:
    inner = Gated()
    io = AsyncCheckpointIO(inner, max_pending=8)
    saves = ModelCheckpoint(tmp_path / "saves", filename="same", save_top_k=-1, every_n_train_steps=2, save_last="link")
    seen: list[str] = []

    def look(trainer: Trainer) -> None:
        seen.extend(os.listdir(tmp_path / "saves") if (tmp_path / "saves").exists() else [])
        inner.gate.set()

    _trainer(tmp_path, io, At(6, look), saves).fit(Model(), _data())
    assert seen == [], "a link was made to a file that was not there"
    assert sorted(os.listdir(tmp_path / "saves")) == [
        "last.ckpt",
        "same-v1.ckpt",
        "same-v2.ckpt",
        "same-v3.ckpt",
        "same.ckpt",
    ]
    assert os.readlink(tmp_path / "saves" / "last.ckpt") == "same-v3.ckpt"


def test_loggers_hear_of_a_checkpoint_when_it_is_there(tmp_path: Path) -> None:
    from fulmen.loggers import CSVLogger

    told: list[bool] = []

    class Uploading(CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            # Told late enough, though the path of a later save may be known already.
            told.append(any((tmp_path / "saves").glob("*.ckpt")))

    inner = Gated()
    saves = ModelCheckpoint(tmp_path / "saves", every_n_train_steps=4)
    trainer = _trainer(tmp_path, AsyncCheckpointIO(inner), At(6, lambda _: inner.gate.set()), saves)
    trainer.loggers = [Uploading(tmp_path)]
    trainer.fit(Model(), _data())
    assert told == [True, True]


def test_a_run_that_saves_synchronously_polls_nothing(tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    assert trainer.strategy.saving.step_hooks() == ()

"""What users read of savers and stoppers, when they act, and what they say before anything is lost."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = [0.5, 0.3, 0.7, 0.2]


class Model(fulmen.LightningModule):
    """Logs ``val_loss``: 0.5, 0.3, 0.7, 0.2."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", SCRIPT[self.validations % 4])

    def on_validation_epoch_end(self) -> None:
        self.validations += not self.trainer.sanity_checking

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches: int = 2) -> DataLoader[Any]:
    return DataLoader(torch.ones(batches, 1))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> fulmen.Trainer:
    return fulmen.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 4,
            "logger": False,
            "default_root_dir": str(folder),
            "callbacks": list(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            **options,
        }
    )


@pytest.mark.proves("5.20")
def test_where_validation_runs_by_the_clock_its_end_is_the_moment(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=-1)
    run = trainer(
        tmp_path, keep, val_check_interval=timedelta(microseconds=1), max_epochs=1, check_val_every_n_epoch=None
    )
    run.fit(Model(), loader(3), loader(1))

    # It is time for a validation after each of the three batches.
    assert {os.path.basename(p): round(s.item(), 1) for p, s in keep.best_k_models.items()} == {
        "step=1.ckpt": 0.5, "step=2.ckpt": 0.3, "step=3.ckpt": 0.7,
    }  # fmt: skip


@pytest.mark.proves("5.21")
def test_a_save_that_is_due_before_its_value_is_not_lost_where_epochs_save_at_their_end(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=-1, every_n_train_steps=3)
    trainer(tmp_path, keep, max_epochs=3).fit(Model(), loader(2), loader(1))

    # Steps 3 and 6 are due; the value of step 3's weights never exists, that of step 4's is the next.
    assert {os.path.basename(p): round(s.item(), 1) for p, s in keep.best_k_models.items()} == {
        "step=4.ckpt": 0.3, "step=6.ckpt": 0.7,
    }  # fmt: skip


@pytest.mark.proves("5.24")
def test_where_there_are_no_links_last_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    keep = ModelCheckpoint(tmp_path / "c", "{step}", save_last="link")
    trainer(tmp_path, keep, max_epochs=2).fit(Model(), loader(), loader(1))

    assert sorted(os.listdir(tmp_path / "c")) == ["last.ckpt", "step=4.ckpt"]
    assert not (tmp_path / "c" / "last.ckpt").is_symlink()
    assert (tmp_path / "c" / "last.ckpt").read_bytes() == (tmp_path / "c" / "step=4.ckpt").read_bytes()


@pytest.mark.proves("5.24")
@pytest.mark.parametrize("links", [True, False])
def test_last_links_or_copies_a_checkpoint_that_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    class FolderIO:
        """Writes a folder for each checkpoint, as sharded strategies do."""

        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            os.makedirs(path, exist_ok=True)
            torch.save(checkpoint["global_step"], os.path.join(path, "step"))

        def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
            raise NotImplementedError

        def remove_checkpoint(self, path: Any) -> None:
            for name in os.listdir(path):
                os.remove(os.path.join(path, name))
            os.rmdir(path)

        def teardown(self) -> None: ...

    if not links:
        monkeypatch.setattr(os, "symlink", lambda *_, **__: (_ for _ in ()).throw(OSError("no links here")))
    keep = ModelCheckpoint(tmp_path / "c", "{step}", save_last="link")
    trainer(tmp_path, keep, max_epochs=3, plugins=[FolderIO()]).fit(Model(), loader(), loader(1))

    last = tmp_path / "c" / "last.ckpt"
    assert last.is_symlink() is links
    assert torch.load(last / "step", weights_only=True) == 6
    assert sorted(os.listdir(tmp_path / "c")) == ["last.ckpt", "step=6.ckpt"]


@pytest.mark.proves("5.24")
def test_a_link_needs_a_local_folder(tmp_path: Path) -> None:
    keep = ModelCheckpoint("memory://somewhere", save_last="link")
    with pytest.raises(ValueError, match=r"save_last='link'.*'memory://somewhere'. Use save_last=True there"):
        trainer(tmp_path, keep).fit(Model(), loader(), loader(1))


@pytest.mark.proves("5.27")
def test_what_others_read_and_call_is_there(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=2, mode="min", save_last=True)
    run = trainer(tmp_path, keep)
    run.fit(Model(), loader(), loader(1))
    folder = os.path.realpath(tmp_path / "c")

    # 0.5 and 0.7 were worse than 0.3 of step 4 and 0.2 of step 8.
    assert (keep.dirpath, keep.monitor, keep.mode) == (folder, "val_loss", "min")
    assert keep.best_model_path == f"{folder}/step=8.ckpt"
    assert keep.kth_best_model_path == f"{folder}/step=4.ckpt"
    assert keep.last_model_path == f"{folder}/last.ckpt"
    assert keep.best_model_score is not None
    assert keep.current_score is not None
    scores = (keep.best_model_score, keep.current_score, keep.kth_value)
    assert [round(score.item(), 1) for score in scores] == [0.2, 0.2, 0.3]
    assert set(keep.best_k_models) == {keep.best_model_path, keep.kth_best_model_path}
    assert keep.file_exists(keep.best_model_path, run)
    assert not keep.file_exists(f"{folder}/step=6.ckpt", run)
    assert keep.check_monitor_top_k(run, torch.tensor(0.29))
    assert not keep.check_monitor_top_k(run, torch.tensor(0.3)), "an equal value is not better"
    assert not keep.check_monitor_top_k(run, None)
    assert keep.format_checkpoint_name({"step": torch.tensor(9)}) == f"{folder}/step=9.ckpt"
    keep.to_yaml(tmp_path / "scores.yaml")
    assert (tmp_path / "scores.yaml").read_text().count(".ckpt") == 2


@pytest.mark.proves("11.6")
def test_patience_after_a_resume_is_what_is_given_now(tmp_path: Path) -> None:
    first = EarlyStopping("val_loss", patience=9)
    run = trainer(tmp_path, first, max_epochs=3)
    run.fit(Model(), loader(), loader(1))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert first.wait_count == 1
    second = EarlyStopping("val_loss", patience=2, min_delta=0.5)

    run = trainer(tmp_path, second, max_epochs=9)
    run.fit(Model(), loader(), loader(1), ckpt_path=tmp_path / "a.ckpt")

    assert (run.current_epoch, second.wait_count, second.patience) == (4, 2, 2)


@pytest.mark.proves("11.6")
def test_a_subclass_may_check_at_a_moment_of_its_own(tmp_path: Path) -> None:
    class EverySecond(EarlyStopping):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if pl_module.validations % 2 == 0 and not trainer.sanity_checking:
                self._run_early_stopping_check(trainer)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pass

    stop = EverySecond("val_loss", patience=1, mode="max")  # it sees 0.3 and 0.2
    run = trainer(tmp_path, stop, max_epochs=9)
    run.fit(Model(), loader(), loader(1))

    assert (run.current_epoch, stop.stopped_epoch) == (4, 3)


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_slip_in_the_name_is_told_after_the_sanity_check_and_not_after_an_epoch(tmp_path: Path, kind: Any) -> None:
    class Stopped(Exception):
        pass

    class BeforeTraining(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            raise Stopped

    with (
        pytest.warns(UserWarning, match=rf"{kind.__name__}\(monitor='val_los'\): validation logs 'val_loss'"),
        pytest.raises(Stopped),
    ):
        trainer(tmp_path, BeforeTraining(), kind(monitor="val_los")).fit(Model(), loader(), loader(1))
    # A value of training's own, which validation cannot have logged yet, is no slip.
    with pytest.raises(Stopped):
        trainer(tmp_path, BeforeTraining(), kind(monitor="train_loss")).fit(Model(), loader(), loader(1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "saves at the end of every epoch; keeps the newest; in "),
        (
            {"monitor": "val_loss", "save_top_k": 3, "every_n_train_steps": 100},
            "saves after every 100 optimizer steps, when val_loss has been logged for these weights; keeps the 3 best "
            "by val_loss (min); in ",
        ),
        (
            {"save_last": True, "save_top_k": -1, "every_n_epochs": 2, "save_on_train_epoch_end": False},
            "saves at the end of every validation of epochs 2, 4, 6, ...; keeps all and one named last; in ",
        ),
        (
            {"save_last": "link", "train_time_interval": timedelta(hours=1)},
            "saves 1:00:00 after the last save; keeps the newest and a link to the newest; in ",
        ),
        ({"every_n_epochs": 0, "save_top_k": 0}, "saves never; keeps none; in "),
    ],
)
def test_explain_says_what_will_be_saved_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any], words: str
) -> None:
    text = trainer(tmp_path, ModelCheckpoint(**arguments)).explain(Model())

    assert words + str(tmp_path / "checkpoints") in text
    assert words in capsys.readouterr().out


@pytest.mark.proves("11.21")
def test_functions_are_called_as_hooks_of_a_fit(tmp_path: Path) -> None:
    steps: list[int] = []
    callback = LambdaCallback(
        on_train_batch_end=lambda trainer, pl_module, outputs, batch, batch_idx: steps.append(trainer.global_step),
        on_validation_batch_end=lambda *arguments: steps.append(-1),
    )
    trainer(tmp_path, callback, max_epochs=1, num_sanity_val_steps=0).fit(Model(), loader(2), loader(1))

    assert steps == [1, 2, -1]

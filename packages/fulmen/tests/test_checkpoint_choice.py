"""What a checkpoint holds, which one ``ckpt_path`` means, and the checkpoints of runs that fail."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import Callback, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from pathlib import Path


class Model(fulmen.LightningModule):
    """One parameter, which counts steps; fails in the step with index ``fail_at``."""

    def __init__(self, fail_at: int = -1, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.weight = nn.Parameter(torch.zeros(width))
        self.fail_at = fail_at
        self.steps = 0
        self.tested: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.steps == self.fail_at:
            raise LookupError("on purpose")
        self.steps += 1
        self.log("loss", float(self.global_step))
        return -self.weight.sum()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.tested.append(self.weight.detach().item())

    validation_step = None  # type: ignore[assignment]  # as if it were not defined

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.weight.detach().clone()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["module_was_last"] = "callbacks_turn" not in checkpoint or checkpoint["callbacks_turn"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def loader(batches: int = 2) -> DataLoader[Any]:
    return DataLoader(torch.ones(batches, 1))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> fulmen.Trainer:
    return fulmen.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "default_root_dir": str(folder),
            "callbacks": list(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": bool(callbacks),
            **options,
        }
    )


def read(path: str | Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


# -- content -----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("5.2")
def test_epoch_counts_finished_epochs_so_a_file_of_an_epochs_end_has_that_epochs_index(tmp_path: Path) -> None:
    class Midway(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "middle of epoch 1.ckpt")

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"end of epoch {trainer.current_epoch}.ckpt")

    run = trainer(tmp_path, Midway(), enable_checkpointing=False)
    run.fit(Model(), loader())
    run.save_checkpoint(tmp_path / "afterwards.ckpt")

    epochs = {path.stem: read(path)["epoch"] for path in tmp_path.glob("*.ckpt")}
    assert epochs == {"end of epoch 0": 0, "middle of epoch 1": 1, "end of epoch 1": 1, "afterwards": 2}


@pytest.mark.proves("5.5")
def test_weights_only_leaves_out_what_only_resuming_needs_and_still_asks_the_module_last(tmp_path: Path) -> None:
    class Data(fulmen.LightningDataModule):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader(self.hparams["rows"])

        def state_dict(self) -> dict[str, Any]:
            return {"served": 3}

    class Writing(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"some": "state"}

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["callbacks_turn"] = True

    run = trainer(tmp_path, Writing(), enable_checkpointing=False)
    run.fit(Model(), datamodule=Data(rows=2))
    run.save_checkpoint(tmp_path / "whole.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    whole, weights = read(tmp_path / "whole.ckpt"), read(tmp_path / "weights.ckpt")

    resuming = {"callbacks", "optimizer_states", "lr_schedulers", "fulmen", "callbacks_turn"}
    assert set(whole) - set(weights) == resuming
    for kept in ("epoch", "global_step", "loops", "hyper_parameters", "datamodule_hyper_parameters"):
        assert weights[kept] == whole[kept], kept
    assert weights["Data"] == {"served": 3} if "Data" in weights else weights[Data.__qualname__] == {"served": 3}
    assert weights["module_was_last"] is True
    assert whole["module_was_last"] is True, "callbacks wrote before the module did"
    assert torch.equal(weights["state_dict"]["weight"], whole["state_dict"]["weight"])

    with pytest.raises(RuntimeError, match=r"holds weights only.*load_from_checkpoint"):
        trainer(tmp_path, max_epochs=4).fit(Model(), loader(), ckpt_path=tmp_path / "weights.ckpt")
    assert Model.load_from_checkpoint(tmp_path / "weights.ckpt").weight.item() == 4.0


@pytest.mark.proves("5.9")
def test_states_without_a_callback_are_named_and_callbacks_without_a_state_start_anew(tmp_path: Path) -> None:
    first = trainer(tmp_path, EarlyStopping("loss", patience=9), enable_checkpointing=False, max_epochs=1)
    first.fit(Model(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    other = EarlyStopping("loss", mode="max", patience=9)

    with pytest.warns(UserWarning, match=r"state of callbacks that this Trainer does not have: \[\"EarlyStopping\{"):
        trainer(tmp_path, other, enable_checkpointing=False).fit(Model(), loader(), ckpt_path=tmp_path / "a.ckpt")

    # Only the second epoch counts for it, whose last step logs 3.
    assert other.best_score.item() == 3.0
    assert other.wait_count == 0


@pytest.mark.proves("5.9")
def test_more_epochs_than_max_epochs_is_an_error_with_both_numbers(tmp_path: Path) -> None:
    first = trainer(tmp_path, max_epochs=3)
    first.fit(Model(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")

    with pytest.raises(
        MisconfigurationException, match=r"max_epochs=2, but .* already trained 3 epochs. Give a larger"
    ):
        trainer(tmp_path, max_epochs=2).fit(Model(), loader(), ckpt_path=tmp_path / "a.ckpt")


# -- which -------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("5.29")
def test_a_path_or_url_is_loaded_by_every_call(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.fit(Model(), loader())
    url = "memory://choice/a.ckpt"
    first.save_checkpoint(url)
    model = Model()

    run = trainer(tmp_path)
    run.test(model, loader(1), verbose=False)
    run.test(model, loader(1), ckpt_path=url, verbose=False)

    assert model.tested == [0.0, 4.0], "a passed model is used as it is, unless a checkpoint is named"
    assert run.ckpt_path == url


@pytest.mark.proves("5.29")
def test_best_is_the_first_callbacks_best_and_the_default_where_no_model_is_passed(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", "{step}", monitor="loss", mode="min", save_top_k=1)
    newest = ModelCheckpoint(tmp_path / "newest", "{step}", every_n_train_steps=1)
    run, model = trainer(tmp_path, OnExceptionCheckpoint(tmp_path), best, newest), Model()
    run.fit(model, loader())
    assert model.weight.item() == 4.0

    # Epoch 0 logs 1 at last, which is the least.
    with pytest.warns(UserWarning, match=r"2 checkpoint callbacks have one: that of the first is taken"):
        run.test(model, loader(1), ckpt_path="best", verbose=False)
    with (
        pytest.warns(UserWarning, match=r"trainer.test\(\) without a model uses the best checkpoint, .*step=2.ckpt"),
        pytest.warns(UserWarning, match="2 checkpoint callbacks"),
    ):
        run.test(dataloaders=loader(1), verbose=False)

    assert model.tested == [2.0, 2.0]


@pytest.mark.proves("5.29")
def test_the_weights_are_taken_as_they_are_where_no_callback_knows_better_ones(tmp_path: Path) -> None:
    run, model = trainer(tmp_path), Model()
    run.fit(model, loader())
    run.test(dataloaders=loader(1), verbose=False)

    assert model.tested == [4.0]


@pytest.mark.proves("5.29")
def test_a_best_that_cannot_be_is_an_error_with_what_to_do(tmp_path: Path) -> None:
    quick = trainer(tmp_path, ModelCheckpoint(tmp_path), fast_dev_run=True)
    quick.fit(Model(), loader())
    nothing = trainer(tmp_path, ModelCheckpoint(tmp_path, save_top_k=0))
    nothing.fit(Model(), loader())

    with pytest.raises(ValueError, match=r"ckpt_path='best': fast_dev_run saves no checkpoint. Drop one of the two"):
        quick.test(Model(), loader(), ckpt_path="best")
    with pytest.raises(ValueError, match=r"trainer.test\(\) without a model.*fast_dev_run.*Pass the model"):
        quick.test(dataloaders=loader())
    with pytest.raises(ValueError, match=r"ckpt_path='best', but the checkpoint callback has saved nothing yet"):
        nothing.test(Model(), loader(), ckpt_path="best")
    with pytest.raises(ValueError, match=r"without a model.* has saved nothing yet. Pass the model"):
        nothing.test(dataloaders=loader())


@pytest.mark.proves("5.29")
def test_last_is_the_newest_of_all_folders_whatever_its_version(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Model(), loader())
    places = [tmp_path / "a" / "last.ckpt", tmp_path / "b" / "last-v2.ckpt", tmp_path / "c" / "failed.ckpt"]
    for age, place in enumerate(places):
        run.save_checkpoint(place)
        os.utime(place, (1000 - age, 1000 - age))
    (tmp_path / "b" / "last-of-all.ckpt").write_bytes(b"another's")
    (tmp_path / "a" / "last-v9.ckpt").symlink_to("gone.ckpt")
    callbacks = [
        ModelCheckpoint(tmp_path / "a", save_last=True),
        ModelCheckpoint(tmp_path / "b", monitor="loss"),
        OnExceptionCheckpoint(tmp_path / "c", "failed"),
    ]

    for newest in places:
        os.utime(newest, (2000, 2000))
        again = trainer(tmp_path, *callbacks, max_epochs=1)
        with pytest.warns(UserWarning, match="last-v9.ckpt is passed over"):
            again.test(Model(), loader(1), ckpt_path="last", verbose=False)
        assert again.ckpt_path == str(newest)
        os.utime(newest, (500, 500))


@pytest.mark.proves("5.29")
def test_without_a_last_checkpoint_nothing_is_loaded_and_a_warning_says_so(tmp_path: Path) -> None:
    run, model = trainer(tmp_path, ModelCheckpoint(tmp_path / "c", save_last=True)), Model()
    with pytest.warns(UserWarning, match="ckpt_path='last', but no checkpoint was found: nothing is loaded"):
        run.fit(model, loader(), ckpt_path="last")

    assert model.steps == 4
    again, model = trainer(tmp_path, ModelCheckpoint(tmp_path / "c", save_last=True), max_epochs=3), Model()
    again.fit(model, loader(), ckpt_path="last")
    assert model.steps == 2, "set and forget: the same line goes on once there is one"


@pytest.mark.proves("5.29")
def test_hpc_is_the_highest_number_in_the_root_folder(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Model(), loader())
    for number in (2, 10, 9):
        run.save_checkpoint(tmp_path / f"hpc_ckpt_{number}.ckpt")
    run.test(Model(), loader(1), ckpt_path="hpc", verbose=False)
    assert run.ckpt_path == str(tmp_path / "hpc_ckpt_10.ckpt")

    with pytest.raises(ValueError, match=r"ckpt_path='hpc', but .* holds no hpc_ckpt_N.ckpt. Give a path"):
        trainer(tmp_path / "empty").test(Model(), loader(), ckpt_path="hpc")


@pytest.mark.proves("5.29")
@pytest.mark.parametrize("name", ["registry", "registry:mine", "registry:mine:version:3", "registry:version:3"])
def test_a_registry_is_refused_with_what_to_do_instead(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"ckpt_path='{name}' names a model in Lightning's registry.*give the file's"):
        trainer(tmp_path).test(Model(), loader(), ckpt_path=name)


def test_an_empty_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ckpt_path='' names no checkpoint. Give a path"):
        trainer(tmp_path).fit(Model(), loader(), ckpt_path="")


@pytest.mark.proves("5.30")
def test_a_path_set_on_the_trainer_holds_until_it_is_cleared_and_a_given_one_replaces_it(tmp_path: Path) -> None:
    for epochs, name in ((1, "one"), (2, "two")):
        run = trainer(tmp_path, max_epochs=epochs)
        run.fit(Model(), loader())
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
    run, model = trainer(tmp_path, max_epochs=3), Model()
    assert run.ckpt_path is None

    run.ckpt_path = tmp_path / "one.ckpt"  # type: ignore[assignment]  # any path
    assert run.ckpt_path == str(tmp_path / "one.ckpt")
    run.test(model, loader(1), verbose=False)
    run.test(model, loader(1), verbose=False)
    with pytest.warns(UserWarning, match=r"trainer.ckpt_path is '.*one.ckpt', and this call was given .*two.ckpt"):
        run.test(model, loader(1), verbose=False, ckpt_path=tmp_path / "two.ckpt")
    with torch.no_grad():
        model.weight.fill_(-1.0)
    run.test(model, loader(1), verbose=False)
    run.ckpt_path = str(tmp_path / "one.ckpt")
    run.ckpt_path = None
    run.test(model, loader(1), verbose=False)
    assert model.tested == [2.0, 2.0, 4.0, -1.0, -1.0]

    run.ckpt_path = str(tmp_path / "two.ckpt")
    run.fit(model, loader())
    assert (run.global_step, model.steps) == (6, 2), "fit goes on from it, too"


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("5.26", "11.7")
def test_a_script_that_is_started_again_goes_on_where_it_failed_and_cleans_up(tmp_path: Path) -> None:
    def start(fail_at: int) -> tuple[fulmen.Trainer, Model]:
        run = trainer(tmp_path, OnExceptionCheckpoint(tmp_path), max_epochs=3)
        model = Model(fail_at)
        if fail_at >= 0:
            with pytest.raises(LookupError):
                run.fit(model, loader(4))
        else:
            run.fit(model, loader(4))
        return run, model

    start(fail_at=5)
    saved = tmp_path / "on_exception.ckpt"
    assert read(saved)["global_step"] == 5
    run, _ = start(fail_at=2)
    assert (run.ckpt_path, read(saved)["global_step"]) == (str(saved), 7), "it failed again, and saved again"
    # Another call than fit does not take it, nor delete it.
    trainer(tmp_path, OnExceptionCheckpoint(tmp_path)).predict(model := Model(), loader(1))
    assert (model.weight.item(), saved.exists()) == (0.0, True)

    run, model = start(fail_at=-1)

    assert (run.global_step, model.steps, model.weight.item()) == (12, 5, 12.0)
    assert not saved.exists(), "a fit that ended well needs it no more"
    again, _ = start(fail_at=-1)
    assert again.ckpt_path is None, "and the next begins anew"


@pytest.mark.proves("5.26")
def test_another_path_wins_over_the_checkpoint_of_a_failure(tmp_path: Path) -> None:
    run = trainer(tmp_path, OnExceptionCheckpoint(tmp_path))
    with pytest.raises(LookupError):
        run.fit(Model(fail_at=3), loader())
    first = trainer(tmp_path / "other", max_epochs=1)
    first.fit(Model(), loader())
    first.save_checkpoint(tmp_path / "mine.ckpt")

    run = trainer(tmp_path, OnExceptionCheckpoint(tmp_path))
    run.fit(model := Model(), loader(), ckpt_path=tmp_path / "mine.ckpt")

    assert (run.ckpt_path, model.steps) == (str(tmp_path / "mine.ckpt"), 2)


@pytest.mark.proves("5.26")
def test_trying_out_leaves_no_checkpoint_of_its_failure(tmp_path: Path) -> None:
    class Fails(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise LookupError("in the sanity check")

    for model, options in ((Fails(), {}), (Model(fail_at=0), {"fast_dev_run": True})):
        both = [OnExceptionCheckpoint(tmp_path), ModelCheckpoint(tmp_path / "c", save_on_exception=True)]
        run = trainer(tmp_path, *both, **options)
        with pytest.raises(LookupError):
            run.fit(model, loader(), loader() if isinstance(model, Fails) else None)

    assert list(tmp_path.rglob("*.ckpt")) == []


@pytest.mark.proves("5.26")
def test_model_checkpoint_saves_on_any_exception_what_the_last_step_left(tmp_path: Path) -> None:
    for kind, place in ((KeyboardInterrupt, "a"), (LookupError, "b"), (SystemExit, "c")):

        class Fails(Model):
            def training_step(self, batch: Any, batch_idx: int, kind: Any = kind) -> Any:
                if self.steps == 3:
                    raise kind
                return super().training_step(batch, batch_idx)

        keep = ModelCheckpoint(tmp_path / place, save_on_exception=True, save_last=True, every_n_epochs=9)
        with pytest.raises(kind):
            trainer(tmp_path, keep).fit(Fails(), loader())

        assert sorted(os.listdir(tmp_path / place)) == ["epoch=1-step=3.ckpt", "last.ckpt"]
        assert read(tmp_path / place / "last.ckpt")["state_dict"]["weight"].item() == 3.0


@pytest.mark.proves("5.26")
def test_a_step_that_is_saved_already_is_not_saved_again_for_an_exception(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "c", save_on_exception=True, every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(LookupError):
        trainer(tmp_path, keep).fit(Model(fail_at=2), loader(4))

    assert sorted(os.listdir(tmp_path / "c")) == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"]


def test_an_empty_filename_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"OnExceptionCheckpoint\(filename=''\) is empty. Give a name"):
        OnExceptionCheckpoint(tmp_path, "")

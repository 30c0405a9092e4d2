"""ModelCheckpoint on a stand-in of the Trainer's public surface that writes real files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fulmen._saving import Saving
from fulmen.callbacks import ModelCheckpoint
from fulmen.progress import Progress
from fulmen_protocols import MisconfigurationException


class Strategy:
    """One process; removes like a checkpoint IO does."""

    def __init__(self) -> None:
        self.broadcasts = 0
        self.removed: list[str] = []
        self.saving = Saving(None, None)  # type: ignore[arg-type]  # every save is complete when it returns

    def broadcast(self, value: Any) -> Any:
        self.broadcasts += 1
        return value

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision

    def barrier(self) -> None: ...

    def remove_checkpoint(self, path: str) -> None:
        self.removed.append(path)
        if os.path.lexists(path):
            os.remove(path)


class Delivery:
    """Brings news to loggers at once."""

    def checkpoint(self, callback: Any, loggers: list[Any], about: dict[str, object]) -> None:
        for logger in loggers:
            logger.after_save_checkpoint(callback)


@dataclass
class StandIn:
    """What a callback sees of a Trainer, and a loop that calls its hooks in the Trainer's order."""

    default_root_dir: str
    callback: Any
    loggers: list[Any] = field(default_factory=list)
    val_check_interval: float | int = 1.0
    check_val_every_n_epoch: int | None = 1
    num_val_batches: list[int] = field(default_factory=lambda: [1])
    fast_dev_run: bool = False
    sanity_checking: bool = False
    is_global_zero: bool = True
    world_size: int = 1
    ckpt_path: str | None = None
    current_epoch: int = 0
    global_step: int = 0
    steps_per_batch: int = 1
    fail_saving: bool = False

    def __post_init__(self) -> None:
        self.strategy = Strategy()
        self.state = SimpleNamespace(fn="fit")
        self._progress = Progress()
        self._reporter = SimpleNamespace(delivery=Delivery())
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.saved: list[tuple[str, int]] = []
        self.printed: list[str] = []

    @property
    def enable_validation(self) -> bool:
        return sum(self.num_val_batches) > 0

    def print(self, *text: object) -> None:
        self.printed.append(" ".join(map(str, text)))

    def save_checkpoint(self, path: str, weights_only: bool | None = None) -> None:
        if self.fail_saving:
            raise OSError("disk full")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": self.global_step, "weights_only": weights_only, "state": self.callback.state_dict()}, path)
        self.saved.append((os.path.basename(path), self.global_step))

    def log(self, **values: float) -> None:
        self.callback_metrics.update({name: torch.tensor(float(value)) for name, value in values.items()})

    def start(self) -> None:
        self.callback.setup(self, None, "fit")
        self.callback.on_train_start(self, None)

    def batch(self, **logged: float) -> None:
        self.global_step += self.steps_per_batch
        self.log(**logged)
        self.callback.on_train_batch_end(self, None, None, None, 0)

    def validate(self, **logged: float) -> None:
        self.callback.on_validation_start(self, None)
        self.log(**logged)
        self.callback.on_validation_end(self, None)

    def end_epoch(self, **logged: float) -> None:
        self.log(**logged)
        self.callback.on_train_epoch_end(self, None)
        self.current_epoch += 1

    def epochs_of(self, values: list[float], name: str = "val_loss") -> None:
        """One batch and one validation per epoch."""
        self.start()
        for value in values:
            self.batch()
            self.validate(**{name: value})
            self.end_epoch()
        self.callback.on_train_end(self, None)


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def step_in(path: str | Path) -> int:
    return int(torch.load(path, weights_only=True)["step"])


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.proves("5.23")
def test_without_monitor_only_the_newest_is_kept(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c")
    trainer = StandIn(str(tmp_path), callback)

    trainer.epochs_of([1.0, 2.0, 3.0])

    assert files(tmp_path / "c") == ["epoch=2-step=3.ckpt"]
    assert callback.best_model_path == str(tmp_path / "c" / "epoch=2-step=3.ckpt")


@pytest.mark.proves("5.23")
@pytest.mark.parametrize(("mode", "kept"), [("min", [1, 3]), ("max", [2, 4])])
def test_the_best_k_are_kept_and_the_worst_of_them_makes_room(tmp_path: Path, mode: str, kept: list[int]) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=2, mode=mode)
    trainer = StandIn(str(tmp_path), callback)

    trainer.epochs_of([0.2, 0.9, 0.1, 0.8])

    assert files(tmp_path / "c") == [f"step={step}.ckpt" for step in kept]
    best = {"min": 3, "max": 2}[mode]
    assert step_in(callback.best_model_path) == best
    assert callback.best_model_score is not None
    assert callback.best_model_score.item() == pytest.approx({"min": 0.1, "max": 0.9}[mode])
    assert callback.kth_value.item() == pytest.approx({"min": 0.2, "max": 0.8}[mode])


@pytest.mark.proves("5.23")
def test_a_value_equal_to_the_worst_kept_one_is_not_better(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss")
    StandIn(str(tmp_path), callback).epochs_of([0.5, 0.5])

    assert files(tmp_path / "c") == ["step=1.ckpt"]


@pytest.mark.proves("5.23")
def test_nan_is_worse_than_any_number(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=1)
    StandIn(str(tmp_path), callback).epochs_of([float("nan"), 5.0, float("nan")])

    assert files(tmp_path / "c") == ["step=2.ckpt"]
    assert callback.best_model_score is not None
    assert callback.best_model_score.item() == 5.0


@pytest.mark.proves("5.23")
def test_minus_one_keeps_all_and_zero_keeps_none(tmp_path: Path) -> None:
    everything = ModelCheckpoint(tmp_path / "all", "{step}", monitor="val_loss", save_top_k=-1)
    nothing = ModelCheckpoint(tmp_path / "none", "{step}", monitor="val_loss", save_top_k=0)

    StandIn(str(tmp_path), everything).epochs_of([3.0, 1.0, 2.0])
    StandIn(str(tmp_path), nothing).epochs_of([3.0, 1.0, 2.0])

    assert files(tmp_path / "all") == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    assert step_in(everything.best_model_path) == 2
    assert files(tmp_path / "none") == []


@pytest.mark.proves("5.23")
def test_the_old_file_is_deleted_only_after_the_new_one_is_written(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss")
    trainer = StandIn(str(tmp_path), callback)
    trainer.epochs_of([0.5])

    trainer.fail_saving = True
    trainer.batch()
    trainer.validate(val_loss=0.1)
    with pytest.raises(OSError, match="disk full"):
        trainer.end_epoch()

    assert files(tmp_path / "c") == ["step=1.ckpt"]
    assert step_in(callback.best_model_path) == 1
    assert list(callback.best_k_models) == [callback.best_model_path]


@pytest.mark.proves("5.28")
def test_a_checkpoint_holds_a_ranking_that_includes_itself(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss")
    StandIn(str(tmp_path), callback).epochs_of([0.5, 0.3])

    state = torch.load(callback.best_model_path, weights_only=True)["state"]

    assert state["best_model_path"] == callback.best_model_path
    assert state["best_model_score"].item() == pytest.approx(0.3)


# -- what is never deleted ---------------------------------------------------------------------------------------------


@pytest.mark.proves("5.25")
def test_files_of_another_run_in_the_folder_survive(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "step=1.ckpt").write_text("another run's")
    callback = ModelCheckpoint(folder, "{step}", monitor="val_loss")
    trainer = StandIn(str(tmp_path), callback)

    with pytest.warns(UserWarning, match="is not empty"):
        trainer.epochs_of([0.5, 0.4, 0.3])

    assert (folder / "step=1.ckpt").read_text() == "another run's"
    assert files(folder) == ["step=1.ckpt", "step=3.ckpt"]


@pytest.mark.proves("5.25")
def test_a_ranking_from_a_checkpoint_without_our_journal_cannot_reach_out_of_the_folder(tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.ckpt"
    stranger.write_text("not ours")
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss")
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    state = callback.state_dict()
    state.pop("written")
    state.update(best_k_models={str(stranger): torch.tensor(9.0)}, kth_best_model_path=str(stranger))
    callback.load_state_dict(state)

    trainer.batch()
    trainer.validate(val_loss=0.1)
    trainer.end_epoch()

    assert stranger.exists()
    assert files(tmp_path / "c") == ["step=1.ckpt"]


def test_a_file_that_is_ranked_but_not_in_the_journal_survives(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    callback = ModelCheckpoint(folder, "{step}", monitor="val_loss")
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    folder.mkdir()
    (folder / "hand-made.ckpt").write_text("put here by a person")
    ranked = str(folder / "hand-made.ckpt")
    callback.load_state_dict(
        {**callback.state_dict(), "best_k_models": {ranked: torch.tensor(9.0)}, "kth_best_model_path": ranked}
    )

    trainer.batch()
    trainer.validate(val_loss=0.1)
    trainer.end_epoch()

    assert files(folder) == ["hand-made.ckpt", "step=1.ckpt"]


def test_a_checkpoint_names_itself_in_its_journal_and_a_failed_one_nowhere(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss")
    trainer = StandIn(str(tmp_path), callback)
    trainer.epochs_of([0.5])
    trainer.fail_saving = True
    trainer.batch()
    trainer.validate(val_loss=0.1)
    with pytest.raises(OSError, match="disk full"):
        trainer.end_epoch()

    state = torch.load(callback.best_model_path, weights_only=True)["state"]
    assert state["written"] == callback.state_dict()["written"] == [callback.best_model_path]


@pytest.mark.proves("5.25")
@pytest.mark.parametrize("through_link", [False, True])
def test_the_file_that_the_run_was_resumed_from_survives(tmp_path: Path, through_link: bool) -> None:
    first = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss")
    StandIn(str(tmp_path), first).epochs_of([0.5])
    resumed_from = first.best_model_path
    if through_link:
        os.symlink(resumed_from, tmp_path / "newest.ckpt")
    second = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss")
    path = str(tmp_path / "newest.ckpt") if through_link else resumed_from
    trainer = StandIn(str(tmp_path), second, ckpt_path=path, global_step=1)
    second.setup(trainer, None, "fit")  # type: ignore[arg-type]  # a stand-in
    second.load_state_dict(torch.load(resumed_from, weights_only=True)["state"])

    trainer.epochs_of([0.3, 0.2])

    assert files(tmp_path / "c") == ["step=1.ckpt", "step=3.ckpt"]


def test_a_resumed_run_goes_on_pruning_what_it_wrote_before(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=2)
    StandIn(str(tmp_path), first).epochs_of([0.5, 0.4])
    second = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=2)
    trainer = StandIn(str(tmp_path), second, ckpt_path=first.best_model_path, global_step=2)
    second.setup(trainer, None, "fit")  # type: ignore[arg-type]  # a stand-in
    second.load_state_dict(torch.load(first.best_model_path, weights_only=True)["state"])

    trainer.epochs_of([0.3])

    assert files(tmp_path / "c") == ["step=2.ckpt", "step=3.ckpt"]


@pytest.mark.parametrize(("mode", "left"), [("min", 3), ("max", 2)])
def test_a_resumed_run_that_keeps_fewer_ranks_the_best_and_deletes_nothing(
    tmp_path: Path, mode: str, left: int
) -> None:
    first = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=3, mode=mode)
    StandIn(str(tmp_path), first).epochs_of([0.5, 0.6, 0.4])
    second = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=1, mode=mode)
    trainer = StandIn(str(tmp_path), second, ckpt_path="elsewhere.ckpt", global_step=3)
    second.setup(trainer, None, "fit")  # type: ignore[arg-type]  # a stand-in
    second.load_state_dict(first.state_dict())

    assert [step_in(path) for path in second.best_k_models] == [left]
    assert second.best_model_path == second.kth_best_model_path == first.best_model_path
    trainer.epochs_of([0.45, 0.3 if mode == "min" else 0.7])

    assert step_in(second.best_model_path) == 5
    assert files(tmp_path / "c") == [f"step={step}.ckpt" for step in (1, 2, 3, 5) if step != left]


@pytest.mark.proves("5.28")
def test_in_another_folder_only_the_best_path_is_taken_over(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "old", "{step}", monitor="val_loss")
    StandIn(str(tmp_path), first).epochs_of([0.5])
    second = ModelCheckpoint(tmp_path / "new", "{step}", monitor="val_loss")
    trainer = StandIn(str(tmp_path), second, global_step=1)
    second.setup(trainer, None, "fit")  # type: ignore[arg-type]  # a stand-in

    with pytest.warns(UserWarning, match="only best_model_path"):
        second.load_state_dict(first.state_dict())
    assert second.best_model_path == first.best_model_path
    assert second.best_k_models == {}
    trainer.epochs_of([0.9])

    assert files(tmp_path / "old") == ["step=1.ckpt"]
    assert files(tmp_path / "new") == ["step=2.ckpt"]


# -- when it saves -----------------------------------------------------------------------------------------------------


@pytest.mark.proves("5.20")
def test_every_n_train_steps_saves_at_those_steps_and_not_at_the_end_of_epochs(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", save_top_k=-1, every_n_train_steps=2)
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    for _ in range(2):
        for _ in range(5):
            trainer.batch()
        trainer.validate(val_loss=1.0)
        trainer.end_epoch()
    callback.on_train_end(trainer, None)  # type: ignore[arg-type]  # a stand-in

    assert [step for _, step in trainer.saved] == [2, 4, 6, 8, 10]


@pytest.mark.proves("5.22")
def test_batches_of_an_accumulation_do_not_save_twice_for_one_step(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", save_top_k=-1, every_n_train_steps=1)
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    for step in (0, 0, 1, 1, 1, 2):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]  # a stand-in

    assert [step for _, step in trainer.saved] == [1, 2]


def test_two_optimizers_that_step_over_the_multiple_still_save(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", save_top_k=-1, every_n_train_steps=5)
    trainer = StandIn(str(tmp_path), callback, steps_per_batch=2)
    trainer.start()
    for _ in range(6):
        trainer.batch()

    assert [step for _, step in trainer.saved] == [6, 10]


@pytest.mark.proves("5.20")
def test_every_n_epochs_counts_epochs(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", save_top_k=-1, every_n_epochs=2)
    trainer = StandIn(str(tmp_path), callback)
    trainer.epochs_of([1.0] * 5)

    assert [name for name, _ in trainer.saved] == ["epoch=1-step=2.ckpt", "epoch=3-step=4.ckpt"]


@pytest.mark.proves("5.17")
@pytest.mark.parametrize("trigger", ["every_n_train_steps", "every_n_epochs"])
def test_zero_turns_a_trigger_off(tmp_path: Path, trigger: str) -> None:
    callback = ModelCheckpoint(tmp_path / "c", **{trigger: 0})
    trainer = StandIn(str(tmp_path), callback)
    trainer.epochs_of([1.0, 2.0])

    assert trainer.saved == []


@pytest.mark.proves("5.20")
def test_a_time_interval_saves_when_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    callback = ModelCheckpoint(tmp_path / "c", save_top_k=-1, train_time_interval=timedelta(seconds=60))
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    for _ in range(200):
        now[0] += 1.0
        trainer.batch()

    assert [step for _, step in trainer.saved] == [60, 120, 180]
    assert trainer.strategy.broadcasts < 60, "ranks must not talk at every batch"


@pytest.mark.proves("5.20")
def test_several_validations_per_epoch_each_save(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=-1)
    trainer = StandIn(str(tmp_path), callback, val_check_interval=0.5)
    trainer.start()
    trainer.batch()
    trainer.validate(val_loss=0.5)
    trainer.batch()
    trainer.validate(val_loss=0.4)
    trainer.end_epoch()

    assert trainer.saved == [("step=1.ckpt", 1), ("step=2.ckpt", 2)]


@pytest.mark.proves("5.20")
def test_without_validation_the_end_of_training_epochs_saves(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="train_loss")
    trainer = StandIn(str(tmp_path), callback, num_val_batches=[0], val_check_interval=0.5)
    trainer.start()
    trainer.batch()
    trainer.end_epoch(train_loss=0.5)

    assert trainer.saved == [("step=1.ckpt", 1)]


@pytest.mark.proves("5.22", "9.4")
@pytest.mark.parametrize("inert", [{"fast_dev_run": True}, {"sanity_checking": True}])
def test_nothing_is_saved_while_trying_out(tmp_path: Path, inert: dict[str, Any]) -> None:
    callback = ModelCheckpoint(tmp_path / "c", save_last=True, save_on_exception=True, every_n_train_steps=1)
    trainer = StandIn(str(tmp_path), callback, **inert)
    trainer.epochs_of([1.0])
    callback.on_exception(trainer, None, RuntimeError())  # type: ignore[arg-type]  # a stand-in

    assert trainer.saved == []


# -- fresh values ------------------------------------------------------------------------------------------------------


@pytest.mark.proves("5.21")
def test_a_step_that_is_due_before_validation_waits_for_its_value(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}-{val_loss:.1f}", "val_loss", every_n_train_steps=2)
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    for _ in range(3):
        trainer.batch()
    assert trainer.saved == []
    trainer.validate(val_loss=0.7)

    assert trainer.saved == [("step=3-val_loss=0.7.ckpt", 3)]


@pytest.mark.proves("5.21")
def test_best_is_never_decided_on_the_value_of_an_earlier_validation(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", "val_loss", save_top_k=-1, every_n_train_steps=2)
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    trainer.batch()
    trainer.batch()
    trainer.validate(val_loss=0.1)
    trainer.batch()
    trainer.batch()  # due at step 4, where val_loss is still that of step 2
    assert [step for _, step in trainer.saved] == [2]
    trainer.validate(val_loss=0.9)

    assert {step_in(path): round(score.item(), 1) for path, score in callback.best_k_models.items()} == {2: 0.1, 4: 0.9}


@pytest.mark.proves("5.21")
def test_a_value_logged_at_every_step_is_judged_at_that_step(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", "loss", save_top_k=1, every_n_train_steps=1)
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    for loss in (0.5, 0.2, 0.4):
        trainer.batch(loss=loss)

    assert files(tmp_path / "c") == ["step=2.ckpt"]


@pytest.mark.proves("5.21")
def test_a_train_epoch_value_is_not_judged_by_a_validation_in_the_next_epoch(tmp_path: Path) -> None:
    callback = ModelCheckpoint(
        tmp_path / "c", "{step}", "train_acc", save_top_k=-1, every_n_train_steps=3, save_on_train_epoch_end=False
    )
    trainer = StandIn(str(tmp_path), callback, val_check_interval=0.5)
    trainer.start()
    for accuracy in (0.1, 0.2):
        trainer.batch()
        trainer.validate()
        trainer.batch()
        trainer.end_epoch(train_acc=accuracy)

    scores = {step_in(path): round(score.item(), 1) for path, score in callback.best_k_models.items()}
    assert scores == {4: 0.2}


@pytest.mark.parametrize("named", ["loss", "train_acc"])
def test_values_of_steps_and_of_epochs_are_told_apart_where_validations_save(tmp_path: Path, named: str) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", named, save_top_k=-1)
    trainer = StandIn(str(tmp_path), callback, val_check_interval=0.5)
    trainer.start()
    for epoch in (0.0, 1.0):
        trainer.batch(loss=0.1 + epoch)
        if named == "train_acc" and not epoch:
            with pytest.warns(UserWarning, match="'train_acc'.*found no such value"):
                trainer.validate(val_loss=0.0)
        else:
            trainer.validate(val_loss=0.0)
        trainer.batch(loss=0.2 + epoch)
        trainer.end_epoch(train_acc=0.5 + epoch)

    scores = {step_in(path): round(score.item(), 1) for path, score in callback.best_k_models.items()}
    assert scores == ({1: 0.1, 3: 1.1} if named == "loss" else {2: 0.5, 4: 1.5})


def test_a_value_that_is_nowhere_is_warned_of_while_validation_is_off(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", monitor="val_loss", save_last=True)
    trainer = StandIn(str(tmp_path), callback, num_val_batches=[0])
    trainer.start()
    trainer.batch()
    with pytest.warns(UserWarning, match="found no such value"):
        trainer.end_epoch()
    trainer.batch()
    trainer.end_epoch()
    with pytest.warns(UserWarning, match="training ended before"):
        callback.on_train_end(trainer, None)  # type: ignore[arg-type]  # a stand-in

    assert files(tmp_path / "c") == ["last.ckpt"]


def test_the_last_copy_does_not_wait_for_the_monitored_value(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", "val_loss", save_last=True, every_n_train_steps=2)
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    trainer.batch()
    trainer.batch()
    assert files(tmp_path / "c") == ["last.ckpt"]
    trainer.validate(val_loss=0.3)

    assert files(tmp_path / "c") == ["last.ckpt", "step=2.ckpt"]
    assert [name for name, _ in trainer.saved] == ["last.ckpt", "step=2.ckpt"], "last is not written twice"


def test_a_value_that_validation_does_not_log_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", monitor="val_los")
    trainer = StandIn(str(tmp_path), callback)

    with pytest.raises(MisconfigurationException, match="Did you mean 'val_loss'"):
        trainer.epochs_of([0.3])


def test_a_save_that_never_got_its_value_is_told_at_the_end(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", monitor="val_loss", every_n_train_steps=1)
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    trainer.batch()

    with pytest.warns(UserWarning, match="training ended before"):
        callback.on_train_end(trainer, None)  # type: ignore[arg-type]  # a stand-in


# -- last --------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("5.24")
def test_last_follows_the_epochs_that_were_saved(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_last=True)
    trainer = StandIn(str(tmp_path), callback)

    trainer.epochs_of([0.5, 0.9])

    assert step_in(tmp_path / "c" / "last.ckpt") == 1, "epoch 2 missed the top k"
    assert callback.last_model_path == str(tmp_path / "c" / "last.ckpt")


@pytest.mark.proves("5.24")
def test_last_is_written_at_the_end_if_nothing_ever_was(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", save_last=True, every_n_train_steps=100)
    trainer = StandIn(str(tmp_path), callback)
    trainer.epochs_of([0.5, 0.9])

    assert trainer.saved == [("last.ckpt", 2)]


@pytest.mark.proves("5.24")
def test_last_as_a_link_points_at_the_newest_file_and_is_relative(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", save_last="link")
    trainer = StandIn(str(tmp_path), callback)
    trainer.epochs_of([0.5, 0.9])

    link = tmp_path / "c" / "last.ckpt"
    assert os.readlink(link) == "step=2.ckpt"
    assert step_in(link) == 2
    assert trainer.saved == [("step=1.ckpt", 1), ("step=2.ckpt", 2)]


def test_a_link_is_refused_where_there_are_none(tmp_path: Path) -> None:
    callback = ModelCheckpoint("memory://bucket/c", save_last="link")

    with pytest.raises(MisconfigurationException, match="save_last=True"):
        callback.setup(StandIn(str(tmp_path), callback), None, "fit")  # type: ignore[arg-type]  # a stand-in


def test_last_of_an_earlier_run_gets_a_neighbour_and_both_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    StandIn(str(tmp_path), ModelCheckpoint(folder, "{step}", save_last=True)).epochs_of([0.5])
    second = ModelCheckpoint(folder, "{step}", save_last=True)
    trainer = StandIn(str(tmp_path), second)
    with pytest.warns(UserWarning, match="is not empty"):
        trainer.epochs_of([0.5])

    assert second.last_model_path == str(folder / "last-v1.ckpt")
    assert second._find_last_checkpoints(trainer) == {str(folder / "last.ckpt"), str(folder / "last-v1.ckpt")}  # type: ignore[arg-type]  # a stand-in


def test_a_last_name_with_fields_replaces_its_predecessor(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", save_last=True, save_top_k=-1)
    callback.CHECKPOINT_NAME_LAST = "{epoch}-newest"
    trainer = StandIn(str(tmp_path), callback)
    trainer.epochs_of([0.5, 0.5])

    assert files(tmp_path / "c") == ["epoch=1-newest.ckpt", "step=1.ckpt", "step=2.ckpt"]
    assert callback._find_last_checkpoints(trainer) == {str(tmp_path / "c" / "epoch=1-newest.ckpt")}  # type: ignore[arg-type]  # a stand-in


# -- exceptions --------------------------------------------------------------------------------------------------------


@pytest.mark.proves("5.26")
def test_an_exception_saves_once_if_asked(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", save_on_exception=True)
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    trainer.batch()
    callback.on_exception(trainer, None, KeyboardInterrupt())  # type: ignore[arg-type]  # a stand-in
    callback.on_exception(trainer, None, KeyboardInterrupt())  # type: ignore[arg-type]  # a stand-in

    assert trainer.saved == [("epoch=0-step=1.ckpt", 1)]


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("5.19")
@pytest.mark.parametrize(
    ("template", "insert", "expected"),
    [
        (None, True, "epoch=3-step=10.ckpt"),
        ("{epoch:02d}", True, "epoch=03.ckpt"),
        ("{epoch}-{val_loss:.2f}", True, "epoch=3-val_loss=0.12.ckpt"),
        ("{epoch}-{val_loss:.2f}", False, "3-0.12.ckpt"),
        ("{acc}-{acc_top5:.1f}", True, "acc=0.5-acc_top5=0.9.ckpt"),
        ("{missing:.2f}", True, "missing=0.00.ckpt"),
        ("model", True, "model.ckpt"),
        ("run-{val/loss:.1f}", False, "run-0.3.ckpt"),
        ("{val.loss:.1f}", True, "val.loss=0.4.ckpt"),
    ],
)
def test_names_are_filled_in(template: str | None, insert: bool, expected: str) -> None:
    values = {"val_loss": 0.123, "acc": 0.5, "acc_top5": 0.9, "val/loss": 0.3, "val.loss": 0.4}
    metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    metrics.update(epoch=torch.tensor(3), step=torch.tensor(10))
    callback = ModelCheckpoint(filename=template, auto_insert_metric_name=insert)

    assert callback.format_checkpoint_name(metrics) == expected
    assert callback.format_checkpoint_name(metrics, ver=2) == expected.replace(".ckpt", "-v2.ckpt")
    assert callback.format_checkpoint_name(metrics, prefix="best") == f"best-{expected}"


@pytest.mark.proves("5.19")
def test_a_logged_epoch_names_the_file(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{epoch}")
    trainer = StandIn(str(tmp_path), callback)
    trainer.start()
    trainer.batch()
    trainer.end_epoch(epoch=7.0)

    assert files(tmp_path / "c") == ["epoch=7.ckpt"]


def test_a_format_that_does_not_fit_names_the_field() -> None:
    with pytest.raises(MisconfigurationException, match=r"'val_loss' = 0\.5 with '02d'"):
        ModelCheckpoint(filename="{val_loss:02d}").format_checkpoint_name({"val_loss": torch.tensor(0.5)})


@pytest.mark.proves("5.19")
def test_without_version_counter_a_name_is_overwritten(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "model", save_top_k=-1, enable_version_counter=False)
    StandIn(str(tmp_path), callback).epochs_of([1.0, 1.0])

    assert files(tmp_path / "c") == ["model.ckpt"]
    assert step_in(tmp_path / "c" / "model.ckpt") == 2


@pytest.mark.proves("5.19")
def test_equal_names_get_versions(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "model", save_top_k=-1)
    StandIn(str(tmp_path), callback).epochs_of([1.0, 1.0, 1.0])

    assert files(tmp_path / "c") == ["model-v1.ckpt", "model-v2.ckpt", "model.ckpt"]


@dataclass
class SomeLogger:
    save_dir: str | None
    name: str | None
    version: int | str | None
    uploads: list[str] = field(default_factory=list)

    def after_save_checkpoint(self, callback: ModelCheckpoint) -> None:
        self.uploads.append(callback.best_model_path)


@pytest.mark.proves("5.18")
@pytest.mark.parametrize(
    ("logger", "expected"),
    [
        (None, "checkpoints"),
        (("logs", "lightning_logs", 3), "logs/lightning_logs/version_3/checkpoints"),
        (("logs", "run", "abc"), "logs/run/abc/checkpoints"),
        ((None, "run", 0), "run/version_0/checkpoints"),
    ],
)
def test_the_default_folder_is_the_first_loggers(
    tmp_path: Path, logger: tuple[str | None, str, int | str] | None, expected: str
) -> None:
    callback = ModelCheckpoint()
    loggers = []
    if logger is not None:
        loggers = [SomeLogger(logger[0] and str(tmp_path / logger[0]), logger[1], logger[2])]
    trainer = StandIn(str(tmp_path), callback, loggers=loggers)
    trainer.epochs_of([1.0])

    assert callback.dirpath == str(tmp_path / expected)
    assert files(tmp_path / expected) == ["epoch=0-step=1.ckpt"]
    assert [logger.uploads for logger in loggers] == ([[callback.best_model_path]] if loggers else [])


def test_the_folder_is_looked_at_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    callback = ModelCheckpoint("memory://bucket/c", "{step}", monitor="val_loss")
    trainer = StandIn(str(tmp_path), callback)
    memory = fsspec.filesystem("memory")
    memory.pipe("memory://bucket/c/step=1.ckpt", b"another run's")

    def save(path: str, weights_only: bool | None = None) -> None:
        memory.pipe(path, b"ours")

    trainer.save_checkpoint = save  # type: ignore[method-assign]  # replaced on purpose
    trainer.strategy.remove_checkpoint = memory.rm  # type: ignore[method-assign]  # replaced on purpose
    with pytest.warns(UserWarning, match="is not empty"):
        trainer.epochs_of([0.5, 0.4])

    names = sorted(path.rpartition("/")[2] for path in memory.ls("memory://bucket/c", detail=False))
    assert names == ["step=1.ckpt", "step=2.ckpt"]
    assert memory.cat("memory://bucket/c/step=1.ckpt") == b"another run's"
    memory.rm("memory://bucket", recursive=True)


# -- arguments and state -----------------------------------------------------------------------------------------------


@pytest.mark.proves("5.17")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"save_top_k": 3}, "no monitor to rank by"),
        ({"mode": "mim"}, "Did you mean 'min'"),
        ({"every_n_train_steps": -1}, "every_n_train_steps=-1"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1"),
        ({"every_n_train_steps": 1, "every_n_epochs": 1}, "every_n_train_steps and every_n_epochs"),
        ({"every_n_epochs": 1, "train_time_interval": timedelta(1)}, "every_n_epochs and train_time_interval"),
        (
            {"every_n_train_steps": 1, "train_time_interval": timedelta(1)},
            "every_n_train_steps and train_time_interval",
        ),
    ],
)
def test_contradictory_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        ModelCheckpoint(**arguments)


@pytest.mark.proves("5.28")
def test_the_state_key_is_lightnings() -> None:
    assert ModelCheckpoint(monitor="v").state_key == (
        "ModelCheckpoint{'monitor': 'v', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
        "'train_time_interval': None}"
    )


@pytest.mark.proves("5.27")
def test_best_models_are_written_as_yaml(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=2)
    StandIn(str(tmp_path), callback).epochs_of([0.5, 0.25])
    callback.to_yaml()

    written = yaml.safe_load((tmp_path / "c" / "best_k_models.yaml").read_text())
    assert written == {str(tmp_path / "c" / f"step={step}.ckpt"): value for step, value in ((1, 0.5), (2, 0.25))}


@pytest.mark.proves("5.23")
def test_ranks_that_disagree_do_not_save(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss")
    trainer = StandIn(str(tmp_path), callback)
    trainer.strategy.reduce_boolean_decision = lambda decision, all=True: False  # type: ignore[method-assign]  # replaced on purpose

    trainer.epochs_of([0.5, 0.1])

    assert files(tmp_path / "c") == ["step=1.ckpt"]


@pytest.mark.proves("5.27")
def test_a_method_that_people_override_is_called_for_every_save(tmp_path: Path) -> None:
    class Counting(ModelCheckpoint):
        count = 0

        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            self.count += 1
            super()._save_checkpoint(trainer, filepath)

    callback = Counting(tmp_path / "c", save_last=True)
    StandIn(str(tmp_path), callback).epochs_of([1.0, 2.0])

    assert callback.count == 4

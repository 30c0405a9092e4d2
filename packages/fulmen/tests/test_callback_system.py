"""Callbacks as a system: which there are, in which order, what they are told, and what a checkpoint keeps of them."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from fulmen.exceptions import SIGTERMException
from fulmen_protocols import HOOKS, MisconfigurationException
from fulmen_protocols.discovery import forget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).sum()
        self.log("loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Validated(Model):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).sum())


def loader(batches: int = 2) -> DataLoader[Any]:
    return DataLoader(torch.ones(batches, 2))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def trainer(**options: Any) -> fulmen.Trainer:
    return fulmen.Trainer(**{**QUIET, **options})


def names(run: fulmen.Trainer) -> list[str]:
    return [type(callback).__name__ for callback in run.callbacks]


# -- hooks -------------------------------------------------------------------------------------------------------------


def recording() -> tuple[Callback, dict[str, tuple[Any, ...]]]:
    """A callback that has every hook, and the arguments with which each was last called."""
    called: dict[str, tuple[Any, ...]] = {}

    def hook(name: str) -> Callable[..., None]:
        def method(self: object, *args: Any, **kwargs: Any) -> None:
            called[name] = (*args, *kwargs.values())

        return method

    return type("Everything", (Callback,), {name: hook(name) for name in HOOKS})(), called


@pytest.mark.proves("11.1")
def test_every_hook_is_called_with_the_trainer_the_module_and_its_own_arguments(tmp_path: Path) -> None:
    callback, called = recording()
    run, model = trainer(callbacks=[callback], default_root_dir=str(tmp_path)), Validated()

    run.fit(model, loader(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.test(model, loader(), verbose=False)
    run.predict(model, loader(), ckpt_path=str(tmp_path / "a.ckpt"))
    model.test_step = lambda batch, batch_idx: 1 / 0  # type: ignore[assignment, return-value]  # replaced on purpose
    with pytest.raises(ZeroDivisionError):
        run.test(model, loader(), verbose=False)

    assert set(called) == set(HOOKS), "every hook was called"
    kinds: dict[str, type | tuple[type, ...]] = {
        "stage": str, "batch": torch.Tensor, "batch_idx": int, "dataloader_idx": int, "loss": torch.Tensor,
        "optimizer": torch.optim.Optimizer, "exception": ZeroDivisionError, "checkpoint": dict, "outputs": object,
    }  # fmt: skip
    for name, arguments in HOOKS.items():
        given = called[name]
        assert given[:2] == (run, model), name
        assert len(given) == 2 + len(arguments), name
        for argument, value in zip(arguments, given[2:], strict=True):
            assert isinstance(value, kinds[argument]), (name, argument)
    assert called["on_validation_batch_end"][-1] == 0, "dataloader_idx is given where there is one loader, too"


@pytest.mark.proves("11.2")
def test_what_belongs_to_the_module_alone_is_never_asked_of_a_callback() -> None:
    of_the_module = [
        "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "configure_optimizers", "configure_callbacks",
        "configure_gradient_clipping", "configure_model", "train_dataloader", "val_dataloader", "test_dataloader",
        "predict_dataloader", "prepare_data", "transfer_batch_to_device", "training_step", "backward",
    ]  # fmt: skip
    called: list[str] = []

    def method(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    greedy = type("Greedy", (Callback,), {name: method(name) for name in of_the_module})()

    run = trainer(callbacks=[greedy], gradient_clip_val=0.5)
    run.fit(Validated(), loader(), loader())

    assert called == []
    assert not set(of_the_module) & set(HOOKS)
    for name in ("on_before_batch_transfer", "on_after_batch_transfer", "on_validation_model_eval"):
        misled = type("Misled", (Callback,), {name: method(name)})()
        with pytest.raises(MisconfigurationException, match=f"Misled defines {name!r}, which is no hook of a callback"):
            trainer(callbacks=[misled]).fit(Model(), loader())


# -- keys and states ---------------------------------------------------------------------------------------------------


class Counting(Callback):
    """Stateful, of one key."""

    def __init__(self, count: int = 0) -> None:
        self.items: list[int] = [count] if count else []

    def state_dict(self) -> dict[str, Any]:
        return {"items": self.items} if self.items else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.items = state_dict["items"]


@pytest.mark.proves("11.3")
def test_two_stateful_callbacks_with_one_key_are_refused_when_the_trainer_is_made() -> None:
    for kind in (RuntimeError, MisconfigurationException):
        with pytest.raises(kind, match=r"two callbacks have the state key 'Counting'.*override state_key"):
            trainer(callbacks=[Counting(1), Counting(2)])

    # Where a key tells them apart, or nothing is saved, there may be several.
    callbacks = [EarlyStopping("a"), EarlyStopping("b"), Callback(), Callback()]
    assert trainer(callbacks=callbacks).callbacks == callbacks


@pytest.mark.proves("11.3")
def test_a_state_stored_under_the_class_itself_is_found(tmp_path: Path) -> None:
    first = trainer(callbacks=[EarlyStopping("loss", patience=9)], default_root_dir=str(tmp_path))
    first.fit(Model(), loader())
    first.save_checkpoint(tmp_path / "new.ckpt")
    content = torch.load(tmp_path / "new.ckpt", weights_only=True)
    (state,) = content["callbacks"].values()
    content["callbacks"] = {EarlyStopping: {**state, "wait_count": 7}}
    torch.save(content, tmp_path / "old.ckpt")
    again = EarlyStopping("loss", patience=9)

    run = trainer(callbacks=[again], max_epochs=1, default_root_dir=str(tmp_path))
    run.fit(Model(), loader(), ckpt_path=tmp_path / "old.ckpt", weights_only=False)

    assert again.wait_count == 7


@pytest.mark.proves("11.22")
def test_only_a_state_that_holds_something_is_stored(tmp_path: Path) -> None:
    class Other(Counting):
        pass

    run = trainer(callbacks=[Counting(3), Other()], default_root_dir=str(tmp_path))
    run.fit(Model(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")

    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"] == {"Counting": {"items": [3]}}


@pytest.mark.proves("11.22")
def test_a_callback_gets_a_deep_copy_of_its_state_and_may_write_into_the_checkpoint(tmp_path: Path) -> None:
    class Writing(Counting):
        read: Any = None

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = trainer.global_step

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            self.read = checkpoint

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self.items.append(99)

    first = trainer(callbacks=[Writing(3)], default_root_dir=str(tmp_path))
    first.fit(Model(), loader(2))
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = Writing()
    trainer(callbacks=[second], max_epochs=2, default_root_dir=str(tmp_path)).fit(
        Model(), loader(2), ckpt_path=tmp_path / "a.ckpt"
    )

    assert second.items == [3, 99]
    assert second.read["mine"] == 2
    assert second.read["callbacks"] == {Writing.__qualname__: {"items": [3]}}, "what was read is as it was"


# -- exceptions --------------------------------------------------------------------------------------------------------


class Told(Callback):
    def __init__(self) -> None:
        self.exceptions: list[BaseException] = []

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.exceptions.append(exception)


@pytest.mark.proves("11.22")
@pytest.mark.parametrize(
    ("kind", "act"),
    [
        (ZeroDivisionError, lambda: 1 / 0),
        (KeyboardInterrupt, lambda: signal.raise_signal(signal.SIGINT)),
        (SIGTERMException, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        (SystemExit, lambda: sys.exit(3)),
    ],
)
def test_any_end_but_a_good_one_reaches_the_callbacks(kind: type[BaseException], act: Callable[[], object]) -> None:
    class Failing(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                act()
            return super().training_step(batch, batch_idx)

    told = Told()
    with pytest.raises(kind) as raised:
        trainer(callbacks=[told]).fit(Failing(), loader(4))

    assert told.exceptions == [raised.value]


@pytest.mark.proves("11.22")
def test_an_on_exception_that_fails_hides_neither_the_error_nor_the_other_callbacks() -> None:
    class Failing(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise LookupError("the real reason")

    class Clumsy(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            raise OSError("disk full")

    told = Told()
    with pytest.raises(LookupError, match="the real reason") as raised:
        trainer(callbacks=[Clumsy(), told]).fit(Failing(), loader())

    assert told.exceptions == [raised.value]
    assert "fulmen: Clumsy.on_exception failed as well: OSError: disk full" in raised.value.__notes__


# -- order -------------------------------------------------------------------------------------------------------------


class Tuner(Callback):
    runs_first = True


class First(Callback):
    pass


class Second(Callback):
    pass


class Saver(Checkpoint):
    pass


@pytest.mark.proves("11.4", "11.7")
def test_tuners_come_first_and_checkpoints_last_whatever_the_users_order(tmp_path: Path) -> None:
    on_exception = OnExceptionCheckpoint(tmp_path)
    given = [ModelCheckpoint(tmp_path), First(), Saver(), Tuner(), on_exception, Second()]

    run = trainer(callbacks=given, enable_checkpointing=True)

    assert names(run) == ["Tuner", "First", "Second", "ModelCheckpoint", "Saver", "OnExceptionCheckpoint"]
    assert run.checkpoint_callbacks == run.callbacks[3:], "all that derive from Checkpoint are known as such"


@pytest.mark.proves("11.4")
def test_the_order_holds_for_what_configure_callbacks_adds_and_replaces(tmp_path: Path) -> None:
    class Configured(Model):
        def configure_callbacks(self) -> Any:
            return [Saver(), Tuner(), Second()]

    plain = Callback()
    run = trainer(callbacks=[Second(), ModelCheckpoint(tmp_path), First(), plain], enable_checkpointing=True)
    given = run.callbacks[0]
    run.fit(Configured(), loader())

    assert names(run) == ["Tuner", "First", "Callback", "Second", "ModelCheckpoint", "Saver"]
    assert given not in run.callbacks, "the module's own replaces the Trainer's of the same class"
    assert plain in run.callbacks, "Callback is everybody's parent, but is not replaced by everybody"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes a distribution that registers callbacks, as pip would leave it, and lets it be found."""

    def make(source: str, **points: str) -> None:
        folder = tmp_path / "site"
        info = folder / "acme_callbacks-1.2.dist-info"
        info.mkdir(parents=True)
        (folder / "acme_callbacks.py").write_text(source)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-callbacks\nVersion: 1.2\n")
        lines = [f"{name} = acme_callbacks:{target}" for name, target in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[fulmen.callbacks.v1]", *lines, ""]))
        monkeypatch.syspath_prepend(str(folder))
        forget()

    yield make
    monkeypatch.undo()
    sys.modules.pop("acme_callbacks", None)
    forget()


SOURCE = """
from fulmen.callbacks import Callback, Checkpoint, EarlyStopping

class Heartbeat:  # no base class is needed
    beats = 0
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.beats += 1

class Uploader(Checkpoint):
    pass

class Misspelt(Callback):
    def on_train_bach_end(self, trainer, pl_module):
        pass

def one():
    return Heartbeat()

def several():
    return [Heartbeat(), Uploader()]

def raises():
    raise OSError("no network")

def leaves():
    raise SystemExit(1)

def not_a_callback():
    return [3]

def a_class():
    return Heartbeat

def misspelt():
    return Misspelt()

def clashing():
    return EarlyStopping("loss")
"""


@pytest.mark.proves("11.4")
def test_installed_packages_add_callbacks_after_the_users_and_before_checkpoints(
    install: Callable[..., None], tmp_path: Path
) -> None:
    install(SOURCE, a="one", b="several")

    run = trainer(callbacks=[ModelCheckpoint(tmp_path / "c"), First()], enable_checkpointing=True)
    run.fit(Model(), loader(3))

    assert names(run) == ["First", "Heartbeat", "Heartbeat", "ModelCheckpoint", "Uploader"]
    assert [run.callbacks[1].beats, run.callbacks[2].beats] == [3, 3]


@pytest.mark.proves("11.4")
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("raises", "OSError: no network"),
        ("leaves", "SystemExit: 1"),
        ("not_a_callback", "gave 3, which has no hook"),
        ("a_class", "gave the class Heartbeat, not an instance"),
        ("misspelt", "Did you mean 'on_train_batch_end'"),
        ("clashing", "two callbacks have the state key"),
        ("gone", "cannot be imported from 'acme_callbacks:gone'"),
    ],
)
def test_a_broken_one_is_named_with_its_package_and_the_run_goes_on(
    install: Callable[..., None], target: str, reason: str
) -> None:
    install(SOURCE, broken=target, good="one")

    with pytest.warns(UserWarning, match=reason) as warned:
        run = trainer(callbacks=[EarlyStopping("loss")])
    run.fit(Model(), loader())

    assert "the callback 'broken' of acme-callbacks 1.2 is left out" in str(warned[0].message)
    assert names(run) == ["EarlyStopping", "Heartbeat"]


# -- defaults ----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("11.5")
def test_the_defaults_are_a_bar_a_summary_a_checkpoint_and_a_timer_for_max_time() -> None:
    on = {"enable_checkpointing": True, "enable_progress_bar": True, "enable_model_summary": True}

    run = trainer(**on, max_time="00:01:00:00")

    assert sorted(names(run)) == ["ModelCheckpoint", "RichModelSummary", "RichProgressBar", "Timer"]
    assert names(run)[-1] == "ModelCheckpoint"
    assert "Timer" not in names(trainer(**on))
    assert names(trainer(max_time={"hours": 1})) == ["Timer"]


@pytest.mark.proves("11.5")
def test_without_rich_the_bar_is_tqdm_s_and_the_summary_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)

    run = trainer(enable_progress_bar=True, enable_model_summary=True)

    assert names(run) == ["TQDMProgressBar", "ModelSummary"]


@pytest.mark.proves("11.5", "11.7")
def test_none_of_the_defaults_comes_beside_one_of_the_users(tmp_path: Path) -> None:
    class MyBar(TQDMProgressBar):
        pass

    on = {"enable_checkpointing": True, "enable_progress_bar": True, "enable_model_summary": True}
    mine = [MyBar(), ModelSummary(max_depth=2), Timer("00:02:00:00"), Saver()]

    run = trainer(**on, callbacks=mine, max_time="00:01:00:00")

    assert run.callbacks == mine
    assert isinstance(RichProgressBar(), fulmen.callbacks.ProgressBar)
    assert isinstance(RichModelSummary(), ModelSummary)
    assert names(trainer(enable_checkpointing=True, callbacks=OnExceptionCheckpoint(tmp_path))) == [
        "OnExceptionCheckpoint"
    ]

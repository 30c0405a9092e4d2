"""Progress bars of real fits: on a real pseudo-terminal, and in plain output."""

from __future__ import annotations

import fcntl
import os
import pickle
import pty
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fulmen import LightningModule, Trainer
from fulmen._reporting import Reporter
from fulmen.callbacks import Callback, ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from fulmen.callbacks.progress import RichProgressBarTheme, _bars
from fulmen.callbacks.progress._bars import PlainBar
from fulmen_protocols.errors import MisconfigurationException, MissingPackage

if TYPE_CHECKING:
    from pathlib import Path

KINDS = [TQDMProgressBar, RichProgressBar]


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("half", 0.5, prog_bar=True)
        return self.layer(batch[0]).mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("score", torch.tensor(0.25), prog_bar=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(batches: int = 6) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(2 * batches, 2)), batch_size=2)


def make_trainer(*callbacks: Callback, **flags: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "max_epochs": 2}
    return Trainer(**{**quiet, "accelerator": "cpu", "callbacks": list(callbacks), **flags})


def run_on_terminal(code: str) -> str:
    """What a script writes to a real pseudo-terminal of 120 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    return written.decode()


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from test_progress_bars import *
bar = {bar}
trainer = make_trainer(bar)
trainer.fit(Model(), data(), [data(3), data(4)])
trainer.test(Model(), data(5), verbose=False)
bar.print("the end")
"""


@pytest.mark.proves("11.20")
@pytest.mark.parametrize("bar", ["TQDMProgressBar(leave=True)", "RichProgressBar(leave=True)"])
def test_on_a_terminal_bars_are_redrawn_in_place_and_end_complete(bar: str) -> None:
    written = run_on_terminal(SCRIPT.format(folder=os.path.dirname(__file__), bar=bar))

    assert "\r" in written or "\x1b[" in written
    for expected in ("Epoch 0/1", "Epoch 1/1", "6/6", "Sanity Checking DataLoader 1", "Validation DataLoader 1"):
        assert expected in written, expected
    for expected in ("3/3", "4/4", "Testing DataLoader 0", "5/5", "half", "score", "the end"):
        assert expected in written, expected


@pytest.mark.proves("11.20")
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_terminal_each_epoch_is_one_plain_line(
    kind: type[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bars, "PLAIN_EPOCH_INTERVAL_S", 0.0)
    trainer = make_trainer(kind(), max_epochs=3)

    trainer.fit(Model(), data(), data())

    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Epoch 0/2", "Epoch 1/2", "Epoch 2/2"]
    assert all("6/6" in line and "half=0.5" in line and "score=0.25" in line for line in lines)
    assert not any(character in out for character in "\r\x1b\b")


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_resumed_epoch_has_its_name_and_its_length(
    kind: type[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bars, "PLAIN_EPOCH_INTERVAL_S", 0.0)
    middle = ModelCheckpoint(tmp_path, every_n_train_steps=8)
    make_trainer(middle, enable_checkpointing=True, enable_progress_bar=False).fit(Model(), data(), data())
    resumed = make_trainer(kind(), middle, enable_checkpointing=True, max_epochs=3)

    resumed.fit(Model(), data(), data(), ckpt_path=middle.best_model_path)

    heads = [line.partition(" [")[0] for line in capsys.readouterr().out.splitlines()]
    assert heads == ["Epoch 1/2: 6/6", "Epoch 2/2: 6/6"]


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_short_epochs_do_not_flood_a_log_file(kind: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    make_trainer(kind(), max_epochs=100, limit_val_batches=0).fit(Model(), data(1), data(1))
    spent = time.monotonic() - began

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= spent + 2
    assert lines[0].startswith("Epoch 0/99")
    assert lines[-1].startswith("Epoch 99/99"), "the end is always told"


def test_a_long_epoch_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bars, "PLAIN_INTERVAL_S", 0.0)
    bar = PlainBar("Epoch 3", total=None)
    bar.n = 7
    bar.set_postfix({"loss": 0.123456, "v_num": 3, "name": "abc"})
    bar.refresh()
    assert "Epoch 3: 7/? [00:00" in (out := capsys.readouterr().out)
    assert "loss=0.123, v_num=3, name=abc]" in out


@pytest.mark.proves("11.20")
@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_of_their_own_say_a_line_for_each_loader(
    kind: type[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(kind())
    trainer.validate(Model(), [data(2), data(3)], verbose=False)
    trainer.test(Model(), data(4), verbose=False)
    trainer.predict(Model(), data(5))

    heads = [line.partition(" [")[0] for line in capsys.readouterr().out.splitlines()]
    assert heads == [
        "Validation DataLoader 0: 2/2",
        "Validation DataLoader 1: 3/3",
        "Testing DataLoader 0: 4/4",
        "Predicting DataLoader 0: 5/5",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_results_follows_the_last_bar(kind: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(kind()).test(Model(), [data(2), data(3)])

    heads = [line.partition(" [")[0] for line in capsys.readouterr().out.splitlines() if line.strip("-")]
    assert heads[:2] == ["Testing DataLoader 0: 2/2", "Testing DataLoader 1: 3/3"]
    assert heads[2].startswith("Test metric")


class Counting(TQDMProgressBar):
    """Counts drawings, through the hook that people override."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.drawn: list[int] = []

    def init_train_tqdm(self) -> Any:
        drawn = self.drawn

        class Bar(PlainBar):
            def refresh(self) -> None:
                drawn.append(int(self.n))

        return Bar("Epoch")


@pytest.mark.proves("11.20")
def test_the_pace_of_the_batches_does_not_set_the_pace_of_drawing() -> None:
    bar = Counting()
    began = time.monotonic()
    make_trainer(bar, max_epochs=1, limit_val_batches=0).fit(Model(), data(500), data(1))
    spent = time.monotonic() - began

    assert len(bar.drawn) <= spent / 0.1 + 3
    assert bar.drawn[0] == 1
    assert bar.drawn[-1] == 500


class Hasty(TQDMProgressBar):
    """As it draws on a terminal, counting."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[str, int]] = []

    def _bar(self, name: str) -> Any:
        drawn = self.drawn

        class Bar:
            n = 0
            total = None

            def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None: ...

            def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True) -> None:
                self.metrics = dict(ordered_dict)

            def reset(self, total: Any = None) -> None:
                self.n, self.total = 0, total

            def refresh(self) -> None:
                drawn.append((name, self.n))

            def close(self) -> None: ...

        return Bar()

    def init_train_tqdm(self) -> Any:
        return self._bar("train")

    def init_validation_tqdm(self) -> Any:
        return self._bar("val")


@pytest.mark.proves("11.20")
def test_each_bar_of_tqdm_is_made_by_the_method_that_people_override() -> None:
    made: list[str] = []

    class Mine(TQDMProgressBar):
        def init_sanity_tqdm(self) -> Any:
            made.append("sanity")
            return super().init_sanity_tqdm()

        def init_train_tqdm(self) -> Any:
            made.append("train")
            return super().init_train_tqdm()

        def init_validation_tqdm(self) -> Any:
            made.append("validation")
            return super().init_validation_tqdm()

        def init_test_tqdm(self) -> Any:
            made.append("test")
            return super().init_test_tqdm()

        def init_predict_tqdm(self) -> Any:
            made.append("predict")
            return super().init_predict_tqdm()

    trainer = make_trainer(Mine(), max_epochs=1)
    trainer.fit(Model(), data(2), [data(1), data(1)])
    trainer.test(Model(), data(1), verbose=False)
    trainer.predict(Model(), data(1))
    assert made == ["sanity", "sanity", "train", "validation", "validation", "test", "predict"]


@pytest.mark.proves("11.20")
def test_hundreds_of_tiny_epochs_with_validation_are_drawn_ten_times_a_second() -> None:
    bar = Hasty()
    began = time.monotonic()
    make_trainer(bar, max_epochs=300, num_sanity_val_steps=0).fit(Model(), data(1), data(1))
    spent = time.monotonic() - began

    assert len(bar.drawn) <= 2 * spent / 0.1 + 40, "ends of epochs and batches each at most ten times a second"
    assert bar.drawn[-1] == ("train", 1), "the end is always drawn"
    assert ("val", 1) in bar.drawn


@pytest.mark.proves("11.20")
def test_the_rich_bars_refresh_rate_is_per_second_and_never_above_ten() -> None:
    assert RichProgressBar().refresh_rate == 100
    assert RichProgressBar()._redraw_s == pytest.approx(0.1)
    assert RichProgressBar(refresh_rate=2)._redraw_s == pytest.approx(0.5)
    assert RichProgressBar(refresh_rate=2)._every == 1


def test_a_refresh_rate_draws_only_at_its_batches() -> None:
    bar = Counting(refresh_rate=7)
    make_trainer(bar, max_epochs=1, limit_val_batches=0).fit(Model(), data(30), data(1))
    assert bar.drawn[:-1] == [7]
    assert bar.drawn[-1] == 30


@pytest.mark.proves("11.20")
@pytest.mark.parametrize("kind", KINDS)
def test_refresh_rate_zero_and_disable_draw_nothing(kind: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    disabled = kind()
    disabled.disable()
    for bar in (kind(refresh_rate=0), disabled):
        assert bar.is_disabled
        trainer = make_trainer(bar)
        trainer.fit(Model(), data(), data())
        trainer.test(Model(), data(), verbose=False)
    assert capsys.readouterr().out == ""
    disabled.enable()
    assert disabled.is_enabled


@pytest.mark.proves("11.20")
@pytest.mark.parametrize("kind", KINDS)
def test_other_ranks_draw_nothing(kind: type[Any]) -> None:
    bar = kind()
    bar.setup(SimpleNamespace(is_global_zero=False), SimpleNamespace(), "fit")
    assert bar.is_disabled


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_refresh_rate_is_refused(kind: type[Any]) -> None:
    with pytest.raises(MisconfigurationException, match="-1"):
        kind(refresh_rate=-1)


@pytest.mark.proves("11.20")
@pytest.mark.parametrize("kind", KINDS)
def test_get_metrics_can_be_overridden(
    kind: type[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bars, "PLAIN_EPOCH_INTERVAL_S", 0.0)

    class Mine(kind):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            items: dict[str, Any] = super().get_metrics(trainer, pl_module)
            items.pop("half")
            return {**items, "mine": 42}

    make_trainer(Mine(), max_epochs=1, limit_val_batches=0).fit(Model(), data(), data())
    out = capsys.readouterr().out
    assert "mine=42" in out
    assert "half" not in out


@pytest.mark.proves("11.20")
@pytest.mark.parametrize(("version", "shown"), [(3, 3), ("a1b2c3d4", "c3d4"), (None, None), ("", None)])
def test_v_num_is_the_loggers_version_or_the_end_of_it(version: object, shown: object) -> None:
    trainer: Any = SimpleNamespace(loggers=[SimpleNamespace(version=version)], progress_bar_metrics={})
    assert ProgressBar().get_metrics(trainer, SimpleNamespace()).get("v_num") == shown


def test_a_logged_name_that_the_bar_shows_by_itself_is_warned_about_once() -> None:
    trainer: Any = SimpleNamespace(loggers=[SimpleNamespace(version=3)], progress_bar_metrics={"v_num": 1.0})
    bar = ProgressBar()
    with pytest.warns(UserWarning, match="'v_num'"):
        assert bar.get_metrics(trainer, SimpleNamespace()) == {"v_num": 1.0}
    bar.get_metrics(trainer, SimpleNamespace())


@pytest.mark.proves("11.20")
def test_the_bars_values_are_asked_for_without_reading_the_device() -> None:
    # A meta tensor has no value: whatever reads one fails.
    store: Any = SimpleNamespace(progress_bar_metrics={"loss": torch.ones((), device="meta"), "lr": 0.5})
    reporter = Reporter()
    reporter.store = store
    assert reporter.progress_bar_metrics == {"lr": 0.5}


def test_the_base_class_knows_names_and_totals_and_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}

    class Mine(ProgressBar):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.update(train=self.total_train_batches, val=self.total_val_batches, trainer=self.trainer is trainer)

        def on_validation_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            if self.has_dataloader_changed(dataloader_idx):
                stage = "sanity" if trainer.sanity_checking else "val"
                seen[f"{stage}{dataloader_idx}"] = self.total_val_batches_current_dataloader

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.reset_dataloader_idx_tracker()

    with pytest.raises(MisconfigurationException, match="setup"):
        Mine().trainer  # noqa: B018
    make_trainer(Mine(), max_epochs=1).fit(Model(), data(6), [data(3), data(4)])

    assert seen == {"train": 6, "val": 7, "trainer": True, "sanity0": 2, "sanity1": 2, "val0": 3, "val1": 4}
    assert capsys.readouterr().out == ""
    with pytest.raises(NotImplementedError, match="Mine"):
        Mine().disable()


@pytest.mark.proves("11.20")
def test_the_environment_and_colab_set_the_refresh_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TQDMProgressBar(refresh_rate=3).refresh_rate == 3
    monkeypatch.setenv("TQDM_MINITERS", "13")
    assert TQDMProgressBar(refresh_rate=3).refresh_rate == 13
    assert TQDMProgressBar(refresh_rate=30).refresh_rate == 30
    assert TQDMProgressBar(refresh_rate=0).refresh_rate == 0, "no bar stays no bar"
    monkeypatch.delenv("TQDM_MINITERS")
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    assert TQDMProgressBar().refresh_rate == 20
    assert TQDMProgressBar(refresh_rate=5).refresh_rate == 5
    assert TQDMProgressBar(refresh_rate=0).refresh_rate == 0
    monkeypatch.delitem(sys.modules, "google.colab")
    monkeypatch.setenv("COLAB_GPU", "1")
    assert TQDMProgressBar().refresh_rate == 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_bar_can_be_sent_to_another_process_in_mid_run(kind: type[Any]) -> None:
    bar = kind(refresh_rate=5)
    received: list[Any] = []

    class Send(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            received.append(pickle.loads(pickle.dumps(bar)))

    make_trainer(bar, Send(), max_epochs=1, limit_val_batches=0).fit(Model(), data(1), data(1))
    assert received[0].refresh_rate == 5


def test_a_bar_that_is_not_open_says_so() -> None:
    with pytest.raises(TypeError, match="train_progress_bar is not open"):
        TQDMProgressBar().train_progress_bar  # noqa: B018


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_training_leaves_the_terminal_readable(kind: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    class Fails(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("mine")

    bar = kind()
    with pytest.raises(KeyError, match="mine"):
        make_trainer(bar, limit_val_batches=0).fit(Fails(), data(), data())
    assert bar._train_bar is None
    assert bar._eval_bar is None


def test_missing_rich_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(MissingPackage, match=r"pip install 'fulmen\[rich\]'"):
        RichProgressBar()


@pytest.mark.proves("11.20")
def test_the_rich_theme_and_columns_can_be_changed() -> None:
    from rich.progress import TextColumn

    class Mine(RichProgressBar):
        def configure_columns(self, trainer: Any) -> list[Any]:
            return [*super().configure_columns(trainer), TextColumn("custom")]

    bar = Mine(theme=RichProgressBarTheme(metrics="bold"))
    assert bar.theme.metrics == "bold"
    assert len(bar.configure_columns(SimpleNamespace())) == 8


def test_many_metrics_wrap_and_leave_the_rest_of_the_bar_readable() -> None:
    code = SCRIPT.format(folder=os.path.dirname(__file__), bar="Many()").replace(
        "bar = Many()",
        "class Many(RichProgressBar):\n"
        "    def get_metrics(self, *_): return {f'metric_{i}': 0.5 for i in range(12)}\n"
        "bar = Many()",
    )
    written = run_on_terminal(code)
    for expected in ("Epoch 1/1", "6/6", "metric_0: 0.500", "metric_11: 0.500"):
        assert expected in written, expected


@pytest.mark.proves("11.20")
def test_a_subclass_of_the_tqdm_bar_works_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    class Own(TQDMProgressBar):
        def init_train_tqdm(self) -> Any:
            bar: Any = super().init_train_tqdm()
            seen.append((bar.disable, bar.leave, bar.desc))
            bar.set_description_str("mine")
            return bar

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            bar: Any = self.train_progress_bar
            bar.set_postfix(first=1, second="two")
            bar.set_postfix_str(f"{bar.n:g} of {bar.total:g}")
            bar.clear()

    seen: list[Any] = []
    make_trainer(Own(), max_epochs=1).fit(Model(), data(), data(1))

    [(disabled, _, _)] = seen
    assert not disabled
    assert "6/6" in capsys.readouterr().out


def test_a_plain_bar_counts_as_tqdm_does(capsys: pytest.CaptureFixture[str]) -> None:
    bar = PlainBar("mine", 3)
    bar.update()
    bar.update(2)
    bar.set_postfix_str("a=1")
    bar.close()
    assert capsys.readouterr().out.startswith("mine: 3/3")
    assert bar.desc == "mine"


class ReadsOnce(TQDMProgressBar):
    """A bar in a hasty run: it is drawn at the first batch, and then when the epoch has ended."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self.shown: list[dict[str, Any]] = []

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        self.shown.append(super().get_metrics(trainer, pl_module))
        return self.shown[-1]


class LogsItsBatches(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("batch", float(batch_idx), prog_bar=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("validates", [False, True])
def test_the_end_of_an_epoch_shows_the_last_batch_however_seldom_the_bar_was_drawn(
    validates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fulmen.callbacks.progress._drawn.monotonic", lambda: 0.0)
    bar = ReadsOnce()
    trainer = make_trainer(bar, max_epochs=1, num_sanity_val_steps=0, limit_val_batches=2 if validates else 0)
    trainer.fit(LogsItsBatches(), data(5), data(2))

    assert bar.shown[0]["batch"] == 0.0
    assert bar.shown[-1]["batch"] == trainer.callback_metrics["batch"].item() == 4.0
    assert len(bar.shown) < 5

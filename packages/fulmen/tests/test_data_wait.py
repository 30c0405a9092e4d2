"""Waiting for data: what is measured, what is made of it, and the one line about it."""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import fulmen
from fulmen import _loader_advice
from fulmen.data_wait import DataWait
from fulmen.runlog import read_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers=")


@pytest.fixture(autouse=True)
def _as_in_a_new_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loader_advice, "_said_of_waits", set())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(17)), raising=False)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of a fifth of a second are worth saying: tests are short."""
    monkeypatch.setattr(_loader_advice, "_WORTH_SAYING_S", 0.2)


def slept(seconds: float) -> float:
    """Sleep at least so long; how long it was."""
    began = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - began


class Slow(Dataset[torch.Tensor]):
    """Samples that take ``make_s``, the first of each worker ``first_s`` more; each says how long it took."""

    def __init__(self, samples: int, make_s: float, first_s: float = 0.0) -> None:
        self.samples, self.make_s, self.first_s = samples, make_s, first_s

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        first_s, self.first_s = self.first_s, 0.0
        return torch.tensor([slept(self.make_s + first_s), 1.0])


class Model(fulmen.LightningModule):
    def __init__(self, step_s: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.step_s = step_s
        self.made: list[float] = []
        self.stepped: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.made.append(float(batch[0, 0]))
        self.stepped.append(slept(self.step_s))
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(**options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return fulmen.Trainer(**{**quiet, **options})


def verdicts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "waited for data" in record.getMessage()]


def fitted(model: fulmen.LightningModule, loader: Any, *more: Any, **options: Any) -> DataWait:
    run = trainer(**options)
    run.fit(model, loader, *more)
    assert run.data_wait is not None
    return run.data_wait


# ---------------------------------------------------------------------- what follows from the figures


def simulated(make_s: float, step_s: float, workers: int, batches: int, epochs: int) -> DataWait:
    """Training and its workers by the hand of a clock: each worker makes every n-th batch and is two ahead at most."""
    now = waited = first = 0.0
    for _ in range(epochs):
        begins, free = now, [now] * workers
        taken: list[float] = []
        for index in range(batches):
            ahead = index - 2 * workers  # is asked for when that one is taken
            asked = begins if ahead < 0 else taken[ahead]
            free[index % workers] = ready = max(free[index % workers], asked) + make_s
            wait = max(ready - now, 0.0)
            waited, first, now = waited + wait, first + (wait if index == 0 else 0.0), now + wait
            taken.append(now)
            now += step_s
    return DataWait(now, waited, first, waited - first, batches * epochs, epochs, workers)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(
    ("make_s", "step_s", "workers"),
    [(0.9, 0.2, 1), (0.9, 0.2, 2), (0.9, 0.2, 3), (0.25, 0.1, 1), (2.0, 0.3, 2), (2.0, 0.3, 5)],
)
def test_with_the_workers_that_are_named_training_keeps_up_and_with_one_less_it_does_not(
    make_s: float, step_s: float, workers: int, epochs: int
) -> None:
    wait = simulated(make_s, step_s, workers, 240, epochs)
    needed = wait.workers_needed

    assert wait.step_s == pytest.approx(step_s)
    assert wait.batch_s == pytest.approx(make_s, rel=0.03)
    assert needed == math.ceil(make_s / step_s)
    enough = simulated(make_s, step_s, needed, 240, epochs)
    fewer = simulated(make_s, step_s, needed - 1, 240, epochs)
    assert enough.waited_s - enough.first_s <= make_s * epochs, "the second batch and so on, once an epoch"
    assert fewer.waited_s - fewer.first_s > 0.8 * 240 * epochs * (make_s / (needed - 1) - step_s)


def test_without_workers_a_batch_takes_the_time_that_the_loader_took() -> None:
    wait = DataWait(100.0, 60.0, 1.0, 59.0, batches=101, epochs=1, num_workers=0)

    assert wait.batch_s == 59 / 100
    assert wait.step_s == 40 / 101
    assert wait.workers_needed == math.ceil((59 / 100) / (40 / 101)) == 2


def test_what_is_not_known_is_not_made_up() -> None:
    short = DataWait(10.0, 8.0, 1.0, 7.0, batches=4, epochs=1, num_workers=4)
    other = DataWait(10.0, 8.0, 1.0, 7.0, batches=40, epochs=1, num_workers=None)
    nothing = DataWait(0.0, 0.0, 0.0, 0.0, batches=0, epochs=0, num_workers=0)

    for wait in (short, other, nothing):
        assert math.isnan(wait.batch_s)
        assert wait.workers_needed is None
    assert nothing.share == 0.0


def text(wait: DataWait, *, persistent: bool = False, most: int = 16) -> str:
    return _loader_advice.data_wait_text(wait, persistent_workers=persistent, most_workers=most)


STARVED = simulated(0.25, 0.06, 2, 1000, 1)


@pytest.mark.parametrize(
    ("most", "advice"),
    [
        (16, "with 5 it would keep up (a batch takes 0.25 s to make, a step 0.06 s)."),
        (
            4,
            "with 5 it would keep up (a batch takes 0.25 s to make, a step 0.06 s), but this process has CPUs for 4. "
            "Set num_workers=4, and make batches with less work.",
        ),
        (
            2,
            "with 5 it would keep up (a batch takes 0.25 s to make, a step 0.06 s), but this process has CPUs for 2. "
            "Make batches with less work.",
        ),
    ],
)
def test_no_more_workers_are_advised_than_there_are_cpus_for(most: int, advice: str) -> None:
    assert text(STARVED, most=most) == (
        f"training waited for data during 52% of 125 s; the loader has num_workers=2: {advice}"
    )


def test_workers_that_start_again_and_again_are_to_be_kept() -> None:
    slow_start = DataWait(100.0, 70.0, 68.0, 2.0, batches=300, epochs=10, num_workers=4)

    assert text(slow_start) == (
        "training waited for data during 70% of 100 s, 68 s of it before the first batch of each of 10 epochs: the "
        "loader starts num_workers=4 workers anew. Set persistent_workers=True in it."
    )
    for wait, persistent in (
        (slow_start, True),
        (DataWait(100.0, 70.0, 68.0, 2.0, 300, 1, 4), False),
        (DataWait(100.0, 70.0, 68.0, 2.0, 300, 10, 0), False),
    ):
        said = text(wait, persistent=persistent)
        assert "persistent_workers" not in said, "it would not help"
        assert said.endswith("Let the data set do less before it gives its first sample.")


def test_of_epochs_that_are_over_before_workers_are_busy_no_number_is_said() -> None:
    wait = DataWait(100.0, 70.0, 10.0, 60.0, batches=40, epochs=10, num_workers=4)

    assert text(wait) == (
        "training waited for data during 70% of 100 s; the loader has num_workers=4, and epochs are too short to say "
        "how many would do."
    )


def test_of_a_loader_without_workers_of_ours_no_number_is_said() -> None:
    wait = DataWait(100.0, 70.0, 1.0, 69.0, batches=300, epochs=1, num_workers=None)

    assert text(wait) == (
        "training waited for data during 70% of 100 s; a step takes 0.1 s. Make batches faster, or ahead in a "
        "DataLoader with workers."
    )


@pytest.mark.parametrize(("training_s", "waited_s", "said"), [(20.0, 3.1, 1), (20.0, 2.9, 0), (100.0, 14.0, 0)])
def test_short_waits_and_small_shares_are_not_worth_a_line(
    training_s: float, waited_s: float, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    wait = DataWait(training_s, waited_s, 0.0, waited_s, batches=1000, epochs=1, num_workers=0)

    with caplog.at_level(logging.INFO, "fulmen"):
        _loader_advice.data_wait(wait, object(), trainer().world)

    assert len(verdicts(caplog)) == said


# ---------------------------------------------------------------------- in runs


@pytest.mark.usefixtures("soon")
def test_a_starved_fit_says_once_how_many_workers_would_do(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(step_s=0.04)
    with caplog.at_level(logging.INFO, "fulmen"):
        wait = fitted(model, DataLoader(Slow(20, 0.14), num_workers=2))
    made_s, stepped_s = (sum(times) / len(times) for times in (model.made, model.stepped))

    (said,) = verdicts(caplog)
    assert said == text(wait)
    assert wait.batch_s == pytest.approx(made_s, rel=0.3)
    assert stepped_s <= wait.step_s < 2 * stepped_s
    assert f"with {wait.workers_needed} it would keep up" in said
    assert (wait.batches, wait.epochs, wait.num_workers) == (20, 1, 2)


@pytest.mark.usefixtures("soon")
def test_a_second_fit_says_it_only_of_another_setting_of_the_loader(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fulmen"):
        fitted(Model(), DataLoader(Slow(6, 0.06)))
        fitted(Model(), DataLoader(Slow(6, 0.06)))
        assert len(verdicts(caplog)) == 1

        fitted(Model(), DataLoader(Slow(8, 0.12), num_workers=1))
        assert len(verdicts(caplog)) == 2, "it was changed, and does not do yet"


@pytest.mark.usefixtures("soon")
def test_a_fit_whose_loader_keeps_up_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fulmen"):
        wait = fitted(Model(step_s=0.04), DataLoader(Slow(30, 0.0)))

    assert verdicts(caplog) == []
    assert wait.waited_s < 0.15 * wait.training_s


@pytest.mark.usefixtures("soon")
def test_the_start_of_workers_is_counted_apart(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fulmen"):
        wait = fitted(Model(0.01), DataLoader(Slow(6, 0.0, first_s=0.3), num_workers=1), max_epochs=3)

    assert wait.first_s >= 3 * 0.3
    assert wait.waited_s - wait.first_s < 0.3, "no batch but these was slow"
    assert wait.epochs == 3
    (said,) = verdicts(caplog)
    assert "each of 3 epochs" in said
    assert "Set persistent_workers=True" in said


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(6):
            time.sleep(0.03)
            yield torch.ones(2)


class Raw(Model):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]  # the other way to write it
        batch, _, _ = next(dataloader_iter)
        return self.layer(batch).sum()


@pytest.mark.filterwarnings("ignore:.*takes dataloader_iter")
@pytest.mark.parametrize(
    ("model", "loader"),
    [
        (Model, DataLoader(Stream())),
        (Raw, DataLoader(Slow(6, 0.03))),
        (Model, [torch.ones(1, 2)] * 6),
    ],
    ids=["stream", "step that fetches its batches", "list"],
)
def test_every_kind_of_loader_is_measured(model: type[Model], loader: Any) -> None:
    wait = fitted(model(), loader)

    if isinstance(loader, list):
        assert wait.waited_s < 6 * 0.03
        assert wait.num_workers is None
    else:
        assert wait.waited_s >= 6 * 0.03
        assert wait.first_s >= 0.03
        assert wait.fetching_s >= 5 * 0.03
        assert wait.waited_s == pytest.approx(wait.first_s + wait.fetching_s)


def test_several_loaders_are_waited_for_together_and_no_workers_are_counted() -> None:
    class Both(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch["a"]).sum() + self.layer(batch["b"]).sum()

    wait = fitted(Both(), {"a": DataLoader(Slow(4, 0.03)), "b": DataLoader(Slow(4, 0.02))})

    assert wait.waited_s >= 4 * 0.05
    assert wait.num_workers is None


def test_validation_is_none_of_training_s_time() -> None:
    class Validating(Model):
        validated = 0.0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.validated += slept(0.2)

    model = Validating(0.01)
    run = trainer(num_sanity_val_steps=0)
    began = time.perf_counter()
    run.fit(model, DataLoader(Slow(4, 0.01)), DataLoader(Slow(2, 0.1)))
    took_s = time.perf_counter() - began
    wait = run.data_wait

    assert wait is not None
    assert wait.training_s <= took_s - model.validated - 2 * 0.1
    assert wait.training_s >= sum(model.stepped) + sum(model.made)
    assert wait.waited_s < model.validated


def test_the_figures_can_be_read_while_a_fit_runs_and_stay_for_the_calls_after_it() -> None:
    seen: list[DataWait | None] = []

    class Reading(fulmen.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append(trainer.data_wait)

    class Tested(Model):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    run = trainer(callbacks=[Reading()])
    assert run.data_wait is None
    model = Tested()
    run.fit(model, DataLoader(Slow(3, 0.02)))
    after = run.data_wait
    run.test(model, DataLoader(Slow(3, 0.02)), verbose=False)

    waited = [wait.waited_s for wait in seen if wait is not None]
    assert waited == sorted(waited)
    assert waited[0] >= 0.02
    assert waited[2] >= waited[0] + 2 * 0.02
    assert after is not None
    assert run.data_wait == after


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("error", "said"), [(KeyboardInterrupt, 1), (ValueError, 0)])
def test_a_fit_that_is_stopped_says_it_too_and_one_that_fails_does_not(
    error: type[BaseException], said: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Ending(fulmen.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 6:
                raise error

    run = trainer(callbacks=[Ending()])
    with caplog.at_level(logging.INFO, "fulmen"), pytest.raises(error):
        run.fit(Model(), DataLoader(Slow(10, 0.05)))

    assert len(verdicts(caplog)) == said
    assert run.data_wait is not None
    assert run.data_wait.batches in (6, 7)


def test_the_report_of_a_run_tells_waiting_from_training(tmp_path: Path) -> None:
    from fulmen_loggers import CSVLogger

    model = Model(step_s=0.02)
    run = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=2)
    run.fit(model, DataLoader(Slow(8, 0.04)))
    (path,) = tmp_path.rglob("run.jsonl")
    stages = read_run(str(path.parent)).stages

    wait = run.data_wait
    assert wait is not None
    assert stages["waiting for data"] == pytest.approx(wait.waited_s, abs=0.001)
    assert stages["training"] >= sum(model.stepped)
    assert sum(stages.values()) >= stages["training"] + 8 * 0.04
    (page,) = tmp_path.rglob("report.html")
    assert "waiting for data" in page.read_text(encoding="utf-8")


SCRIPT = """
import time, warnings
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import fulmen
from fulmen import _loader_advice

_loader_advice._WORTH_SAYING, _loader_advice._WORTH_SAYING_S = 0.0, 0.2
warnings.simplefilter("ignore")


class Slow(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        time.sleep(0.05)
        return torch.ones(2)


class Model(fulmen.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = fulmen.Trainer(
        accelerator="cpu", strategy="ddp", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    run.fit(Model(), DataLoader(Slow()))
    print(f"rank {run.global_rank}: {run.data_wait.waited_s >= 8 * 0.05}, {run.data_wait.batches} batches", flush=True)
"""


@pytest.mark.slow
def test_of_two_ranks_the_first_says_it_and_both_know_their_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
    )

    assert len(re.findall("training waited for data", done.stdout + done.stderr)) == 1
    assert sorted(re.findall(r"rank \d: True, 8 batches", done.stdout)) == [
        "rank 0: True, 8 batches",
        "rank 1: True, 8 batches",
    ]


# ---------------------------------------------------------------------- on a device that works behind the host


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_only_the_time_in_which_it_stands_still_counts_and_nobody_waits_for_it() -> None:
    from fulmen._data_waits import DataWaits

    device = torch.device("cuda", 0)
    a = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()

    def late() -> Iterator[int]:
        yield 0
        time.sleep(0.05)
        yield 1

    def waits_for(work: int) -> float:
        waits = DataWaits(device)
        waits.begin(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches = waits.over(late())
            next(batches)
            for _ in range(work):
                a @ a
            next(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        wait = waits.figures(2)
        assert wait is not None
        assert wait.fetching_s >= 0.05
        return wait.waited_s

    waits_for(1)  # warms up
    assert waits_for(0) >= 0.04, "it had nothing to do"
    assert waits_for(100) < 0.01, "a hundred products take far longer than the batch, and were queued before"

"""TimeLedger: sleeps of a known length, each found in its category, and nothing counted twice or lost."""

from __future__ import annotations

import csv
import logging
import re
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fulmen
from fulmen.callbacks import ModelCheckpoint
from fulmen.profilers import TimeLedger

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers=")

SLEPT: defaultdict[str, float] = defaultdict(float)
"""Seconds that were slept on behalf of each category, by the clock."""


@pytest.fixture(autouse=True)
def _nothing_slept() -> None:
    SLEPT.clear()


def sleep(category: str, seconds: float) -> None:
    began = time.perf_counter()
    time.sleep(seconds)
    SLEPT[category] += time.perf_counter() - began


class Slow(Dataset[torch.Tensor]):
    def __init__(self, category: str, seconds: float, samples: int) -> None:
        self.category, self.seconds, self.samples = category, seconds, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        sleep(self.category, self.seconds)
        return torch.ones(2)


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, category: str) -> torch.Tensor:
        ctx.category = category
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sleep(ctx.category, 0.02)
        return grads[0], None


class SlowSGD(torch.optim.SGD):
    steps = 0

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        sleep("first_step" if self.steps == 0 else "optimizer", 0.025)
        self.steps += 1
        return result


class Model(fulmen.LightningModule):
    """Sleeps wherever a category can be spent; 8 batches and 2 validations of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def configure_model(self) -> None:
        sleep("setup", 0.05)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        sleep("validation" if not self.training else "transfer", 0.015)
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        category = "first_step" if self.global_step == 0 else "forward"
        with self.trainer.profiler.profile("my own action"):
            sleep(category, 0.2 if category == "first_step" else 0.03)
        self.log("loss", 1.0)
        return SlowBackward.apply(self.layer(batch).sum(), category.replace("forward", "backward"))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        sleep("hooks", 0.01)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        sleep("validation", 0.04)

    def on_validation_epoch_end(self) -> None:
        sleep("validation", 0.02)

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        sleep("saving", 0.1)

    def configure_optimizers(self) -> Any:
        return SlowSGD(self.parameters(), lr=0.01)


class Sleeping(fulmen.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        sleep("callbacks", 0.012)

    def on_validation_end(self, *_: Any) -> None:
        sleep("callbacks", 0.03)

    def teardown(self, *_: Any, **__: Any) -> None:
        sleep("callbacks", 0.01)


def trainer(folder: Path, ledger: Any, **options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "profiler": ledger,
    }
    return fulmen.Trainer(**{**quiet, **options})


def loaders() -> tuple[Any, Any]:
    return DataLoader(Slow("data", 0.035, 8)), DataLoader(Slow("validation_data", 0.03, 2))


def test_what_is_slept_lands_in_its_category_and_next_to_nothing_in_another(tmp_path: Path) -> None:
    ledger = TimeLedger()
    saves = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    run = trainer(tmp_path, ledger, callbacks=[Sleeping(), saves], enable_checkpointing=True, val_check_interval=4)
    run.fit(Model(), *loaders())

    expected = {
        *("data", "transfer", "forward", "backward", "optimizer", "first_step", "validation", "validation_data"),
        *("saving", "callbacks", "hooks", "setup"),
    }
    assert set(SLEPT) == expected
    for category, slept in SLEPT.items():
        assert ledger.seconds[category] >= slept, category
    # In setup torch imports what its optimizers need.
    surplus = {category: ledger.seconds[category] - slept for category, slept in SLEPT.items() if category != "setup"}
    everything = sum(SLEPT.values())
    assert sum(surplus.values()) < 0.35 * everything, surplus
    for category in ("data", "forward", "backward", "optimizer", "validation", "validation_data", "callbacks"):
        assert surplus[category] < 0.5 * SLEPT[category], category
    for category in ("other", "logging", "teardown"):
        assert ledger.seconds[category] < 0.1 * everything, f"{category} hides nothing"


def test_the_categories_are_the_wall_time(tmp_path: Path) -> None:
    times: dict[str, float] = {}

    class Clock(fulmen.Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            times["inside"] = -time.perf_counter()

        def teardown(self, *_: Any, **__: Any) -> None:
            times["inside"] += time.perf_counter()

    ledger = TimeLedger()
    run = trainer(tmp_path, ledger, callbacks=[Clock()])
    outside = -time.perf_counter()
    run.fit(Model(), *loaders())
    outside += time.perf_counter()

    assert times["inside"] <= ledger.wall_s <= outside
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.wall_s)


def rows_of(run: fulmen.Trainer) -> list[dict[str, float]]:
    assert run.log_dir is not None
    with open(f"{run.log_dir}/metrics.csv", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["time/data"]]
    return [{key: float(value) for key, value in row.items() if key.startswith("time/")} for row in found]


def test_loggers_get_the_shares_of_the_time_since_the_row_before(tmp_path: Path) -> None:
    class Late(Slow):
        def __getitem__(self, index: int) -> torch.Tensor:
            self.seconds = 0.1 if index >= 4 else 0.0
            return super().__getitem__(index)

    ledger = TimeLedger()
    run = trainer(tmp_path, ledger, logger=fulmen.loggers.CSVLogger(tmp_path), log_every_n_steps=4, limit_val_batches=0)
    run.fit(Model(), DataLoader(Late("data", 0.0, 8)))
    early, late = rows_of(run)

    for row in (early, late):
        assert sum(row.values()) == pytest.approx(1.0)
        assert set(row) == {f"time/{name}" for name in ledger.seconds if name not in ("setup", "teardown")}
    assert early["time/first_step"] > 0.2
    assert late["time/first_step"] == 0.0
    assert late["time/data"] > 2 * early["time/data"], "only the second half of the data is late"
    assert late["time/data"] > late["time/forward"] > 0, "0.1 seconds against 0.03"


def test_another_prefix_is_taken(tmp_path: Path) -> None:
    ledger = TimeLedger(prefix="spent.")

    assert set(ledger.row()) >= {"spent.data", "spent.other"}


def test_the_table_has_seconds_and_percent_the_longest_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fulmen"):
        run = trainer(tmp_path, "ledger")
        run.fit(Model(), *loaders())
    (report,) = [record.getMessage() for record in caplog.records if "Time Ledger" in record.getMessage()]

    assert isinstance(run.profiler, TimeLedger)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if "|" in line]
    assert rows[0] == ["Category", "Seconds", "Percent", "What it is"]
    assert rows[1][0] == "total"
    seconds = [float(row[1]) for row in rows[2:]]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(seconds) == pytest.approx(float(rows[1][1]), abs=0.001 * len(seconds))
    assert sum(float(row[2]) for row in rows[2:]) == pytest.approx(100, abs=0.1 * len(seconds))
    assert "host's" not in report, "on the CPU there is nothing to explain"


def test_each_rank_s_table_can_go_to_a_file(tmp_path: Path) -> None:
    run = trainer(tmp_path, TimeLedger(dirpath=tmp_path, filename="spent"))
    run.fit(Model(), *loaders())

    assert "Time Ledger" in (tmp_path / "fit-spent-0.txt").read_text(encoding="utf-8")


def test_every_call_has_a_ledger_of_its_own(tmp_path: Path) -> None:
    class Tested(Model):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            sleep("forward", 0.05)

    ledger = TimeLedger()
    run = trainer(tmp_path, ledger, limit_val_batches=0)
    model = Tested()
    run.fit(model, loaders()[0])
    SLEPT.clear()
    run.test(model, DataLoader(Slow("data", 0.03, 4)), verbose=False)

    assert ledger.seconds["backward"] == ledger.seconds["optimizer"] == ledger.seconds["first_step"] == 0.0
    for category in ("forward", "data"):
        assert SLEPT[category] <= ledger.seconds[category] < 1.5 * SLEPT[category]


def test_windows_of_manual_optimization_are_divided_as_well(tmp_path: Path) -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first = self.global_step == 0
            sleep("first_step" if first else "forward", 0.03)
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(SlowBackward.apply(self.layer(batch).sum(), "first_step" if first else "backward"))
            optimizer.step()

    ledger = TimeLedger()
    run = trainer(tmp_path, ledger, limit_val_batches=0)
    run.fit(Manual(), loaders()[0])

    assert ledger.seconds["optimizer"] >= SLEPT["optimizer"]
    assert ledger.seconds["forward"] + ledger.seconds["backward"] >= SLEPT["forward"] + SLEPT["backward"]
    assert ledger.seconds["first_step"] >= SLEPT["first_step"]


def test_an_action_that_was_not_started_is_named() -> None:
    ledger = TimeLedger()
    ledger.start("mine")

    with pytest.raises(
        ValueError, match=re.escape("profiler.stop('yours'): that action was not started. Running: 'mine'")
    ):
        ledger.stop("yours")
    ledger.stop("mine")
    with pytest.raises(ValueError, match="Running: none"):
        ledger.stop("mine")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("synchronize", [False, True])
def test_on_a_gpu_time_is_the_host_s_and_the_table_says_so(tmp_path: Path, synchronize: bool) -> None:
    class Heavy(fulmen.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8192, 8192)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            hidden = batch.expand(8192, 8192)
            with torch.no_grad():
                for _ in range(50):
                    hidden = self.layer(hidden)
            return self.layer(hidden[:1]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    ledger = TimeLedger(synchronize=synchronize)
    run = trainer(tmp_path, ledger, accelerator="cuda", devices=1)
    run.fit(Heavy(), DataLoader(torch.ones(6, 8192)))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset

    said = ledger.summary()
    assert ("TimeLedger(synchronize=True) tells more" in said) is not synchronize
    assert ("The host waited for cuda:0" in said) is synchronize
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.wall_s)
    if synchronize:
        assert ledger.seconds["forward"] > ledger.seconds["backward"], "fifty products against two"

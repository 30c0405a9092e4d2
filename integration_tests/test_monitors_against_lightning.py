"""What watches a run says the same as Lightning's own when it is fed the same."""

from __future__ import annotations

import importlib
import json
import random
import time
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import (
    DeviceStatsMonitor,
    LearningRateMonitor,
    RichProgressBar,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from fulmen.utilities.model_summary import summarize
from fulmen_fabric import Fabric, SpikeDetection, Throughput, TrainingSpikeException, get_available_flops, measure_flops

if TYPE_CHECKING:
    from pathlib import Path

lightning = pytest.importorskip("lightning", reason="Lightning is not installed to compare with")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose logger has no folder keeps its log in the working folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


def theirs(path: str) -> Any:
    module, _, name = path.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"lightning.{module}"), name)


@pytest.mark.proves("13.7")
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("flops", [None, 30])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("separator", ["/", "|"])
def test_throughput_has_the_keys_and_values_of_lightnings(
    world_size: int, flops: int | None, with_lengths: bool, separator: str
) -> None:
    arguments: dict[str, Any] = {
        "available_flops": 1e6, "world_size": world_size, "window_size": 4, "separator": separator
    }  # fmt: skip
    pair = [Throughput(**arguments), theirs("fabric.utilities.throughput.Throughput")(**arguments)]
    draw = random.Random(1)
    now, samples, lengths = 0.0, 0, 0
    for batches in range(1, 12):
        now, size = now + draw.uniform(0.1, 2), draw.randint(1, 9)
        samples, lengths = samples + size, lengths + size * draw.randint(1, 9)
        for each in pair:
            each.update(
                time=now,
                batches=batches,
                samples=samples,
                lengths=lengths if with_lengths else None,
                flops=None if flops is None else flops * batches,
            )
        assert pair[0].compute() == pytest.approx(pair[1].compute())
    assert len(pair[0].compute()) >= 5


@pytest.mark.proves("13.8")
def test_flops_are_counted_as_lightning_counts_them() -> None:
    with torch.device("meta"):
        net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)), torch.randn(2, 3, 8, 8)
    for loss in (None, torch.Tensor.sum):
        counted = theirs("fabric.utilities.throughput.measure_flops")(net, lambda: net(x), loss)
        assert measure_flops(net, lambda: net(x), loss) == counted > 0


@pytest.mark.proves("13.8")
@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("NVIDIA H100 80GB HBM3", [torch.float32, torch.bfloat16, torch.float16, torch.int8]),
        ("NVIDIA H100 PCIe", [torch.bfloat16, torch.float16, torch.int8]),
        ("NVIDIA A100-SXM4-80GB", [torch.float32, torch.bfloat16, torch.float16, torch.int8]),
        ("NVIDIA L4", [torch.float32, torch.bfloat16]),
        ("Tesla T4", [torch.float32, torch.float16, torch.int8]),
        ("Tesla V100-SXM2-32GB", [torch.float32, torch.float16]),
        ("NVIDIA GeForce RTX 3090", [torch.float32]),
    ],
)
def test_peaks_on_which_lightning_is_right_are_the_same(
    name: str, dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    for dtype in dtypes:
        expected = theirs("fabric.utilities.throughput.get_available_flops")(torch.device("cuda"), dtype)
        assert get_available_flops(torch.device("cuda"), dtype) == pytest.approx(expected, rel=1e-3), dtype


def spikes(kind: Any, fabric: Any, losses: list[float], path: Path, failure: type[Exception]) -> tuple[Any, Any]:
    detection = kind(exclude_batches_path=str(path), **OPTIONS)
    for index, loss in enumerate(losses):
        try:
            detection.on_train_batch_end(fabric, torch.tensor(loss), None, index)
        except failure as error:
            return str(error), json.loads(path.read_text())
    return None, detection.bad_batches


OPTIONS: dict[str, Any] = {}


@pytest.mark.proves("11.17")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "max", "rtol": 0.4},
        {"window": 3, "rtol": 0.5},
        {"warmup": 4, "rtol": 0.3},
        {"atol": 1.5, "rtol": None},
        {"atol": 1.0, "rtol": 0.5, "finite_only": False},
    ],
)
def test_spikes_are_found_where_lightning_finds_them(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "OPTIONS", options)
    mine, other = Fabric(accelerator="cpu"), theirs("fabric.Fabric")(accelerator="cpu", devices=1)
    draw = random.Random(3)
    found = 0
    for number in range(12):
        losses = [draw.uniform(1, 3) for _ in range(20)]
        losses[draw.randint(5, 19)] *= draw.choice([1, 3, 10])
        if number % 4 == 3:
            losses[draw.randint(6, 19)] = draw.choice([float("nan"), float("inf")])
        names = [tmp_path / f"{number}{who}.json" for who in ("mine", "theirs")]
        expected = spikes(
            theirs("fabric.utilities.spike.SpikeDetection"),
            other,
            losses,
            names[1],
            theirs("fabric.utilities.spike.TrainingSpikeException"),
        )
        assert spikes(SpikeDetection, mine, losses, names[0], TrainingSpikeException) == expected, losses
        found += expected[0] is not None
    assert found >= 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(144, 5)
        self.scale = nn.Parameter(torch.ones(7))
        self.head.bias.requires_grad = False
        self.body[1].eval()

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x))


@pytest.mark.proves("13.9")
@pytest.mark.parametrize("depth", [0, 1, 2, -1])
@pytest.mark.parametrize("example", [False, True])
def test_a_summary_has_the_columns_cells_and_totals_of_lightnings(depth: int, example: bool) -> None:
    tables: list[Any] = []
    for library, summary_of in ((fulmen, summarize), (None, theirs("pytorch.utilities.model_summary.summarize"))):
        base: Any = theirs("pytorch.LightningModule") if library is None else library.LightningModule

        class Module(Net, base):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            pass

        torch.manual_seed(0)
        module = Module()
        if example:
            module.example_input_array = torch.zeros(2, 3, 8, 8)
        found = summary_of(module, max_depth=depth)
        tables.append(
            {
                "columns": {heading for heading, _ in found._get_summary_data()} - {"FLOPs"},
                "rest": found.total_parameters - sum(found.param_nums) if depth == 1 else None,
                "names": found.layer_names,
                "types": found.layer_types,
                "in": found.in_sizes,
                "out": found.out_sizes,
                "parameters": found.param_nums,
                "total": found.total_parameters,
                "trainable": found.trainable_parameters,
                "modes": found.total_training_modes,
                "size": found.model_size,
                "flops": found.total_flops,
            }
        )
    mine, other = tables
    for name in other:
        assert mine[name] == (pytest.approx(other[name]) if name == "size" else other[name]), name
    if example and depth:
        assert mine["flops"] == 2 * 2 * (4 * 36 * 27 + 144 * 5)
        assert "In sizes" in mine["columns"]


@pytest.mark.proves("11.20")
@pytest.mark.parametrize("environment", [{}, {"TQDM_MINITERS": "10"}, {"COLAB_GPU": "1"}])
@pytest.mark.parametrize("asked", [1, 3, 30])
def test_tqdms_refresh_rate_is_lightnings(
    environment: dict[str, str], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expected = theirs("pytorch.callbacks.TQDMProgressBar")(refresh_rate=asked).refresh_rate
    assert TQDMProgressBar(refresh_rate=asked).refresh_rate == expected


@pytest.mark.proves("11.20")
def test_the_bars_have_lightnings_arguments_and_the_methods_that_people_override() -> None:
    for mine, path in ((TQDMProgressBar, "TQDMProgressBar"), (RichProgressBar, "RichProgressBar")):
        other = theirs(f"pytorch.callbacks.{path}")
        assert mine().refresh_rate == other().refresh_rate
        missing = {
            name
            for name in dir(other)
            if not name.startswith("_") and not hasattr(mine, name) and name not in {"reset_dataloader_idx_tracker"}
        }
        assert not missing


class Rows:
    """A logger for both."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []


def logger_for(library: Any) -> Any:
    if library is fulmen:

        class Mine(Rows):
            name, version = "rows", 0

            def log_metrics(self, metrics: Any, step: int | None = None) -> None:
                self.rows.append((step, dict(metrics)))

            def log_hyperparams(self, params: Any) -> None: ...

            def save(self) -> None: ...

            def finalize(self, status: str) -> None: ...

        return Mine()

    base: Any = theirs("pytorch.loggers.Logger")

    class Theirs(Rows, base):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        name, version = "rows", 0

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.rows.append((step, dict(metrics)))

        def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None: ...

    return Theirs()


def model_for(library: Any) -> Any:
    class Model(library.LightningModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        flops_per_batch = 100

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 1), nn.Linear(1, 1)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.second(self.first(batch[0])).mean().backward()
            for optimizer in self.optimizers():
                optimizer.step()

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> Any:
            groups = [{"params": [self.first.weight], "name": "weight"}, {"params": [self.first.bias]}]
            optimizers = [
                torch.optim.SGD(groups, lr=0.5, momentum=0.5, weight_decay=0.1),
                torch.optim.SGD(self.second.parameters(), lr=0.25),
            ]
            schedule = torch.optim.lr_scheduler.StepLR(optimizers[1], 1)
            return optimizers, [{"scheduler": schedule, "name": "mine", "interval": "epoch"}]

    return Model()


def watched(library: Any, make: Any, **flags: Any) -> list[tuple[int | None, dict[str, float]]]:
    logger = logger_for(library)
    given: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "log_every_n_steps": 2, "num_sanity_val_steps": 0,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, **flags,
    }  # fmt: skip
    loader = DataLoader(TensorDataset(torch.ones(16, 2)), batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = library.Trainer(logger=logger, callbacks=[make], **given)
        trainer.fit(model_for(library), loader, loader)
    return logger.rows


PYTORCH = SimpleNamespace()


@pytest.fixture(autouse=True)
def pytorch() -> Any:
    PYTORCH.LightningModule, PYTORCH.Trainer = theirs("pytorch.LightningModule"), theirs("pytorch.Trainer")
    return PYTORCH


@pytest.mark.proves("11.8")
@pytest.mark.parametrize("interval", [None, "step", "epoch"])
def test_learning_rates_are_named_and_logged_as_lightning_does(interval: str | None) -> None:
    options: dict[str, Any] = {"logging_interval": interval, "log_momentum": True, "log_weight_decay": True}
    mine = watched(fulmen, LearningRateMonitor(**options))
    other = watched(PYTORCH, theirs("pytorch.callbacks.LearningRateMonitor")(**options))
    assert mine == [(x, pytest.approx({k: v for k, v in row.items() if k != "epoch"})) for x, row in other]
    names = {name for _, row in mine for name in row}
    assert {"mine", "mine-momentum", "lr-SGD/weight", "lr-SGD/pg2-weight_decay"} <= names


@pytest.mark.proves("11.9")
def test_device_statistics_have_lightnings_names_and_places_in_training() -> None:
    mine = watched(fulmen, DeviceStatsMonitor())
    other = watched(PYTORCH, theirs("pytorch.callbacks.DeviceStatsMonitor")())

    places = [[(x, sorted(row)) for x, row in rows] for rows in (mine, other)]
    assert places[0] == places[1]
    assert {name.partition("/")[0] for _, row in mine for name in row} == {
        f"DeviceStatsMonitor.on_{stage}_batch_{end}" for stage in ("train", "validation") for end in ("start", "end")
    }


@pytest.mark.proves("11.18")
def test_throughput_rows_have_lightnings_names_places_and_totals() -> None:
    options: dict[str, Any] = {
        "batch_size_fn": lambda batch: len(batch[0]),
        "length_fn": lambda batch: batch[0].numel(),
    }
    mine = watched(fulmen, ThroughputMonitor(**options, window_size=3))
    other = watched(PYTORCH, theirs("pytorch.callbacks.ThroughputMonitor")(**options, window_size=3))

    def totals(rows: list[Any], stage: str) -> list[Any]:
        kept = [(x, {k: v for k, v in row.items() if "sec" not in k and "time" not in k}) for x, row in rows]
        return [(x, row) for x, row in kept if f"{stage}/batches" in row]

    assert totals(mine, "train") == totals(other, "train") != []
    assert {name for _, row in mine for name in row} == {name for _, row in other for name in row}
    validations = [totals(rows, "validate") for rows in (mine, other)]
    assert [row for _, row in validations[0]] == [row for _, row in validations[1]] != []
    assert [x for x, _ in validations[0]] == list(range(2, 17, 2)), "Lightning's x begins anew with each validation"


@pytest.mark.proves("11.10")
def test_a_timers_state_goes_to_lightning_and_back() -> None:
    mine, other = Timer(), theirs("pytorch.callbacks.Timer")()
    trainer: Any = SimpleNamespace(world_size=1)
    for each in (mine, other):
        each.on_train_start(trainer, None)
    time.sleep(0.01)
    for each in (mine, other):
        each.on_train_end(trainer, None)
    assert set(mine.state_dict()["time_elapsed"]) == {str(stage.value) for stage in _stages()}
    fresh, loaded = theirs("pytorch.callbacks.Timer")(), Timer()
    fresh.load_state_dict(mine.state_dict())
    loaded.load_state_dict({"time_elapsed": _elapsed(other)})
    assert fresh.time_elapsed() == pytest.approx(mine.time_elapsed())
    assert loaded.time_elapsed() == pytest.approx(other.time_elapsed())
    for stage in _stages():
        assert (mine.start_time(stage.value) is None) == (other.start_time(stage.value) is None)


def _stages() -> Any:
    return theirs("pytorch.trainer.states.RunningStage")


def _elapsed(timer: Any) -> dict[str, float]:
    return {str(name): float(spent) for name, spent in timer.state_dict()["time_elapsed"].items()}

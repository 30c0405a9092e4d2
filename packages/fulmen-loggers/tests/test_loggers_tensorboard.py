"""TensorBoardLogger, read back with TensorBoard's own reader."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from torch import nn

from fulmen_loggers import TensorBoardLogger
from fulmen_loggers._event_records import encode_scalars
from fulmen_protocols import (
    LOGGERS,
    Logger,
    MisconfigurationException,
    MissingPackage,
    SupportsGraph,
    SupportsLogDir,
    load,
    missing_members,
)


def _events(folder: str | os.PathLike[str]) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def _scalars(folder: str | os.PathLike[str], tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in _events(folder).Scalars(tag)]


def _settings(folder: str) -> tuple[dict[str, object], list[str]]:
    content = _events(folder).PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
    return values, [info.name.tag for info in experiment.metric_infos]


def test_it_is_a_logger_found_by_name(tmp_path: Path) -> None:
    logger = load(LOGGERS, "tensorboard", save_dir=tmp_path)
    assert isinstance(logger, TensorBoardLogger)
    for protocol in (Logger, SupportsLogDir, SupportsGraph):
        assert missing_members(protocol, logger) == []


def test_nothing_is_touched_before_the_first_use(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "new")
    assert (logger.name, logger.save_dir) == ("lightning_logs", str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.proves("6.2")
def test_a_version_is_the_next_free_number_or_the_text_that_is_given(tmp_path: Path) -> None:
    for name in ("version_3", "version_11", "other"):
        (tmp_path / "lightning_logs" / name).mkdir(parents=True)
    assert [TensorBoardLogger(tmp_path).version for _ in range(2)] == [12, 13]
    logger = TensorBoardLogger(tmp_path, version="mine")
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "mine")
    assert TensorBoardLogger(tmp_path, name="", version=7).log_dir == str(tmp_path / "version_7")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.text(), st.floats(width=64) | st.integers(-5, 5))),
    st.integers(-(2**40), 2**40),
    st.floats(0, 2e9),
)
def test_rows_are_encoded_as_protobuf_encodes_them(values: list[tuple[str, float]], step: int, time_s: float) -> None:
    theirs = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values])
    ours = Event.FromString(encode_scalars(values, step, time_s))
    assert str(ours) == str(Event(wall_time=time_s, step=step, summary=theirs))  # as text, in which NaN equals NaN


def test_rows_that_an_earlier_process_wrote_are_known(tmp_path: Path) -> None:
    first = TensorBoardLogger(tmp_path, version="run", prefix="p")
    for step in range(3):
        first.log_metrics({"loss": 0.1 * step, "odd": math.nan, "huge": 1e300}, step=step)
    first.finalize("success")
    [path] = Path(first.log_dir).iterdir()
    path.write_bytes(path.read_bytes()[:-5])  # it was killed while it wrote the last one

    second = TensorBoardLogger(tmp_path, version="run", prefix="p")
    assert [second.has_row({"loss": 0.1 * step, "odd": math.nan, "huge": 1e300}, step) for step in range(4)] == [
        True, True, False, False
    ]  # fmt: skip
    assert second.has_row({"loss": 0.1}, 1)
    assert not second.has_row({"loss": 0.2}, 1)
    assert not second.has_row({"loss": 0.1, "other": 1.0}, 1)
    assert not TensorBoardLogger(tmp_path / "new", version="run").has_row({"loss": 0.1}, 1)


@pytest.mark.proves("6.2")
def test_scalars_are_read_by_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    values = [math.pi, math.nan, math.inf, -math.inf, 1e-30, 7, np.float64(2), torch.tensor([3.0])]
    for step, value in enumerate(values):
        logger.log_metrics({"train/loss": value, "lr": 0.1}, step=10 * step)
    logger.save()
    read = _scalars(logger.log_dir, "train/loss")
    assert [step for step, _ in read] == list(range(0, 80, 10))
    assert np.allclose([value for _, value in read], [float(value) for value in values], rtol=1e-6, equal_nan=True)
    assert len(_scalars(logger.log_dir, "lr")) == 8
    assert [name for name in os.listdir(logger.log_dir) if "tfevents" in name] == os.listdir(logger.log_dir)
    logger.finalize("success")


def test_saved_events_are_on_disk_though_the_process_is_killed(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from fulmen_loggers import TensorBoardLogger
logger = TensorBoardLogger(sys.argv[1], version=0)
for step in range(500):
    logger.log_metrics({"loss": float(step)}, step=step)
logger.save()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=240, check=False)
    assert len(_scalars(tmp_path / "lightning_logs" / "version_0", "loss")) == 500


def test_events_of_a_process_that_ends_without_finalize_are_on_disk(tmp_path: Path) -> None:
    script = """
import sys
from fulmen_loggers import TensorBoardLogger
logger = TensorBoardLogger(sys.argv[1], version=0)
for step in range(500):
    logger.log_metrics({"loss": float(step)}, step=step)
raise SystemExit
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=240, check=True)
    assert len(_scalars(tmp_path / "lightning_logs" / "version_0", "loss")) == 500


def test_logging_after_finalize_loses_nothing_of_the_same_second(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in range(5):
        logger.log_metrics({"loss": float(step), "both": {"a": 1.0, "b": 2.0}}, step=step)
        logger.finalize("success")
    assert _scalars(logger.log_dir, "loss") == [(step, float(step)) for step in range(5)]
    assert len(_scalars(Path(logger.log_dir, "both", "a"), "both")) == 5


@pytest.mark.proves("6.2")
def test_a_mapping_draws_its_curves_in_one_chart(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix="p")
    logger.log_metrics({"loss": {"train": 1.0, "val": torch.tensor(2.0)}, "x": 5.0}, step=3)
    logger.finalize("success")
    # The layout that tensorboardX's own add_scalars makes.
    assert _scalars(Path(logger.log_dir, "p-loss", "train"), "p-loss") == [(3, 1.0)]
    assert _scalars(Path(logger.log_dir, "p-loss", "val"), "p-loss") == [(3, 2.0)]
    assert _scalars(logger.log_dir, "p-x") == [(3, 5.0)]


@pytest.mark.proves("6.2")
def test_experiment_is_a_summary_writer_in_the_same_file(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, flush_secs=1000, filename_suffix=".mine")
    writer = logger.experiment
    assert isinstance(writer, SummaryWriter)
    logger.log_metrics({"loss": 1.0}, step=0)
    writer.add_scalar("direct", 2.0, 1)
    writer.add_histogram("weights", np.arange(100.0), 2)
    writer.add_image("image", np.zeros((3, 4, 4), dtype=np.uint8), 2)
    writer.add_text("note", "hello", 2)
    logger.save()
    events = _events(logger.log_dir)
    assert events.Tags()["scalars"] == ["loss", "direct"]
    assert events.Tags()["histograms"] == ["weights"]
    assert events.Tags()["images"] == ["image"]
    (name,) = os.listdir(logger.log_dir)
    assert name.endswith(".mine")
    logger.finalize("success")
    writer.add_scalar("direct", 3.0, 2)  # a writer kept by the user opens a further file
    writer.close()
    assert _scalars(logger.log_dir, "direct") == [(1, 2.0), (2, 3.0)]


@pytest.mark.proves("6.2")
def test_hyperparameters_are_shown_and_written(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams(
        {"lr": 0.5, "net": {"width": 3, "act": nn.ReLU}, "layers": [1, 2], "flag": True, "none": None}
    )
    logger.log_hyperparams({"name": "tiny"})
    logger.save()
    values, metrics = _settings(logger.log_dir)
    assert values == {
        "lr": 0.5,
        "net/width": 3.0,
        "net/act": "torch.nn.modules.activation.ReLU",
        "layers": "[1, 2]",
        "flag": True,
        "name": "tiny",
    }
    assert metrics == ["hp_metric"]
    assert _scalars(logger.log_dir, "hp_metric") == [(0, -1.0)]
    known = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert known["net"] == {"width": 3, "act": "torch.nn.modules.activation.ReLU"}
    assert known["none"] is None
    logger.log_metrics({"hp_metric": 0.9}, step=7)
    logger.log_hyperparams({"later": 1})
    logger.finalize("success")
    assert _scalars(logger.log_dir, "hp_metric") == [(0, -1.0), (7, pytest.approx(0.9))]


@pytest.mark.proves("6.2")
@pytest.mark.parametrize(
    ("metrics", "expected"), [(0.5, {"hp_metric": 0.5}), ({"acc": 0.25, "f1": 1}, {"acc": 0.25, "f1": 1.0})]
)
def test_metrics_given_with_hyperparameters_replace_the_placeholder(
    tmp_path: Path, metrics: float | dict[str, float], expected: dict[str, float]
) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 1}, metrics=metrics, step=4)
    logger.finalize("success")
    assert _settings(logger.log_dir)[1] == list(expected)
    assert {tag: _scalars(logger.log_dir, tag) for tag in expected} == {t: [(4, v)] for t, v in expected.items()}


def test_the_placeholder_can_be_turned_off(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"lr": 1})
    logger.finalize("success")
    assert "hp_metric" not in _events(logger.log_dir).Tags()["scalars"]
    assert _settings(logger.log_dir) == ({"lr": 1.0}, [])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.head = nn.Linear(3, 1)
        self.layer[0].eval()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        y = self.head(self.layer(x))
        return y if scale is None else y * scale


@pytest.mark.proves("6.2")
@pytest.mark.parametrize("example", [torch.randn(2, 4), (torch.randn(2, 4), torch.ones(1))])
def test_a_graph_is_drawn_and_the_model_is_left_as_it_was(tmp_path: Path, example: object) -> None:
    logger, model = TensorBoardLogger(tmp_path, log_graph=True), Net()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    model.example_input_array = example  # type: ignore[assignment]
    logger.log_graph(model)
    logger.finalize("success")
    graph = _events(logger.log_dir).Graph()
    assert any("layer" in node.name for node in graph.node)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_a_graph_without_an_example_is_a_warning_and_without_the_flag_nothing(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    with pytest.warns(UserWarning, match="none was found. Set Net.example_input_array"):
        logger.log_graph(Net())
    with pytest.warns(UserWarning, match="it is of type dict"):
        logger.log_graph(Net(), {"x": torch.ones(2, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TensorBoardLogger(tmp_path).log_graph(Net())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.proves("6.2")
def test_sub_dir_is_expanded_and_lies_below_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHICH", "fold_1")
    logger = TensorBoardLogger(tmp_path, version="v", sub_dir="$WHICH")
    logger.log_metrics({"a": 1.0})
    logger.log_hyperparams({"x": 1})
    logger.finalize("success")
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "v" / "fold_1")
    assert "hparams.yaml" in os.listdir(logger.log_dir)


@pytest.mark.parametrize("clone", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_a_copy_goes_on_in_the_same_folder(tmp_path: Path, clone) -> None:  # type: ignore[no-untyped-def]
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    again = clone(logger)
    again.log_metrics({"a": 2.0}, step=1)
    again.finalize("success")
    logger.finalize("success")
    assert _scalars(logger.log_dir, "a") == [(0, 1.0), (1, 2.0)]


def test_what_is_no_number_and_a_folder_that_cannot_be_written_give_clear_errors(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"metric 'x' has shape \(3,\)"):
        logger.log_metrics({"x": torch.ones(3)})  # type: ignore[dict-item]
    with pytest.raises(MisconfigurationException, match="metric 'x/a' is 'b'"):
        logger.log_metrics({"x": {"a": "b"}})  # type: ignore[dict-item]
    (tmp_path / "file").touch()
    with pytest.raises(MisconfigurationException, match=r"TensorBoardLogger\(save_dir='.*file'\) cannot write"):
        TensorBoardLogger(tmp_path / "file").log_metrics({"a": 1.0})


def test_without_tensorboardx_the_install_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "fulmen_loggers.tensorboard.find_spec", lambda name: None if name == "tensorboardX" else found(name)
    )
    with pytest.raises(MissingPackage, match="pip install tensorboardX"):
        TensorBoardLogger(tmp_path)


def test_a_graph_without_tensorboard_names_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    logger.log_graph(Net(), torch.ones(2, 4))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it could not be imported
    with pytest.raises(MissingPackage, match=r"pip install tensorboard$"):
        logger.log_graph(Net(), torch.ones(2, 4))
    monkeypatch.undo()
    logger.finalize("success")

"""CometLogger on the real library, offline; what it wrote is read back from the archive that it leaves."""

from __future__ import annotations

import json
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fulmen_conformance import LoggerConformance
from fulmen_protocols.errors import MisconfigurationException

comet_ml = pytest.importorskip("comet_ml")

from fulmen_loggers import CometLogger  # noqa: E402  Comet wants to be first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

pytestmark = [pytest.mark.proves("6.6"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def messages(folder: Path) -> list[dict[str, Any]]:
    """Every message of the archives in ``folder``; ends the running experiment, which writes its archive."""
    running = comet_ml.get_running_experiment()
    if running is not None:
        running.end()
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.zip"), key=lambda path: path.stat().st_mtime):
        with zipfile.ZipFile(path) as archive:
            found += [json.loads(line) for line in archive.read("messages.json").splitlines()]
    return found


def metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for message in messages(folder):
        if message["type"] == "metric_msg":
            metric = message["payload"]["metric"]
            if metric.get("step") is not None:  # Comet's own, of the machine, have none
                found.setdefault(metric["metricName"], []).append((metric["step"], float(metric["metricValue"])))
    return found


def parameters(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for message in messages(folder):
        if message["type"] == "parameter_msg":
            param = message["payload"]["param"]
            found[param["paramName"]] = param["paramValue"]
    return found


def make(folder: Path, **arguments: Any) -> CometLogger:
    switches = ("log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details", "auto_output_logging")
    off = dict.fromkeys(switches[:-1], False)
    return CometLogger(
        online=False, offline_directory=str(folder), **{**off, "auto_output_logging": "off", **arguments}
    )


@pytest.fixture(autouse=True)
def _ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COMET_LOGGING_CONSOLE", "ERROR")
    yield
    running = comet_ml.get_running_experiment()
    if running is not None:
        running.end()


class TestCometConformance(LoggerConformance):
    @pytest.fixture
    def logger(self, tmp_path: Path) -> Any:
        return make(tmp_path)

    @pytest.fixture
    def read_metrics(self, tmp_path: Path) -> Callable[[], Mapping[str, list[tuple[int, float]]]]:
        return lambda: metrics(tmp_path)

    @pytest.fixture
    def read_hyperparams(self, tmp_path: Path) -> Callable[[], Mapping[str, object]]:
        return lambda: parameters(tmp_path)


def test_metrics_have_their_prefix_step_and_epoch(tmp_path: Path) -> None:
    logger = make(tmp_path, project="mine", prefix="run")

    logger.log_metrics({"loss": torch.tensor(0.5), "epoch": 2.0}, step=7)
    logger.finalize("success")

    [metric] = [m["payload"]["metric"] for m in messages(tmp_path) if m["type"] == "metric_msg" and "loss" in str(m)]
    assert metric["metricName"] == "run_loss"
    assert (metric["step"], metric["epoch"]) == (7, 2)
    assert (logger.name, logger.save_dir, logger.log_dir) == ("mine", str(tmp_path), None)


def test_a_model_is_recorded_as_text(tmp_path: Path) -> None:
    logger = make(tmp_path)

    logger.log_graph(torch.nn.Linear(3, 2))
    logger.save()

    graphs = [m["payload"]["graph"] for m in messages(tmp_path) if m["type"] == "graph"]
    assert graphs == ["Linear(in_features=3, out_features=2, bias=True)"]


def test_how_the_run_ended_is_noted(tmp_path: Path) -> None:
    logger = make(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)

    logger.finalize("failed")

    others = {m["payload"]["key"]: m["payload"]["value"] for m in messages(tmp_path) if m["type"] == "log_other"}
    assert others["status"] == "failed"


def test_the_key_is_known_before_anything_is_opened_and_kept_by_copies(tmp_path: Path) -> None:
    logger = make(tmp_path)

    copy = pickle.loads(pickle.dumps(logger))

    assert not list(tmp_path.iterdir())
    key = logger.version
    assert len(key) == 32
    assert logger.experiment.get_key() == key  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(logger)).version == key
    assert copy.version != key, "copied before anybody asked for the key, it is another experiment"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "append"}, r"mode='append'\) must be 'get_or_create', 'get' or 'create'"),
        ({"project_name": "x"}, r"project_name='x'\) is now called project"),
        ({"save_dir": "x"}, r"save_dir='x'\) is now called offline_directory"),
    ],
)
def test_wrong_arguments_are_named_with_the_fix(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        CometLogger(**arguments)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        MisconfigurationException, match=r"CometLogger\(offline_directory='.*file'\) cannot write .*Choose off"
    ):
        make(tmp_path / "file").log_metrics({"a": 1.0}, step=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.ones(3), r"metric 'x' has shape \(3,\)"), ("high", "metric 'x' is 'high' of type str")],
)
def test_what_is_no_number_is_named(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make(tmp_path).log_metrics({"x": value}, step=0)

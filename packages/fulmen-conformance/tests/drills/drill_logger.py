"""A minimal correct logger, and broken ones that LoggerConformance must catch."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from fulmen_conformance import LoggerConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from fulmen_protocols import Logger, LoggerStatus


class Good:
    """One JSON line a call."""

    name = "drill"
    version = 3

    def __init__(self, save_dir: Path) -> None:
        self.save_dir = str(save_dir)
        self.log_dir = str(save_dir / "run")
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.params: dict[str, object] = {}
        self.next_step = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((self.next_step if step is None else step, dict(metrics)))
        self.next_step += 1

    def log_hyperparams(self, params: Mapping[str, object]) -> None:
        self.params |= params

    def log_graph(self, model: nn.Module, input_array: object | None = None) -> None:
        pass

    def save(self) -> None:
        folder = Path(self.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metrics.jsonl").open("a") as file:
            for row in self.rows:
                file.write(json.dumps(row) + "\n")
        self.rows.clear()
        (folder / "params.json").write_text(json.dumps(self.params, default=str))

    def finalize(self, status: LoggerStatus) -> None:
        self.save()


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        step, row = json.loads(line)
        for name, value in row.items():
            metrics[name].append((step, value))
    return metrics


class TestGood(LoggerConformance):
    caught_by: ClassVar[set[str]] = set()
    backend: ClassVar[type[Good]] = Good

    @pytest.fixture
    def logger(self, tmp_path: Path) -> Logger:
        return self.backend(tmp_path)

    @pytest.fixture
    def read_metrics(self, tmp_path: Path) -> Callable[[], Mapping[str, list[tuple[int, float]]]]:
        return lambda: read(tmp_path)

    @pytest.fixture
    def read_hyperparams(self, tmp_path: Path) -> Callable[[], Mapping[str, object]]:
        return lambda: json.loads((tmp_path / "run" / "params.json").read_text())


def broken(backend: type[Good], *tests: str) -> type[LoggerConformance]:
    """The drill with another backend, which exactly ``tests`` must catch."""
    return type(f"Test{backend.__name__}", (TestGood,), {"backend": backend, "caught_by": set(tests)})


class NeverSaves(Good):
    def save(self) -> None:
        pass

    def finalize(self, status: LoggerStatus) -> None:
        super().save()


class LosesFailedRuns(Good):
    def finalize(self, status: LoggerStatus) -> None:
        if status != "failed":
            self.save()


class HeaderFromTheFirstRow(Good):
    header: tuple[str, ...] | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.header = self.header or tuple(metrics)
        super().log_metrics({name: value for name, value in metrics.items() if name in self.header}, step)


class KeyedByStep(Good):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self.rows = list(dict(self.rows).items())


class StepNoneIsZero(Good):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, -self.next_step if step is None else step)


class Rounds(Good):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: round(value, 4) for name, value in metrics.items()}, step)


class DropsNan(Good):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if value == value}, step)


class SmallBuffer(Good):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        del self.rows[:-1000]


class StartsAnew(Good):
    def finalize(self, status: LoggerStatus) -> None:
        for file in Path(self.log_dir).glob("metrics*"):
            file.unlink()
        self.save()


class FailsWhenEmpty(Good):
    def finalize(self, status: LoggerStatus) -> None:
        if not self.next_step:
            raise RuntimeError("nothing was logged")
        self.save()


class Pops(Good):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        metrics.pop("epoch", None)
        super().log_metrics(metrics, step)


class KeepsTheReference(Good):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self.rows[-1] = (self.rows[-1][0], metrics)


class JsonHyperparams(Good):
    def log_hyperparams(self, params: Mapping[str, object]) -> None:
        json.dumps(dict(params))
        super().log_hyperparams(params)


class OverwritesHyperparams(Good):
    def log_hyperparams(self, params: Mapping[str, object]) -> None:
        self.params = dict(params)


class VersionCounts(Good):
    @property
    def version(self) -> int:
        self.next_step += 1
        return self.next_step


class LogsElsewhere(Good):
    def __init__(self, save_dir: Path) -> None:
        super().__init__(save_dir)
        self.save_dir = str(save_dir / "somewhere" / "else")


class GraphInEvalMode(Good):
    def log_graph(self, model: nn.Module, input_array: object | None = None) -> None:
        model.eval()(input_array)


TestNeverSaves = broken(NeverSaves, "test_saved_metrics_are_there_with_their_steps")
TestLosesFailedRuns = broken(LosesFailedRuns, "test_finalize_writes_everything_whatever_the_status")
TestHeaderFromTheFirstRow = broken(
    HeaderFromTheFirstRow,
    "test_metrics_that_appear_later_do_not_lose_earlier_ones",
    "test_two_calls_at_one_step_are_both_kept",
    "test_logging_after_finalize_reopens_the_run",
)
TestKeyedByStep = broken(KeyedByStep, "test_two_calls_at_one_step_are_both_kept")
TestStepNoneIsZero = broken(StepNoneIsZero, "test_metrics_without_a_step_are_kept_in_order")
TestRounds = broken(Rounds, "test_values_are_kept_to_float32_and_so_are_nan_and_infinity")
TestDropsNan = broken(DropsNan, "test_values_are_kept_to_float32_and_so_are_nan_and_infinity")
TestSmallBuffer = broken(SmallBuffer, "test_many_rows_are_all_kept")
TestStartsAnew = broken(
    StartsAnew,
    "test_metrics_that_appear_later_do_not_lose_earlier_ones",
    "test_logging_after_finalize_reopens_the_run",
)
TestFailsWhenEmpty = broken(
    FailsWhenEmpty,
    "test_nothing_logged_is_nothing_to_fail_on",
    "test_hyperparameters_of_any_kind_are_taken",
    "test_hyperparameters_are_there_and_later_ones_add_to_them",
    "test_drawing_a_graph_leaves_the_model_as_it_was",
)
TestPops = broken(Pops, "test_what_it_is_given_is_left_alone")
TestKeepsTheReference = broken(KeepsTheReference, "test_what_it_was_given_may_change_later")
TestJsonHyperparams = broken(JsonHyperparams, "test_hyperparameters_of_any_kind_are_taken")
TestOverwritesHyperparams = broken(OverwritesHyperparams, "test_hyperparameters_are_there_and_later_ones_add_to_them")
TestVersionCounts = broken(VersionCounts, "test_its_name_and_version_stay_the_same")
TestLogsElsewhere = broken(LogsElsewhere, "test_its_log_dir_lies_below_its_save_dir")
TestGraphInEvalMode = broken(GraphInEvalMode, "test_drawing_a_graph_leaves_the_model_as_it_was")

"""Profilers by themselves and in a Trainer: what they count, what they write, and what they refuse."""

from __future__ import annotations

import json
import pstats
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerAction
from torch.utils.data import DataLoader

import fulmen
from fulmen.profilers import (
    AdvancedProfiler,
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
    XLAProfiler,
)
from fulmen_protocols import BackendUnavailable, MisconfigurationException, MissingPackage

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*validation is left out")


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(3, 1)

    def forward(self, batch: Any) -> Any:
        return self.second(self.first(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with self.trainer.profiler.profile("my action"):
            return self(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(torch.randn(2 * batches, 2), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def trainer(root: Path, **options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
    }
    return fulmen.Trainer(**{**quiet, **options})


# ---------------------------------------------------------------------- SimpleProfiler


@pytest.mark.proves("13.4")
def test_the_simple_profiler_keeps_the_duration_of_every_call_of_every_action() -> None:
    profiler = SimpleProfiler()
    for pause_s in (0.01, 0.03):
        with profiler.profile("outer"):
            time.sleep(pause_s)
            with profiler.profile("inner"):
                pass

    outer, inner = profiler.recorded_durations["outer"], profiler.recorded_durations["inner"]
    assert (len(outer), len(inner)) == (2, 2)
    assert outer[0] >= 0.01
    assert outer[1] >= 0.03
    assert all(o > i for o, i in zip(outer, inner, strict=True)), "an inner action counts in the outer one"
    assert profiler.current_actions == {}


@pytest.mark.proves("13.4")
def test_the_simple_report_has_mean_calls_total_and_share_and_without_extended_mean_and_total() -> None:
    for extended in (True, False):
        profiler = SimpleProfiler(extended=extended)
        profiler.recorded_durations.update({"often": [1.0, 2.0, 3.0], "long": [4.0]})
        profiler.start_time = time.perf_counter() - 20

        rows = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in profiler.summary().splitlines() if "|" in line
        ]

        if extended:
            assert rows[0] == ["Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"]
            assert rows[1][:3] == ["Total", "-", "4"]
            assert [row[:4] for row in rows[2:]] == [["often", "2.0", "3", "6.0"], ["long", "4.0", "1", "4.0"]]
            assert [float(row[4]) for row in rows[2:]] == pytest.approx([30.0, 20.0], abs=0.5)
        else:
            assert rows == [
                ["Action", "Mean duration (s)", "Total time (s)"],
                ["long", "4.0", "4.0"],
                ["often", "2.0", "6.0"],
            ]


@pytest.mark.proves("13.4")
@pytest.mark.parametrize("extended", [True, False])
def test_a_report_without_any_action_is_a_table_without_rows(extended: bool) -> None:
    assert "Profiler Report" in SimpleProfiler(extended=extended).summary()


@pytest.mark.proves("13.4")
def test_an_action_is_not_started_twice_nor_stopped_without_a_start() -> None:
    profiler = SimpleProfiler()
    profiler.start("a")
    with pytest.raises(ValueError, match=r"start\('a'\).*started and not stopped.*Stop it first"):
        profiler.start("a")
    with pytest.raises(ValueError, match=r"stop\('b'\).*not started. Running: 'a'.*Start it first"):
        profiler.stop("b")
    with pytest.raises(ValueError, match="started and not stopped"), profiler.profile("a"):
        pass
    assert list(profiler.current_actions) == ["a"], "the refused inner block must not stop the outer one"


@pytest.mark.proves("13.4")
def test_an_action_that_raises_is_stopped_and_the_error_goes_on() -> None:
    profiler = SimpleProfiler()
    with pytest.raises(RuntimeError, match="mine"), profiler.profile("a"):
        raise RuntimeError("mine")
    assert len(profiler.recorded_durations["a"]) == 1


# ---------------------------------------------------------------------- AdvancedProfiler


def work() -> int:
    return sum(leaf() for _ in range(5))


def leaf() -> int:
    return 1


def calls_in(text: str, function: str) -> int:
    found = re.search(rf"^\s*(\d+)\s.*\({function}\)$", text, re.MULTILINE)
    return 0 if found is None else int(found[1])


@pytest.mark.proves("13.4")
def test_the_advanced_profiler_reports_the_functions_of_an_action_and_of_those_nested_in_it() -> None:
    profiler = AdvancedProfiler()
    with profiler.profile("outer"):
        work()
        with profiler.profile("inner"):
            leaf()
        work()

    report = profiler.summary()
    outer, inner = report.partition("Profile stats for: outer")[2].split("Profile stats for: inner")
    assert (calls_in(outer, "work"), calls_in(outer, "leaf")) == (2, 11)
    assert (calls_in(inner, "work"), calls_in(inner, "leaf")) == (0, 1)


@pytest.mark.proves("13.4")
@pytest.mark.parametrize(("restriction", "lines"), [(2, 2), (0.5, None), (1.0, None)])
def test_line_count_restriction_is_a_number_of_lines_or_a_share(restriction: float, lines: int | None) -> None:
    def listed(profiler: AdvancedProfiler) -> int:
        with profiler.profile("a"):
            work()
        table = profiler.summary().partition("filename:lineno(function)")[2]
        return sum(bool(line.strip()) for line in table.splitlines())

    everything = listed(AdvancedProfiler())
    expected = lines if lines is not None else int(everything * restriction + 0.5)
    assert listed(AdvancedProfiler(line_count_restriction=restriction)) == expected


@pytest.mark.proves("13.4")
def test_dump_stats_writes_one_file_per_action_that_pstats_reads(tmp_path: Path) -> None:
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="report", dump_stats=True)
    profiler.setup("fit", local_rank=0)
    with profiler.profile("a:b"):
        work()
    profiler.describe()

    stats = pstats.Stats(str(tmp_path / "fit-report-0-a_b.prof"))
    calls = {name: count for (_, _, name), (_, count, _, _, _) in stats.stats.items()}  # type: ignore[attr-defined]  # its type does not say so
    assert (calls["work"], calls["leaf"]) == (1, 5)
    assert "leaf" in (tmp_path / "fit-report-0.txt").read_text()

    profiler.teardown("fit")
    assert profiler.summary() == "", "every call of a Trainer has its own report"


@pytest.mark.proves("13.4")
def test_the_advanced_profiler_refuses_what_cannot_work() -> None:
    for wrong in (1.5, -1, "ten"):
        with pytest.raises(MisconfigurationException, match=rf"line_count_restriction={wrong!r}.*number of lines"):
            AdvancedProfiler(line_count_restriction=wrong)  # type: ignore[arg-type]  # wrong on purpose
    profiler = AdvancedProfiler(dump_stats=True)
    with profiler.profile("a"):
        pass
    with pytest.raises(MisconfigurationException, match=r"dump_stats=True.*no folder.*dirpath="):
        profiler.summary()
    with pytest.raises(ValueError, match=r"stop\('b'\).*not started"):
        profiler.stop("b")


# ---------------------------------------------------------------------- in a Trainer


@pytest.mark.proves("13.4")
def test_without_a_profiler_the_users_own_actions_may_stay_in_the_code(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(Model(), loader(2))

    assert type(run.profiler) is PassThroughProfiler
    assert run.profiler.summary() == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.proves("9.3")
@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("simple", SimpleProfiler),
        ("Advanced", AdvancedProfiler),
        ("pytorch", PyTorchProfiler),
        (None, PassThroughProfiler),
    ],
)
def test_a_profiler_is_given_by_name(given: Any, kind: type, tmp_path: Path) -> None:
    assert type(trainer(tmp_path, profiler=given).profiler) is kind


@pytest.mark.proves("13.6")
def test_each_call_writes_a_report_named_by_stage_filename_and_rank(tmp_path: Path) -> None:
    profiler = SimpleProfiler(dirpath=tmp_path, filename='a/b:c*"d')
    run, model = trainer(tmp_path, profiler=profiler), Model()
    run.fit(model, loader(3), loader(2))
    run.validate(model, loader(2), verbose=False)
    run.test(model, loader(2), verbose=False)
    run.predict(model, loader(2))

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{stage}-a_b_c_d-0.txt" for stage in ("fit", "predict", "test", "validate")]
    report = (tmp_path / names[0]).read_text()
    assert report.startswith("FIT Profiler Report")
    assert re.search(r"\|  my action +\|", report)


@pytest.mark.proves("13.6")
def test_a_report_without_a_file_is_logged_and_one_without_a_folder_goes_to_the_trainers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="fulmen"):
        trainer(tmp_path, profiler="simple").fit(Model(), loader(2))
    assert "FIT Profiler Report" in caplog.text + capsys.readouterr().err

    trainer(tmp_path, profiler=SimpleProfiler(filename="here")).fit(Model(), loader(2))
    assert (tmp_path / "fit-here-0.txt").is_file()


@pytest.mark.proves("13.6")
def test_reports_of_one_stage_are_appended_also_behind_a_url() -> None:
    for _ in range(2):
        profiler = SimpleProfiler(dirpath="memory://profiles", filename="x")
        profiler.setup("fit", local_rank=1)
        profiler.describe()

    import fsspec  # type: ignore[import-untyped]  # it has no types

    text = fsspec.filesystem("memory").cat("/profiles/fit-x-1.txt").decode()
    assert text.count("FIT Profiler Report") == 2


class Recording:
    """Everything a profiler needs to have; it derives from nothing."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, action_name: str) -> None:
        self.events.append(f"start {action_name}")

    def stop(self, action_name: str) -> None:
        self.events.append(f"stop {action_name}")

    def profile(self, action_name: str) -> Any:
        raise NotImplementedError

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        self.events.append(f"setup {stage} {local_rank} {log_dir}")

    def teardown(self, stage: str | None) -> None:
        self.events.append(f"teardown {stage}")

    def summary(self) -> str:
        return ""

    def describe(self) -> None:
        self.events.append("describe")


class Plain(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch).sum()


@pytest.mark.proves("9.3")
@pytest.mark.proves("13.6")
def test_any_object_with_the_members_of_a_profiler_is_one_and_is_told_of_every_stage(tmp_path: Path) -> None:
    profiler = Recording()
    trainer(tmp_path, profiler=profiler).fit(Plain(), loader(2))

    assert f"setup fit 0 {tmp_path}" in profiler.events
    assert profiler.events[-2:] == ["describe", "teardown fit"]
    measured = [event for event in profiler.events if event.split()[0] in ("start", "stop")]
    assert measured.count("start run_training_batch") == measured.count("stop run_training_batch") == 2
    one_batch = measured[measured.index("start run_training_batch") : measured.index("stop run_training_batch") + 1]
    strategy, module = "[Strategy]SingleDeviceStrategy", "[LightningModule]Plain"
    actions = [
        f"{strategy}.training_step",
        f"{module}.optimizer_zero_grad",
        f"{strategy}.backward",
        f"{module}.optimizer_step",
    ]
    expected = [f"{edge} {action}" for action in actions for edge in ("start", "stop")]
    assert one_batch == ["start run_training_batch", *expected, "stop run_training_batch"]


@pytest.mark.proves("13.6")
def test_a_run_that_fails_leaves_no_action_open_and_the_profiler_can_be_used_again(tmp_path: Path) -> None:
    class Failing(Model):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("in the middle")

    for profiler in (SimpleProfiler(), PyTorchProfiler(), AdvancedProfiler()):
        run = trainer(tmp_path, profiler=profiler)
        with pytest.raises(RuntimeError, match="in the middle"):
            run.fit(Failing(), loader(3))
        if isinstance(profiler, SimpleProfiler):
            assert profiler.current_actions == {}
            assert len(profiler.recorded_durations["run_training_epoch"]) == 1
        run.fit(Model(), loader(3))


@pytest.mark.proves("13.6")
def test_training_is_the_same_with_a_profiler(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, data = Model(), loader(6)
    second, third = Model(), Model()
    second.load_state_dict(first.state_dict())
    third.load_state_dict(first.state_dict())
    for model, profiler in ((first, None), (second, "simple"), (third, "pytorch")):
        trainer(tmp_path, profiler=profiler, gradient_clip_val=0.5, accumulate_grad_batches=2).fit(model, data)

    for ours, theirs, other in zip(first.parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, other)


@pytest.mark.proves("13.6")
def test_a_manual_optimizers_step_is_an_action_of_its_own(tmp_path: Path) -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                self.manual_backward(self(batch).sum())
                optimizer.step()

    profiler = SimpleProfiler()
    trainer(tmp_path, profiler=profiler).fit(Manual(), loader(3))

    assert len(profiler.recorded_durations["optimizer_step"]) == 6
    assert len(profiler.recorded_durations["run_training_batch"]) == 3


@pytest.mark.proves("13.6")
def test_settings_changed_during_an_epoch_do_not_end_its_action(tmp_path: Path) -> None:
    class Change(fulmen.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.accumulate_grad_batches = 2

    profiler = SimpleProfiler()
    trainer(tmp_path, profiler=profiler, callbacks=[Change()], max_epochs=2).fit(Model(), loader(4))

    counts = {name: len(times) for name, times in profiler.recorded_durations.items()}
    assert counts["run_training_epoch"] == 2
    assert counts["[_TrainingEpochLoop].train_dataloader_next"] == 8


@pytest.mark.proves("9.18")
@pytest.mark.parametrize("profiler", ["simple", SimpleProfiler()])
def test_barebones_refuses_a_profiler(profiler: Any) -> None:
    with pytest.raises(ValueError, match=r"barebones=True turns profiler off.*drop one"):
        fulmen.Trainer(accelerator="cpu", barebones=True, profiler=profiler, max_epochs=1)


@pytest.mark.proves("9.3")
@pytest.mark.parametrize(
    ("profiler", "message"),
    [
        ("simpel", r"profiler='simpel'.*Did you mean 'simple'\?.*Allowed: 'simple', 'advanced', 'pytorch', 'xla'"),
        (SimpleProfiler, "profiler is the class SimpleProfiler. Give a name"),
        (3, "profiler is a int, which lacks .*start.*Give a name"),
    ],
    ids=["name", "class", "number"],
)
def test_what_is_no_profiler_is_refused(profiler: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, profiler=profiler)


@pytest.mark.proves("13.5")
def test_the_xla_profiler_says_what_it_would_need(tmp_path: Path) -> None:
    for make in (XLAProfiler, lambda: XLAProfiler(port=1), lambda: trainer(tmp_path, profiler="xla")):
        with pytest.raises(
            MissingPackage, match=r"XLAProfiler\(port=\d+\).*pip install 'fulmen\[xla\]'.*profiler='pytorch'"
        ):
            make()


@pytest.mark.proves("13.5")
@pytest.mark.parametrize("port", [0, 70_000, "9012", True])
def test_the_xla_profiler_refuses_what_is_no_port(port: Any) -> None:
    with pytest.raises(MisconfigurationException, match=rf"XLAProfiler\(port={port!r}\).*1 and 65535"):
        XLAProfiler(port=port)


@pytest.mark.proves("13.4")
def test_a_users_own_profiler_needs_only_start_and_stop(tmp_path: Path) -> None:
    class Mine(Profiler):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def start(self, action_name: str) -> None:
            self.names.add(action_name)

        def stop(self, action_name: str) -> None:
            pass

    profiler = Mine()
    trainer(tmp_path, profiler=profiler).fit(Model(), loader(1))
    assert {"my action", "run_training_batch"} <= profiler.names


def test_explain_names_the_profiler(tmp_path: Path) -> None:
    assert "SimpleProfiler from fulmen" in trainer(tmp_path, profiler="simple").explain()


# ---------------------------------------------------------------------- PyTorchProfiler


def traces(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The events of each trace, by the step function that is recorded."""
    found = {}
    for path in folder.glob("*.pt.trace.json"):
        step = path.name.split(".")[1]
        assert step not in found, "one trace for each step function"
        found[step] = json.loads(path.read_text())["traceEvents"]
    return found


def named(events: list[dict[str, Any]], prefix: str) -> list[str]:
    return [
        str(event["name"]) for event in events if str(event.get("name", "")).startswith(prefix) and event["ph"] == "X"
    ]


@pytest.mark.proves("13.5")
def test_by_default_one_step_is_left_out_one_warms_up_and_three_are_recorded_for_each_step_function(
    tmp_path: Path,
) -> None:
    run, model = trainer(tmp_path, profiler=PyTorchProfiler(dirpath=tmp_path), max_epochs=2), Model()
    run.fit(model, loader(8), loader(6))
    in_fit = traces(tmp_path)

    assert sorted(in_fit) == ["training_step", "validation_step"]
    for step, events in in_fit.items():
        assert sorted(set(named(events, "ProfilerStep#"))) == ["ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"]
        assert len(named(events, f"[pl][profile][Strategy]SingleDeviceStrategy.{step}")) == 3
    assert len(named(in_fit["training_step"], "[pl][profile][LightningModule]Model.optimizer_step")) == 3
    assert len(named(in_fit["training_step"], "[pl][profile]my action")) == 3

    for path in tmp_path.glob("*.json"):
        path.unlink()
    run.test(model, loader(6), verbose=False)
    run.predict(model, loader(6))
    assert sorted(traces(tmp_path)) == ["predict_step", "test_step"], "every stage counts anew"


@pytest.mark.proves("13.5")
@pytest.mark.parametrize("batches", [1, 4])
def test_an_epoch_too_short_for_the_default_schedule_is_recorded_from_its_first_step(
    batches: int, tmp_path: Path
) -> None:
    trainer(tmp_path, profiler=PyTorchProfiler(dirpath=tmp_path)).fit(Model(), loader(batches), loader(8))

    found = traces(tmp_path)
    assert len(set(named(found["training_step"], "ProfilerStep#"))) == batches
    assert len(set(named(found["validation_step"], "ProfilerStep#"))) == 3


@pytest.mark.proves("13.5")
def test_the_sanity_check_is_not_counted(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(dirpath=tmp_path, schedule=lambda step: ProfilerAction.RECORD_AND_SAVE)
    seen: list[str] = []

    class Watching(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(f"{self.trainer.sanity_checking} {len(list(tmp_path.glob('*.json')))}")

    trainer(tmp_path, profiler=profiler, num_sanity_val_steps=2).fit(Watching(), loader(1), loader(2))

    assert seen[:2] == ["True 0", "True 0"]
    assert sorted(traces(tmp_path)) == ["training_step", "validation_step"]


@pytest.mark.proves("13.5")
def test_a_recording_ends_where_validation_begins(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(
        dirpath=tmp_path, schedule=torch.profiler.schedule(wait=0, warmup=1, active=50), record_module_names=False
    )
    trainer(tmp_path, profiler=profiler, val_check_interval=3).fit(Model(), loader(6), loader(4))

    found = traces(tmp_path)
    assert set(named(found["training_step"], "ProfilerStep#")) == {"ProfilerStep#1", "ProfilerStep#2"}
    assert not named(found["training_step"], "[pl][profile][Strategy]SingleDeviceStrategy.validation_step")
    assert len(set(named(found["validation_step"], "ProfilerStep#"))) == 3


@pytest.mark.proves("13.5")
def test_a_recording_that_only_warmed_up_goes_on_at_the_next_step(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(dirpath=tmp_path, schedule=torch.profiler.schedule(wait=0, warmup=1, active=1))
    trainer(tmp_path, profiler=profiler, val_check_interval=1).fit(Model(), loader(3), loader(1))

    assert set(named(traces(tmp_path)["training_step"], "ProfilerStep#")) == {"ProfilerStep#1"}


@pytest.mark.proves("13.5")
def test_submodules_are_labelled_in_the_trace_unless_that_is_turned_off(tmp_path: Path) -> None:
    for labelled in (True, False):
        folder = tmp_path / str(labelled)
        model = Model()
        profiler = PyTorchProfiler(dirpath=folder, record_module_names=labelled)
        trainer(tmp_path, profiler=profiler).fit(model, loader(5))

        labels = set(named(traces(folder)["training_step"], "[pl][module]"))
        linear = "[pl][module]torch.nn.modules.linear.Linear: "
        assert labels == ({f"{linear}first", f"{linear}second"} if labelled else set())
        assert not model.first._forward_hooks
        assert not model.first._forward_pre_hooks


@pytest.mark.proves("13.5")
def test_the_report_is_a_table_of_operators_for_each_step_function(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="ops", row_limit=-1, export_to_chrome=False)
    trainer(tmp_path, profiler=profiler).fit(Model(), loader(6), loader(6))

    report = (tmp_path / "fit-ops-0.txt").read_text()
    assert [path.suffix for path in tmp_path.iterdir()] == [".txt"], "no trace was asked for"
    for step in ("training_step", "validation_step"):
        assert f"Profile stats for: [Strategy]SingleDeviceStrategy.{step} rank: 0" in report
    training, validation = report.split("SingleDeviceStrategy.validation_step rank: 0")
    assert "aten::linear" in training
    assert "aten::linear" in validation
    assert "AddmmBackward0" in training, "a recorded step holds its backward pass"
    assert "AddmmBackward0" not in validation
    assert profiler.function_events is not None


@pytest.mark.proves("13.5")
def test_rows_are_limited_and_sorted_as_asked(tmp_path: Path) -> None:
    def rows(**options: Any) -> list[list[str]]:
        profiler = PyTorchProfiler(export_to_chrome=False, record_module_names=False, **options)
        profiler.start("training_step")
        for _ in range(3):
            profiler.stop("training_step")
            profiler.start("training_step")
            torch.ones(2) + torch.ones(2)
            torch.ones(2)
        profiler.stop("training_step")
        parts = profiler.summary().split("\n")
        rules = [i for i, line in enumerate(parts) if line.startswith("---")]
        return [line.split() for line in parts[rules[1] + 1 : rules[2]]]

    everything: dict[str, Any] = {"schedule": lambda _: ProfilerAction.RECORD}
    assert len(rows(row_limit=2, **everything)) == 2
    by_count = [int(row[-1]) for row in rows(sort_by_key="count", row_limit=-1, **everything)]
    assert len(by_count) > 3
    assert by_count == sorted(by_count, reverse=True)
    wide = rows(table_kwargs={"max_name_column_width": 10}, row_limit=-1, **everything)
    assert any(row[0].endswith("...") for row in wide)


@pytest.mark.proves("13.5")
def test_operators_can_be_told_apart_by_the_shapes_of_their_inputs() -> None:
    def additions(**options: Any) -> int:
        profiler = PyTorchProfiler(export_to_chrome=False, row_limit=-1, **options)
        profiler._schedule = lambda _: ProfilerAction.RECORD
        with profiler.profile("training_step"):
            for size in (2, 3, 4):
                torch.ones(size) + torch.ones(size)
        return sum("aten::add" in line for line in profiler.summary().splitlines())

    assert additions() == 1
    assert additions(group_by_input_shapes=True) == 3


@pytest.mark.proves("13.5")
def test_stacks_for_a_flame_graph_and_a_handler_of_ones_own(tmp_path: Path) -> None:
    stacks = PyTorchProfiler(dirpath=tmp_path, export_to_chrome=False, export_to_flame_graph=True)
    trainer(tmp_path, profiler=stacks).fit(Model(), loader(5))
    written = list(tmp_path.iterdir())
    assert [path.name for path in written] == ["fit-0-[Strategy]SingleDeviceStrategy.training_step.stack"]

    got: list[Any] = []
    own = PyTorchProfiler(dirpath=tmp_path, on_trace_ready=got.append)
    trainer(tmp_path, profiler=own).fit(Model(), loader(5))
    assert [type(each) for each in got] == [torch.profiler.profile]
    assert list(tmp_path.iterdir()) == written, "the handler takes the place of writing traces"


@pytest.mark.proves("13.5")
def test_a_trace_can_be_written_behind_a_url() -> None:
    import fsspec

    profiler = PyTorchProfiler(dirpath="memory://traces", schedule=lambda _: ProfilerAction.RECORD)
    with profiler.profile("training_step"):
        torch.ones(1)
    profiler.summary()

    (path,) = fsspec.filesystem("memory").ls("/traces", detail=False)
    assert named(json.loads(fsspec.filesystem("memory").cat(path))["traceEvents"], "ProfilerStep#")


@pytest.mark.proves("13.5")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nvtx_marks_need_a_cuda_device() -> None:
    with pytest.raises(BackendUnavailable, match=r"emit_nvtx=True.*no CUDA device.*Leave emit_nvtx at False"):
        PyTorchProfiler(emit_nvtx=True)


@pytest.mark.proves("13.5")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sort_by_key": "cpu_tme"}, r"sort_by_key='cpu_tme'. Did you mean 'cpu_time'\? Allowed: .*count"),
        ({"schedule": 3}, r"schedule=3, which cannot be called. Give torch.profiler.schedule"),
        ({"schedule": lambda _: 1}, "schedule returned 1 for step 0. Return a torch.profiler.ProfilerAction"),
        ({"with_stak": True}, r"unknown argument 'with_stak'. Did you mean 'with_stack'\?"),
        ({"table_kwargs": {"sort_by": "x"}}, "'sort_by' in table_kwargs. Give it as .*sort_by_key"),
        ({"table_kwargs": {"headr": "x"}}, r"unknown key 'headr' in table_kwargs. Did you mean 'header'\?"),
        ({"group_by_input_shapes": True, "record_shapes": False}, "group_by_input_shapes=True and record_shapes=False"),
    ],
)
def test_arguments_of_the_pytorch_profiler_that_cannot_work_are_refused(options: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        PyTorchProfiler(**options)


@pytest.mark.proves("13.5")
def test_a_trace_without_a_folder_is_a_warning() -> None:
    profiler = PyTorchProfiler(schedule=lambda _: ProfilerAction.RECORD)
    with profiler.profile("training_step"):
        torch.ones(1)
    with pytest.warns(UserWarning, match="no folder to write its trace to. Give dirpath="):
        profiler.summary()


@pytest.mark.cuda
@pytest.mark.proves("13.5")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_time_on_the_device_is_recorded_and_sorts_the_table_where_there_is_one(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(dirpath=tmp_path, row_limit=-1)
    model, batch = nn.Linear(512, 512).cuda(), torch.randn(64, 512, device="cuda")
    for _ in range(6):
        with profiler.profile("training_step"):
            model(batch).sum().backward()
    report = profiler.summary()

    assert profiler._sort_by_key == "cuda_time_total"
    assert "CUDA total" in report
    (trace,) = traces(tmp_path).values()
    assert any(event.get("cat") == "kernel" for event in trace)


@pytest.mark.cuda
@pytest.mark.proves("13.5")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nvtx_marks_are_set_while_the_profiler_is_in_use_and_nothing_is_recorded() -> None:
    profiler = PyTorchProfiler(emit_nvtx=True)
    with profiler.profile("training_step"):
        assert torch.autograd._profiler_enabled()
        torch.ones(2, device="cuda").sum()
    assert profiler.summary() == ""
    profiler.teardown("fit")
    assert not torch.autograd._profiler_enabled()

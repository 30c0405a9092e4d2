"""The callbacks that save, stop and write predictions do the same as Lightning's, run beside them in this test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).with_name("checkpoint_runner.py")


def load_runner() -> Any:
    spec = importlib.util.spec_from_file_location("checkpoint_runner", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = load_runner()

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="Lightning is not installed to compare with"
)


@cache
def both() -> tuple[dict[str, Any], dict[str, Any]]:
    """What fulmen and Lightning leave behind; the two run side by side."""
    started = [
        subprocess.Popen(
            [sys.executable, str(RUNNER), library], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for library in ("fulmen", "lightning.pytorch")
    ]
    found: list[dict[str, Any]] = []
    for process in started:
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, err[-3000:]
        line = next(line for line in out.splitlines() if line.startswith("RESULT"))
        found.append(json.loads(line.removeprefix("RESULT")))
    return found[0], found[1]


# Where fulmen deliberately leaves something else: the files here, and there. See docs/differences.md.
DIFFERENT: dict[str, tuple[list[str], list[str]]] = {
    "equal names": (["c/model-v1.ckpt", "c/model-v2.ckpt", "c/model-v3.ckpt", "c/model.ckpt"], ["c/model.ckpt"]),
    "quick": ([], ["c/last.ckpt"]),
}


@pytest.mark.proves("5.2", "5.16", "5.17", "5.19", "5.20", "5.21", "5.22", "5.23", "5.24", "5.27", "5.28", "11.7")
@pytest.mark.parametrize("case", runner.SAVING)
def test_model_checkpoint_leaves_the_same_files_ranking_and_state(case: str) -> None:
    ours, theirs = (library["saving"][case] for library in both())

    if case in DIFFERENT:
        assert (sorted(ours["files"]), sorted(theirs["files"])) == DIFFERENT[case]
        return
    assert ours["files"] == theirs["files"]
    assert ours["ranking"] == theirs["ranking"]


@pytest.mark.proves("5.18")
def test_the_default_folder_is_the_same() -> None:
    ours, theirs = (library["saving_in_default_places"] for library in both())

    assert ours == theirs
    assert len({case["folder"] for case in ours.values()}) == 3


@pytest.mark.proves("5.28")
def test_a_resumed_run_goes_on_with_the_same_ranking() -> None:
    ours, theirs = (library["resuming"] for library in both())

    assert ours == theirs


@pytest.mark.proves("11.6")
@pytest.mark.parametrize("case", range(len(runner.stopping_cases())))
def test_early_stopping_decides_the_same(case: int) -> None:
    ours, theirs = (library["stopping"][case] for library in both())

    assert ours == theirs, runner.stopping_cases()[case]


@pytest.mark.proves("11.6")
def test_the_cases_of_early_stopping_end_for_every_reason_and_for_none() -> None:
    assert {case["reason"] for case in both()[0]["stopping"]} == {0, 1, 2, 3, 4}


@pytest.mark.proves("11.6")
def test_early_stopping_goes_on_counting_after_a_resume() -> None:
    ours, theirs = (library["stopping_state_survives"] for library in both())

    assert ours == theirs


@pytest.mark.proves("5.26")
def test_a_run_that_fails_saves_goes_on_and_cleans_up_alike() -> None:
    ours, theirs = (library["failing"] for library in both())

    assert ours == theirs
    assert ours["failed"][1], "something was saved"


@pytest.mark.proves("5.30")
def test_a_path_that_is_set_on_the_trainer_is_resumed_from() -> None:
    ours, theirs = (library["user_managed_path"] for library in both())

    assert ours == theirs


@pytest.mark.proves("11.16")
def test_prediction_writers_are_given_the_same() -> None:
    ours, theirs = (library["writing"] for library in both())

    for case, calls in theirs.items():
        assert ours[case] == calls, case


@pytest.mark.proves("5.16", "11.5", "11.6", "11.7")
def test_constructors_class_attributes_defaults_and_order_are_the_same() -> None:
    ours, theirs = (library["surface"] for library in both())

    for name, value in theirs.items():
        assert ours[name] == value, name

"""The examples of loops of one's own, as a person runs them: shortly, and to the score that each states."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tools.examples import EXAMPLES
from tools.examples import run as run_whole

SCRIPTS = Path(__file__).parent.parent / "docs" / "examples" / "fabric"


def run(folder: Path, name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def number(output: str, line: str) -> float:
    [found] = [each for each in output.splitlines() if line in each]
    return float(re.findall(r"\d+\.\d+", found)[0])


@pytest.mark.slow
def test_the_classifier_reaches_its_score_after_a_stop_too(tmp_path: Path) -> None:
    stopped = run(tmp_path, "image_classifier", "--minutes", "0.02")
    output = run(tmp_path, "image_classifier")

    assert "Saved after step" in stopped
    assert "Going on after step" in output
    assert number(output, "Test accuracy") >= 97


@pytest.mark.slow
def test_cross_validation_reaches_its_score_and_resumes_in_a_fold(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", "kfold", "--folds", "3", "--max-epochs", "6")
    run(tmp_path, "kfold", "--folds", "3", "--max-epochs", "6", "--max-steps", "150")
    resumed = run(tmp_path, "kfold", "--folds", "3", "--max-epochs", "6")

    assert "Going on in fold 2 after step 150" in resumed
    assert whole.splitlines()[-1] == resumed.splitlines()[-1]
    assert number(whole, "Accuracy over 3 folds") >= 94


@pytest.mark.slow
def test_the_adversarial_and_the_reinforced_loop_run(tmp_path: Path) -> None:
    assert "clusters drawn" in run(tmp_path, "gan", "--max-epochs", "1")
    assert "Poles stand for" in run(tmp_path, "actor_critic", "--max-updates", "5")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_the_language_model_runs_on_one_process_and_on_two(tmp_path: Path, strategy: str) -> None:
    devices = "1" if strategy == "auto" else "2"
    output = run(tmp_path, "language_model", "--max-steps", "6", "--devices", devices, "--strategy", strategy)

    assert number(output, "Held-out loss") < 5


@pytest.mark.parametrize(
    "name",
    [
        "fabric/image_classifier",
        pytest.param("fabric/kfold", marks=pytest.mark.slow),
        pytest.param("fabric/gan", marks=pytest.mark.slow),
        pytest.param("fabric/actor_critic", marks=pytest.mark.slow),
        pytest.param("fabric/language_model", marks=pytest.mark.slow),  # two processes, sharded
    ],
)
def test_an_example_reaches_the_score_that_it_states(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    [example] = [one for one in EXAMPLES if one.name == name]

    run_whole(example, tmp_path, seconds=290)


def test_every_example_is_one_readable_file() -> None:
    files = sorted(SCRIPTS.glob("*.py"))

    assert len(files) == 5
    for file in files:
        assert len(file.read_text().splitlines()) < 150, file.name

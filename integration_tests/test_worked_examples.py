"""The worked examples, as a person runs them: shortly to see that they run, and whole to see what they reach."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def run(folder: Path, name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(folder), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return done.stdout


def numbers(output: str, line: str) -> list[float]:
    [found] = [each for each in output.splitlines() if line in each]
    return [float(number) for number in re.findall(r"\d+\.\d+", found)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("finetuning", ("--max-epochs", "2")),
        pytest.param("gan", ("--max-epochs", "2"), marks=pytest.mark.slow),
        pytest.param("language_model", ("--max-steps", "12"), marks=pytest.mark.slow),
    ],
)
def test_an_example_runs_and_leaves_its_curves(tmp_path: Path, name: str, arguments: tuple[str, str]) -> None:
    run(tmp_path, name, *arguments)


@pytest.mark.slow
def test_finetuning_the_backbone_beats_a_head_on_a_frozen_one(tmp_path: Path) -> None:
    head_alone, finetuned = numbers(run(tmp_path, "finetuning"), "All ten")

    assert finetuned >= 93
    assert finetuned > head_alone + 1


@pytest.mark.slow
def test_the_gan_makes_digits_of_every_kind_that_a_classifier_recognizes(tmp_path: Path) -> None:
    output = run(tmp_path, "gan")

    _, of_noise = numbers(output, "Recognized with 90 %")[-2:]
    recognized = numbers(output, "Recognized with 90 %")[0]
    [counts] = re.findall(r"0 to 9: \[(.*)\]", output)
    assert recognized >= 70
    assert of_noise <= 30
    assert min(int(count) for count in counts.split(",")) >= 10, "each of the ten digits among a thousand"


@pytest.mark.slow
def test_the_language_model_does_better_than_counting_pairs(tmp_path: Path) -> None:
    loss, _, pairs = numbers(run(tmp_path, "language_model"), "Held-out loss")

    assert loss <= 1.8
    assert pairs >= 2.2

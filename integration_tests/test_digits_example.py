"""The example that `nox -s demo` runs, as a person runs it: a script in a folder of its own."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "examples" / "digits.py"


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracy(output: str) -> float:
    [percent] = re.findall(r"Accuracy on the 360 held-out digits: ([\d.]+)%", output)
    return float(percent)


def test_the_digits_example_learns_reports_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = run(tmp_path)

    out = tmp_path / "demo_output" / "digits"
    assert accuracy(first) >= 97
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 2, "the page holds its pictures itself"
    assert 'src="http' not in page
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "misclassified.png").read_bytes().startswith(b"\x89PNG")
    assert list(out.glob("tensorboard/version_0/events.out.tfevents.*"))
    assert list(out.glob("best-epoch=*.ckpt"))

    second = run(tmp_path, "--max-epochs", "32")

    assert "30 epochs done, training until 32" in second
    with (out / "csv" / "version_1" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        validated = [int(row["epoch"]) for row in csv.DictReader(file) if row["val_acc"]]
    assert validated == [30, 31], "the second run validates after the epochs that it adds, counted from 0"


@pytest.mark.slow
def test_the_digits_example_trains_on_two_processes_with_no_line_changed(tmp_path: Path) -> None:
    output = run(tmp_path, "--devices", "2", "--max-epochs", "8")

    assert accuracy(output) >= 95

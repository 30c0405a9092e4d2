"""On several GPUs, too, a row of logged values makes no host wait for its device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_row_after_every_step_waits_for_no_device_and_holds_the_mean_over_ranks(
    strategy: str, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("rows_on_gpus_script.py")
    done = subprocess.run(
        [sys.executable, str(script), strategy, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    rows = [row for row in found["rows"] if "mean" in row]
    first, second = found["losses"]
    assert [row["own"] for row in rows] == pytest.approx(first)
    assert [row["mean"] for row in rows] == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    assert first != second

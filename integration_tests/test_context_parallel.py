"""torch's context parallelism with the model-parallel strategy: one sequence on two GPUs, against one GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path as _Path

SCRIPT = Path(__file__).with_name("context_parallel_script.py")


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: torch has no rule for it on the CPU")
def test_two_devices_that_share_a_sequence_train_as_one(tmp_path: _Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["way"] > 0.01
    assert found["distance"] < 5e-2  # bfloat16, and attention summed in another order

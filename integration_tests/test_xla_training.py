"""Training on the real torch-xla, against the same training on the CPU: `nox -s xla` runs this."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fulmen_protocols.cli import main

if find_spec("torch_xla") is None or os.environ.get("PJRT_DEVICE") is None:
    pytest.skip("needs torch_xla and PJRT_DEVICE=CPU", allow_module_level=True)

ROOT = Path(__file__).parent.parent
SCENARIOS = {
    "auto": (1, "SingleDeviceXLAStrategy"),
    "xla": (1, "XLAStrategy"),
    "xla_spmd": (4, "XLASPMDStrategy"),
    "spmd-sharded": (4, "XLASPMDStrategy"),
    "spmd-dcp": (4, "XLASPMDStrategy"),
}


def run(scenario: str, folder: Path, devices: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "integration_tests.xla_runner", scenario, str(folder)]
    environment = {**os.environ, "CPU_NUM_DEVICES": str(devices), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.proves("2.1", "3.3", "4.1", "4.2", "4.3", "4.31", "5.14")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_training_saving_resuming_and_predicting_give_the_numbers_of_the_cpu(scenario: str, tmp_path: Path) -> None:
    devices, strategy = SCENARIOS[scenario]

    found = run(scenario, tmp_path, devices)

    ours, theirs = found["xla"]["trainer"], found["cpu"]["trainer"]
    assert ours["strategy"] == found["xla"]["fabric"]["strategy"] == strategy
    assert ours["precision"] == "XLAPrecision"
    assert ours["tied"]
    assert ours["devices"] == ["xla:0"]
    for key in ("losses", "resumed", "predicted", "val"):
        assert ours[key] == pytest.approx(theirs[key], rel=2e-4, abs=2e-5), key
    assert ours["resumed"] == pytest.approx(ours["losses"][len(ours["losses"]) // 2 :], rel=1e-5, abs=1e-6)
    loop, expected = found["xla"]["fabric"], found["cpu"]["fabric"]
    assert loop["losses"] == pytest.approx(expected["losses"], rel=2e-4, abs=2e-5)
    assert loop["again"] == pytest.approx(loop["losses"][2:], rel=1e-5, abs=1e-6)
    assert loop["step"] == 2

    last = tmp_path / "xla" / "last.ckpt"
    assert last.is_dir() == ours["folder"] == (scenario in ("spmd-sharded", "spmd-dcp"))
    weights = consolidated(last, tmp_path) if scenario != "spmd-dcp" else None
    if weights is not None:
        theirs_last = torch.load(tmp_path / "cpu" / "last.ckpt", weights_only=True)["state_dict"]
        assert list(weights) == list(theirs_last)
        for name, value in weights.items():
            assert value.device.type == "cpu"
            torch.testing.assert_close(value, theirs_last[name], rtol=1e-3, atol=1e-4)


def consolidated(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint; a folder is made one file first, by the command line."""
    file = path
    if path.is_dir():
        file = folder / "whole.ckpt"
        assert main(["consolidate", str(path), "--output_file", str(file)]) == 0
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["state_dict"]
    return state


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.proves("13.5")
def test_the_profiler_s_server_listens_and_steps_are_marked(tmp_path: Path) -> None:
    found = run("profiler", tmp_path, 1)

    assert found == {"listens": True, "numbered": {"validation_step": 6}, "open": []}


@pytest.mark.slow
def test_a_run_on_the_cpu_leaves_torch_as_it_is_where_torch_xla_is_installed_and_no_tpu() -> None:
    code = """
import os, sys, torch
before = torch.nn.utils.clip_grad_norm_, torch.nn.GRU
import fulmen
from fulmen.demos import BoringModel
trainer = fulmen.Trainer(accelerator="cpu", fast_dev_run=True, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(BoringModel())
assert "torch_xla" not in sys.modules
assert "PJRT_DEVICE" not in os.environ
assert (torch.nn.utils.clip_grad_norm_, torch.nn.GRU) == before
"""
    environment = {name: value for name, value in os.environ.items() if name != "PJRT_DEVICE"}

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr

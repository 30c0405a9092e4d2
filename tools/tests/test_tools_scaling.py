"""The scaling measurement: its order, its budget, its table, and a small run of it on CPU ranks."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tools.bench import scaling
from tools.workspace import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def asked(**changed: Any) -> argparse.Namespace:
    base: dict[str, Any] = {
        "devices": [1, 2, 4, 8],
        "accelerator": "cuda",
        "workloads": scaling.WORKLOADS,
        "contestants": scaling.CONTESTANTS,
        "rounds": 1,
        "budget": 480.0,
        "measure": True,
        "eager": False,
        "resume": True,
        "apart": False,
    }
    return argparse.Namespace(**{**base, **changed})


def shown(waves: list[list[scaling.Launch]]) -> list[str]:
    return [
        "; ".join(f"{one.action} {one.workload} {one.devices}@{one.first_device}" for one in wave) for wave in waves
    ]


def test_smaller_numbers_of_gpus_share_the_host_after_the_largest() -> None:
    assert shown(scaling.waves(asked())) == [
        "measure gpt2-ddp 8@0",
        "measure gpt2-ddp 4@0; measure gpt2-ddp 2@4; measure gpt2-ddp 1@6",
        "measure 1b-fsdp 8@0",
        "measure 1b-fsdp 4@0; measure 1b-fsdp 2@4; measure 1b-fsdp 1@6",
        "measure 7b-fsdp 8@0",
        "measure 7b-2d 8@0",
        "save 1b-fsdp 8@0",
        "resume 1b-fsdp 4@0; resume 1b-fsdp 2@4",
        "measure 7b-fsdp 4@0; measure 7b-fsdp 2@4",
        "measure 7b-2d 4@0",
    ]
    one_gpu = scaling.waves(asked(devices=[1]))
    assert shown(one_gpu) == ["measure gpt2-ddp 1@0", "measure 1b-fsdp 1@0"]  # 7B needs more, resuming too
    eager = scaling.waves(asked(devices=[4], workloads=["gpt2-ddp", "7b-2d"], measure=False, eager=True))
    assert shown(eager) == ["eager gpt2-ddp 4@0", "eager 7b-2d 4@0"]
    apart = scaling.waves(asked(apart=True, workloads=["gpt2-ddp"]))
    assert [len(wave) for wave in apart] == [1, 1, 1, 1]


def test_what_the_budget_does_not_allow_is_said_to_be_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = scaling.Runner(asked(budget=10.0), tmp_path)
    for wave in scaling.waves(asked(workloads=["gpt2-ddp"])):
        runner.wave(wave)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["devices"] for row in rows] == [8, 4, 2, 1]
    assert all("of the budget left" in row["not_run"] for row in rows)
    scaling.table(rows, {}, markdown=False, tiny=False)
    assert "not run: measure gpt2-ddp on 8: " in capsys.readouterr().out


def test_the_table_has_speed_efficiency_and_memory_by_their_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    def row(devices: int, by: str, step_s: float, **more: Any) -> dict[str, Any]:
        base = {"action": "measure", "workload": "1b-fsdp", "devices": devices, "contestant": by, "step_s": step_s}
        return {**base, "peak_bytes": 2.0**31, "device": "NVIDIA H100", **more}

    stalls = {"stall_s": 0.25, "next_stall_s": 0.125}
    rows = [row(1, "fulmen", 0.8), row(8, "fulmen", 1.0, **stalls), row(8, "raw", 0.9)]
    rows.append({"action": "eager", "workload": "1b-fsdp", "devices": 8, "eager_peak_bytes": 2.0**32})
    rows.append({"action": "plan", "workload": "1b-fsdp", "devices": 8, "peak_bytes": 4.4 * 2**30, "at_peak": {}})
    scaling.table(rows, {"NVIDIA H100": 1e15}, markdown=True, tiny=False)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1b-fsdp | 8 | fulmen")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3:6] == ["1000.0", "16,384", "0.900"]  # 8 sequences of 2048 tokens a second
    scaling.table(rows, {}, markdown=True, tiny=False, batch=8)
    assert "| 16,384 | 0.900 |" in capsys.readouterr().out
    assert cells[7:] == ["0.800 (from 1)", "2.00", "4.00", "4.40 (1.10x)", "0.25", "0.12"]


def test_losses_after_resuming_are_compared_with_those_of_the_run_that_saved() -> None:
    saved = {"action": "save", "losses": [3.0, 2.9, 2.8]}
    same, other = {"action": "resume", "losses": [3.001, 2.9, 2.8]}, {"action": "resume", "losses": [3.3, 2.9, 2.8]}
    assert scaling.resumed_losses_agree([saved, same]) is True
    assert scaling.resumed_losses_agree([saved, same, other]) is False
    assert scaling.resumed_losses_agree([saved, {"action": "resume", "losses": [3.0]}]) is False
    assert scaling.resumed_losses_agree([saved]) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_run_on_cpu_ranks_measures_resumes_and_plans(tmp_path: Path) -> None:
    words = ["--tiny", "--accelerator", "cpu", "--devices", "1,2", "--no-compile", "--budget", "800"]
    words += ["--workloads", "gpt2-ddp", "1b-fsdp", "--contestants", "fulmen", "raw", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "tools.bench.scaling", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + str([row.get("log") for row in rows])
    assert [row for row in rows if "not_run" in row] == []
    measured = {(row["workload"], row["devices"], row["contestant"]) for row in rows if "step_s" in row}
    assert measured == {
        (workload, devices, by)
        for workload in ("gpt2-ddp", "1b-fsdp")
        for devices in (1, 2)
        for by in ("fulmen", "raw")
    }
    assert "losses after resuming on fewer devices equal those" in done.stdout
    assert {row["devices"] for row in rows if row["action"] == "plan"} == {1, 2}

"""The plan of every strategy against a real run of it: bytes on CPU ranks, the allocator's peak on GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from fulmen.memory_plan import MemoryPlan

sys.path.insert(0, str(Path(__file__).parent))
import memory_script

# Plans are made on the CPU, where there is a GPU too.
pytestmark = pytest.mark.filterwarnings("ignore:accelerator='cpu' was asked for while")

SMALL = {"width": 64, "layers": 2, "heads": 4, "vocabulary": 128}
LARGE = {"width": 1024, "layers": 12, "heads": 16, "vocabulary": 32_000}


def planned(asked: dict[str, Any], device: str) -> MemoryPlan:
    rows, length = asked["batch"]
    runs = memory_script.trainer_of(asked, "cpu")
    return runs.plan(lambda: memory_script.Model(**asked["model"]), batch=f"int64[{rows},{length}]", device=device)


def measured(asked: dict[str, Any], accelerator: str, folder: Path) -> dict[str, int]:
    report = folder / "report.json"
    words = json.dumps({**asked, "accelerator": accelerator, "report": str(report)})
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, memory_script.__file__, words],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(report.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "devices", "precision"),
    [("ddp", 2, "32-true"), ("fsdp", 2, "32-true"), ("fsdp", 2, "bf16-true"), ("model_parallel", 4, "32-true")],
)
def test_planned_bytes_are_those_of_real_ranks(strategy: str, devices: int, precision: str, tmp_path: Path) -> None:
    model = {**SMALL, "places": strategy == "model_parallel"}
    asked = {"strategy": strategy, "devices": devices, "precision": precision, "model": model, "batch": [2, 17]}
    plan, real = planned(asked, "cpu"), measured(asked, "cpu", tmp_path)
    assert {"parameters": plan.parameters, "gradients": plan.gradients, "optimizer": plan.optimizer} == real


def test_each_of_64_ranks_holds_its_part_of_what_fsdp_shards() -> None:
    model = {"width": 128, "layers": 3, "heads": 4, "vocabulary": 256}
    asked: dict[str, Any] = {
        "strategy": "fsdp",
        "devices": 64,
        "precision": "32-true",
        "model": model,
        "batch": [2, 33],
    }
    plan = planned(asked, "cuda")
    assert plan.parameter_count == sum(p.numel() for p in memory_script.Model(**model).parameters())
    assert plan.parameters == plan.gradients == 4 * plan.parameter_count // 64  # every first dimension divides by 64
    tensors = sum(1 for _ in memory_script.Model(**model).parameters())
    assert plan.optimizer == 2 * plan.parameters + 4 * tensors
    assert plan.mesh.endswith("64")
    assert all("Shard(0)" in group.placement for group in plan.groups)
    assert plan.checkpoint == 3 * 4 * plan.parameter_count + 4 * tensors
    # A unit's weights are whole while it computes: those of at least one block, and never the whole model.
    block = 4 * (12 * 128 * 128 + 13 * 128)
    assert block < plan.communication


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_on_shards_makes_nothing_of_the_whole_size(fused: bool) -> None:
    """AdamW's temporary lists have the size of this rank's shards: a 64th of the model."""
    model = {**LARGE, "fused": fused}
    plan = planned({"strategy": "fsdp", "devices": 64, "precision": "32-true", "model": model, "batch": [1, 3]}, "cuda")
    # The peak is where the embedding or the head, 15 % of the model each, and a block are whole, with their gradients.
    assert plan.peak < 4 * plan.parameter_count


@pytest.mark.slow
def test_mixed_precision_gathers_halves_for_a_gpu() -> None:
    asked: dict[str, Any] = {"strategy": "fsdp", "devices": 8, "model": LARGE, "batch": [1, 129]}
    whole, mixed = (planned({**asked, "precision": precision}, "cuda") for precision in ("32-true", "bf16-mixed"))
    assert mixed.parameters == whole.parameters
    assert mixed.communication < 0.8 * whole.communication
    assert mixed.activations < whole.activations


def test_both_dimensions_of_a_mesh_divide_a_tensor_parallel_weight() -> None:
    model = {**SMALL, "places": True}
    asked: dict[str, Any] = {"strategy": "model_parallel", "devices": 8, "model": model, "batch": [2, 17]}
    plan = planned(asked, "cuda")
    assert plan.mesh == "data_parallel 4 x tensor_parallel 2"
    groups = {group.name: group for group in plan.groups}
    assert groups["blocks.*.q.weight"].local_bytes == 2 * 4 * 64 * 64 // 8
    assert groups["blocks.*.out.weight"].placement == "data_parallel Shard(0), tensor_parallel Shard(1)"
    assert groups["tokens.weight"].local_bytes == 4 * 128 * 64 // 4


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("strategy", "devices", "precision"),
    [("auto", 1, "32-true"), ("auto", 1, "bf16-mixed"), ("fsdp", 2, "bf16-mixed")],
)
def test_the_planned_peak_is_within_a_tenth_of_the_allocators(
    strategy: str, devices: int, precision: str, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} GPUs")
    asked = {"strategy": strategy, "devices": devices, "precision": precision, "model": LARGE, "batch": [16, 513]}
    plan, real = planned(asked, "cuda"), measured(asked, "cuda", tmp_path)
    print(f"planned {plan.peak:,}, measured {real['peak']:,}: {plan.peak / real['peak']:.3f}")
    assert plan.peak == pytest.approx(real["peak"], rel=0.10)
    assert (plan.parameters, plan.gradients) == (real["parameters"], real["gradients"])

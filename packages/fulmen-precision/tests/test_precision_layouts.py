"""Gradients of which two gloo ranks hold parts: a gradient that is not finite skips the step on both of them.

This file is also the script that both ranks run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fulmen_precision import ScaledMixedPrecision


def on_a_rank(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh, other = init_device_mesh("cpu", (2,), mesh_dim_names=("a",)), init_device_mesh("cpu", (2, 1))
    layouts = {
        "whole first": [(mesh, [Replicate()]), (mesh, [Shard(0)])],
        "plain first": [None, (mesh, [Shard(0)])],
        "two meshes": [(mesh, [Replicate()]), (other, [Shard(0), Replicate()])],
    }
    for name, layout in layouts.items():
        parameters = []
        for place in layout:
            value = torch.ones(4, 3)
            parameters.append(nn.Parameter(value if place is None else distribute_tensor(value, *place)))
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        precision = ScaledMixedPrecision()
        for poisoned in (True, False):
            optimizer.zero_grad()
            loss = sum((one * 2.0).sum() for one in map(_local, parameters))
            precision.scale(loss).backward()
            if poisoned and rank == 1:
                _local(parameters[1].grad)[0] = float("inf")
            precision.unscale(optimizer)
            precision.step(optimizer)
            precision.update()
            expected = 1.0 if poisoned else -1.0  # 1 - lr * 2
            for one in parameters:
                assert torch.equal(_local(one), torch.full_like(_local(one), expected)), (name, poisoned, one)
        assert precision.scaler.get_scale() == 2.0**15, name
    dist.destroy_process_group()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    on_a_rank(int(sys.argv[1]), sys.argv[2])
    sys.exit()


@pytest.mark.proves("4.24")
def test_ranks_agree_on_a_gradient_that_is_not_finite_whatever_its_layout(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", __file__]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-4000:]

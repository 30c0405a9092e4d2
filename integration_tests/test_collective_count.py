"""Between declared points the Trainer issues no collective of its own: a step begins as many as one by raw torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest


@cache
def counts() -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        return _counted(Path(folder))


def _counted(folder: Path) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("collective_count_script.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads((folder / f"counts-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.proves("4.14")
def test_a_step_of_ddp_under_the_trainer_begins_as_many_collectives_as_raw_ddp() -> None:
    for found in counts():
        for name in ("plain", "accumulated"):
            # The first steps of a wrapper also agree on its buckets; then come whole windows of four.
            ours, raw = found[name][7:23], found[f"raw {name}"][7:23]
            assert sum(begun for begun, _ in ours) == sum(raw), "rows, bar, clipping and a checkpoint add none"
            assert not any(called for _, called in ours), "and no function of torch.distributed is called"
        assert sum(found["raw accumulated"]) < sum(found["raw plain"]), "the count would see one"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_weighed_losses_cost_one_collective_for_each_optimizer_step(strategy: str, accumulate: int) -> None:
    for found in counts():
        weighed, means = (found[f"{strategy} {name} {accumulate}"][7:23] for name in ("weights", "mean"))
        steps = len(weighed) // accumulate
        assert sum(begun for begun, _ in weighed) - sum(begun for begun, _ in means) == steps
        assert sum(called for _, called in weighed) - sum(called for _, called in means) == steps


def test_a_step_of_fsdp2_under_the_trainer_begins_as_many_collectives_as_raw_fully_shard() -> None:
    for found in counts():
        for name in ("fsdp", "fsdp accumulated"):
            ours, raw = found[name][7:23], found[f"raw {name}"][7:23]
            assert sum(begun for begun, _ in ours) == sum(raw), "rows and a bar add none"
        fewer = sum(found["raw fsdp"][7:23]) - sum(found["raw fsdp accumulated"][7:23])
        assert fewer == 12 * 2, "of 16 batches, 12 do not reduce the gradients of the two layers"

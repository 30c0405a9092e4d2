"""What the Trainer does on two ranks: real processes, all cases in one run of them."""

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
import torch

SCRIPT = Path(__file__).with_name("trainer_ranks.py")


@cache
def ranks(accelerator: str = "cpu") -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(SCRIPT), folder, accelerator],
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in (0, 1)]


def order(accelerator: str) -> list[list[Any]]:
    norm, half, full, wrapped = "BatchNorm1d", "torch.bfloat16", "torch.float32", "DistributedDataParallel"
    inside, before = ("SyncBatchNorm", []) if accelerator == "cuda" else ("SyncedNorm", [["layers", norm, full]])
    return [
        ["accelerator", accelerator],
        *before,
        ["precision", inside, full],
        ["place", inside, half],
        ["placed", wrapped, 1],  # with its communication hook
        ["configure_optimizers", inside, half],
        ["model", wrapped, wrapped],
        ["prepare_optimizers", wrapped, "_After"],  # its steps average from now on
        ["precision", "SGD"],
        ["on_fit_start", inside, half],
        ["training_step", inside, half],
        ["on_fit_end", norm, half],  # the devices are given back before on_fit_end
    ]


@pytest.mark.proves("4.9")
def test_ddp_is_set_up_in_lightnings_order() -> None:
    for seen in ranks():
        assert seen["order"] == order("cpu")
        assert seen["own layer is back"]
        assert seen["its parameters are trained ones"]


@pytest.mark.cuda
@pytest.mark.proves("4.9", "9.17", "9.24")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_batch_norm_is_synchronised_before_anything_else_and_given_back_at_the_end() -> None:
    for seen in ranks("cuda"):
        assert seen["order"] == order("cuda")
        assert seen["own layer is back"]
        assert seen["its parameters are trained ones"]
        assert seen["device"] == "cpu"


@pytest.mark.proves("9.17")
def test_synchronised_batch_norm_is_refused_where_torch_has_none() -> None:
    for seen in ranks():
        assert seen["sync_batchnorm"] == (
            "sync_batchnorm=True with 2 processes on the CPU: torch's SyncBatchNorm runs on GPUs only. "
            "Leave it out here, or use accelerator='gpu'."
        )


@pytest.mark.proves("9.17", "9.34", "9.8")
def test_loaders_are_split_over_ranks_unless_told_otherwise() -> None:
    first, second = ranks()
    everything = [float(number) for number in range(8)]

    def trained(seen: dict[str, Any], name: str) -> list[float]:
        return [number for batch in seen[name] if batch[0] != "val" for number in batch]

    epochs = [sorted(trained(first, "shuffled")[i : i + 4] + trained(second, "shuffled")[i : i + 4]) for i in (0, 4)]
    assert epochs == [everything, everything], "each sample once an epoch"
    assert trained(first, "shuffled")[:4] != trained(first, "shuffled")[4:], "shuffled anew"
    assert trained(first, "left alone") == trained(second, "left alone") == everything
    for seen, mine in ((first, [0.0, 2.0, 4.0, 6.0]), (second, [1.0, 3.0, 5.0, 7.0])):
        assert trained(seen, "overfit") == mine * 2, "unshuffled, the same in each epoch"


@pytest.mark.proves("9.16", "9.34")
def test_gloo_evaluates_each_sample_once_and_without_inference_mode() -> None:
    tested = [entry for seen in ranks() for entry in seen["tested"]]

    assert sorted(number for _, *batch, _ in tested for number in batch) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert not any(inference for *_, inference in tested)


@pytest.mark.proves("9.36")
def test_a_rank_without_data_is_mentioned_unless_that_is_meant_and_stops_nobody() -> None:
    assert [seen["empty"] for seen in ranks()] == [seen["empty, allowed"] for seen in ranks()] == [1, 0]
    said = ranks()[0]["empty, said"]
    assert len(said) == 1
    assert "val_dataloader has no batch on rank(s) 1, but the other ranks have some" in said[0]
    assert "set allow_zero_length_dataloader_with_multiple_devices = True" in said[0]
    assert ranks()[0]["empty, allowed, said"] == []


@pytest.mark.proves("9.38")
def test_a_step_without_a_loss_is_an_error_where_other_ranks_wait() -> None:
    for seen in ranks():
        assert "training_step returned None for batch 0 on one of 2 ranks" in seen["skipped"]
        assert "return a loss of zero weight instead" in seen["skipped"]


@pytest.mark.proves("9.44", "9.45", "A.1")
def test_properties_and_collectives_tell_of_both_ranks() -> None:
    for rank, seen in enumerate(ranks()):
        found = seen["properties"]
        assert found["ranks"] == [rank, rank, 0, 2]
        assert found["counts"] == [1, 2, 2]
        assert found["zero"] == (rank == 0)
        assert found["sampler"] == {"num_replicas": 2, "rank": rank}
        assert found["broadcast"] == "of rank 0"
        assert found["reduced"] == [0.5, 1.0, 1.0]
        assert found["gathered"] == [0.0, 1.0]
        assert (found["all"], found["any"]) == (False, True)
        assert (found["model"], found["module"]) == ("DistributedDataParallel", "Watched")
        assert found["distributed"]
    assert ranks()[0]["properties"]["log_dir"] == ranks()[1]["properties"]["log_dir"]
    assert ranks()[0]["best"] == ranks()[1]["best"] != ""


@pytest.mark.proves("9.53")
def test_a_compiled_module_trains_under_ddp_like_the_module_itself() -> None:
    for seen in ranks():
        assert seen["compiled"]["compiled"] == pytest.approx(seen["compiled"]["eager"])
        assert seen["graphs"] > 0
    assert ranks()[0]["compiled"] == ranks()[1]["compiled"]

"""MetricStore over real gloo processes: ranks that log the same, different things, or nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.processes

PREAMBLE = """
import json, os, sys, warnings
import torch
import torch.distributed as dist
from datetime import timedelta
from fulmen.metrics import MetricStore, scope_for
from fulmen._metric_agreement import ByHosts
from fulmen_fabric import StopAgreement
from fulmen_fabric.voting import HostVote, group_store, new_name

warnings.simplefilter("ignore")
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=40))
RANK, WORLD = dist.get_rank(), dist.get_world_size()


class Gloo:
    rank, world_size = RANK, WORLD

    def __init__(self):
        self.calls = []

    def all_gather(self, tensor, *, differentiable=False):
        self.calls.append(("all_gather", tuple(tensor.shape)))
        out = [torch.empty_like(tensor) for _ in range(WORLD)]
        dist.all_gather(out, tensor)
        return torch.stack(out)

    def all_gather_object(self, value):
        self.calls.append(("all_gather_object",))
        out = [None] * WORLD
        dist.all_gather_object(out, value)
        return out


def make(stage="train", by_hosts=True):
    agreement = ByHosts(
        HostVote(group_store(), WORLD, name=new_name("vote"), timeout=timedelta(seconds=40)),
        StopAgreement(group_store(), RANK, WORLD, name=new_name("agreement")),
    )
    store = MetricStore(
        device=torch.device("cpu"), collectives=Gloo(), stage=stage, agreement=agreement if by_hosts else None
    )
    store.scope = scope_for("training_step" if stage == "train" else "validation_step")
    return store


def log(store, name, value, **options):
    options = {"prog_bar": False, "logger": None, "on_step": None, "on_epoch": None, "reduce_fx": "mean",
        "sync_dist": True, "sync_dist_group": None, "add_dataloader_idx": True, "batch_size": None,
        "metric_attribute": None, "rank_zero_only": False, "module": None, **options}
    store.log(name, value, **options)


def floats(metrics):
    return {name: float(value) for name, value in metrics.items()}


def calls(store):
    made, store._collectives.calls = store._collectives.calls, []
    return made


RESULT = {}
"""

SCENARIOS = """
# ragged: every rank has its own number of batches, of its own sizes
store = make("validate")
generator = torch.Generator().manual_seed(RANK)
fed = []
for _ in range(3 + 5 * RANK):
    size = int(torch.randint(1, 20, (), generator=generator))
    value = torch.randn((), generator=generator)
    store.start_batch(torch.zeros(size, 2), 0, None)
    for op in ("mean", "sum", "min", "max"):
        log(store, op, value, reduce_fx=op)
    log(store, "number", float(value))
    fed.append((float(value), size))
before = len(store._collectives.calls)
store.reduce_epoch()
RESULT["ragged"] = {"fed": fed, "got": floats(store.callback_metrics), "calls_before": before}

# the second epoch has one collective, of a shape known before
calls(store)
store.reset()
store.start_batch(torch.zeros(2, 2), 0, None)
for op in ("mean", "sum", "min", "max"):
    log(store, op, torch.tensor(1.0), reduce_fx=op)
store.reduce_epoch()
RESULT["second_epoch_calls"] = calls(store)

# different keys on each rank; the last rank logs nothing at all, and reading communicates nothing
store = make()
store.start_batch(torch.zeros(2, 2), 0, None)
if RANK < WORLD - 1:
    log(store, "shared", float(RANK), on_step=False, on_epoch=True)
    log(store, f"own{RANK}", float(RANK), on_step=False, on_epoch=True)
store.reduce_epoch()
calls(store)
RESULT["different_keys"] = floats(store.callback_metrics)
floats(store.logged_metrics), store.progress_bar_metrics
RESULT["reading_calls"] = calls(store)

# logging from the epoch-end hook on one rank only
store.scope = scope_for("on_train_epoch_end")
if RANK == 0:
    log(store, "late", 5.0)
store.reduce_epoch()
RESULT["late"] = floats(store.callback_metrics)

# without sync_dist: each rank its own
store = make()
store.start_batch(torch.zeros(2, 2), 0, None)
log(store, "local", float(RANK), on_step=False, on_epoch=True, sync_dist=False)
store.reduce_epoch()
RESULT["local"] = floats(store.callback_metrics)

# rank_zero_only: only on rank 0, no reduction
store = make()
store.start_batch(torch.zeros(2, 2), 0, None)
if RANK == 0:
    log(store, "zero", 3.0, on_step=False, on_epoch=True, rank_zero_only=True)
store.reduce_epoch()
RESULT["rank_zero_only"] = floats(store.callback_metrics)

# step values
store = make()
steps = []
for step in range(6):
    store.start_batch(torch.zeros(2, 2), step, None)
    for op in ("mean", "sum", "min", "max"):
        log(store, op, torch.tensor(float(RANK + step)), reduce_fx=op)
    store.pending_sync(at_flush=step == 3)
    steps.append(floats(store.callback_metrics))
RESULT["steps"] = steps
RESULT["step_calls"] = calls(store)

# step values that ranks log at different steps
store = make()
steps = []
for step in range(6):
    store.start_batch(torch.zeros(2, 2), step, None)
    if step == 0 or step % WORLD == RANK:
        log(store, "turns", float(100 * RANK + step))
    store.pending_sync()
    steps.append(floats(store.callback_metrics))
RESULT["turns"] = steps

# step values that only rank 0 knows, and only after a while: agreed on at the first flush or at one of the next
for by_hosts in (True, False):
    for first in (2, 6):
        store = make(by_hosts=by_hosts)
        steps = []
        for step in range(20):
            store.start_batch(torch.zeros(2, 2), step, None)
            if RANK == 0 and step >= first:
                log(store, "rare", float(step))
            store.pending_sync(at_flush=step % 4 == 3)
            steps.append(floats(store.callback_metrics))
            dist.barrier()  # as the gradients' reduction does, it keeps ranks at about the same batch
        RESULT[f"rare {by_hosts} {first}"] = steps

# a second metric appears on one rank while another is agreed on, with no flush
store = make()
for step in range(70):
    store.start_batch(torch.zeros(2, 2), step, None)
    log(store, "steady", 1.0)
    if RANK == WORLD - 1 and step >= 10:
        log(store, "joins", float(step))
    store.pending_sync()
RESULT["joins"] = floats(store.callback_metrics)

# DTensors: a replicated one is as good as a tensor, a partial one would communicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, DTensor, Replicate

mesh = init_device_mesh("cpu", (WORLD,))
store = make()
store.start_batch(torch.zeros(2, 2), 0, None)
log(store, "replicated", DTensor.from_local(torch.tensor(2.5), mesh, [Replicate()]), sync_dist=False)
try:
    log(store, "partial", DTensor.from_local(torch.tensor(2.5), mesh, [Partial()]), sync_dist=False)
except ValueError as error:
    RESULT["dtensor"] = [floats(store.callback_metrics), str(error)]

# nobody syncs step values: what does that cost?
store = make()
for step in range(200):
    store.start_batch(torch.zeros(2, 2), step, None)
    log(store, "x", 1.0, sync_dist=False)
    store.pending_sync(at_flush=step % 10 == 9)
RESULT["idle_calls"] = len(calls(store))

# a group: even ranks among themselves, odd ones too
groups = [dist.new_group([r for r in range(WORLD) if r % 2 == parity]) for parity in (0, 1)]
store = make()
store.start_batch(torch.zeros(2, 2), 0, None)
log(store, "grouped", float(RANK), on_step=True, on_epoch=True, reduce_fx="sum", sync_dist_group=groups[RANK % 2])
store.pending_sync()
grouped_step = floats(store.callback_metrics)["grouped_step"]
store.reduce_epoch()
RESULT["grouped"] = [grouped_step, floats(store.callback_metrics)["grouped_epoch"]]

# ranks that disagree on the reduction
store = make()
store.start_batch(torch.zeros(2, 2), 0, None)
log(store, "x", 1.0, on_step=False, on_epoch=True, reduce_fx="sum" if RANK else "mean")
try:
    store.reduce_epoch()
except ValueError as error:
    RESULT["conflict"] = str(error)

# torchmetrics: on all ranks, then on rank 0 alone
import torchmetrics

module = torch.nn.Module()
module.accuracy = torchmetrics.MeanMetric()
module.partial = torchmetrics.MeanMetric()
store = make()
store.start_batch(torch.zeros(2, 2), 0, None)
module.accuracy(torch.tensor(float(RANK)), weight=1.0 + RANK)
log(store, "accuracy", module.accuracy, on_step=True, on_epoch=True, module=module, sync_dist=False)
if RANK == 0:
    module.partial(torch.tensor(7.0))
    log(store, "partial", module.partial, on_step=False, on_epoch=True, module=module, sync_dist=False)
store.reduce_epoch()
RESULT["torchmetrics"] = floats(store.callback_metrics)

with open(f"result{RANK}.json", "w") as file:
    json.dump(RESULT, file)
dist.destroy_process_group()
import time; time.sleep(0.1)  # gloo's threads need the GIL to drop what they hold
"""


def run_ranks(folder: Path, world_size: int, body: str) -> list[dict[str, Any]]:
    (folder / "script.py").write_text(PREAMBLE + body)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error
    return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(world_size)]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("ranks"), request.param, SCENARIOS)


Results = list[dict[str, Any]]


@pytest.mark.proves("6.18")
def test_synced_epoch_values_are_those_of_all_batches_of_all_ranks(results: Results) -> None:
    fed = [pair for result in results for pair in result["ragged"]["fed"]]
    values, sizes = np.array(fed).T
    expected = {
        "mean": np.average(values, weights=sizes),
        "number": np.average(values, weights=sizes),
        "sum": values.sum(),
        "min": values.min(),
        "max": values.max(),
    }
    for result in results:
        assert result["ragged"]["got"] == pytest.approx(expected, rel=1e-6)
        assert result["ragged"]["got"] == results[0]["ragged"]["got"], "every rank has the very same number"


def test_log_never_communicates(results: Results) -> None:
    assert [result["ragged"]["calls_before"] for result in results] == [0] * len(results)


def test_an_epoch_of_known_metrics_takes_one_collective(results: Results) -> None:
    for result in results:
        assert [call[0] for call in result["second_epoch_calls"]] == ["all_gather"]


@pytest.mark.proves("6.18")
def test_ranks_may_log_different_metrics_or_none(results: Results) -> None:
    last = len(results) - 1
    expected = {"shared": sum(range(last)) / last, **{f"own{rank}": float(rank) for rank in range(last)}}
    for result in results:
        assert result["different_keys"] == expected


def test_reading_metrics_never_communicates(results: Results) -> None:
    assert [result["reading_calls"] for result in results] == [[]] * len(results)


def test_a_rank_may_log_alone_from_the_epoch_end_hook(results: Results) -> None:
    assert [result["late"]["late"] for result in results] == [5.0] * len(results)


@pytest.mark.proves("6.18")
def test_unsynced_values_stay_with_their_rank(results: Results) -> None:
    assert [result["local"] for result in results] == [{"local": float(rank)} for rank in range(len(results))]
    assert [result["rank_zero_only"] for result in results] == [{"zero": 3.0}] + [{}] * (len(results) - 1)


@pytest.mark.proves("6.18")
def test_synced_step_values_are_reduced_at_every_step(results: Results) -> None:
    ranks = np.arange(len(results))
    for result in results:
        for step, got in enumerate(result["steps"]):
            values = ranks + step
            assert got == {
                "mean": values.mean(),
                "sum": values.sum(),
                "min": values.min(),
                "max": values.max(),
            }


def test_synced_step_values_cost_one_collective_a_step_once_agreed(results: Results) -> None:
    for result in results:
        assert [call[0] for call in result["step_calls"]] == ["all_gather_object"] + ["all_gather"] * 6


def test_step_values_of_ranks_that_take_turns_are_those_of_the_rank_that_logged(results: Results) -> None:
    world = len(results)
    for result in results:
        assert result["turns"][0]["turns"] == pytest.approx(np.mean([100 * rank for rank in range(world)]))
        for step, got in enumerate(result["turns"][1:], start=1):
            assert got["turns"] == 100 * (step % world) + step


@pytest.mark.parametrize("by_hosts", [True, False])
def test_a_step_metric_that_appears_before_the_first_flush_is_shared_from_there_on(
    results: Results, by_hosts: bool
) -> None:
    for result in results:
        shared = [step.get("rare") for step in result[f"rare {by_hosts} 2"]]
        assert shared[3:] == list(range(3, 20))
    assert all(shared_early == [None, None, None] for shared_early in _before(results[1:], f"rare {by_hosts} 2", 3))


def test_a_step_metric_that_appears_later_is_shared_soon_and_from_the_same_flush_on_everywhere(
    results: Results,
) -> None:
    for by_hosts in (True, False):
        name = f"rare {by_hosts} 6"
        assert [step.get("rare") for step in results[0][name]][6:] == list(range(6, 20)), "its own, or the same shared"
        begin = 11 if by_hosts else 7  # the flushes after it appeared are at 7 and 11
        for result in results[1:]:
            assert not any("rare" in step for step in result[name][:begin])
            assert [step.get("rare") for step in result[name]][begin:] == list(range(begin, 20))


def _before(results: Results, name: str, step: int) -> list[list[float | None]]:
    return [[each.get("rare") for each in result[name][:step]] for result in results]


def test_a_step_metric_that_joins_others_is_shared_without_waiting_for_a_flush(results: Results) -> None:
    for result in results:
        assert result["joins"] == {"steady": 1.0, "joins": 69.0}


def test_a_replicated_dtensor_is_logged_and_a_partial_one_is_refused(results: Results) -> None:
    for result in results:
        values, error = result["dtensor"]
        assert values == {"replicated": 2.5}
        assert "full_tensor()" in error


def test_runs_that_sync_no_step_value_pay_for_no_collective(results: Results) -> None:
    assert all(result["idle_calls"] == 0 for result in results)


@pytest.mark.proves("6.10", "6.18")
def test_a_group_reduces_among_its_own_ranks(results: Results) -> None:
    for rank, result in enumerate(results):
        expected = float(sum(other for other in range(len(results)) if other % 2 == rank % 2))
        assert result["grouped"] == [expected, expected]


def test_ranks_that_reduce_a_metric_differently_all_get_the_error(results: Results) -> None:
    assert all("the same reduce_fx on every rank" in result["conflict"] for result in results)


@pytest.mark.proves("6.18", "6.19")
def test_metric_objects_sync_by_themselves_and_do_not_hang_when_one_rank_lacks_them(results: Results) -> None:
    ranks = np.arange(len(results))
    for rank, result in enumerate(results):
        assert result["torchmetrics"]["accuracy_epoch"] == pytest.approx(np.average(ranks, weights=1.0 + ranks))
        assert result["torchmetrics"].get("partial") == (7.0 if rank == 0 else None)

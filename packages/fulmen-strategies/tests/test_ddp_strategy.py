"""DDPStrategy and TorchCollectives on two gloo ranks against raw DDP, plain modules and formulas.

This file is also the script that both ranks run: each ``check_...`` runs once on every rank, one test reports each.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from fulmen_protocols import (
    MisconfigurationException,
    SupportsAdvice,
    SupportsBoundMethods,
    SupportsInferencePlacement,
    SupportsLaunch,
    SupportsManualBackward,
    SupportsNoSync,
    SupportsPatientBarrier,
    SupportsReplicaCheck,
    Topology,
    missing_members,
)
from fulmen_strategies import DDPStrategy, LightningEnvironment, LocalLauncher
from fulmen_strategies.ddp import find_unused_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Check = Callable[["Rank"], None]

pytestmark = pytest.mark.processes

# ------------------------------------------------------------------------------------------- what the ranks train


class Net(nn.Module):
    """Some layers, a buffer that training changes, and a step as users write it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)
        self.other_branch = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x)))) + self.other_branch(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return mse_loss(self(x), y)

    def dict_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, object]:
        return {"loss": self.training_step(batch, 0), "note": "kept", "nothing": None}

    def none_step(self) -> None:
        return None

    def bad_step(self) -> None:
        raise KeyError("a user's own error")

    def one_branch_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(self.other_branch(batch[0]), batch[1])


def batches(rank: int, count: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator("cpu").manual_seed(100 + rank)
    here = torch.get_default_device()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cpu").to(here)

    return [(normal(5, 6), normal(5, 2)) for _ in range(count)]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.01)


class Rank:
    """One process, joined to the other."""

    def __init__(self, topology: Topology) -> None:
        self.topology, self.rank = topology, topology.rank
        self.strategy = self.joined()

    def joined(self, **options: Any) -> DDPStrategy:
        strategy = DDPStrategy(**options)
        strategy.setup_environment(self.topology)
        return strategy

    def same(self, ours: nn.Module, theirs: nn.Module) -> None:
        """Not one bit may differ, in parameters, gradients and buffers."""
        for (name, got), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(got, expected), f"{name} on rank {self.rank}"
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), f"gradient of {name}"


# ------------------------------------------------------------------------------------------------- what they check


def _check_equals_raw_ddp(me: Rank, make: Callable[[nn.Module], torch.optim.Optimizer], every: int) -> None:
    raw_module = Net()
    raw, data = DistributedDataParallel(raw_module), batches(me.rank, 7)
    raw_optimizer = make(raw_module)
    for i, (x, y) in enumerate(data):
        stepping = (i + 1) % every == 0
        if stepping:
            mse_loss(raw(x), y).div(every).backward()
            raw_optimizer.step()
            raw_optimizer.zero_grad()
        else:
            with raw.no_sync():
                mse_loss(raw(x), y).div(every).backward()

    module = Net(seed=me.rank)  # equal only once rank 0's weights have been sent
    placed = me.strategy.place(module)
    optimizer = make(module)
    step = me.strategy.bind_method(placed, "training_step")
    for i, batch in enumerate(data):
        if (i + 1) % every == 0:
            step(batch, i).div(every).backward()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
        else:
            with me.strategy.no_sync(placed):
                step(batch, i).div(every).backward()  # type: ignore[attr-defined]

    me.same(module, raw_module)


@pytest.mark.proves("4.11")
def check_sgd_through_training_step_equals_raw_ddp_bit_for_bit(me: Rank) -> None:
    _check_equals_raw_ddp(me, sgd, 1)


@pytest.mark.proves("4.11")
def check_adam_through_training_step_equals_raw_ddp_bit_for_bit(me: Rank) -> None:
    _check_equals_raw_ddp(me, adam, 1)


@pytest.mark.proves("4.14")
def check_accumulation_equals_raw_ddp_bit_for_bit(me: Rank) -> None:
    _check_equals_raw_ddp(me, adam, 3)


@pytest.mark.proves("4.14")
def check_accumulating_four_batches_reduces_once(me: Rank) -> None:
    reduced: list[int] = []

    def counting(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        reduced.append(bucket.index())
        return allreduce_hook(None, bucket)

    strategy = me.joined(ddp_comm_hook=counting)
    placed = strategy.place(Net())
    step = strategy.bind_method(placed, "training_step")
    for i, batch in enumerate(batches(me.rank, 8)):
        if i % 4 == 3:
            step(batch, i).backward()  # type: ignore[attr-defined]
        else:
            with strategy.no_sync(placed):
                step(batch, i).backward()  # type: ignore[attr-defined]

    assert reduced == [0, 0], "one bucket, two windows"


@pytest.mark.proves("4.11")
def check_methods_may_return_anything(me: Rank) -> None:
    module = Net()
    placed, batch = me.strategy.place(module), batches(me.rank, 1)[0]

    result = me.strategy.bind_method(placed, "dict_step")(batch)
    assert isinstance(result, dict)
    assert (list(result), result["note"], result["nothing"]) == (["loss", "note", "nothing"], "kept", None)
    result["loss"].backward()
    assert me.strategy.drifted_parameters(placed) == []
    assert me.strategy.bind_method(placed, "none_step")() is None


@pytest.mark.proves("4.11")
def check_after_an_error_forward_is_forward_again(me: Rank) -> None:
    placed = me.strategy.place(Net())
    x, y = batches(me.rank, 1)[0]

    with pytest.raises(KeyError, match="a user's own error"):
        me.strategy.bind_method(placed, "bad_step")()

    assert placed(x).shape == y.shape
    mse_loss(placed(x), y).backward()


def check_forward_runs_the_modules_own_hooks(me: Rank) -> None:
    module, seen = Net(), []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    placed = me.strategy.place(module)

    me.strategy.bind_method(placed, "forward")(batches(me.rank, 1)[0][0])

    assert seen == ["hook"]


def check_what_a_step_calls_through_the_wrapper_is_a_forward(me: Rank) -> None:
    module = Net()
    placed = me.strategy.place(module)
    module.training_step = lambda x: placed(x).sum()  # type: ignore[method-assign, assignment]
    x = batches(me.rank, 1)[0][0]
    with torch.no_grad():
        assert torch.equal(me.strategy.bind_method(placed, "training_step")(x), module(x).sum())  # type: ignore[arg-type]


def check_nothing_to_train_means_no_wrapper(me: Rank) -> None:
    module = Net(seed=me.rank).requires_grad_(False)

    placed = me.strategy.place(module)

    assert placed is module
    assert me.strategy.drifted_parameters(placed) == [], "the weights are rank 0's all the same"
    batch = batches(0, 1)[0]
    with me.strategy.no_sync(placed):
        loss = me.strategy.bind_method(placed, "training_step")(batch, 0)
    assert torch.equal(loss, module.training_step(batch, 0))  # type: ignore[arg-type]


@pytest.mark.proves("4.10")
def check_inference_uses_weights_and_buffers_of_rank_zero(me: Rank) -> None:
    module = Net(seed=me.rank)
    module.norm.running_mean.fill_(me.rank + 1.0)
    module.register_buffer("mask", torch.tensor([me.rank == 0, True]))

    placed = me.strategy.place_for_inference(module)

    assert placed is module
    assert torch.equal(module.first.weight, Net(seed=0).first.weight)
    assert module.norm.running_mean.tolist() == [1.0] * 16
    assert module.mask.tolist() == [True, True]


@pytest.mark.proves("4.13")
def check_an_unused_parameter_is_explained(me: Rank) -> None:
    placed = me.strategy.place(Net())
    step = me.strategy.bind_method(placed, "one_branch_step")
    batch = batches(me.rank, 1)[0]
    step(batch).backward()  # type: ignore[attr-defined]

    with pytest.raises(RuntimeError, match="Expected to have finished reduction") as caught:
        step(batch)

    assert any("find_unused_parameters=True" in note for note in caught.value.__notes__)


@pytest.mark.proves("4.8")
def check_unused_parameters_can_be_allowed(me: Rank) -> None:
    strategy = find_unused_parameters()
    strategy.setup_environment(me.topology)
    module = Net()
    placed = strategy.place(module)
    step = strategy.bind_method(placed, "one_branch_step")
    for batch in batches(me.rank, 3):
        step(batch).backward()  # type: ignore[attr-defined]
    assert module.first.weight.grad is None
    assert module.other_branch.weight.grad is not None


def _mean_gradients(module: nn.Module) -> None:
    """What DDP does, by hand: each rank's gradient divided by the number of ranks, then summed."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(2)
            dist.all_reduce(parameter.grad)


class Gan(nn.Module):
    """Two players trained in turn, each step with two backward passes, as in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, backward: Callable[[Tensor], None], optimizers: Any) -> None:
        of_generator, of_critic = optimizers
        noise = batch[:, :3]
        self.critic.requires_grad_(False)
        loss = -self.critic(self.generator(noise)).mean()
        of_generator.zero_grad()
        backward(loss)
        of_generator.step()
        self.critic.requires_grad_(True)

        self.generator.requires_grad_(False)
        loss = self.critic(self.generator(noise)).mean() - self.critic(batch).mean()
        of_critic.zero_grad()
        backward(loss)
        of_critic.step()
        self.generator.requires_grad_(True)


@pytest.mark.proves("4.11")
def check_two_optimizers_by_hand_equal_averaged_gradients_bit_for_bit(me: Rank) -> None:
    plain, module = Gan(), Gan()
    strategy = me.joined(find_unused_parameters=True)
    placed = strategy.place(module)
    step = strategy.bind_manual_method(placed, "training_step")

    def averaged(loss: Tensor) -> None:
        loss.backward()
        _mean_gradients(plain)

    def through_strategy(loss: Tensor) -> None:
        with strategy.manual_backward(placed, loss):
            loss.backward()

    theirs = [torch.optim.Adam(part.parameters(), lr=0.01) for part in (plain.generator, plain.critic)]
    ours = [torch.optim.Adam(part.parameters(), lr=0.01) for part in (module.generator, module.critic)]
    for x, _ in batches(me.rank, 6):
        plain.training_step(x, averaged, theirs)
        step(x, through_strategy, ours)

    me.same(module, plain)
    assert strategy.drifted_parameters(placed) == []


class Manual(Net):
    """One backward pass inside the step; the batches in ``held_back`` keep their gradients local."""

    def manual_step(self, batch: tuple[Tensor, Tensor], backward: Callable[[Tensor], None]) -> Tensor:
        loss = self.training_step(batch, 0)
        backward(loss)
        return loss.detach()

    def without_backward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.training_step(batch, 0)


def _check_manual(me: Rank, **options: Any) -> None:
    raw_module, module, data = Manual(), Manual(), batches(me.rank, 6)
    raw = DistributedDataParallel(raw_module, **options)
    raw_optimizer, optimizer = sgd(raw_module), sgd(module)
    for x, y in data:
        raw_optimizer.zero_grad()
        mse_loss(raw(x), y).backward()
        raw_optimizer.step()

    strategy = me.joined(**options)
    placed = strategy.place(module)
    step = strategy.bind_manual_method(placed, "manual_step")

    def backward(loss: Tensor) -> None:
        with strategy.manual_backward(placed, loss):
            loss.backward()

    for batch in data:
        optimizer.zero_grad()
        step(batch, backward)
        optimizer.step()

    me.same(module, raw_module)


@pytest.mark.proves("4.11")
def check_backward_inside_the_step_equals_raw_ddp_bit_for_bit(me: Rank) -> None:
    _check_manual(me)


@pytest.mark.proves("4.12")
def check_backward_inside_the_step_works_with_a_static_graph(me: Rank) -> None:
    _check_manual(me, static_graph=True)


def check_backward_inside_the_step_works_with_bucket_views(me: Rank) -> None:
    _check_manual(me, gradient_as_bucket_view=True)


@pytest.mark.proves("4.11")
def check_several_backward_passes_in_one_step_are_averaged_each(me: Rank) -> None:
    module, plain = Manual(), Manual()
    placed = me.strategy.place(module)

    def twice(step: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def backward(loss: Tensor) -> None:
            step(loss)
            step(loss * 3)

        return backward

    def averaged(loss: Tensor) -> None:
        kept = [p.grad for p in plain.parameters()]
        plain.zero_grad()
        loss.backward(retain_graph=True)
        _mean_gradients(plain)
        for p, before in zip(plain.parameters(), kept, strict=True):
            p.grad = p.grad if before is None else before + p.grad

    def through_strategy(loss: Tensor) -> None:
        with me.strategy.manual_backward(placed, loss):
            loss.backward(retain_graph=True)

    step = me.strategy.bind_manual_method(placed, "manual_step")
    for batch in batches(me.rank, 3):
        module.zero_grad()
        plain.zero_grad()
        step(batch, twice(through_strategy))
        plain.manual_step(batch, twice(averaged))
        for p, q in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)  # a second pass adds before it averages: other rounding


def check_manual_backward_within_no_sync_stays_local(me: Rank) -> None:
    module, plain, data = Manual(), Manual(), batches(me.rank, 2)
    placed = me.strategy.place(module)
    step = me.strategy.bind_manual_method(placed, "manual_step")

    def held_back(loss: Tensor) -> None:
        with me.strategy.no_sync(placed), me.strategy.manual_backward(placed, loss):
            loss.backward()

    def reduced(loss: Tensor) -> None:
        with me.strategy.manual_backward(placed, loss):
            loss.backward()

    me.strategy.bind_manual_method(placed, "without_backward")(data[0])  # must not make ready for a reduction
    plain.without_backward(data[0])
    step(data[0], held_back)
    plain.manual_step(data[0], Tensor.backward)  # type: ignore[arg-type]
    assert torch.equal(module.first.weight.grad, plain.first.weight.grad)

    step(data[1], reduced)
    plain.manual_step(data[1], Tensor.backward)  # type: ignore[arg-type]
    _mean_gradients(plain)
    assert torch.equal(module.first.weight.grad, plain.first.weight.grad)


@pytest.mark.proves("4.11")
def check_manual_and_automatic_steps_share_a_wrapper(me: Rank) -> None:
    raw_module, module, data = Manual(), Manual(), batches(me.rank, 4)
    raw = DistributedDataParallel(raw_module)
    placed = me.strategy.place(module)
    automatic = me.strategy.bind_method(placed, "training_step")
    manual = me.strategy.bind_manual_method(placed, "manual_step")

    def backward(loss: Tensor) -> None:
        with me.strategy.manual_backward(placed, loss):
            loss.backward()

    for i, (x, y) in enumerate(data):
        mse_loss(raw(x), y).backward()
        if i % 2:
            manual((x, y), backward)
        else:
            automatic((x, y), i).backward()  # type: ignore[attr-defined]

    me.same(module, raw_module)


@pytest.mark.proves("4.8")
def check_a_comm_hook_and_its_wrapper_are_used(me: Rank) -> None:
    module = Net()
    strategy = me.joined(ddp_comm_hook=fp16_compress_hook)
    placed = strategy.place(module)
    strategy.bind_method(placed, "training_step")(batches(me.rank, 1)[0], 0).backward()  # type: ignore[attr-defined]
    gradient = module.first.weight.grad
    assert gradient is not None
    assert torch.equal(gradient, gradient.half().float()), "it has been through float16"

    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_wrapper

    module = Net()
    strategy = me.joined(ddp_comm_hook=allreduce_hook, ddp_comm_wrapper=fp16_compress_wrapper)
    placed = strategy.place(module)
    strategy.bind_method(placed, "training_step")(batches(me.rank, 1)[0], 0).backward()  # type: ignore[attr-defined]
    assert torch.equal(module.first.weight.grad, gradient)


def _trained(
    place: Callable[[nn.Module], nn.Module], me: Rank, step: Callable[[nn.Module, Any], Tensor] | None = None
) -> nn.Module:
    """A Net after six steps of SGD, wrapped by ``place``; ``step`` gives the loss."""
    module = Net()
    placed, optimizer = place(module), sgd(module)
    for batch in batches(me.rank, 6):
        loss = mse_loss(placed(batch[0]), batch[1]) if step is None else step(placed, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module


@pytest.mark.proves("4.8")
def check_every_option_of_ddp_gives_what_raw_ddp_gives_with_it(me: Rank) -> None:
    for options in (
        {"gradient_as_bucket_view": True},
        {"bucket_cap_mb": 1},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
    ):
        strategy = me.joined(process_group_backend=dist.get_backend(), timeout=timedelta(seconds=50), **options)
        ours = _trained(strategy.place, me)
        theirs = _trained(lambda module, options=options: DistributedDataParallel(module, **options), me)  # type: ignore[misc]
        me.same(ours, theirs)


@pytest.mark.proves("4.8")
def check_options_reach_the_wrapper(me: Rank) -> None:
    strategy = me.joined(find_unused_parameters=True, gradient_as_bucket_view=True, bucket_cap_mb=3)

    placed: Any = strategy.place(Net())

    assert (placed.find_unused_parameters, placed.gradient_as_bucket_view) == (True, True)
    assert placed.bucket_bytes_cap == 3 * 1024 * 1024
    assert not placed.static_graph


def _post_local(start: int, *, reduce: bool) -> PostLocalSGDState:
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    return PostLocalSGDState(None, alone, start_localSGD_iter=start, post_local_gradient_allreduce=reduce)


@pytest.mark.proves("4.8")
def check_post_local_sgd_equals_local_steps_with_averages_every_few(me: Rank) -> None:
    strategy = me.joined(
        ddp_comm_hook=post_localSGD_hook, ddp_comm_state=_post_local(2, reduce=False), model_averaging_period=3
    )
    module = Net()
    placed = strategy.place(module)
    (optimizer,) = strategy.prepare_optimizers(placed, [torch.optim.SGD(module.parameters(), lr=0.1)])
    apart: list[bool] = []
    by_hand = Net()
    plain = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for i, (x, y) in enumerate(batches(me.rank, 9)):
        loss = mse_loss(placed(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apart.append(bool(strategy.drifted_parameters(placed)))

        for buffer in by_hand.buffers():  # DDP sends them before each forward pass
            dist.broadcast(buffer, 0)
        plain.zero_grad()
        mse_loss(by_hand(x), y).backward()
        if i < 2:
            _mean_gradients(by_hand)
        plain.step()
        if i >= 2 and (i - 2) % 3 == 0:
            for parameter in by_hand.parameters():
                dist.all_reduce(parameter.data)
                parameter.data.div_(2)

    for got, expected in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(got, expected)
    assert apart == [False, False, False, True, True, False, True, True, False]


@pytest.mark.proves("4.8")
def check_an_optimizer_that_communicates_itself_is_not_averaged(me: Rank) -> None:
    strategy = me.joined(
        ddp_comm_hook=post_localSGD_hook, ddp_comm_state=_post_local(2, reduce=True), model_averaging_period=3
    )
    placed = strategy.place(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import alone: torch.jit.script is deprecated
        from torch.distributed.optim import ZeroRedundancyOptimizer
    optimizer = ZeroRedundancyOptimizer(placed.parameters(), torch.optim.SGD, lr=0.1)

    with pytest.raises(MisconfigurationException, match="model_averaging_period=3 cannot work with ZeroRedundancy"):
        strategy.prepare_optimizers(placed, [optimizer])


@pytest.mark.proves("4.13")
def check_a_graph_that_turned_out_to_be_static_is_mentioned(me: Rank) -> None:
    strategy = me.joined(find_unused_parameters=True)

    def advice(steps: list[str], strategy: DDPStrategy = strategy) -> str | None:
        placed = strategy.place(Net())
        for name, batch in zip(steps, batches(me.rank, len(steps)), strict=True):
            step = strategy.bind_method(placed, name)
            (step(batch, 0) if name == "training_step" else step(batch)).backward()  # type: ignore[attr-defined]
        return strategy.advice(placed)

    assert "DDPStrategy(static_graph=True)" in (advice(["one_branch_step"] * 4) or "")
    assert advice(["one_branch_step", "training_step", "one_branch_step", "training_step"]) is None, "it changes"
    assert advice(["training_step"] * 4, me.joined(find_unused_parameters=True, static_graph=True)) is None
    assert advice(["training_step"] * 4, me.strategy) is None, "nothing was searched for"


def check_drift_is_named(me: Rank) -> None:
    module = Net()
    placed = me.strategy.place(module)
    assert me.strategy.drifted_parameters(placed) == []
    if me.rank == 1:
        with torch.no_grad():
            module.last.bias[1].nextafter_(torch.tensor(9.0))  # one bit

    assert me.strategy.drifted_parameters(placed) == ["last.bias"]


def check_ignored_parameters_are_ignored(me: Rank) -> None:
    module = Net()
    module._ddp_params_and_buffers_to_ignore = ["other_branch.weight", "other_branch.bias"]  # type: ignore[assignment]
    placed = me.strategy.place(module)
    me.strategy.bind_method(placed, "training_step")(batches(me.rank, 1)[0], 0).backward()  # type: ignore[attr-defined]

    mine = me.strategy.collectives.all_gather(module.other_branch.weight.grad)  # type: ignore[arg-type]
    assert not torch.equal(mine[0], mine[1])


def check_setting_up_twice_is_setting_up_once(me: Rank) -> None:
    group = dist.group.WORLD
    me.strategy.setup_environment(me.topology)
    assert dist.group.WORLD is group


@pytest.mark.proves("4.15")
def check_a_group_that_exists_is_used_and_left_alone(me: Rank) -> None:
    group = dist.group.WORLD
    guest = me.joined()
    assert guest.collectives.all_reduce(torch.ones(()), "sum").item() == 2
    guest.teardown()
    assert dist.group.WORLD is group


@pytest.mark.proves("4.15")
def check_a_group_that_contradicts_is_refused(me: Rank) -> None:
    with pytest.raises(MisconfigurationException, match=f"rank {me.rank} of 3.*rank {me.rank} of 2"):
        DDPStrategy().setup_environment(me.topology._replace(world_size=3, devices=me.topology.devices * 2))


def check_wrappers_may_be_collected_after_teardown(me: Rank) -> None:
    me.strategy.teardown()
    assert not dist.is_initialized()
    before = sys.excepthook
    for _ in range(15):
        strategy = me.joined()
        module = Net()
        placed = strategy.place(module)
        for batch in batches(me.rank, 2):
            strategy.bind_method(placed, "training_step")(batch, 0).backward()  # type: ignore[attr-defined]
        strategy.teardown()
        del placed, module
        gc.collect()
    assert sys.excepthook is before
    me.strategy = me.joined()


@pytest.mark.proves("4.8", "4.47")
def check_a_patient_barrier_outlasts_the_groups_timeout(me: Rank) -> None:
    me.strategy.teardown()
    impatient = me.joined(timeout=timedelta(seconds=1))
    began = time.monotonic()
    if me.rank == 0:
        time.sleep(2.5)
    impatient.collectives.patient_barrier("prepare_data")
    impatient.collectives.patient_barrier("again")
    assert time.monotonic() - began > 2.4
    impatient.teardown()
    me.strategy = me.joined()


@pytest.mark.proves("4.16")
def check_collectives_keep_odd_dtypes_whole(me: Rank) -> None:
    c, r = me.strategy.collectives, me.rank
    assert c.all_reduce(torch.tensor([r == 0, True, False]), "sum").tolist() == [True, True, False]
    assert c.all_reduce(torch.tensor([r == 0, True, False]), "mean").tolist() == [False, True, False]
    assert c.all_reduce(torch.tensor([100, -100], dtype=torch.int8)).tolist() == [100, -100]
    half = c.all_reduce(torch.tensor([60000.0], dtype=torch.float16))
    assert (half.dtype, half.item()) == (torch.float16, 60000.0)
    assert c.all_reduce(torch.tensor([1 + 2j * r])).tolist() == [1 + 1j]
    with pytest.raises(ValueError, match="no order"):
        c.all_reduce(torch.tensor([1j]), "max")
    with pytest.raises(ValueError, match="'average'"):
        c.all_reduce(torch.ones(1), "average")  # type: ignore[arg-type]
    for dtype in (torch.bool, torch.bfloat16, torch.int16, torch.complex64, torch.float8_e4m3fn, torch.uint8):
        mine = torch.tensor([[r, 1], [0, r]]).to(dtype)
        both = c.all_gather(mine)
        assert both.dtype == dtype
        assert torch.equal(both[r].float() if dtype != torch.complex64 else both[r],
                           mine.float() if dtype != torch.complex64 else mine)  # fmt: skip
        assert torch.equal(c.broadcast(mine.clone(), source=1).to(torch.complex64),
                           torch.tensor([[1, 1], [0, 1]]).to(torch.complex64))  # fmt: skip


def check_a_failed_barrier_says_its_name(me: Rank) -> None:
    me.strategy.teardown()
    impatient = me.joined(timeout=timedelta(seconds=1))
    caught = None
    if me.rank == 0:
        with pytest.raises(RuntimeError) as caught:  # type: ignore[assignment]
            impatient.collectives.barrier("after the epoch")
    else:
        time.sleep(2)
    impatient.teardown()
    me.strategy = me.joined()
    if caught is not None:
        assert any("'after the epoch'" in note for note in caught.value.__notes__)  # type: ignore[unreachable]


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}


def main(folder: Path, kind: str) -> None:
    environment = LightningEnvironment()
    rank = environment.local_rank()
    devices = (torch.device("cpu"),) * 2
    if kind == "cuda":
        devices = (torch.device("cuda", 0), torch.device("cuda", 1))
        torch.cuda.set_device(devices[rank])
        torch.set_default_device(devices[rank])
        # NCCL does not raise when a collective takes too long: its watchdog ends the process.
        del CHECKS["a_failed_barrier_says_its_name"]

    def run_checks() -> None:
        me = Rank(
            Topology(
                devices=devices, rank=rank, local_rank=rank, world_size=2,
                main_address=environment.main_address, main_port=environment.main_port,
            )
        )  # fmt: skip
        for name, check in CHECKS.items():
            error = ""
            try:
                check(me)
            except BaseException:  # noqa: BLE001  # its report is the point
                error = traceback.format_exc()
            errors = me.strategy.collectives.all_gather_object(error)
            (folder / f"{name}-{rank}.json").write_text(json.dumps(errors))
        me.strategy.teardown()

    LocalLauncher().launch(
        run_checks, num_processes=2, num_nodes=1, node_rank=0,
        main_address=environment.main_address, main_port=environment.main_port,
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    sys.exit()

# ----------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "kind").write_text(request.param)
    env = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, __file__, str(folder), request.param],
        env=env, text=True, timeout=280, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    (folder / "output").write_text(f"exit status {done.returncode}\n{done.stdout}")
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(folder: Path, name: str) -> None:
    if name == "a_failed_barrier_says_its_name" and (folder / "kind").read_text() == "cuda":
        pytest.skip("NCCL ends the process instead")
    file = folder / f"{name}-0.json"
    if not file.exists():
        pytest.fail(f"no result:\n{(folder / 'output').read_text()[-5000:]}", pytrace=False)
    for rank, error in enumerate(json.loads(file.read_text())):
        if error:
            pytest.fail(f"on rank {rank}:\n{error}", pytrace=False)


def test_the_ranks_end_well_and_print_no_warning(folder: Path) -> None:
    assert (folder / "output").read_text().splitlines()[:1] == ["exit status 0"]


def test_it_offers_what_ddp_can_do() -> None:
    strategy = DDPStrategy()
    for ability in (
        SupportsBoundMethods, SupportsInferencePlacement, SupportsLaunch, SupportsManualBackward, SupportsNoSync,
        SupportsReplicaCheck, SupportsAdvice,
    ):  # fmt: skip
        assert missing_members(ability, strategy) == []
    assert strategy.launcher == "local"


@pytest.mark.proves("4.8")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_method": "spwan"}, "'spwan'. Did you mean 'spawn'"),
        ({"find_unused_parameter": True}, "Did you mean 'find_unused_parameters'"),
        ({"module": nn.Linear(1, 1)}, "'module'"),
        ({"ddp_comm_state": 1}, "ddp_comm_hook is None"),
        ({"model_averaging_period": 4}, "model_averaging_period=4 and ddp_comm_state=None"),
        (
            {"ddp_comm_hook": post_localSGD_hook, "ddp_comm_state": PostLocalSGDState(None, None, 1)},
            "a PostLocalSGDState and model_averaging_period=None",
        ),
        (
            {
                "ddp_comm_hook": post_localSGD_hook,
                "ddp_comm_state": PostLocalSGDState(None, None, 1),
                "model_averaging_period": 0,
            },
            "model_averaging_period=0: it counts optimizer steps",
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        DDPStrategy(**options)


def test_several_processes_cannot_meet_at_port_zero() -> None:
    with pytest.raises(MisconfigurationException, match="main_port"):
        DDPStrategy().setup_environment(Topology(devices=(torch.device("cpu"),) * 2, world_size=2))


@pytest.mark.parametrize("name", ["root_device", "collectives"])
def test_what_setup_makes_is_refused_before(name: str) -> None:
    with pytest.raises(RuntimeError, match="setup_environment"):
        getattr(DDPStrategy(), name)


def test_the_patient_barrier_is_an_ability_of_its_collectives() -> None:
    strategy = DDPStrategy()
    strategy.setup_environment(Topology(devices=(torch.device("cpu"),)))
    assert isinstance(strategy.collectives, SupportsPatientBarrier)
    strategy.collectives.patient_barrier()
    strategy.teardown()


def test_a_copy_of_the_original_is_possible_after_placing() -> None:
    strategy = DDPStrategy()
    strategy.setup_environment(Topology(devices=(torch.device("cpu"),)))
    module = Net()
    strategy.place(module)
    assert list(copy.deepcopy(module).state_dict()) == list(Net().state_dict())
    strategy.teardown()

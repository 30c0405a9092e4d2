"""What every rank does to prove a ``Strategy`` of several processes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional as F

from fulmen_conformance._kit import offers
from fulmen_conformance._reference import adam, batches, equal_bits, plain_training, sgd, tiny_net
from fulmen_conformance._strategy_steps import backward, differences, full_state, gradients, prepare, step, train
from fulmen_conformance._world import SkipCheck
from fulmen_protocols import (
    Strategy,
    SupportsBoundMethods,
    SupportsCollectives,
    SupportsDataParallel,
    SupportsGradClipping,
    SupportsInferencePlacement,
    SupportsNoSync,
    SupportsShardedState,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from fulmen_conformance._reference import Batch
    from fulmen_conformance._world import Rank
    from fulmen_protocols import Topology

__all__ = ["checks"]

# Means over ranks are exact for two replicas, but an engine may add in another order or in buckets.
_TOLERANCE = 1e-6


def _need(strategy: object, ability: type) -> None:
    if not offers(strategy, ability):
        raise SkipCheck(f"{type(strategy).__name__} does not offer {ability.__name__}")


def _set_up(me: Rank, strategy: Strategy) -> Topology:
    """Let ``strategy`` join the others; return its place when all have joined."""
    topology = me.topology()
    strategy.setup_environment(topology)
    # A rank that is quick could leave again, and take the store of torch's rendezvous with it, while a slow one still
    # looks up addresses there: "Connection reset by peer".
    me.meet()
    return topology


def _with_strategy(check: Callable[[Rank, Strategy], None]) -> Callable[[Rank], None]:
    """Run ``check`` in one cycle of a new strategy."""

    @functools.wraps(check)
    def whole(me: Rank) -> None:
        strategy: Strategy = me.make()
        _set_up(me, strategy)
        reason = None
        # The wrapped module dies with the frame of ``check``, before the group: torch deadlocks when DDP's reducer has
        # the last reference to a gloo group, whose destructor then joins threads while it holds the GIL.
        # After any other error ranks stand at different places, and leaving a group could hang.
        try:
            check(me, strategy)
        except SkipCheck as skip:
            reason = str(skip)
        strategy.teardown()
        if reason is not None:
            raise SkipCheck(reason)

    return whole


def _part(me: Rank, strategy: Strategy) -> tuple[int, int]:
    """Which part of the data this rank reads, and the number of parts."""
    if offers(strategy, SupportsDataParallel):
        parallel = cast("SupportsDataParallel", strategy)
        return parallel.data_parallel_rank, parallel.data_parallel_size
    return me.rank, me.world_size


def _joint(parts: list[list[Batch]]) -> list[Batch]:
    """Batches of all parts put together: the mean loss over them has the mean of the parts' gradients."""
    return [
        (torch.cat([x for x, _ in at_once]), torch.cat([y for _, y in at_once])) for at_once in zip(*parts, strict=True)
    ]


def _local_gradients(batch: Batch, device: torch.device) -> list[torch.Tensor]:
    module = tiny_net(device=device)
    F.mse_loss(module(batch[0].to(device)), batch[1].to(device)).backward()  # type: ignore[no-untyped-call, unused-ignore]
    return gradients(module)


def _assert_close(got: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=_TOLERANCE), (
            f"gradient {index} is not {what}: it differs by {(ours - theirs).abs().max().item():.3g}"
        )


def place_in_the_world(me: Rank) -> None:
    strategy: Strategy = me.make()
    topology = _set_up(me, strategy)
    _need(strategy, SupportsCollectives)
    collectives = cast("SupportsCollectives", strategy).collectives

    assert (collectives.rank, collectives.world_size) == (me.rank, me.world_size)
    assert strategy.root_device == topology.device
    strategy.teardown()


@_with_strategy
def collectives(me: Rank, strategy: Strategy) -> None:
    group = cast("SupportsCollectives", strategy).collectives
    total = group.all_reduce(torch.tensor(float(me.rank), device=strategy.root_device), "sum")

    assert total.item() == sum(range(me.world_size))
    assert group.all_gather_object(me.rank) == list(range(me.world_size))
    assert group.broadcast_object(f"from {me.rank}", me.world_size - 1) == f"from {me.world_size - 1}"
    group.barrier("conformance")


@_with_strategy
def replicas_start_equal(me: Rank, strategy: Strategy) -> None:
    if offers(strategy, SupportsShardedState):
        raise SkipCheck(f"{type(strategy).__name__} shards its module: there are no replicas")
    module = tiny_net(seed=me.rank)

    strategy.place(module)

    assert differences(
        {k: v.cpu() for k, v in module.state_dict().items()}, tiny_net(seed=0).state_dict()
    ) == []  # fmt: skip


def training_follows_the_mean_gradient(me: Rank) -> None:
    for optimizer in (sgd, adam):

        @_with_strategy
        def one_cycle(me: Rank, strategy: Strategy, optimizer: Callable[..., Optimizer] = optimizer) -> None:
            part, parts = _part(me, strategy)
            data = [batches(4, seed=p) for p in range(parts)]
            expected = plain_training(tiny_net(), optimizer, _joint(data))
            module = tiny_net()

            placed, prepared = prepare(strategy, module, optimizer)
            train(strategy, placed, prepared, data[part])

            got = full_state(strategy, module, placed)
            if got or me.rank == 0:
                problems = differences(got, expected.state_dict(), tolerance=2e-5)
                assert problems == [], f"{optimizer.__name__}: {problems}"

        one_cycle(me)


@_with_strategy
def ranks_end_equal(me: Rank, strategy: Strategy) -> None:
    part, _ = _part(me, strategy)
    module = tiny_net()
    placed, optimizer = prepare(strategy, module, sgd)
    train(strategy, placed, optimizer, batches(4, seed=part))

    mine = full_state(strategy, module, placed)
    file = me.folder / f"weights-{me.rank}.pt"
    torch.save(mine, file)
    me.meet()

    theirs: dict[str, torch.Tensor] = torch.load(me.folder / "weights-0.pt")
    if mine:  # a sharding strategy gives the whole state to rank 0 only
        for name, value in theirs.items():
            assert equal_bits(mine[name], value), f"{name} of rank {me.rank} is not that of rank 0"


@_with_strategy
def no_sync(me: Rank, strategy: Strategy) -> None:
    _need(strategy, SupportsNoSync)
    if offers(strategy, SupportsShardedState):
        raise SkipCheck(f"{type(strategy).__name__} shards its gradients")
    part, parts = _part(me, strategy)
    device = strategy.root_device
    first, second = ([batches(2, seed=p)[i] for p in range(parts)] for i in (0, 1))
    local = _local_gradients(first[part], device)
    mean = [
        torch.stack(per_rank).mean(0)
        for per_rank in zip(
            *([a + b for a, b in zip(_local_gradients(first[p], device), _local_gradients(second[p], device),
                                     strict=True)] for p in range(parts)), strict=True)
    ]  # fmt: skip
    module = tiny_net()
    placed, _ = prepare(strategy, module, sgd)

    with cast("SupportsNoSync", strategy).no_sync(placed):
        _forward_backward(strategy, placed, first[part])
    _assert_close(gradients(placed), local, "this rank's own after a backward within no_sync")
    _forward_backward(strategy, placed, second[part])

    _assert_close(gradients(placed), mean, "the mean of the accumulated ones after no_sync has ended")


@_with_strategy
def bound_methods_reduce(me: Rank, strategy: Strategy) -> None:
    _need(strategy, SupportsBoundMethods)
    part, parts = _part(me, strategy)
    data = [batches(3, seed=p) for p in range(parts)]
    expected = plain_training(tiny_net(), sgd, _joint(data))
    module = tiny_net()
    placed, optimizer = prepare(strategy, module, sgd)
    bound = cast("SupportsBoundMethods", strategy).bind_method(placed, "loss_of")

    for x, y in data[part]:
        optimizer.zero_grad()
        loss = bound((x.to(strategy.root_device), y.to(strategy.root_device)))
        assert isinstance(loss, torch.Tensor)
        backward(strategy, loss, placed)
        step(strategy, optimizer, placed)

    got = full_state(strategy, module, placed)
    if got or me.rank == 0:
        assert differences(got, expected.state_dict(), tolerance=2e-5) == []


@_with_strategy
def clipping(me: Rank, strategy: Strategy) -> None:
    _need(strategy, SupportsGradClipping)
    part, parts = _part(me, strategy)
    plain = tiny_net()
    x, y = _joint([batches(1, seed=p) for p in range(parts)])[0]
    F.mse_loss(plain(x), y).backward()  # type: ignore[no-untyped-call, unused-ignore]
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    placed, optimizer = prepare(strategy, tiny_net(), sgd)
    _forward_backward(strategy, placed, batches(1, seed=part)[0])

    norm = cast("SupportsGradClipping", strategy).clip_grad_norm(placed, optimizer, 0.1)

    assert norm.shape == ()
    assert torch.allclose(norm.cpu(), expected, rtol=1e-5), f"the norm is {norm.item()}, not {expected.item()}"


@_with_strategy
def inference_placement(me: Rank, strategy: Strategy) -> None:
    _need(strategy, SupportsInferencePlacement)
    x = batches(1)[0][0]

    placed = cast("SupportsInferencePlacement", strategy).place_for_inference(tiny_net(seed=me.rank))

    with torch.no_grad():
        assert torch.allclose(placed(x.to(strategy.root_device)).cpu(), tiny_net(seed=0)(x), atol=_TOLERANCE)


@_with_strategy
def sharded_state(me: Rank, strategy: Strategy) -> None:
    _need(strategy, SupportsShardedState)
    sharded = cast("SupportsShardedState", strategy)
    part, _ = _part(me, strategy)
    module, other = tiny_net(), tiny_net(seed=5)
    placed, optimizer = prepare(strategy, module, adam)
    train(strategy, placed, optimizer, batches(2, seed=part))
    placed_other, optimizer_other = prepare(strategy, other, adam)

    for full in (True, False):
        sharded.load_module_state(placed_other, sharded.module_state(placed, full=full), strict=True)
        sharded.load_optimizer_state(
            placed_other, optimizer_other, sharded.optimizer_state(placed, optimizer, full=full)
        )
        train(strategy, placed, optimizer, batches(1, seed=part))
        train(strategy, placed_other, optimizer_other, batches(1, seed=part))

        states = [full_state(strategy, m, p) for m, p in ((module, placed), (other, placed_other))]
        if me.rank == 0:
            shapes = {name: value.shape for name, value in tiny_net().state_dict().items()}
            assert {name: value.shape for name, value in states[0].items()} == shapes
            assert differences(states[1], states[0]) == [], f"full={full}"


@_with_strategy
def data_parallel_ranks(me: Rank, strategy: Strategy) -> None:
    _need(strategy, SupportsDataParallel)
    parallel = cast("SupportsDataParallel", strategy)
    (me.folder / f"part-{me.rank}").write_text(f"{parallel.data_parallel_rank} {parallel.data_parallel_size}")
    me.meet()

    found = [(me.folder / f"part-{r}").read_text().split() for r in range(me.world_size)]

    sizes = {int(size) for _, size in found}
    assert len(sizes) == 1, f"ranks disagree about data_parallel_size: {sizes}"
    assert {int(part) for part, _ in found} == set(range(sizes.pop()))


def two_cycles(me: Rank) -> None:
    for _ in range(2):
        strategy: Strategy = me.make()
        _set_up(me, strategy)
        _one_step(strategy)
        strategy.teardown()
        strategy.teardown()
        me.meet()


def _one_step(strategy: Strategy) -> None:
    placed, optimizer = prepare(strategy, tiny_net(), sgd)
    train(strategy, placed, optimizer, batches(1))


def _forward_backward(strategy: Strategy, placed: torch.nn.Module, batch: Batch) -> None:
    x, y = (value.to(strategy.root_device) for value in batch)
    backward(strategy, F.mse_loss(placed(x), y), placed)


def checks() -> dict[str, Callable[[Rank], None]]:
    """All checks by name, in the order in which they run."""
    functions = (
        place_in_the_world, collectives, replicas_start_equal, training_follows_the_mean_gradient, ranks_end_equal,
        no_sync, bound_methods_reduce, clipping, inference_placement, sharded_state, data_parallel_ranks, two_cycles,
    )  # fmt: skip
    return {function.__name__: function for function in functions}

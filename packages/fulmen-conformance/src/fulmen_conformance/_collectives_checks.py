"""What every rank does to prove ``Collectives``; expected values are formulas of rank and world size."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from fulmen_conformance._reference import equal_bits
from fulmen_protocols import Collectives, SupportsBackgroundReduce, missing_members

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen_conformance._world import Rank
    from fulmen_protocols import ReduceOp

__all__ = ["checks", "collectives_of"]


def collectives_of(me: Rank) -> Collectives:
    """The backend under test; made once in each process, since a process group is joined once."""
    found = _made.get(me.rank)
    if found is None:
        found = me.make(me.topology())
        missing = missing_members(Collectives, found)
        assert not missing, f"{type(found).__name__} is not a Collectives: it lacks {', '.join(missing)}"
        _made[me.rank] = found
    return found


_made: dict[int, Collectives] = {}


def _values(me: Rank) -> list[torch.Tensor]:
    """One tensor of each rank, with exactly representable mean, of a shape that shows transposition."""
    return [torch.arange(6.0, device=me.device).reshape(2, 3) * 4 + 2 * r for r in range(me.world_size)]


def ranks(me: Rank) -> None:
    collectives = collectives_of(me)

    assert (collectives.rank, collectives.world_size) == (me.rank, me.world_size)


def barrier(me: Rank) -> None:
    collectives = collectives_of(me)
    last = me.world_size - 1
    proof = me.folder / "the last rank came"
    if me.rank == last:
        time.sleep(0.4)
        proof.touch()

    collectives.barrier("conformance")

    assert proof.exists(), f"rank {me.rank} passed the barrier before rank {last} had come"


def broadcast(me: Rank) -> None:
    collectives = collectives_of(me)
    for source in range(me.world_size):
        mine = _values(me)[me.rank].clone()
        expected = _values(me)[source]

        got = collectives.broadcast(mine, source)

        assert equal_bits(got, expected), f"broadcast from rank {source} returned {got}, not {expected}"
        assert equal_bits(mine, expected), "broadcast writes in place"


def broadcast_views(me: Rank) -> None:
    collectives = collectives_of(me)
    base = torch.full((3, 4), float(me.rank), device=me.device)

    collectives.broadcast(base[:, ::2], 0)

    assert base[:, ::2].eq(0.0).all(), "a view with gaps is written in place too"
    assert base[:, 1::2].eq(float(me.rank)).all(), "what lies between is left alone"


def broadcast_object(me: Rank) -> None:
    collectives = collectives_of(me)
    for source in range(me.world_size):
        value = {"rank": me.rank, "text": "x" * (1000 * me.rank), "list": [me.rank, None]}

        got = collectives.broadcast_object(value, source)

        assert got == {"rank": source, "text": "x" * (1000 * source), "list": [source, None]}


def all_reduce(me: Rank) -> None:
    collectives = collectives_of(me)
    stacked = torch.stack(_values(me))
    for op, expected in {
        "mean": stacked.mean(0),
        "sum": stacked.sum(0),
        "min": stacked.amin(0),
        "max": stacked.amax(0),
    }.items():
        mine = _values(me)[me.rank].clone()

        got = collectives.all_reduce(mine, op)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

        assert equal_bits(got, expected), f"{op} gave {got}, not {expected}"
        assert equal_bits(mine, _values(me)[me.rank]), f"{op} changed its input"
        got.fill_(-1)
        assert equal_bits(mine, _values(me)[me.rank]), f"{op} returned its input, not a new tensor"


def all_reduce_defaults_to_mean(me: Rank) -> None:
    collectives = collectives_of(me)

    got = collectives.all_reduce(torch.tensor(float(2 * me.rank), device=me.device))

    assert got.shape == ()
    assert got.item() == me.world_size - 1


def all_reduce_of_integers(me: Rank) -> None:
    collectives = collectives_of(me)
    size = me.world_size
    for base in (10, -11):
        mine = torch.tensor([base + me.rank, base], dtype=torch.int64, device=me.device)
        total = [sum(base + r for r in range(size)), base * size]

        assert collectives.all_reduce(mine, "sum").tolist() == total
        mean = collectives.all_reduce(mine, "mean")
        assert mean.dtype == torch.int64
        assert mean.tolist() == [value // size for value in total], "an integer mean is the floor of the true mean"


def all_reduce_of_other_dtypes(me: Rank) -> None:
    collectives = collectives_of(me)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        mine = torch.full((3,), float(2 * me.rank), dtype=dtype, device=me.device)

        got = collectives.all_reduce(mine, "mean")

        assert got.dtype == dtype
        assert got.tolist() == [float(me.world_size - 1)] * 3


def all_reduce_of_views(me: Rank) -> None:
    collectives = collectives_of(me)
    mine = _values(me)[me.rank].t()[::2]

    got = collectives.all_reduce(mine, "sum")

    assert torch.equal(got, torch.stack([value.t()[::2] for value in _values(me)]).sum(0))


def begin_all_reduce(me: Rank) -> None:
    collectives = collectives_of(me)
    if missing_members(SupportsBackgroundReduce, collectives):
        return
    assert isinstance(collectives, SupportsBackgroundReduce)
    ops: tuple[ReduceOp, ...] = ("mean", "sum", "min", "max")
    waiting: list[tuple[ReduceOp, Callable[[], torch.Tensor]]] = []
    for op in ops:
        mine = _values(me)[me.rank].clone()
        waiting.append((op, collectives.begin_all_reduce(mine, op)))
        mine.fill_(-1)
    between = collectives.all_reduce(_values(me)[me.rank], "max")

    for op, result in waiting:
        expected = collectives.all_reduce(_values(me)[me.rank], op)
        got = result()
        assert equal_bits(got, expected), f"{op}, begun early, gave {got}, not {expected}"
    assert equal_bits(between, torch.stack(_values(me)).amax(0))


def all_gather(me: Rank) -> None:
    collectives = collectives_of(me)
    mine = _values(me)[me.rank]

    got = collectives.all_gather(mine)

    assert got.shape == (me.world_size, 2, 3), f"shape is {tuple(got.shape)}, not (world_size, *tensor.shape)"
    assert equal_bits(got, torch.stack(_values(me)))
    scalars = collectives.all_gather(torch.tensor(float(me.rank), device=me.device))
    assert scalars.tolist() == [float(r) for r in range(me.world_size)]
    views = collectives.all_gather(mine.t())
    assert torch.equal(views, torch.stack([value.t() for value in _values(me)]))


def all_gather_without_gradient(me: Rank) -> None:
    collectives = collectives_of(me)
    mine = _values(me)[me.rank].requires_grad_()

    assert not collectives.all_gather(mine).requires_grad


def all_gather_with_gradient(me: Rank) -> None:
    collectives = collectives_of(me)
    mine = _values(me)[me.rank].requires_grad_()

    gathered = collectives.all_gather(mine, differentiable=True)
    assert equal_bits(gathered, torch.stack(_values(me)))
    # Rank r weighs entry i by (r + 1) * (i + 1): the gradient of entry i is the sum of that over all r.
    weights = torch.arange(1.0, me.world_size + 1, device=me.device).reshape(-1, 1, 1) * (me.rank + 1)
    (gathered * weights).sum().backward()  # type: ignore[no-untyped-call, unused-ignore]

    expected = float(sum(r + 1 for r in range(me.world_size)) * (me.rank + 1))
    assert mine.grad is not None, "no gradient came back"
    assert mine.grad.eq(expected).all(), f"the gradient is {mine.grad}, not {expected} everywhere"


def all_gather_object(me: Rank) -> None:
    collectives = collectives_of(me)

    got = collectives.all_gather_object({"rank": me.rank, "text": "x" * (1000 * me.rank)})

    assert got == [{"rank": r, "text": "x" * (1000 * r)} for r in range(me.world_size)]


def checks() -> dict[str, Callable[[Rank], None]]:
    """All checks by name, in the order in which they run."""
    functions = (
        ranks, barrier, broadcast, broadcast_views, broadcast_object,
        all_reduce, all_reduce_defaults_to_mean, all_reduce_of_integers, all_reduce_of_other_dtypes,
        all_reduce_of_views, begin_all_reduce, all_gather, all_gather_without_gradient, all_gather_with_gradient,
        all_gather_object,
    )  # fmt: skip
    return {function.__name__: function for function in functions}

"""Which rank was it: from how ranks ended, where they were and what they called last, to one report."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fulmen_protocols import Position
    from fulmen_strategies.launchers._pulse import Collective

__all__ = ["odd_rank", "others", "recent"]

T = TypeVar("T")

_FRAMES = 12
_LINES_A_FRAME = 2


def odd_rank(
    collectives: Mapping[int, Sequence[Collective]], positions: Mapping[int, Position]
) -> tuple[int, str] | None:
    """The rank that did something else than the others, which waited for it, and what; None if nothing tells.

    Args:
        collectives: the last ones of each rank that could be asked.
        positions: where each rank was.
    """
    mismatch = _mismatch(collectives)
    if mismatch is not None:
        return mismatch
    begun = {rank: position.collectives for rank, position in positions.items()}
    rank = _minority(begun)
    if rank is None:
        return None
    usual = Counter(count for other, count in begun.items() if other != rank).most_common(1)[0][0]
    return rank, f"it had begun {begun[rank]} collectives, and the others {usual}"


def _mismatch(collectives: Mapping[int, Sequence[Collective]]) -> tuple[int, str] | None:
    """The first collective of a group that was not the same on all ranks that have begun it."""
    called: dict[tuple[str, int], dict[int, str]] = {}
    for rank, calls in collectives.items():
        for call in calls:
            called.setdefault((call.group, call.number), {})[rank] = call.what
    for (_, number), by_rank in sorted(called.items(), key=lambda item: item[0][1]):
        if len(set(by_rank.values())) > 1:
            odd = _minority(by_rank)
            if odd is not None:
                usual = next(what for rank, what in by_rank.items() if rank != odd)
                return odd, f"its collective number {number} was {by_rank[odd]}, and that of the others {usual}"
    return None


def _minority(values: Mapping[int, T]) -> int | None:
    """The one rank with another value than most; among equals the one with the least."""
    counts = Counter(values.values())
    if len(counts) < 2:
        return None
    usual, number = counts.most_common(1)[0]
    if 2 * number <= len(values):  # no majority, as between two ranks: who is behind is waited for
        return min(values, key=lambda rank: (_order(values[rank]), rank))
    return min(
        (rank for rank, value in values.items() if value != usual), key=lambda rank: (_order(values[rank]), rank)
    )


def _order(value: object) -> float:
    return value if isinstance(value, (int, float)) else 0.0


def others(stacks: Mapping[int, Sequence[str]], positions: Mapping[int, Position], world_size: int) -> str:
    """Where the other ranks stood, ranks that stood at the same place together; "" if nobody knows."""
    places: dict[tuple[str, ...], list[int]] = {}
    for rank, stack in stacks.items():
        places.setdefault(_innermost(stack), []).append(rank)
    lines: list[str] = []
    for stack, ranks in places.items():
        for rank in ranks:
            known = f" ({positions[rank]})" if rank in positions else ""
            lines.append(f"rank {rank} of {world_size}{known} stood at:")
        prefix = "".join(f"[rank{rank}]" for rank in ranks)
        lines.extend(f"{prefix}: {line}" for line in stack or ("an unknown place",))
    return "".join(f"{line}\n" for line in lines)


def _innermost(stack: Sequence[str]) -> tuple[str, ...]:
    kept = _FRAMES * _LINES_A_FRAME
    return tuple(stack) if len(stack) <= kept else (f"  ... {len(stack) - kept} lines", *stack[-kept:])


def recent(collectives: Mapping[int, Sequence[Collective]], world_size: int) -> str:
    """The last collectives of each rank, one line a rank; "" where torch has no flight recorder."""
    lines = [
        f"last collectives of rank {rank} of {world_size}: "
        + ", ".join(f"{call.number} {call.what}" for call in list(calls)[-5:])
        for rank, calls in sorted(collectives.items())
        if calls
    ]
    return "".join(f"{line}\n" for line in lines)

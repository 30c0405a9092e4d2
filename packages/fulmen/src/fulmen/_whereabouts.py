"""What a loop writes down about where it is, for the report of a rank that fails; only where several ranks run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen_protocols import PHASES, current_whereabouts

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen.progress import Progress

__all__ = ["begin", "evaluation", "fail", "leave", "training"]

_TRAINING = PHASES.index("training")
_PHASES = {
    "validation": PHASES.index("validation"),
    "test": PHASES.index("test"),
    "predict": PHASES.index("prediction"),
    "sanity_check": PHASES.index("the sanity check"),
}


def training(progress: Progress) -> tuple[Callable[..., None], ...]:
    """A hook for the start of every training batch; none where nobody wants to know."""
    note = current_whereabouts()
    if note is None:
        return ()
    at = note.at

    def write(batch: object, batch_idx: int) -> None:
        at(_TRAINING, progress.epoch, batch_idx, progress.updates)

    return (write,)


def evaluation(phase: str, progress: Progress) -> tuple[Callable[..., None], ...]:
    """The same for the start of every batch of an evaluation."""
    note = current_whereabouts()
    if note is None:
        return ()
    at, number = note.at, _PHASES[phase]

    def write(batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        at(number, progress.epoch, batch_idx, progress.updates)

    return (write,)


def leave() -> None:
    """The call is over."""
    note = current_whereabouts()
    if note is not None:
        note.leave()


def begin() -> None:
    """A call begins."""
    note = current_whereabouts()
    if note is not None:
        note.error = None


def fail(error: BaseException) -> None:
    """The call ends with ``error``; where it was stays written down."""
    note = current_whereabouts()
    if note is not None:
        note.error = error

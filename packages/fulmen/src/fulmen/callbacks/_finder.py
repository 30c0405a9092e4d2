"""What callbacks that search for a setting have in common: they run once, and the call goes on with what was found."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from fulmen.exceptions import _TunerExitException  # pyright: ignore[reportPrivateUsage]  # Lightning's name
from fulmen_fabric import isolate_rng
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Generator

    from fulmen.callbacks.callback import Callback
    from fulmen.trainer import Trainer

__all__ = ["refuse_second", "searching"]


def refuse_second(kind: type[Callback], trainer: Trainer) -> None:
    """Refuse a run in which two callbacks search for the same setting.

    Raises:
        MisconfigurationException: ``trainer`` has several callbacks of ``kind``.
    """
    count = sum(isinstance(callback, kind) for callback in trainer.callbacks)
    if count > 1:
        raise MisconfigurationException(f"callbacks holds {count} {kind.__name__}s; keep one.")


@contextmanager
def searching(*, ends_the_call: bool) -> Generator[None]:
    """Within the block, what is drawn at random is not missed later; after it the call ends, if that was all of it."""
    with isolate_rng():
        yield
    if ends_the_call:
        raise _TunerExitException

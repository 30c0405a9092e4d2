"""Saves that may still be on their way: what waits for them, and how their errors are heard."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from fulmen import _files
from fulmen_fabric.abilities import supports
from fulmen_protocols import CheckpointError, SupportsAsyncSave

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from fulmen_fabric import World
    from fulmen_protocols import CheckpointIO

__all__ = ["Saving"]


class Saving:
    """Saves of a checkpoint IO, asynchronous or not. Pending are those of rank 0, or those that every rank writes."""

    def __init__(self, checkpoint_io: CheckpointIO, world: World) -> None:
        self._io = checkpoint_io
        self._world = world
        self._async = checkpoint_io if supports(checkpoint_io, SupportsAsyncSave) else None
        self._due: list[Callable[[], None]] = []
        self._undo: list[Callable[[], None]] = []

    def step_hooks(self) -> tuple[Callable[..., None], ...]:
        """What runs before every training batch; nothing where every save is complete when it returns."""
        return () if self._async is None else (self._between_steps,)

    def _between_steps(self, *_: object) -> None:
        assert self._async is not None
        try:
            self._async.poll()
        except Exception:
            self._take_back()
            raise
        self._tell()

    def after(self, action: Callable[[], None]) -> None:
        """Run ``action`` when the saves so far are visible, never if one failed; perhaps in another thread."""
        if self._async is None:
            action()
        else:
            self._async.after_saves(action)

    def tell(self, action: Callable[[], None]) -> None:
        """The same in this thread, at one of the next steps or at the end of the run."""
        if self._async is None:
            action()
        else:
            self._async.after_saves(partial(self._due.append, action))
            self._tell()

    @contextmanager
    def taken_back(self, undo: Callable[[], None]) -> Generator[None, None, None]:
        """Call ``undo`` if the save in this block fails, now or later."""
        self._undo.append(undo)
        try:
            yield
        except BaseException:
            self._keep(undo)
            undo()
            raise
        self.after(partial(self._keep, undo))

    def exists(self, path: str) -> bool:
        """Whether a file or folder is at ``path`` once all that is pending is done."""
        expected = None if self._async is None else self._async.will_exist(path)
        return _files.exists(path) if expected is None else expected

    def wait(self) -> None:
        """Return when this rank's saves are visible. Raises the first error of any of them."""
        if self._async is None:
            return
        try:
            self._async.wait()
        except Exception:
            self._take_back()
            raise
        self._tell()

    def finish(self) -> None:
        """Return on every rank when all saves are visible; every rank must call it.

        Raises:
            CheckpointError: one of them failed, which every rank is told.
        """
        if self._async is None or self._world.world_size == 1:
            self.wait()
            return
        error: Exception | None = None
        try:
            self.wait()
        except Exception as raised:  # noqa: BLE001 - raised below, when the others know
            error = raised
        told = self._world.collectives.all_gather_object(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text is not None:
                raise CheckpointError(f"on rank {rank}: {text}")

    def close(self) -> None:
        """Let the checkpoint IO release what it holds. Raises the error of a save that was still pending."""
        self._io.teardown()

    def close_after(self, error: BaseException) -> None:
        """The same when a run has failed with ``error``, which gets what fails here as a note."""
        try:
            self.close()
        except BaseException as another:  # noqa: BLE001 - a second Ctrl-C too: the first one is on its way
            self._take_back()
            error.add_note(f"fulmen: a checkpoint was lost as well: {type(another).__name__}: {another}")

    def _tell(self) -> None:
        while self._due:
            self._due.pop(0)()

    def _keep(self, undo: Callable[[], None]) -> None:
        with suppress(ValueError):  # taken back already, with a save that failed before it
            self._undo.remove(undo)

    def _take_back(self) -> None:
        while self._undo:
            self._undo.pop()()

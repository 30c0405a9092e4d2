"""CheckpointIO: one format of checkpoints at a path or URL. Member names are Lightning's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from os import PathLike

    import torch

__all__ = [
    "CheckpointIO",
    "RecognisesFolders",
    "SupportsAsyncSave",
    "SupportsContentCheck",
    "SupportsShardedSave",
    "SupportsVerification",
    "WrapsCheckpointIO",
]


@runtime_checkable
class CheckpointIO(Protocol):
    """Writes and reads one checkpoint. Knows nothing about ranks, strategies or training.

    A class that derives from this one may leave out ``teardown``.
    """

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Write ``checkpoint`` so that ``path`` holds either the old content or all of the new, whatever happens.

        ``storage_options`` go to the storage (credentials of a bucket, for example).
        """
        ...

    def load_checkpoint(
        self,
        path: str | PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        """Read a checkpoint; tensors go to ``map_location`` (None: CPU).

        No code from the file runs unless ``weights_only`` is False; None means True.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: it is damaged, or holds objects that only code could rebuild.
        """
        ...

    def remove_checkpoint(self, path: str | PathLike[str]) -> None:
        """Delete the checkpoint, file or folder. Removing what is not there is allowed."""
        ...

    def teardown(self) -> None:
        """Finish pending writes and release resources. Calling it twice is allowed."""
        return  # a body, so that a type checker does not take it for abstract


@runtime_checkable
class SupportsAsyncSave(Protocol):
    """A checkpoint IO that returns from ``save_checkpoint`` before the file is complete.

    So it does from ``save_sharded``, if it has that too. Then each member is about what this rank knows: all ranks make
    the same saves in the same order, and each hears of the end of each save.
    """

    def wait(self) -> None:
        """Return when every save so far is visible; raises the first error of any of them."""
        ...

    def poll(self) -> None:
        """Raise the first error of a save that has not been raised yet; waits for nothing."""
        ...

    def after_saves(self, action: Callable[[], None]) -> None:
        """Run ``action`` when every save so far is visible: at once if all are, never if one of them failed.

        It may run in another thread, before any later save is visible. ``remove_checkpoint`` waits in the same way.
        """
        ...

    def will_exist(self, path: str | PathLike[str]) -> bool | None:
        """Whether a pending save makes ``path`` (True) or a pending removal deletes it (False); None: neither."""
        ...


@runtime_checkable
class SupportsContentCheck(Protocol):
    """A checkpoint IO that refuses to save some objects, and can say so before it is asked to."""

    def cannot_hold(self, checkpoint: Mapping[str, object]) -> list[tuple[str, object]]:
        """The objects in ``checkpoint`` that ``save_checkpoint`` would refuse, each with its place."""
        ...


@runtime_checkable
class WrapsCheckpointIO(Protocol):
    """A checkpoint IO that does its work with the help of another."""

    checkpoint_io: CheckpointIO | None
    """The wrapped one; if it is None, assembling a run sets it."""


@runtime_checkable
class SupportsShardedSave(Protocol):
    """A checkpoint IO to which every rank writes what it holds, instead of rank 0 writing all."""

    def save_sharded(
        self,
        checkpoint: Mapping[str, object],
        path: str | PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """As ``save_checkpoint``, called by every rank with the same names.

        It returns when the checkpoint is visible; one that ``SupportsAsyncSave`` when what was given may change.
        Tensors may be shards (``DTensor``). What is no tensor of a module or an optimizer counts on rank 0. An error of
        one rank is raised on all, and ``path`` then keeps what it held.
        """
        ...

    def load_sharded(self, path: str | PathLike[str], into: Mapping[str, object]) -> dict[str, object]:
        """Read what the tensors of ``into`` need, in place, and return the checkpoint with them at their places.

        Any number of ranks may load, each whatever shards it has. Raises as ``load_checkpoint``.
        """
        ...


@runtime_checkable
class SupportsVerification(Protocol):
    """A checkpoint IO that can tell a whole checkpoint from a damaged one without loading it."""

    def verify_checkpoint(self, path: str | PathLike[str]) -> None:
        """Raises ``FileNotFoundError`` or ``ValueError`` (naming the damaged part) unless the checkpoint is whole."""
        ...


@runtime_checkable
class RecognisesFolders(Protocol):
    """A checkpoint IO, registered by name, that reads folders of a format which no other knows.

    Whoever is to read a folder of unknown kind asks the registered ones, and lets the one that recognises it.
    """

    @staticmethod
    def recognises(names: Collection[str]) -> bool:
        """Whether a folder with these entries (names of files and folders) is of its format."""
        ...

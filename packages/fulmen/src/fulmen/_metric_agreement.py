"""When ranks look whether one of them reduces a step value that the others do not know of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen_fabric import StopAgreement
    from fulmen_fabric.voting import HostVote

__all__ = ["Agreement", "ByDevices", "ByHosts"]


class Agreement(Protocol):
    """All ranks call the same methods in the same order."""

    def any(self, mine: bool) -> bool:
        """Whether any rank has something new; ``mine`` tells about this one."""
        ...

    def at_row(self, mine: bool) -> bool:
        """Whether all ranks look into it here, at a row of the loggers; at another row, soon, if not at this one."""
        ...


class ByHosts:
    """Hosts ask each other through the store: no device is waited for.

    Args:
        vote: for ``any``, which waits for the slowest host.
        agreement: for ``at_row``, which waits for nobody: what is new at one row is looked into at the next that all
            ranks can still reach.
    """

    def __init__(self, vote: HostVote, agreement: StopAgreement) -> None:
        self._vote, self._agreement = vote, agreement

    def any(self, mine: bool) -> bool:
        """Whether any rank has something new."""
        return self._vote.any(mine)

    def at_row(self, mine: bool) -> bool:
        """True at the same row on every rank."""
        return self._agreement.point("a new metric" if mine else None)


class ByDevices:
    """Where ranks have no store: a collective that the host reads, so ever more rarely.

    Args:
        ask: whether any rank says yes.
    """

    def __init__(self, ask: Callable[[bool], bool]) -> None:
        self.any = ask
        self._rows = 1

    def at_row(self, mine: bool) -> bool:
        """Asked at the 2nd, 4th, 8th, ... row, and at every 32nd."""
        self._rows += 1
        is_due = self._rows & (self._rows - 1) == 0 or self._rows % 32 == 0
        return is_due and self.any(mine)

"""Feeding what a run has logged to a logger that did not get it, or never was there."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from fulmen.runlog import _cursors as cursors
from fulmen.runlog._items import Hyperparameters, Row
from fulmen.runlog._reader import deliverable, find, read_run, records
from fulmen_fabric.abilities import supports
from fulmen_protocols import SupportsRowLookup, SupportsRowTime

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fulmen_protocols import Logger, LoggerStatus

__all__ = ["replay"]

_AT_ONCE = 500
"""Records between two notes of how far it got."""


def replay(run: str, logger: Logger, *, after: int | None = None) -> int:
    """Deliver the log of ``run`` to ``logger``, and finalize it with how the run ended.

    Called again for the same destination it goes on where it stopped, whether it was interrupted or the run has gone
    on since: how far each destination has got is noted beside the log.

    Args:
        run: the run's folder, or its log.
        logger: what is fed.
        after: start at this position in the log, in bytes; None: at the noted one, 0 for a new destination.

    Returns:
        How many records were delivered.

    Raises:
        MisconfigurationException: there is no log of a run.
        Exception: whatever the logger raises.
    """
    path = find(run)
    known = cursors.load(path)
    name, options = cursors.registered_name(logger), cursors.options_of(logger)
    cursor = cursors.Cursor(
        name or type(logger).__name__, options or {}, can_reopen=name is not None and options is not None
    )
    cursor = known.setdefault(cursors.key_of(cursor.logger, cursor.options), cursor)
    start = cursor.delivered_to if after is None else after
    cursor.is_due = True
    timed: SupportsRowTime | None = logger if supports(logger, SupportsRowTime) else None
    delivered = 0
    # A process that was killed may have saved more than it could note.
    lookup: SupportsRowLookup | None = logger if start > 0 and supports(logger, SupportsRowLookup) else None
    items = _items(path, start)
    while batch := list(islice(items, _AT_ONCE)):
        done = None
        try:
            for item in batch:
                if lookup is not None and isinstance(item, Row) and lookup.has_row(item.metrics, item.x):
                    done = item
                    continue
                _deliver(item, logger, timed)
                done, delivered = item, delivered + 1
        finally:
            if done is not None:
                logger.save()
                cursor.delivered_to = done.end
                cursors.save(path, known)
    status = read_run(path).status
    ended: dict[str, LoggerStatus] = {"success": "success", "failed": "failed"}
    logger.finalize(ended.get(status, "finished"))
    cursor.is_due = False
    cursors.save(path, known)
    return delivered


def _items(path: str, start: int) -> Iterator[Row | Hyperparameters]:
    """What comes after ``start``, without the points that the run has logged again since."""
    whole = {located.start for located in read_run(path).rows}
    for located in records(path, start):
        if located.record["kind"] == "metrics" and located.start not in whole:
            continue
        item = deliverable(located)
        if item is not None:
            yield item


def _deliver(item: Row | Hyperparameters, logger: Logger, timed: SupportsRowTime | None) -> None:
    if isinstance(item, Hyperparameters):
        logger.log_hyperparams(item.values)
    elif timed is not None:
        timed.log_metrics_at(item.metrics, item.x, item.time_s)
    else:
        logger.log_metrics(item.metrics, step=item.x)

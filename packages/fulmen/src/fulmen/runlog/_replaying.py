"""Feeding what a run has logged to a logger that did not get it, or never was there."""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING

from fulmen.runlog import _cursors as cursors
from fulmen.runlog._items import Hyperparameters, Row
from fulmen.runlog._reader import deliverable, find, read_run, records
from fulmen_fabric.abilities import supports
from fulmen_protocols import SupportsRowLookup, SupportsRowTime

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fulmen_protocols import Logger, LoggerStatus

__all__ = ["catch_up", "replay"]

_AT_ONCE = 500
"""Records between two notes of how far it got."""


def replay(run: str, logger: Logger) -> int:
    """Deliver the log of ``run`` to ``logger``, and finalize it with how the run ended.

    Called again for the same destination it goes on where it stopped, whether it was interrupted or the run has gone
    on since: how far each destination has got is noted beside the log.

    Args:
        run: the run's folder, or its log.
        logger: what is fed.

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
    return catch_up(path, logger, known, cursors.key_of(cursor.logger, cursor.options), cursor)


def catch_up(
    path: str, logger: Logger, known: dict[str, cursors.Cursor], key: str, new: cursors.Cursor | None = None
) -> int:
    """Deliver to ``logger`` what the destination ``key`` has not got yet; see ``replay``.

    Args:
        path: of the log.
        logger: what is fed.
        known: the destinations of the log, which is updated and saved.
        key: the destination among them.
        new: it, if it may not be among them yet.
    """
    cursor = known[key] if new is None else known.setdefault(key, new)
    lookup: SupportsRowLookup | None = None
    if (cursor.delivered_to > 0 or cursor.gaps) and supports(logger, SupportsRowLookup):
        lookup = logger  # a process that was killed may have saved more than it could note
    timed: SupportsRowTime | None = logger if supports(logger, SupportsRowTime) else None
    cursor.is_due = True
    delivered = 0
    items = _items(path, cursor)
    while batch := list(islice(items, _AT_ONCE)):
        done: Row | Hyperparameters | None = None
        try:
            for item in batch:
                if lookup is None or not isinstance(item, Row) or not lookup.has_row(item.metrics, item.x):
                    _deliver(item, logger, timed)
                    delivered += 1
                done = item
        finally:
            if done is not None:
                logger.save()
                _note(cursor, done.end)
                cursors.save(path, known)
    ended: dict[str, LoggerStatus] = {"success": "success", "failed": "failed"}
    logger.finalize(ended.get(read_run(path).status, "finished"))
    cursor.is_due, cursor.gaps = False, []
    cursors.save(path, known)
    return delivered


def _note(cursor: cursors.Cursor, end: int) -> None:
    """Everything before ``end`` is delivered."""
    cursor.gaps = [[max(first, end), last] for first, last in cursor.gaps if last > end]
    cursor.delivered_to = max(cursor.delivered_to, end)


def _items(path: str, cursor: cursors.Cursor) -> Iterator[Row | Hyperparameters]:
    """What a destination lacks, without the points that the run has logged again since."""
    whole = {located.start for located in read_run(path).rows}
    parts: list[tuple[int, int | None]] = [*((first, last) for first, last in cursor.gaps), (cursor.delivered_to, None)]
    for located in chain.from_iterable(records(path, first, last) for first, last in parts):
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

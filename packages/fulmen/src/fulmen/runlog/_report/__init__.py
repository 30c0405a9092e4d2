"""The page of a run: one HTML file that needs nothing else, made of the run's log."""

from __future__ import annotations

import os

from fulmen.runlog._reader import read_run
from fulmen.runlog._record import REPORT_FILE
from fulmen.runlog._report.page import page

__all__ = ["write_report"]


def write_report(run: str, output: str | None = None) -> str:
    """Make the page of ``run``, a run's folder or its log, whether the run has ended, has failed or was killed.

    Args:
        run: what to report on.
        output: where to; None: ``report.html`` beside the log.

    Returns:
        The page's path.

    Raises:
        MisconfigurationException: there is no log, or a newer version of fulmen wrote it.
        OSError: the page cannot be written.
    """
    log = read_run(run)
    path = os.path.join(os.path.dirname(log.path), REPORT_FILE) if output is None else os.path.expanduser(output)
    staging = f"{path}.{os.getpid()}.partial"
    with open(staging, "w", encoding="utf-8") as stream:
        stream.write(page(log))
    os.replace(staging, path)
    return path

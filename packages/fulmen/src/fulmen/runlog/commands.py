"""``fulmen log``: a run's log, from a shell."""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import sys
from typing import TYPE_CHECKING, Any, cast

from fulmen.runlog import _cursors as cursors
from fulmen.runlog._reader import find, read_run
from fulmen.runlog._record import FILE
from fulmen.runlog._replaying import catch_up, replay
from fulmen_protocols import LOGGERS, available, check, load_factory
from fulmen_protocols.errors import FulmenError, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen_protocols import Logger

__all__ = ["main"]

_LOCAL = {"csv", "tensorboard"}


def main(argv: Sequence[str] | None = None) -> int:
    """Deliver a run's log to loggers, make its report again, or say what is in it.

    ``argv`` are the words after the command; None takes those of this process.

    Returns:
        0 when it was done, 1 when it could not be, 2 when the command is wrong.
    """
    parser = argparse.ArgumentParser("fulmen log", description=f"Work with the log ({FILE}) that a run has left.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    again = verbs.add_parser(
        "replay",
        help="deliver the log to loggers",
        description="Deliver a run's log to loggers. Without --logger: to those that did not get everything while the "
        "run went on. What a destination has already is not delivered again.",
        epilog="Example: fulmen log replay lightning_logs/version_3 --logger mlflow --option "
        "tracking_uri=http://localhost:5000",
    )
    again.add_argument("run", help="the run's folder, or its log")
    again.add_argument("--logger", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(available(LOGGERS))}")
    again.add_argument(
        "--option",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the logger, as project=digits; csv and tensorboard write to RUN/replay by default",
    )
    page = verbs.add_parser("report", help="make the run's page again", description="Make the page of a run again.")
    page.add_argument("run", help="the run's folder, or its log")
    page.add_argument("--output", help="where to write the page; by default report.html in the run's folder")
    show = verbs.add_parser("show", help="say what is in the log", description="Say what is in the log of a run.")
    show.add_argument("run", help="the run's folder, or its log")
    try:
        asked = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed why
        return int(stop.code or 0)
    try:
        if asked.verb == "replay":
            return _replay(asked)
        if asked.verb == "report":
            # Here because the other verbs do not need it.
            from fulmen.runlog._report import write_report

            print(write_report(asked.run, asked.output))
            return 0
        _show(asked.run)
    except (FulmenError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _replay(asked: argparse.Namespace) -> int:
    path = find(asked.run)
    options = _pairs(asked.option)
    if len(asked.logger) > 1 and options:
        raise MisconfigurationException(
            f"--option {' '.join(asked.option)} cannot be for {' and '.join(asked.logger)} at once: give one "
            "--logger at a time."
        )
    if options and not asked.logger:
        raise MisconfigurationException(f"--option {' '.join(asked.option)} needs --logger, whose options they are.")
    known = cursors.load(path)
    sinks: list[tuple[str, dict[str, Any], str | None]] = [
        (name, _with_place(name, options, path), None) for name in asked.logger
    ]
    if not sinks:
        due = {key: cursor for key, cursor in known.items() if cursor.is_due}
        for cursor in due.values():
            if not cursor.can_reopen:
                print(
                    f"{cursor.logger} did not get everything, but it cannot be opened by name: call "
                    f"fulmen.runlog.replay({os.path.dirname(path)!r}, logger) from Python.",
                    file=sys.stderr,
                )
        sinks = [(cursor.logger, cursor.options, key) for key, cursor in due.items() if cursor.can_reopen]
        if not due:
            print("nothing to deliver: every logger of the run has got everything")
            return 0
    failed = 0
    for name, arguments, key in sinks:
        try:
            logger = _made(name, arguments)
            count = replay(path, logger) if key is None else catch_up(path, logger, known, key)
        except FulmenError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed += 1
        except Exception as error:  # noqa: BLE001 - whatever the logger's library raises: the others are still fed
            print(
                f"{name}: stopped by {type(error).__name__}: {error}. The same command goes on from there.",
                file=sys.stderr,
            )
            failed += 1
        else:
            print(f"{name}: {count} records delivered")
    return 1 if failed or not sinks else 0


def _made(name: str, options: dict[str, Any]) -> Logger:
    factory = load_factory(LOGGERS, name)
    assert callable(factory)
    parameters = inspect.signature(factory).parameters
    wrong = sorted(options.keys() - parameters.keys())
    if wrong and not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        raise MisconfigurationException(
            f"--option {wrong[0]}={options[wrong[0]]!r}: the logger {name!r} has no such argument. It has: "
            f"{', '.join(parameters)}."
        )
    return check(LOGGERS, factory(**options))  # not load(): an argument may be called name


def _with_place(name: str, options: dict[str, Any], path: str) -> dict[str, Any]:
    if name not in _LOCAL or "save_dir" in options:
        return options
    return {"save_dir": os.path.dirname(path), "name": "replay", "version": name, **options}


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise MisconfigurationException(f"--option {word!r}: write NAME=VALUE, as project=digits.")
        try:
            found[name] = cast("object", ast.literal_eval(text))
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def _show(run: str) -> None:
    log = read_run(run)
    names: dict[str, int] = {}
    for located in log.rows:
        for name in cast("dict[str, object]", located.record["values"]):
            names[name] = names.get(name, 0) + 1
    print(f"{log.path}: {log.status}, {len(log.begins)} calls, {len(log.rows)} rows")
    for name, count in sorted(names.items()):
        print(f"  {name:<40} {count} points")
    for key, cursor in cursors.load(log.path).items():
        print(f"  {'behind' if cursor.is_due else 'has all'}: {key}")

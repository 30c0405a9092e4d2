"""What one training step executes, counted, not timed: the same number on a busy machine as on a quiet one.

Two counts, between the forward of step ``FIRST`` and that of step ``LAST`` of one run:

- *calls*: calls of Python functions and of C functions from Python, in everything, torch included;
- *lines*: lines of Python executed in the framework's own files (torch's and the user's are left out).

``python -m tools.bench.instructions`` prints the Trainer's figures over the raw loop's; ``--write`` records them, and a
tenth more, in step_budget.json, which integration_tests/test_step_budget.py holds.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tools.bench.child import finish, print_table, spawn
from tools.workspace import packages

BUDGET = Path(__file__).parent / "step_budget.json"
CONFIGS = ("bare", "bare+idle50", "log", "metrics10", "val", "predict")
FIRST, LAST = 120, 220
"""The window's ends: behind everything that happens once, with two flushes of the CSV logger (every 50) inside."""


@dataclass
class Counts:
    """What the window executed."""

    calls: int = 0
    lines: int = 0


class Counter:
    """A clock for the model's forward that counts what runs between two of its ticks."""

    def __init__(self, counted_file: Callable[[str], bool], what: str) -> None:
        self.counted_file, self.what = counted_file, what
        self.ticks = 0
        self.counts = Counts()
        self._ours: dict[CodeType, bool] = {}

    def __call__(self) -> None:
        self.ticks += 1
        if self.ticks == FIRST:
            gc.collect()
            gc.disable()  # a collection inside the window would call finalizers, now and then
            self._start()
        elif self.ticks == LAST:
            self._stop()
            gc.enable()

    def _start(self) -> None:
        if self.what == "calls":
            sys.setprofile(self._count_call)
            return
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:  # the loop's own frames run already: they must be told one by one
            if self._is_ours(frame.f_code):
                frame.f_trace = self._count_line
            frame = frame.f_back
        sys.settrace(self._trace_new)

    def _stop(self) -> None:
        if self.what == "calls":
            sys.setprofile(None)
            return
        sys.settrace(None)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            frame.f_trace = None
            frame = frame.f_back

    def _is_ours(self, code: CodeType) -> bool:
        if code not in self._ours:
            self._ours[code] = self.counted_file(code.co_filename)
        return self._ours[code]

    def _count_call(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self.counts.calls += 1

    def _trace_new(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not self._is_ours(frame.f_code):
            return None
        return self._count_line

    def _count_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.counts.lines += 1
        return self._count_line


def fulmen_folders() -> tuple[str, ...]:
    """Where the installed fulmen packages are, each with a separator at its end."""
    names = [package.module for package in packages()]
    specs = [importlib.util.find_spec(name) for name in names]
    return tuple(f"{Path(spec.origin).resolve().parent}{os.sep}" for spec in specs if spec is not None and spec.origin)


def per_step(name: str, config: str) -> dict[str, float]:
    """Count one configuration of one contestant in this process, per step.

    Returns:
        ``{"calls": ..., "lines": ...}``: means over the window's steps.
    """
    from tools.bench.contestants import contestant

    other = contestant(name)
    folders = fulmen_folders()
    counts = {}
    for what in ("calls", "lines"):
        counter = Counter(lambda file: str(Path(file).resolve()).startswith(folders), what)
        other.run(config, LAST + 10, counter)
        counts[what] = getattr(counter.counts, what) / (LAST - FIRST)
    return counts


def measure(configs: tuple[str, ...] = CONFIGS) -> dict[str, dict[str, float]]:
    """The Trainer's counts over the raw loop's for each configuration, each run in a fresh process."""
    found = {}
    twins = {config: config if config in ("val", "predict") else "bare" for config in configs}
    raw = {twin: spawn("tools.bench.instructions", "raw", twin) for twin in sorted(set(twins.values()))}
    for config in configs:
        counts = spawn("tools.bench.instructions", "fulmen", config)
        twin = raw[twins[config]]
        found[config] = {"calls": round(counts["calls"] - twin["calls"], 2), "lines": round(counts["lines"], 2)}
    return found


def ceiling(count: float) -> int:
    """What is recorded for a count: a tenth more, so that a line here and there is free and a habit is not."""
    return math.ceil(1.1 * count)


def main() -> int:
    """Print the counts; with ``--write`` record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"record the counts in {BUDGET.name}")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("case", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        finish(arguments.child, per_step(*arguments.case))
        return 0
    found = measure()
    rows = [[config, f"{counts['calls']:+.2f}", f"{counts['lines']:.2f}"] for config, counts in found.items()]
    print_table(["a step of", "calls over raw", "lines of fulmen"], rows, markdown=arguments.markdown)
    if arguments.write:
        allowed = {config: {what: ceiling(count) for what, count in counts.items()} for config, counts in found.items()}
        BUDGET.write_text(json.dumps(allowed, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {BUDGET.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

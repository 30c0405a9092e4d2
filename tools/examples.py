"""Train the worked examples and check the score that each states: ``python -m tools.examples [NAME ...]``.

Each runs as a person runs it, in a folder of its own below build/examples, which is emptied before. One that fails, or
misses its goal, is an error; the others still run. The goals are those of docs/examples/index.md.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tools.workspace import ROOT

SCRIPTS = ROOT / "docs" / "examples"
RESULTS = ROOT / "build" / "examples"


@dataclass(frozen=True)
class Goal:
    """One number of what an example prints, and how good it must be."""

    says: str
    """A regular expression; its one group is the number. The last match counts."""
    least: float | None = None
    most: float | None = None

    def judge(self, output: str) -> str | None:
        """Why ``output`` misses the goal, or None."""
        found = re.findall(self.says, output)
        if not found:
            return f"nothing that was printed matches {self.says!r}"
        value = float(found[-1])
        if self.least is not None and value < self.least:
            return f"{value:g} is less than {self.least:g} ({self.says})"
        if self.most is not None and value > self.most:
            return f"{value:g} is more than {self.most:g} ({self.says})"
        return None


@dataclass(frozen=True)
class Example:
    """A script below docs/examples, how it is called, and what it must reach."""

    name: str
    goals: tuple[Goal, ...]
    arguments: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its name and arguments, as one would type them."""
        return " ".join([self.name, *self.arguments])


class Missed(Exception):
    """An example that failed or missed its goal; the message says why."""


_PERCENT = r"([\d.]+) ?%"
EXAMPLES = (
    Example("digits", (Goal(rf"Accuracy on the 360 held-out digits: {_PERCENT}", least=97),)),
    Example("finetuning", (Goal(rf"frozen backbone, {_PERCENT} finetuned", least=93),)),
    Example(
        "gan",
        (
            Goal(rf"Recognized with 90 % certainty: {_PERCENT}", least=70),
            Goal(rf"\({_PERCENT} of pure noise\)", most=30),
        ),
    ),
    Example("language_model", (Goal(r"Held-out loss: ([\d.]+)", most=1.8),)),
    Example("fabric/image_classifier", (Goal(rf"Test accuracy: {_PERCENT}", least=98),)),
    Example(
        "fabric/gan",
        (Goal(rf"Points in a cluster: {_PERCENT}", least=75), Goal(r"clusters drawn: (\d+) of 8", least=8)),
    ),
    Example("fabric/actor_critic", (Goal(r"Poles stand for: ([\d.]+) steps", least=475),)),
    Example("fabric/kfold", (Goal(rf"Accuracy over 5 folds: {_PERCENT}", least=95.5),)),
    Example(
        "fabric/language_model",
        (Goal(r"Held-out loss: ([\d.]+)", most=1.85),),
        arguments=("--devices", "2", "--strategy", "fsdp"),
    ),
)


def run(example: Example, folder: Path, scripts: Path = SCRIPTS, seconds: float | None = None) -> str:
    """Run it in ``folder`` and return what it printed.

    Raises:
        Missed: it failed, or what it printed misses a goal.
    """
    command = [sys.executable, str(scripts / f"{example.name}.py"), *example.arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise Missed(f"{example.title} ended with exit status {done.returncode}:\n{done.stdout}{done.stderr}")
    missed = [why for goal in example.goals if (why := goal.judge(done.stdout))]
    if missed:
        raise Missed(f"{example.title} misses its goal: {'; '.join(missed)}. It printed:\n{done.stdout}")
    return done.stdout


def main(names: list[str], examples: tuple[Example, ...] = EXAMPLES, scripts: Path = SCRIPTS) -> int:
    """Run the named examples, or all; return 0 if each reached its goal."""
    unknown = sorted(set(names) - {example.name for example in examples})
    if unknown:
        known = ", ".join(example.name for example in examples)
        raise SystemExit(f"no example is named {', '.join(unknown)}; there are: {known}")
    failed = []
    for example in examples:
        if names and example.name not in names:
            continue
        print(f"===== {example.title} =====", flush=True)
        folder = RESULTS / example.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.perf_counter()
        try:
            print(run(example, folder, scripts).rstrip())
        except Missed as missed:
            failed.append(example.title)
            print(missed)
        print(f"{time.perf_counter() - started:.0f} s, in {folder}", flush=True)
    print(f"examples: {', '.join(failed)} failed" if failed else "examples: each reached its goal")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

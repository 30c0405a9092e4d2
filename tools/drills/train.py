"""COUNT trainings killed at random moments and resumed: each ends bit for bit like the one that was left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from tools.drills.drill import Attempts, Drill, evenly
from tools.drills.table import Row
from tools.drills.train_run import CONFIGURATIONS
from tools.workspace import ROOT

MOST_KILLS = 3
TIMEOUT_S = 300.0


@dataclass
class Outcome:
    """What one training left."""

    digest: str
    kills: int
    before_batches: int
    """Kills that came before the first batch of their process: while it started or loaded."""
    error: str = ""


class Training:
    """A process group that trains in ``folder``."""

    def __init__(self, configuration: str, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.output = open(folder / "output.txt", "ab")  # noqa: SIM115  # closed in wait() or kill()
        self.began_before = self._began()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("train_run.py")), configuration, str(folder)],
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
            env=environment,
        )

    def _began(self) -> int:
        return len(list(self.folder.glob("began-*")))

    def wait_for_batches(self) -> bool:
        """Whether batches began, and the process did not end before."""
        limit = time.monotonic() + TIMEOUT_S
        while self._began() == self.began_before and self.process.poll() is None and time.monotonic() < limit:
            time.sleep(0.005)
        return self._began() > self.began_before

    def wait(self, seconds: float) -> bool:
        """Whether it ended by itself within ``seconds``."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self.output.close()
        return True

    def kill(self) -> None:
        """SIGKILL to all of its processes: ranks and loader workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.output.close()


def trained(configuration: str, folder: Path, chance: random.Random, span_s: float, kills: int) -> Outcome:
    """Train to the end through up to ``kills`` kills, each in about ``span_s`` seconds of batches."""
    done, early = 0, 0
    for _ in range(kills):
        training = Training(configuration, folder)
        if chance.random() < 0.15:
            ended, is_early = training.wait(chance.uniform(0.1, 6.0)), True
        else:
            ended = not training.wait_for_batches() or training.wait(chance.uniform(0.0, 0.8 * span_s))
            is_early = False
        if ended:
            break
        early += is_early and training._began() == training.began_before
        training.kill()
        done += 1
    if not (folder / "done.json").exists():
        training = Training(configuration, folder)
        if not training.wait(TIMEOUT_S):
            training.kill()
            return Outcome("", done, early, f"no end within {TIMEOUT_S:.0f} s")
    if not (folder / "done.json").exists():
        return Outcome("", done, early, (folder / "output.txt").read_text(errors="replace")[-2000:])
    return Outcome(json.loads((folder / "done.json").read_text())["digest"], done, early)


class _Trainings:
    """Unbroken trainings, one a configuration, and broken ones to compare with them."""

    def __init__(self, home: Path) -> None:
        self.seed = int(os.environ.get("DRILL_SEED", str(time.time_ns() % 2**32)))
        print(f"DRILL_SEED={self.seed}", file=sys.stderr, flush=True)
        self.home = home
        self.wrong = False
        self._expected: dict[str, tuple[str, float]] = {}
        self._alone = {name: Lock() for name in CONFIGURATIONS}

    def attempts(self, name: str, first: int, count: int) -> Row:
        """Break ``count`` trainings of a configuration."""
        expected, span_s = self._unbroken(name)
        notes = {"equal": 0, "kills": 0, "kills before the first batch": 0}
        for index in range(first, first + count):
            chance = random.Random(f"{self.seed} {name} {index}")
            folder = self._folder(name, f"{index}")
            outcome = trained(name, folder, chance, span_s, chance.randint(1, MOST_KILLS))
            if outcome.digest == expected:
                shutil.rmtree(folder)
            else:
                self.wrong = True
                print(f"{name}: run {index} differs, see {folder}\n{outcome.error}", file=sys.stderr, flush=True)
            notes["equal"] += outcome.digest == expected
            notes["kills"] += outcome.kills
            notes["kills before the first batch"] += outcome.before_batches
        return Row("train", name, count, count - notes["equal"], notes)

    def _folder(self, name: str, run: str) -> Path:
        folder = self.home / f"{list(CONFIGURATIONS).index(name)}-{run}"
        folder.mkdir()
        return folder

    def _unbroken(self, name: str) -> tuple[str, float]:
        """Digest at the end, and seconds of batches."""
        with self._alone[name]:
            if name not in self._expected:
                folder = self._folder(name, "unbroken")
                training = Training(name, folder)
                training.wait_for_batches()
                began = time.monotonic()
                training.wait(TIMEOUT_S)
                span_s = time.monotonic() - began
                outcome = trained(name, folder, random.Random(0), 0.0, 0)
                if outcome.error or not outcome.digest:
                    raise SystemExit(f"{name}: the unbroken training failed\n{outcome.error}")
                self._expected[name] = outcome.digest, span_s
            return self._expected[name]


@contextmanager
def _trainings() -> Iterator[Attempts]:
    home = Path(tempfile.mkdtemp(prefix="drill-train-"))
    trainings = _Trainings(home)
    yield trainings.attempts
    if not trainings.wrong:
        shutil.rmtree(home)


TRAIN = Drill(_trainings, lambda count: evenly(list(CONFIGURATIONS), count), piece=1, short=8, full=200, parallel=True)

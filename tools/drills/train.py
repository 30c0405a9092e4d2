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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools.drills.table import Row, table
from tools.drills.train_run import CONFIGURATIONS
from tools.workspace import ROOT

__all__ = ["main", "rows"]

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
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
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


def rows(count: int) -> list[Row]:
    """Spread ``count`` trainings over the configurations; a row of each."""
    seed = int(os.environ.get("DRILL_SEED", str(time.time_ns() % 2**32)))
    print(f"DRILL_SEED={seed}", file=sys.stderr, flush=True)
    home = Path(tempfile.mkdtemp(prefix="drill-train-"))
    names = list(CONFIGURATIONS)

    def unbroken(name: str) -> tuple[Outcome, float]:
        folder = home / f"unbroken-{names.index(name)}"
        folder.mkdir()
        training = Training(name, folder)
        training.wait_for_batches()
        began = time.monotonic()
        training.wait(TIMEOUT_S)
        return trained(name, folder, random.Random(0), 0.0, 0), time.monotonic() - began

    def broken(index: int) -> tuple[str, Outcome]:
        name = names[index % len(names)]
        chance = random.Random(f"{seed} {index}")
        folder = home / f"run-{index}"
        folder.mkdir()
        outcome = trained(name, folder, chance, expected[name][1], chance.randint(1, MOST_KILLS))
        if outcome.digest == expected[name][0].digest:
            shutil.rmtree(folder)
        else:
            print(f"{name}: run {index} differs, see {folder}\n{outcome.error}", file=sys.stderr, flush=True)
        return name, outcome

    used = names[:count]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        expected = dict(zip(used, pool.map(unbroken, used), strict=True))
        for name, (outcome, _) in expected.items():
            if outcome.error or not outcome.digest:
                raise SystemExit(f"{name}: the unbroken training failed\n{outcome.error}")
        outcomes = list(pool.map(broken, range(count)))
    found: list[Row] = []
    for name in used:
        mine = [outcome for which, outcome in outcomes if which == name]
        equal = sum(outcome.digest == expected[name][0].digest for outcome in mine)
        notes = {
            "equal": equal,
            "kills": sum(outcome.kills for outcome in mine),
            "kills before the first batch": sum(outcome.before_batches for outcome in mine),
        }
        found.append(Row("train", name, len(mine), len(mine) - equal, notes))
    if not any(row.wrong for row in found):
        shutil.rmtree(home)
    return found


def main(count: int) -> int:
    """Run the drill and print its table; 1 if a training ended otherwise than the unbroken one."""
    found = rows(count)
    print(table(found))
    return int(any(row.wrong for row in found))

"""Real processes in which checks of one backend run together, rank by rank.

Processes are costly to start, so all checks of one kit and backend share a world: each check ends with a meeting of all
ranks through files (never through the backend under test). After a failure or a hang the world is ended and a new one
goes on with the checks that are left.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import pytest
import torch

from fulmen_conformance._importing import import_callable
from fulmen_conformance._reference import free_port
from fulmen_protocols import Topology

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from multiprocessing.process import BaseProcess

__all__ = ["Rank", "SkipCheck", "settle"]


class SkipCheck(Exception):
    """Raised by a check on every rank: the backend does not offer what it needs; the text says what."""


class Outcome(NamedTuple):
    """How one check ended."""

    kind: Literal["passed", "skipped", "failed"]
    text: str = ""


class _Setting(NamedTuple):
    """What the worlds of one kit and backend have in common."""

    checks: str
    """The module of this package that has them."""
    factory: str
    num_processes: int
    device: str
    timeout_s: float


@dataclass
class Rank:
    """One process of a world, as a check sees it."""

    rank: int
    world_size: int
    make: Callable[..., Any]
    device: torch.device
    folder: Path
    meetings: int = field(default=0)

    def meet(self) -> None:
        """Return when every rank has come here; independent of the backend."""
        self.meetings += 1
        (self.folder / f"meet-{self.meetings}-{self.rank}").touch()
        others = [self.folder / f"meet-{self.meetings}-{r}" for r in range(self.world_size)]
        while not all(other.exists() for other in others):
            time.sleep(0.005)

    def topology(self) -> Topology:
        """A new meeting point for a process group, the same on every rank."""
        file = self.folder / f"port-{self.meetings}"
        if self.rank == 0:
            file.write_text(str(free_port()))
        self.meet()
        device = self.device
        if device.type == "cpu" or _has_index(device):
            devices = tuple(device for _ in range(self.world_size))
        else:
            devices = tuple(torch.device(device.type, i) for i in range(self.world_size))
        return Topology(
            devices=devices,
            rank=self.rank,
            local_rank=self.rank,
            world_size=self.world_size,
            main_port=int(file.read_text()),
        )


def _has_index(device: torch.device) -> bool:
    # torch declares the index an int; where none was given it is None.
    return cast("int | None", device.index) is not None


def settle(checks: str, name: str, factory: str, num_processes: int, device: torch.device, timeout_s: float) -> None:
    """Pass, skip or fail the running test as check ``name`` of module ``checks`` ended on all ranks of a world."""
    outcome = _outcomes(_Setting(checks, factory, num_processes, str(device), timeout_s))[name]
    if outcome.kind == "skipped":
        pytest.skip(outcome.text)
    if outcome.kind == "failed":
        pytest.fail(outcome.text, pytrace=False)


def _checks_of(module: str) -> dict[str, Callable[[Rank], None]]:
    table: dict[str, Callable[[Rank], None]] = import_callable(f"fulmen_conformance.{module}:checks")()
    return table


@functools.cache
def _outcomes(setting: _Setting) -> Mapping[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    remaining = list(_checks_of(setting.checks))
    while remaining:
        ended = _one_world(setting, remaining)
        outcomes.update(ended)
        remaining = [name for name in remaining if name not in ended]
    return outcomes


def _one_world(setting: _Setting, names: Sequence[str]) -> dict[str, Outcome]:
    """Run ``names`` until the first one that fails; at least one outcome."""
    folder = Path(tempfile.mkdtemp(prefix="fulmen-conformance-"))
    processes = _start(setting, names, folder)
    try:
        hung = _watch(processes, folder, setting.timeout_s)
        return _collect(names, processes, folder, f"hung for {setting.timeout_s:g} s" if hung else "")
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        shutil.rmtree(folder, ignore_errors=True)


def _start(setting: _Setting, names: Sequence[str], folder: Path) -> list[BaseProcess]:
    # A fork server that has imported torch once starts clean processes in milliseconds; Windows has none.
    if "forkserver" in multiprocessing.get_all_start_methods() and torch.device(setting.device).type == "cpu":
        context: Any = multiprocessing.get_context("forkserver")
        # With what torch itself imports, in most of a second each, where an optimizer or a shard is made first.
        preload = ["torch", "torch.distributed.fsdp", "torch._dynamo", "fulmen_conformance"]
        context.set_forkserver_preload(preload)
    else:
        context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    with _main_module_left_alone():
        for rank in range(setting.num_processes):
            arguments = (setting, list(names), rank, str(folder), dict(os.environ))
            process: BaseProcess = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            processes.append(process)
    return processes


@contextlib.contextmanager
def _main_module_left_alone() -> Generator[None]:
    """New processes must not import the main script: under pytest it is pytest, elsewhere it may be unguarded."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _watch(processes: Sequence[BaseProcess], folder: Path, timeout_s: float) -> bool:
    """Wait until all ranks ended, one failed, or nothing moved for ``timeout_s``; the last is True."""
    seen, moved = -1, time.monotonic()
    while True:
        ended = [process for process in processes if not process.is_alive()]
        reports = sorted(folder.glob("report-*.json"))
        failed = any(process.exitcode for process in ended) or any("failed" in report.name for report in reports)
        if len(ended) == len(processes):
            return False
        if failed:
            # The other ranks may be about to fail too, which says more; or they wait for the dead one.
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline and any(process.is_alive() for process in processes):
                time.sleep(0.02)
            return False
        if len(reports) > seen:
            seen, moved = len(reports), time.monotonic()
        if time.monotonic() - moved > timeout_s:
            return True
        time.sleep(0.02)


def _collect(names: Sequence[str], processes: Sequence[BaseProcess], folder: Path, hung: str) -> dict[str, Outcome]:
    """Outcomes up to the first check that did not pass; ``hung`` tells how, if the world did."""
    outcomes: dict[str, Outcome] = {}
    for index, name in enumerate(names):
        texts: list[str] = []
        kinds: set[str] = set()
        for rank, process in enumerate(processes):
            found = sorted(folder.glob(f"report-{index}-{rank}-*.json"))
            kind, text = json.loads(found[0].read_text()) if found else ("nothing", "")
            kinds.add(kind)
            if kind == "failed":
                texts.append(f"on rank {rank} of {len(processes)}:\n{text}")
            elif kind == "skipped":
                texts.append(text)
            elif kind == "nothing":
                log = (folder / f"log-{rank}").read_text(errors="replace")[-4000:] if process.pid is not None else ""
                state = hung or f"gave no result (exit code {process.exitcode})"
                texts.append(f"rank {rank} of {len(processes)} {state}; the end of its output:\n{log}")
        if kinds == {"passed"}:
            outcomes[name] = Outcome("passed")
        elif kinds == {"skipped"}:
            outcomes[name] = Outcome("skipped", texts[0])
        else:
            if "failed" in kinds:  # ranks that only waited for the failed one say nothing
                texts = [text for text in texts if text.startswith("on rank")]
            outcomes[name] = Outcome("failed", "\n".join(texts))
            break
    return outcomes


def _work(setting: _Setting, names: list[str], rank: int, folder: str, variables: dict[str, str]) -> None:
    """One process of a world."""
    os.environ.clear()
    os.environ.update(variables)
    log = (Path(folder) / f"log-{rank}").open("wb", buffering=0)  # open for the life of this process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    table = _checks_of(setting.checks)
    # A hung rank leaves in its log where it stood, just before the parent gives up.
    patience_s = max(0.8 * setting.timeout_s, setting.timeout_s - 5.0)
    me: Rank | None = None
    for index, name in enumerate(names):
        kind, text = "passed", ""
        try:
            if me is None:
                make, device = import_callable(setting.factory), torch.device(setting.device)
                me = Rank(rank, setting.num_processes, make, device, Path(folder))
            faulthandler.dump_traceback_later(patience_s, file=log)
            table[name](me)
            me.meet()
        except SkipCheck as reason:
            kind, text = "skipped", str(reason)
        except BaseException:  # noqa: BLE001 - whatever a backend raises, this rank must report it
            kind, text = "failed", traceback.format_exc()
        staging = Path(folder) / f"staging-{index}-{rank}"
        staging.write_text(json.dumps([kind, text]))
        staging.rename(Path(folder) / f"report-{index}-{rank}-{kind}.json")
        if kind == "failed":
            # The process group is in an unknown state: leave without asking it.
            os._exit(1)
        assert me is not None
        me.meet()

"""``fulmen doctor``: whether the processes of a run start, meet, and add numbers up right, within a time limit.

Also ``python -m fulmen_fabric.doctor``, which any starter of processes can run in the place of a script.
"""

from __future__ import annotations

import math
import os
import platform
import socket
import sys
import threading
import time
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from fulmen_protocols import FulmenError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    import torch

    from fulmen_fabric.assembly import Assembly
    from fulmen_fabric.world import World
    from fulmen_protocols import Collectives

__all__ = ["command"]

_EXAMPLES = """
Give it what your Trainer or Fabric is given, and start it as your script is started:

  fulmen doctor --devices 2
  fulmen run --devices 2 -m fulmen_fabric.doctor
  torchrun --nproc-per-node 2 -m fulmen_fabric.doctor
  srun fulmen doctor --devices 4 --num-nodes 2
"""
_BYTES = 64 << 20
_TIMES = 3


def command(argv: Sequence[str]) -> int:
    """Check that the processes of a run start, meet and add numbers up right, within a time limit.

    Returns:
        The exit status: 0 if all is well, 1 if not, 2 when the arguments contradict each other or the environment.
    """
    try:
        asked = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help, or what is wrong
        return int(stop.code or 0)
    course = _Course.of_this_process(asked.time_limit)
    try:
        return _run(asked, course)
    finally:
        course.end()


def _run(asked: Namespace, course: _Course) -> int:
    # Here: they import torch, for which --help need not wait.
    from fulmen_fabric import _arguments
    from fulmen_fabric.assembly import assemble
    from fulmen_fabric.world import World

    try:
        assembly = assemble(
            accelerator=_arguments.overridden("accelerator", asked.accelerator, "auto"),
            strategy=_arguments.overridden("strategy", asked.strategy, "auto"),
            devices=_arguments.overridden("devices", asked.devices, "auto"),
            num_nodes=_arguments.overridden("num_nodes", asked.num_nodes, 1),
        )
    except FulmenError as error:
        print(f"fulmen doctor: {error}", file=sys.stderr)
        return 2
    world = World(assembly)
    place = f" at {assembly.environment.main_address}" if world.world_size > 1 else ""
    course.at(world.rank, world.world_size, f"starting and meeting the others{place}")
    try:
        world.launch(partial(_examine, world, assembly, asked.time_limit))  # a launcher may have to pickle it
        world.close()
    except Exception as error:
        # Another rank's end is told by who watches them; what is raised here is this rank's own.
        print(f"fulmen doctor: {course.where}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    return 0


class _Course:
    """What this process is doing; ends it when the time is up.

    Args:
        limit_s: from now, in seconds.
    """

    _current: ClassVar[_Course | None] = None

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began = time.monotonic()
        self.where = "putting the parts together"
        self._timer = threading.Timer(limit_s, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    @classmethod
    def of_this_process(cls, limit_s: float) -> _Course:
        """The one that has begun, or a new one: a process may have been started for the examination alone."""
        if cls._current is None:
            cls._current = cls(limit_s)
        return cls._current

    def at(self, rank: int, world_size: int, doing: str) -> None:
        """From now on this process is ``doing`` something."""
        self.where = f"rank {rank} of {world_size}, {doing}"

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def end(self) -> None:
        """It has come to an end by itself."""
        self._timer.cancel()
        type(self)._current = None

    def _give_up(self) -> None:
        text = (
            f"fulmen doctor: after {self._limit_s:g} s this process is still here: {self.where}. A rank that has said "
            "nothing was not started, or cannot reach the others."
        )
        print(text, file=sys.stderr, flush=True)
        os._exit(1)  # whoever waits in a collective cannot be interrupted


class _Place(NamedTuple):
    """Where one rank is."""

    rank: int
    node: int
    local_rank: int
    host: str
    pid: int
    device: str
    ready_s: float
    """Since this process began: it has met the others."""

    def __str__(self) -> str:
        return (
            f"rank {self.rank}: node {self.node}, local rank {self.local_rank}, {self.device} of {self.host}, process "
            f"{self.pid}; ready after {self.ready_s:.1f} s"
        )


def _examine(world: World, assembly: Assembly, limit_s: float) -> None:
    """In every process: meet, add up, and let rank 0 tell."""
    course = _Course.of_this_process(limit_s)
    rank, size = world.rank, world.world_size
    if rank == 0:
        print("\n".join(_machine(assembly)), flush=True)
    course.at(rank, size, "gathering where the ranks are")
    place = _Place(
        rank, world.node_rank, world.local_rank, socket.gethostname(), os.getpid(), str(world.device), course.seconds
    )
    places = world.collectives.all_gather_object(place)
    if rank == 0:
        print("\n".join(map(str, places)), flush=True)
    wrong = _wrong_places(places)
    course.at(rank, size, "adding up one number of each rank")
    lines, faults = _add_up(world.collectives, world.device, size)
    wrong += faults
    course.at(rank, size, "leaving")
    world.collectives.barrier("doctor")
    if wrong:
        raise RuntimeError(" ".join(wrong))
    if rank == 0:
        print("\n".join([*lines, f"all is well, after {course.seconds:.1f} s"]), flush=True)


def _machine(assembly: Assembly) -> list[str]:
    """What there is, and what was chosen."""
    import torch

    environment = assembly.environment
    started = "its own launcher" if not environment.creates_processes_externally else "what started this process"
    return [
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}",
        f"{len(assembly.devices)} x {assembly.accelerator_name} on each of {assembly.num_nodes} "
        f"node{'s' * (assembly.num_nodes > 1)}, strategy {assembly.strategy_name}; ranks come from "
        f"{type(environment).__name__}, and their processes from {started}",
        *assembly.chosen,
        *([f"they meet at {environment.main_address}:{environment.main_port}"] if assembly.world_size > 1 else []),
    ]


def _wrong_places(places: Sequence[_Place]) -> list[str]:
    """Two ranks on one device."""
    seen: dict[tuple[str, str], int] = {}
    found: list[str] = []
    for place in places:
        other = seen.setdefault((place.host, place.device), place.rank)
        if other != place.rank and place.device != "cpu":
            found.append(f"Ranks {other} and {place.rank} share {place.device} of {place.host}.")
    return found


def _add_up(collectives: Collectives, device: torch.device, size: int) -> tuple[list[str], list[str]]:
    """Sums over all ranks: what they took, and what was wrong with them."""
    import torch

    # float32 holds these sums exactly, and every device has it.
    one = torch.full((1,), float(collectives.rank + 1), device=device)
    large = torch.full((_BYTES // 4,), float(collectives.rank + 1), device=device)
    expected = size * (size + 1) / 2
    wrong: list[str] = []
    best: dict[int, float] = {}
    for tensor in (one, large):
        for _ in range(_TIMES):
            collectives.barrier("doctor")
            began = time.monotonic()
            total = collectives.all_reduce(tensor, "sum")
            total[-1].item()  # waits for the device
            best[len(tensor)] = min(best.get(len(tensor), math.inf), time.monotonic() - began)
            low, high = total.min().item(), total.max().item()
            if low != expected or high != expected:
                found = f"{low:g}" if low == high else f"between {low:g} and {high:g}"
                wrong.append(f"The sum of 1 to {size} over all ranks was {found} on rank {collectives.rank}.")
    # What each rank must send and receive at least, over the time: the "bus bandwidth" of NVIDIA's nccl-tests.
    rate = 2 * (size - 1) / size * _BYTES / best[len(large)] / 1e9
    return [
        f"a sum over {size} ranks of one number is right and takes {1e3 * best[1]:.2f} ms; of {_BYTES >> 20} MiB, "
        f"{1e3 * best[len(large)]:.1f} ms, which is {rate:.1f} GB/s through each rank"
        if size > 1
        else f"one process: {device} works, and there is nobody to meet"
    ], list(dict.fromkeys(wrong))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="fulmen doctor",
        description=command.__doc__.partition("\n")[0] if command.__doc__ else None,
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--accelerator", default="auto", help="cpu, cuda, gpu, mps, auto, or the name of an installed one")
    add("--strategy", default="auto", help="ddp, fsdp, ... (see `fulmen plugins`)")
    add("--devices", default="auto", help="of a node: a count, ids (0,1) or auto")
    add("--num-nodes", type=int, default=1, help="number of machines")
    add("--time-limit", type=_seconds, default=30.0, metavar="SECONDS", help="after which it gives up (30)")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise ArgumentTypeError(f"{text!r} is no time: give a positive number of seconds")
    return seconds


if __name__ == "__main__":
    raise SystemExit(command(sys.argv[1:]))

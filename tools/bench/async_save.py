"""What asynchronous saving costs: how long a step is blocked, and how fast steps run while the file is written.

A model of plain float32 weights (500 MB by default) is saved in turns, in one process: by ``torch.save``, by fulmen's
synchronous and asynchronous writer and, where installed, by Lightning's AsyncCheckpointIO. Between the saves a training
loop of matrix products runs on every core. "Blocked" is of the fastest save of ``--rounds``, which a neighbour's burst
does not move, as a ratio to the fastest ``torch.save``; steps meanwhile are the median, as a ratio to free steps. A
folder in memory is measured beside the disk, where that is to be had.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fulmen_checkpoint import AsyncCheckpointIO, TorchCheckpointIO
from tools.bench.checkpoint import folders
from tools.bench.child import print_table

if TYPE_CHECKING:
    from collections.abc import Callable

_STEP_SIZE = 512
_LAYERS = 20


def torch_save(checkpoint: dict[str, Any], path: str) -> None:
    """``torch.save``, which flushes nothing to the disk."""
    torch.save(checkpoint, path)


def torch_save_flushed(checkpoint: dict[str, Any], path: str) -> None:
    """``torch.save`` and fsync: what survives a power failure."""
    torch.save(checkpoint, path)
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _lightning() -> Any:
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            plugins: Any = importlib.import_module(f"{package}.plugins.io")
        except ImportError:
            continue
        return plugins.AsyncCheckpointIO(plugins.TorchCheckpointIO())
    return None


class _Step:
    """A training step's worth of work on all cores, about 20 ms."""

    def __init__(self) -> None:
        self._layer = torch.nn.Linear(_STEP_SIZE, _STEP_SIZE)
        self._optimizer = torch.optim.SGD(self._layer.parameters(), lr=1e-3)
        self._data = torch.randn(2048, _STEP_SIZE)

    def __call__(self) -> float:
        began = time.perf_counter()
        self._optimizer.zero_grad()
        self._layer(self._data).pow(2).mean().backward()
        self._optimizer.step()
        return time.perf_counter() - began


def _steps(step: _Step, until: Callable[[], bool], least: int = 15) -> list[float]:
    times = []
    while len(times) < least or not until():
        times.append(step())
    return times


def measure(megabytes: int, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds blocked at best, and the median speed of steps meanwhile, of each contestant over ``rounds``."""
    count = megabytes * 1_000_000 // 4 // _LAYERS
    checkpoint = {"state_dict": {f"layer{i}.weight": torch.randn(count) for i in range(_LAYERS)}, "global_step": 1}
    ours, theirs = AsyncCheckpointIO(), _lightning()
    blocking: dict[str, Callable[[dict[str, Any], str], object]] = {
        "torch.save": torch_save,
        "torch.save, fsync": torch_save_flushed,
        "fulmen TorchCheckpointIO": TorchCheckpointIO().save_checkpoint,
    }
    pending: dict[str, tuple[Any, Callable[[], bool], Callable[[], None]]] = {
        "fulmen AsyncCheckpointIO": (ours, lambda: ours.will_exist(target) is None, ours.wait)
    }
    if theirs is not None:
        pending["Lightning AsyncCheckpointIO"] = (theirs, lambda: os.path.exists(target), theirs.teardown)
    step = _Step()
    blocked: dict[str, list[float]] = {name: [] for name in (*blocking, *pending)}
    speed: dict[str, list[float]] = {name: [] for name in pending}
    undisturbed: list[float] = []
    first: dict[str, float] = {}
    _steps(step, lambda: True)
    for _ in range(rounds + 1):  # the first round fills caches and buffers and is reported apart
        undisturbed += _steps(step, lambda: True, 30)
        for name, save in blocking.items():
            target = str(folder / "blocking.ckpt")
            began = time.perf_counter()
            save(checkpoint, target)
            blocked[name].append(time.perf_counter() - began)
            os.sync()
        for name, (io, idle, finish) in pending.items():
            target = str(folder / f"{name.partition(' ')[0]}.ckpt")
            Path(target).unlink(missing_ok=True)
            began = time.perf_counter()
            io.save_checkpoint(checkpoint, target)
            blocked[name].append(time.perf_counter() - began)
            speed[name].append(statistics.fmean(_steps(step, idle, 3)))
            finish()
            os.sync()
    ours.teardown()
    for name, times in blocked.items():
        first[name] = times.pop(0)
    base, free = min(blocked["torch.save"]), statistics.median(undisturbed)
    return {
        name: {
            "blocked_s": min(times),
            "blocked_ratio": min(times) / base,
            "median_ratio": statistics.median(times) / statistics.median(blocked["torch.save"]),
            "first_ratio": first[name] / base,
            "speed": free / statistics.median(speed[name][1:]) if name in speed else 0.0,
        }
        for name, times in blocked.items()
    }


def main() -> int:
    """Measure in this process: the writer is to have the cores that training has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, nargs="+", help="on the file systems to measure", default=folders())
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    rows, figures = [], {}
    for place in arguments.folder:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            found = figures[str(place)] = measure(arguments.megabytes, arguments.rounds, Path(folder))
        for name, figure in found.items():
            ratios = [f"{figure[kind]:.3f}x" for kind in ("blocked_ratio", "median_ratio", "first_ratio")]
            rows.append([str(place), name, *ratios, f"{figure['speed']:.2f}x" if figure["speed"] else "-"])
    columns = ["folder", "saved by", "blocked at best", "median", "the first time", "steps meanwhile"]
    print_table(columns, rows, markdown=arguments.markdown)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

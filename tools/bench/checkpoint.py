"""Saving and loading a checkpoint of 500 MB, in ratios to ``torch.save`` and ``torch.load`` on the same file system.

Contestants take turns in one process, in a new order each round. Two ratios are printed: of the fastest rounds, which a
neighbour's burst on the disk does not move, and of the medians of ``--rounds``. Beside the disk a folder in memory is
measured, where that is to be had: there an fsync costs nothing, and the code's own cost is seen. "Processor" is the
least time on all cores together, which hardly depends on what else the machine does. Every save ends with an fsync, and
makes a file that was not there before, as checkpoints of a run do. One thread copies: several spin while they wait.
Every load ends with the values in a model: they are copied into tensors that are there already, so that a mapped file
is really read. Peak memory is measured for each contestant in a process of its own, over what the process held before.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fulmen_checkpoint import SafetensorsCheckpointIO, ShardedCheckpointIO, TorchCheckpointIO
from tools.bench.child import print_table

GOALS = {
    "save: fulmen": 1.05,
    "load: fulmen, verified": 0.85,
    "load: fulmen, mapped (verified before)": 0.65,
}


BASELINES = ("torch.save + fsync", "torch.load")


def model(megabytes: int) -> dict[str, torch.Tensor]:
    """Tensors as of a transformer: most of the bytes in matrices, many small ones between them."""
    side = 1024
    blocks = max(1, megabytes * 1_000_000 // (side * side * 4))
    state: dict[str, torch.Tensor] = {}
    for block in range(blocks):
        state[f"blocks.{block}.weight"] = torch.randn(side, side)
        state[f"blocks.{block}.bias"] = torch.randn(side)
        state[f"blocks.{block}.norm"] = torch.ones(side)
    return state


def torch_save(state: dict[str, torch.Tensor], path: Path) -> None:
    """The baseline: plain ``torch.save``, and an fsync."""
    with path.open("wb") as stream:
        torch.save({"state_dict": state}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def lightning_save(state: dict[str, torch.Tensor], path: Path) -> None:
    """Lightning's own writer, as its Trainer calls it."""
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO as Theirs

    Theirs().save_checkpoint({"state_dict": state}, str(path))


def savers() -> dict[str, Callable[[dict[str, torch.Tensor], Path], None]]:
    """By name; the first is the baseline."""
    found: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {"torch.save + fsync": torch_save}
    found["save: fulmen"] = lambda state, path: TorchCheckpointIO().save_checkpoint({"state_dict": state}, path)
    found["save: fulmen, safetensors"] = lambda state, path: SafetensorsCheckpointIO().save_checkpoint(
        {"state_dict": state}, path
    )
    found["save: fulmen, folder of shards"] = lambda state, path: ShardedCheckpointIO().save_checkpoint(
        {"state_dict": state}, f"{path}-folder"
    )
    try:
        import lightning.fabric  # noqa: F401

        found["save: Lightning (no checksum, no fsync)"] = lightning_save
    except ImportError:
        pass
    return found


def loaders() -> dict[str, Callable[[Path], dict[str, Any]]]:
    """By name; the first is the baseline."""
    return {
        "torch.load": lambda path: torch.load(path, weights_only=True),
        "load: fulmen, verified": lambda path: TorchCheckpointIO().load_checkpoint(path),
        "load: fulmen, mapped (verified before)": lambda path: TorchCheckpointIO(verify=False).load_checkpoint(path),
        "load: fulmen, safetensors, verified": lambda path: TorchCheckpointIO().load_checkpoint(
            path.with_suffix(".safetensors")
        ),
    }


def folders() -> list[Path]:
    """One on the disk of TMPDIR, and one in memory."""
    memory = Path("/dev/shm")
    return [Path(tempfile.gettempdir()), *([memory] if memory.is_dir() and os.access(memory, os.W_OK) else [])]


def remove(target: Path) -> None:
    """What an earlier save of a contestant wrote, a file or a folder."""
    target.unlink(missing_ok=True)
    shutil.rmtree(f"{target}-folder", ignore_errors=True)


def timed(act: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time, and of this process on all cores."""
    started = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def measure(folder: Path, megabytes: int, rounds: int, only: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each contestant, by round: of wall time and of the processor."""
    state = model(megabytes)
    into = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    torch_file = folder / "load.ckpt"
    TorchCheckpointIO().save_checkpoint({"state_dict": state}, torch_file)
    SafetensorsCheckpointIO().save_checkpoint({"state_dict": state}, folder / "load.safetensors")

    def load(read: Callable[[Path], dict[str, Any]]) -> None:
        loaded = read(torch_file)["state_dict"]
        for name, tensor in into.items():
            tensor.copy_(loaded[name])

    torch.set_num_threads(1)
    acts: dict[str, Callable[[], object]] = {}
    targets: dict[str, Path] = {}
    for name, save in savers().items():
        target = folder / f"save{len(acts)}.ckpt"
        targets[name] = target
        acts[name] = lambda save=save, target=target: save(state, target)
    for name, read in loaders().items():
        acts[name] = lambda read=read: load(read)
    acts = {name: act for name, act in acts.items() if name in BASELINES or re.search(only, name)}
    for act in acts.values():
        act()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in acts}
    rng = random.Random(0)
    for _ in range(rounds):
        order = list(acts)
        rng.shuffle(order)
        for name in order:
            if name in targets:
                remove(targets[name])
            os.sync()  # nobody pays for another's dirty pages
            taken[name].append(timed(acts[name]))
    return taken


def _memory(key: str) -> float:
    """Of this process, in MB."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 / 1e6 for line in text.splitlines() if line.startswith(key))


def peak(name: str, megabytes: int) -> float:
    """MB over what the process held before the save."""
    state = model(megabytes)
    with tempfile.TemporaryDirectory() as folder:
        save = savers()[name]
        save({"w": torch.zeros(1)}, Path(folder, "first"))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _memory("VmRSS")
        save(state, Path(folder, "second"))
        return _memory("VmHWM") - before


def peak_of(name: str, megabytes: int) -> float:
    """``peak`` in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tools.bench.checkpoint", "--peak", name,
               "--megabytes", str(megabytes)]  # fmt: skip
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    """Measure and print; with ``--check`` return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, nargs="+", help="on the file systems to measure", default=folders())
    parser.add_argument("--only", default="", help="a regular expression: which contestants beside the baselines")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--check", action="store_true", help="fail if a goal is missed")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak, arguments.megabytes))
        return 0
    rows, missed = [], []
    for place in arguments.folder:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            taken = measure(Path(folder), arguments.megabytes, arguments.rounds, arguments.only)
        for name, values in taken.items():
            wall, cpu = zip(*values, strict=True)
            base_wall, base_cpu = zip(*taken[BASELINES["load" in name]], strict=True)
            best = min(wall) / min(base_wall)
            shown = [f"{best:.2f}", f"{median(wall) / median(base_wall):.2f}", f"{min(cpu) / min(base_cpu):.2f}"]
            if name in BASELINES:
                shown = [f"{seconds * 1e3:.0f} ms" for seconds in (min(wall), median(wall), min(cpu))]
            goal = GOALS.get(name)
            rows.append([str(place), name, *shown, "" if goal is None else f"{goal}"])
            if goal is not None and best > goal:
                missed.append(f"{name}, in {place}: {best:.2f} instead of {goal}")
    print_table(["folder", "contestant", "fastest", "median", "processor", "goal"], rows, markdown=arguments.markdown)
    if os.access("/proc/self/clear_refs", os.W_OK) and not arguments.no_memory:
        names = [name for name in savers() if name in BASELINES or re.search(arguments.only, name)]
        peaks = [[name, f"{peak_of(name, arguments.megabytes):+.0f}"] for name in names]
        print_table(["contestant", "peak MB"], peaks, markdown=arguments.markdown)
    for name in missed:
        print(f"goal missed: {name}", file=sys.stderr)
    return int(arguments.check and bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())

"""What a logger that raises, blocks or loses its folder costs a run's steps, as a ratio to the same run without it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import nn

import fulmen
from fulmen.loggers import CSVLogger, TensorBoardLogger
from fulmen.runlog import LogDelivery

__all__ = ["main"]

_GOAL = 1.02
_METRICS = 20
_WARM_UP = 50
_BLOCK = 25


def main() -> int:
    """Print a ratio for each fault; 1 when a step costs its thread more than the goal allows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=512, help="of the layers: how much a step has to do")
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faults: dict[str, Callable[[Path], Any]] = {
        "raises": _raises,
        "blocks 60 s in each call": _blocks,
        "loses its folder": _loses_its_folder,
    }
    if importlib.util.find_spec("mlflow") is not None:
        faults["MLflow, its server killed"] = _server_killed
    walls: dict[str, list[float]] = {}
    cpus: dict[str, list[float]] = {}
    names = ["without", *faults]
    for turn in range(arguments.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, cpu = _run(faults.get(name), arguments)
            walls.setdefault(name, []).extend(wall)
            cpus.setdefault(name, []).extend(cpu)
    wall_without, cpu_without = _quiet(walls["without"]), _quiet(cpus["without"])
    print(f"{arguments.rounds} runs of {arguments.steps} steps that log {_METRICS} metrics each, in turns; of blocks")
    print(
        f"of {_BLOCK} steps the lower quartile. With CSV alone a step takes {wall_without * 1e6:.0f} us, of which its"
    )
    print(f"thread computes {cpu_without * 1e6:.0f} us. Ratio to that (goal {_GOAL}) with a second logger that ...")
    print("                               wall   CPU")
    worst = 0.0
    for name in faults:
        wall_ratio, cpu_ratio = _quiet(walls[name]) / wall_without, _quiet(cpus[name]) / cpu_without
        worst = max(worst, cpu_ratio)
        print(f"  {name:<27} {wall_ratio:6.3f} {cpu_ratio:5.3f}")
    return int(worst > _GOAL)


def _quiet(seconds: list[float]) -> float:
    """The lower quartile: neighbours on the machine only ever add."""
    return quantiles(seconds, n=4)[0]


class _Net(fulmen.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.walls: list[float] = []
        self.cpus: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.walls.append(time.perf_counter())
        self.cpus.append(time.thread_time())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layers(batch).square().mean()
        self.log_dict({f"metric_{n}": 0.1234567 * (batch_idx + n) for n in range(_METRICS)})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.001)


def _run(fault: Callable[[Path], Any] | None, arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds a step, of the clock and of the CPU time of the thread that trains: means of blocks of steps."""
    batches = [torch.randn(64, arguments.width, device=arguments.accelerator)] * arguments.steps
    net = _Net(arguments.width)
    # What was blocked may write once more while the folder is deleted.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        loggers: list[Any] = [CSVLogger(folder, version="run")]
        bad = None if fault is None else fault(Path(folder))
        with bad if bad is not None else _nothing() as second:
            trainer = fulmen.Trainer(
                accelerator=arguments.accelerator,
                devices=1,
                max_epochs=1,
                logger=loggers + ([] if second is None else [second]),
                log_every_n_steps=1,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            trainer.log_delivery = LogDelivery(finalize_timeout_s=0.2, report=False)
            trainer.fit(net, batches)
            assert trainer.global_step == arguments.steps
    return _means(net.walls), _means(net.cpus)


def _means(moments: list[float]) -> list[float]:
    edges = moments[_WARM_UP::_BLOCK]
    return [(after - before) / _BLOCK for before, after in pairwise(edges)]


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


@contextmanager
def _raises(folder: Path) -> Iterator[Any]:
    back = threading.Event()

    class Raises(TensorBoardLogger):
        def log_metrics_at(self, metrics: Any, step: int, time_s: float) -> None:
            if not back.is_set():
                raise ConnectionError("nobody answers")

    yield Raises(folder, version="raises")
    back.set()
    time.sleep(1.0)  # its thread delivers, and ends: it must not be there in the next run


@contextmanager
def _blocks(folder: Path) -> Iterator[Any]:
    back = threading.Event()

    class Blocks(TensorBoardLogger):
        def log_metrics_at(self, metrics: Any, step: int, time_s: float) -> None:
            back.wait(60)

    yield Blocks(folder, version="blocks")
    back.set()
    time.sleep(1.0)


@contextmanager
def _loses_its_folder(folder: Path) -> Iterator[Any]:
    share = folder / "share"
    share.write_text("")  # nothing can be made below it
    yield CSVLogger(share, version="run", flush_logs_every_n_steps=1)
    share.unlink()
    time.sleep(1.0)


@contextmanager
def _server_killed(folder: Path) -> Iterator[Any]:
    # MLflow is not needed for the others.
    from fulmen.loggers import MLFlowLogger

    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", address.split(":")[1]]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_for(f"http://{address}/health")
        logger = MLFlowLogger("bench", tracking_uri=f"http://{address}", run_name="killed")
        _ = logger.run_id
    finally:
        os.killpg(server.pid, 9)
        server.wait()
    yield logger


def _wait_for(address: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(address, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"no answer from {address}")


if __name__ == "__main__":
    raise SystemExit(main())

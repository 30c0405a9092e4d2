"""What the Trainer adds to a step of DDP on two gloo processes, as a ratio to raw DDP.

Both train the same model in the same two processes and take turns (raw, Trainer, raw, Trainer, ...). A reading is the
median time from one ``training_step`` to the next; a pair of turns gives one ratio; the result is their median.
Bar, checkpoints and logger are off in ``bare``; ``log`` logs one value a step and writes a row every 50 steps.

``--clock cpu`` reads the CPU time of the thread that trains, for a machine that has other work: waiting for the other
process does not count then, so the ratio is above the one on the wall.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from statistics import median
from typing import Any

GOAL = 1.05


def main() -> int:
    """Start both processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=256, help="of the hidden layers")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--check", action="store_true", help=f"fail above {GOAL}")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return measure(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tools.bench.ddp_overhead", *sys.argv[1:]]
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        env |= {name: str(value) for name, value in place.items()}
        processes.append(subprocess.Popen(command, env=env))
    return max(process.wait() for process in processes)


def measure(arguments: argparse.Namespace) -> int:
    """The work of one process; rank 0 prints the table."""
    import torch
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel

    import fulmen
    from fulmen.loggers import CSVLogger

    warnings.simplefilter("ignore")
    width, steps = arguments.width, arguments.steps
    data = [torch.randn(32, width) for _ in range(steps)]
    stamps: list[float] = []
    clock = time.thread_time if arguments.clock == "cpu" else time.perf_counter

    class Model(fulmen.LightningModule):
        def __init__(self, *, logs: bool) -> None:
            super().__init__()
            self.logs = logs
            self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            stamps.append(clock())
            loss: Tensor = self.layers(batch).square().mean()
            if self.logs:
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    def step_s() -> float:
        times = [after - before for before, after in pairwise(stamps[20:])]
        stamps.clear()
        return median(times)

    def raw() -> float:
        model = Model(logs=False)
        placed, optimizer = DistributedDataParallel(model.layers), model.configure_optimizers()
        for batch in data:
            stamps.append(clock())
            loss = placed(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return step_s()

    folder = tempfile.mkdtemp()

    def ours(config: str) -> float:
        trainer = fulmen.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=1,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            logger=CSVLogger(folder) if config == "log" else False,
        )
        trainer.fit(Model(logs=config == "log"), data)
        return step_s()

    configs = ("bare", "log")
    for config in configs:  # not measured: joins the group, and whatever is built lazily
        ours(config)
    raw()
    ratios: dict[str, list[float]] = {config: [] for config in configs}
    baseline: list[float] = []
    for _ in range(arguments.rounds):
        for config, found in ratios.items():
            baseline.append(raw())
            found.append(ours(config) / baseline[-1])
    if os.environ["RANK"] == "0":
        kind = "of CPU time" if arguments.clock == "cpu" else "on the wall"
        print(f"raw DDP: {median(baseline) * 1e6:.0f} us a step {kind}, {steps} steps, {arguments.rounds} rounds")
        print("| configuration | ratio to raw DDP | lowest | highest |\n|---|---|---|---|")
        for config, found in ratios.items():
            print(f"| {config} | {median(found):.3f} | {min(found):.3f} | {max(found):.3f} |")
    worst = max(median(found) for found in ratios.values())
    return int(arguments.check and worst > GOAL)


if __name__ == "__main__":
    raise SystemExit(main())

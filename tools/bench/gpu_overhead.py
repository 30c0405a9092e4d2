"""What the Trainer adds to a step on an accelerator: tiny MLP, ResNet-18 on 32x32 pictures, GPT-2 124M, in bf16-mixed.

``--workloads 1b`` is a transformer of 1B parameters under FSDP2 (``gpu_sharded.py``), with tokens a second and MFU.

``--devices N`` runs every contestant on N devices by torchrun with DDP; the raw loop is DDP too. Contestants take
turns, a fresh launch each, ``--rounds`` times; the table has medians. A step is timed between two device
synchronisations around the measured steps, so that work left on the device counts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

from tools.bench.child import contestant_parser, environment, finish, print_table

CONTESTANTS = ["raw", "fulmen", "fulmen-log", "fulmen-mixed", "lightning", "lightning-log"]
SHARDED = ("1b", "tiny")
LEARNING_RATE = 1e-4


class Timer:
    """Starts at the ``warm_up``-th batch, stops at the end; synchronises with the device at both."""

    def __init__(self, warm_up: int, accelerator: str) -> None:
        import torch

        self.synchronize = torch.cuda.synchronize if accelerator == "cuda" else (lambda: None)
        self.warm_up, self.started, self.seconds = warm_up, 0.0, 0.0

    def batch(self, index: int) -> None:
        """Call before batch ``index``."""
        if index == self.warm_up:
            self.synchronize()
            self.started = time.perf_counter()

    def end(self) -> None:
        """Call after the last batch."""
        self.synchronize()
        self.seconds = time.perf_counter() - self.started


def own_device(accelerator: str) -> Any:
    """The device of this process."""
    import torch

    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if accelerator == "cuda" else torch.device("cpu")
    )


def raw(workload: str, accelerator: str, devices: int, timer: Timer, steps: int) -> None:
    """The loop that a person writes; DDP if there is more than one device."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from tools.bench import gpu_sharded
    from tools.bench.gpu_workloads import Repeated, batch, model

    device = own_device(accelerator)
    if accelerator == "cuda":
        torch.cuda.set_device(device)
    is_sharded = workload in SHARDED
    if (devices > 1 or is_sharded) and not torch.distributed.is_initialized():
        alone: dict[str, Any] = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        group: dict[str, Any] = {} if devices > 1 else alone
        torch.distributed.init_process_group("nccl" if accelerator == "cuda" else "gloo", **group)
    network: torch.nn.Module = gpu_sharded.sharded(workload, device) if is_sharded else model(workload).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, fused=True)
    if devices > 1 and not is_sharded:
        network = DistributedDataParallel(network, device_ids=[device] if accelerator == "cuda" else None)
    data = gpu_sharded.tokens(workload, device) if is_sharded else batch(workload, device)
    for index, (x, y) in enumerate(Repeated(data, steps)):
        timer.batch(index)
        optimizer.zero_grad()
        with torch.autocast(accelerator, torch.bfloat16, enabled=not is_sharded):
            loss = network(x, y)
        loss.backward()
        optimizer.step()
    timer.end()


def trainer(
    library_name: str, workload: str, accelerator: str, devices: int, timer: Timer, steps: int, *, kind: str
) -> int:
    """A Trainer with this interface, everything off, or with one log a step, CSV, progress bar and checkpoints.

    Returns:
        How often host and device were synchronised in the measured batches of a sharded workload.
    """
    import torch

    from tools.bench import gpu_sharded
    from tools.bench.gpu_workloads import Repeated, batch, model

    library: Any = importlib.import_module(library_name)
    loggers: Any = importlib.import_module(f"{library_name}.loggers")
    logging.getLogger(library_name).setLevel(logging.ERROR)
    log, is_sharded = kind == "log", workload in SHARDED
    # Counting costs time: it is done in batches after those that are timed.
    syncs = gpu_sharded.Syncs(steps if is_sharded else sys.maxsize, accelerator)
    extra = 10 if is_sharded else 0

    class Module(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = None if is_sharded else model(workload)

        def configure_model(self) -> None:
            if self.net is None:
                self.net = gpu_sharded.network(workload)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == steps:
                timer.end()
            syncs.begin(batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            syncs.end()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            timer.batch(batch_idx)
            loss = self.net(*batch)
            if log:
                self.log("loss", loss, prog_bar=True)
            return loss

        def on_train_end(self) -> None:
            if not extra:
                timer.end()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, fused=True)

    device = own_device(accelerator)
    how = {"strategy": "ddp" if devices > 1 else "auto", "precision": "bf16-mixed"}
    if is_sharded:
        how = gpu_sharded.options(library_name, kind)
    data = gpu_sharded.tokens(workload, device) if is_sharded else batch(workload, device)
    with tempfile.TemporaryDirectory() as folder:
        callbacks: Any = importlib.import_module(f"{library_name}.callbacks")
        saver = callbacks.ModelCheckpoint(folder, every_n_train_steps=10_000)  # armed; none is due in so few steps
        library.Trainer(
            accelerator=accelerator,
            devices=devices,
            **how,
            max_epochs=1,
            callbacks=[saver] if log and is_sharded else [],
            logger=loggers.CSVLogger(folder) if log else False,
            enable_progress_bar=log,
            enable_checkpointing=log and is_sharded,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(Module(), Repeated(data, steps + extra))
    return syncs.count


def child(arguments: argparse.Namespace) -> None:
    """Run every workload of one contestant in this process and report µs per step."""
    import torch

    from tools.bench.gpu_workloads import STEPS

    warnings.filterwarnings("ignore")
    torch.set_float32_matmul_precision("high")
    [name] = arguments.contestants
    library, _, kind = name.partition("-")
    found: dict[str, float] = {}
    for workload in arguments.workloads:
        warm_up, measured = STEPS[workload]
        timer = Timer(warm_up, arguments.accelerator)
        if name == "raw":
            raw(workload, arguments.accelerator, arguments.devices, timer, warm_up + measured)
        else:
            module = {"lightning": "lightning.pytorch"}.get(library, library)
            count = trainer(
                module, workload, arguments.accelerator, arguments.devices, timer, warm_up + measured, kind=kind
            )
            found[f"{workload} syncs"] = count
        found[workload] = 1e6 * timer.seconds / measured
        if arguments.accelerator == "cuda":
            torch.cuda.empty_cache()
    if os.environ.get("RANK", "0") == "0":
        finish(arguments.child, found)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(name: str, arguments: argparse.Namespace, visible: str | None) -> dict[str, float]:
    """One fresh launch of a contestant; µs per step of each workload."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        devices = str(arguments.devices)
        start = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
            if arguments.devices > 1
            else []
        )
        given = ["--devices", devices, "--accelerator", arguments.accelerator, "--workloads", *arguments.workloads]
        module = ["-m", __spec__.name, "--child", str(result), *given, "--", name]
        env = environment()
        env.pop("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            env["CUDA_VISIBLE_DEVICES"] = visible
        done = subprocess.run([sys.executable, *start, *module], env=env, capture_output=True, text=True, check=False)
        if done.returncode or not result.exists():
            raise RuntimeError("\n".join((done.stderr or done.stdout).strip().splitlines()[-12:]))
        return json.loads(result.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _rates(workload: str, us: float, syncs: float | None) -> list[str]:
    import torch

    from tools.bench import gpu_sharded

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    tokens, used = gpu_sharded.rates(workload, us, name)
    return [
        f"{tokens:.0f}",
        "unknown" if used is None else f"{100 * used:.1f} %",
        "-" if syncs is None else f"{syncs:.0f}",
    ]


def main() -> int:
    """Measure everyone who is installed and print a table."""
    parser = contestant_parser(__doc__, CONTESTANTS)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument(
        "--accelerator", choices=["cuda", "cpu"], default="cuda", help="cpu is for trying the script out"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", default=["mlp", "resnet", "gpt"])
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return 0
    taken: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for name in arguments.contestants:
            if name != "raw" and importlib.util.find_spec(name.partition("-")[0]) is None:
                continue
            try:
                found = launch(name, arguments, os.environ.get("CUDA_VISIBLE_DEVICES"))
            except RuntimeError as error:
                print(f"{name} failed:\n{error}", file=sys.stderr)
                continue
            taken.setdefault(name, []).append(found)
    rows, figures = [], {}
    for workload in arguments.workloads:
        for name, rounds in taken.items():
            us = median([found[workload] for found in rounds])
            base = median([found[workload] for found in taken["raw"]]) if "raw" in taken else float("nan")
            figures[f"{workload} {name}"] = {"us": us, "ratio": us / base}
            row = [f"{workload} {name}", f"{us:.0f}", f"{us - base:+.0f}", f"{us / base:.3f}"]
            if workload in SHARDED:
                row += _rates(workload, us, rounds[0].get(f"{workload} syncs"))
            rows.append(row)
    head = [f"workload, {arguments.devices} device(s)", "µs a step", "over raw µs", "ratio"]
    if arguments.workloads and all(workload in SHARDED for workload in arguments.workloads):
        head += ["tokens/s and device", "MFU", "syncs in 10 steps"]
    print_table(head, rows, markdown=arguments.markdown)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return int(not rows)


if __name__ == "__main__":
    raise SystemExit(main())

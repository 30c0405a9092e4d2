"""ZeRO through fulmen against the same DeepSpeed engine driven by hand: seconds a step, and their ratio.

Started once; with several devices it starts a process for each. In every process the two take turns (by hand, fulmen,
by hand, ...), ``--rounds`` times ``--steps`` steps each; the time of a round is that of rank 0 between two barriers. On
CUDA in bfloat16, on the CPU in float32 and small. The ratio is by hand / fulmen: 1.0 is as fast, less is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from tools.bench.child import print_table


def _config(stage: int, batch: int, half: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": batch,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "timers": {"throughput": {"enabled": False}},
        **({"bf16": {"enabled": True}} if half else {}),
    }


def _model(width: int, depth: int) -> Any:
    from torch import nn

    blocks = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
              for _ in range(depth)]  # fmt: skip
    return nn.Sequential(*blocks)


def _rank(arguments: argparse.Namespace) -> None:
    import torch

    import fulmen
    from fulmen.strategies import DeepSpeedStrategy

    cuda = arguments.accelerator == "cuda"
    half = cuda
    strategy = DeepSpeedStrategy(config=_config(arguments.stage, arguments.batch, half))
    fabric = fulmen.Fabric(
        accelerator=arguments.accelerator, devices=arguments.devices, strategy=strategy,
        precision="bf16-mixed" if half else "32-true",
    )  # fmt: skip
    fabric.launch()
    import deepspeed

    def made() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = _model(arguments.width, arguments.depth).to(fabric.device)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4)

    model, optimizer = made()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=_config(arguments.stage, arguments.batch, half),
        model_parameters=model.parameters(), dist_init_required=False,
    )  # fmt: skip
    ours, our_optimizer = fabric.setup(*made())
    x = torch.randn(arguments.batch, arguments.width, device=fabric.device)
    dtype = torch.bfloat16 if half else torch.float32

    def by_hand() -> None:
        loss = engine(x.to(dtype)).square().mean()
        engine.backward(loss)
        engine.step()

    def by_fulmen() -> None:
        loss = ours(x).square().mean()
        fabric.backward(loss, model=ours)
        our_optimizer.step()

    def seconds(step: Any, count: int) -> float:
        fabric.barrier()
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            step()
        if cuda:
            torch.cuda.synchronize()
        fabric.barrier()
        return (time.perf_counter() - started) / count

    for step in (by_hand, by_fulmen):
        seconds(step, arguments.warm_up)
    taken = [(seconds(by_hand, arguments.steps), seconds(by_fulmen, arguments.steps)) for _ in range(arguments.rounds)]
    if fabric.is_global_zero:
        Path(arguments.child).write_text(json.dumps({"taken": taken}))


def main() -> int:
    """Measure each stage and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--width", type=int, default=64, help="of a block (GPU: 2048)")
    parser.add_argument("--depth", type=int, default=4, help="number of blocks (GPU: 24)")
    parser.add_argument("--batch", type=int, default=32, help="rows of a rank's batch (GPU: 8192)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _rank(arguments)
        return 0
    import subprocess
    import tempfile

    rows = []
    for stage in arguments.stages:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = [
                sys.executable,
                "-m",
                __spec__.name,
                *sys.argv[1:],
                "--child",
                str(result),
                "--stage",
                str(stage),
            ]
            env = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
            }
            subprocess.run(command, check=True, env=env)
            taken = json.loads(result.read_text())["taken"]
        hand, ours = (median(column) for column in zip(*taken, strict=True))
        ratio = median([by_hand / mine for by_hand, mine in taken])
        rows.append([f"ZeRO-{stage}", f"{1e3 * hand:.2f}", f"{1e3 * ours:.2f}", f"{ratio:.3f}"])
    print_table(
        ["stage", "by hand, ms a step", "fulmen, ms a step", "by hand / fulmen"], rows, markdown=arguments.markdown
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""float8 against bfloat16 on one GPU: tokens per second, use of the device, and the loss after some hundred steps.

Every precision trains the same compiled transformer on the same tokens through Fabric, in turn, in one process. A table
says for each width: tokens per second, model FLOPs utilisation against the device's dense bfloat16 peak, ratio to
``bf16-true`` of the same run, peak memory. Then a smaller model learns a language of pairs under two precisions.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fulmen
from fulmen.plugins import Float8Precision
from tools.bench.transformer import Shape, Transformer, flops_per_token

WIDTHS = {
    2048: Shape(2048, 18, 16, 5632),
    4096: Shape(4096, 6, 32, 11008),
}
# Dense bfloat16 peak without sparsity: NVIDIA's data sheets of H100 SXM and H200 give the same figure.
PEAK = 989e12
CONTESTANTS: dict[str, Any] = {
    "bf16-true": lambda **_: "bf16-true",
    "fp8-bf16": lambda **kw: Float8Precision(torch.bfloat16, **kw),
    "fp8-bf16 rowwise": lambda **kw: Float8Precision(torch.bfloat16, "rowwise", **kw),
    "bf16-mixed": lambda **_: "bf16-mixed",
    "fp8-mixed": lambda **kw: Float8Precision(torch.float32, **kw),
}


class Compiled(nn.Module):
    """The transformer with its blocks and its loss compiled one by one, which takes seconds instead of minutes."""

    def __init__(self, shape: Shape, *, compiles: bool) -> None:
        super().__init__()
        self.transformer = Transformer(shape)
        if compiles:
            for block in self.transformer.blocks:
                block.compile()
        self.loss = torch.compile(_loss) if compiles else _loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """As the transformer's."""
        return self.loss(self.transformer, self.transformer.hidden(x), y)


def _loss(transformer: Transformer, hidden: Tensor, y: Tensor) -> Tensor:
    logits = transformer.head(transformer.norm(hidden))
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def prepared(name: str, shape: Shape, args: argparse.Namespace) -> tuple[fulmen.Fabric, Any, Any, Any]:
    """A Fabric with the compiled model, the optimizer, and the precision object or name."""
    emulate = {"emulate": True, "min_features": 16, "device": "cpu"} if args.accelerator == "cpu" else {}
    precision = CONTESTANTS[name](**emulate)
    chosen = {"precision": precision} if isinstance(precision, str) else {"plugins": precision}
    fabric = fulmen.Fabric(accelerator=args.accelerator, devices=1, **chosen)
    torch.manual_seed(0)
    with fabric.init_module():
        model = Compiled(shape, compiles=args.compile)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    placed, optimizer = fabric.setup(model, optimizer)
    return fabric, placed, optimizer, precision


def step(fabric: fulmen.Fabric, model: Any, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """One update; returns the loss on the device."""
    loss: Tensor = model(x, y)
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def synchronize(fabric: fulmen.Fabric) -> None:
    """Wait for the device."""
    if fabric.device.type == "cuda":
        torch.cuda.synchronize()


def speed(name: str, width: int, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of one precision."""
    shape = args.shapes[width]
    fabric, model, optimizer, precision = prepared(name, shape, args)
    x = torch.randint(shape.vocabulary, (args.batch, args.length), device=fabric.device)
    y = x.roll(-1, dims=1)
    if fabric.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(args.warm_up):
        step(fabric, model, optimizer, x, y)
    synchronize(fabric)
    warm = time.perf_counter() - began
    times = []
    for _ in range(args.steps):
        started = time.perf_counter()
        step(fabric, model, optimizer, x, y)
        synchronize(fabric)
        times.append(time.perf_counter() - started)
    rate = x.numel() / sorted(times)[len(times) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30 if fabric.device.type == "cuda" else 0.0
    return {
        "kind": "speed", "precision": name, "width": width, "tokens_per_s": rate,
        "mfu": rate * flops_per_token(shape, args.length) / PEAK, "peak_gib": peak, "warm_up_s": warm,
        "converted": len(getattr(precision, "converted", ())),
    }  # fmt: skip


def losses(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Mean loss of the last 50 steps of a run on a language in which a token says much about the next."""
    shape = args.shapes["loss"]
    fabric, model, optimizer, _ = prepared(name, shape, args)
    generator = torch.Generator().manual_seed(0)
    follows = torch.randint(shape.vocabulary, (shape.vocabulary, 4), generator=generator)
    last: list[Tensor] = []
    for index in range(args.loss_steps):
        tokens = torch.empty(args.batch, args.length + 1, dtype=torch.int64)
        tokens[:, 0] = torch.randint(shape.vocabulary, (args.batch,), generator=generator)
        choice = torch.randint(4, (args.batch, args.length), generator=generator)
        for position in range(args.length):
            tokens[:, position + 1] = follows[tokens[:, position], choice[:, position]]
        tokens = tokens.to(fabric.device)
        loss = step(fabric, model, optimizer, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        if index >= args.loss_steps - 50:
            last.append(loss.float())
    mean = torch.stack(last).mean().item()
    return {"kind": "loss", "precision": name, "steps": args.loss_steps, "loss": mean}


def table(rows: list[dict[str, Any]]) -> str:
    """The two tables in Markdown."""
    lines = ["| width | precision | float8 layers | tokens/s | MFU | ratio to bf16-true | peak GiB |", "|" + "---|" * 7]
    base = {row["width"]: row["tokens_per_s"] for row in rows if row.get("precision") == "bf16-true" and "width" in row}
    for row in rows:
        if row["kind"] == "speed":
            ratio = row["tokens_per_s"] / base[row["width"]]
            lines.append(
                f"| {row['width']} | `{row['precision']}` | {row['converted']} | {row['tokens_per_s']:,.0f} | "
                f"{row['mfu']:.2f} | {ratio:.3f} | {row['peak_gib']:.1f} |"
            )
    found = {row["precision"]: row["loss"] for row in rows if row["kind"] == "loss"}
    if found:
        lines += ["", "| precision | loss, mean of the last 50 steps | difference from bf16-true |", "|---|---|---|"]
        lines += [f"| `{n}` | {v:.4f} | {v / found['bf16-true'] - 1:+.2%} |" for n, v in found.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--loss-steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which nothing new is begun")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.shapes = {**WIDTHS, "loss": Shape(1024, 4, 16, 4096, vocabulary=4096)}
    if args.tiny:
        args.shapes = {64: Shape(64, 2, 4, 176, vocabulary=512), "loss": Shape(64, 2, 4, 176, vocabulary=64)}
    began, rows = time.perf_counter(), []
    widths = [width for width in args.shapes if isinstance(width, int)]
    runs: list[tuple[Any, ...]] = [(speed, name, width) for width in widths for name in ("bf16-true", "fp8-bf16")]
    runs += [(losses, "bf16-true"), (losses, "fp8-bf16")]  # what tells most comes first
    runs += [(speed, name, widths[0]) for name in CONTESTANTS if name not in ("bf16-true", "fp8-bf16")]
    for run, *what in runs:
        if time.perf_counter() - began > args.budget:
            print(f"not run, out of time: {what}", flush=True)
            continue
        length, args.length = args.length, min(args.length, 256) if run is losses else args.length
        row = run(*what, args)
        args.length = length
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / "float8.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        torch.compiler.reset()
        gc.collect()
        if args.accelerator == "cuda":
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if args.accelerator == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}\n\n{table(rows)}")


if __name__ == "__main__":
    main()

"""Train a small transformer language model in a loop of your own, its parameters sharded over the processes.

The text is that of Python's own help pages (the module ``pydoc_data``), so nothing is downloaded. ``--strategy fsdp``
shards parameters, gradients and optimizer state; ``ddp`` keeps a copy on each process; the loop is the same::

    python docs/examples/fabric/language_model.py --devices 2 --strategy fsdp
"""

import argparse
import math
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fulmen_fabric import Fabric

CONTEXT, WIDTH = 64, 96


class Letters(Dataset[Tensor]):
    """Windows of ``CONTEXT + 1`` letters, as numbers; one starts at every ``stride``-th letter."""

    def __init__(self, numbers: Tensor, stride: int) -> None:
        self.numbers, self.stride = numbers, stride

    def __len__(self) -> int:
        return (len(self.numbers) - CONTEXT - 1) // self.stride

    def __getitem__(self, index: int) -> Tensor:
        return self.numbers[index * self.stride : index * self.stride + CONTEXT + 1]


class Writer(nn.Module):
    """A decoder-only transformer; returns the mean loss of a batch of windows, in nats a letter."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters))

    def forward(self, windows: Tensor) -> Tensor:
        known, following = windows[:, :-1], windows[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=windows.device)
        hidden = self.embed(known) + self.place(torch.arange(CONTEXT, device=windows.device))
        logits = self.head(self.layers(hidden, mask=mask, is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())


def held_out_loss(fabric: Fabric, model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    with torch.no_grad():
        losses = torch.stack([model(windows) for windows in loader])
    model.train()
    return fabric.all_reduce(losses.mean()).item()


def loss_of_pairs(train: Tensor, test: Tensor, letters: int) -> float:
    """What counting pairs of letters reaches: the score to beat."""
    pairs, singles = Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True)), Counter(train[:-1].tolist())
    told = zip(test[:-1].tolist(), test[1:].tolist(), strict=True)
    return sum(-math.log((pairs[pair] + 1) / (singles[pair[0]] + letters)) for pair in told) / (len(test) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda or auto (default cpu)")
    parser.add_argument("--devices", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--strategy", default="auto", help="fsdp, ddp or auto (default auto)")
    parser.add_argument("--precision", default="32-true", help="for example bf16-mixed (default 32-true)")
    parser.add_argument("--max-steps", type=int, default=300, help="updates to train (default 300)")
    parser.add_argument("--out", type=Path, default=Path("demo_output/fabric"), help="where the checkpoint goes")
    args = parser.parse_args()

    fabric = Fabric(
        accelerator=args.accelerator, devices=args.devices, strategy=args.strategy, precision=args.precision
    )
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    torch.set_num_threads(1)

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {letter: number for number, letter in enumerate(sorted(set(text)))}
    numbers = torch.tensor([alphabet[letter] for letter in text])
    cut = int(0.9 * len(numbers))
    batch = 64 // fabric.world_size  # 64 windows an update, whatever the number of processes
    loader, test_loader = fabric.setup_dataloaders(
        DataLoader(Letters(numbers[:cut], stride=7), batch_size=batch, shuffle=True, drop_last=True),
        DataLoader(Letters(numbers[cut:], stride=2 * CONTEXT), batch_size=batch),
    )
    with fabric.init_module():
        module = Writer(len(alphabet))
    model = fabric.setup_module(module)  # first the module: sharding makes its parameters new ones
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=6e-3))

    def rate(step: int) -> float:
        return min(step / 50, 1.0) * (0.55 + 0.45 * math.cos(math.pi * min(step / args.max_steps, 1.0)))

    run = fabric.run_state
    while run.step < args.max_steps:
        for windows in loader:
            for group in optimizer.param_groups:
                group["lr"] = 6e-3 * rate(run.step + 1)
            optimizer.zero_grad()
            loss = model(windows)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            run.step += 1
            if run.step % 100 == 0:
                fabric.print(f"step {run.step}: loss {loss.item():.3f}")
            if run.step == args.max_steps:
                break
        run.epoch += 1
    fabric.save(args.out / "language_model.ckpt", {"model": model, "optimizer": optimizer, "run": run})

    reached = held_out_loss(fabric, model, test_loader)
    pairs = loss_of_pairs(numbers[:cut], numbers[cut:], len(alphabet))
    fabric.print(f"Held-out loss: {reached:.3f} nats a letter (counting pairs: {pairs:.3f})")


if __name__ == "__main__":
    main()

"""Train a small transformer to write English, letter by letter, on the text of Python's own help pages.

The text ships with every Python (the module ``pydoc_data``), so nothing is downloaded::

    python docs/examples/language_model.py
"""

import argparse
import itertools
import math
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import torch
from curves import draw_curves, plt, read_curves
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import fulmen as L
from fulmen.callbacks import LearningRateMonitor, ModelCheckpoint
from fulmen.loggers import CSVLogger

CONTEXT = 64


class Letters(Dataset[Tensor]):
    """Windows of ``CONTEXT + 1`` letters, as numbers; one starts at every ``stride``-th letter."""

    def __init__(self, numbers: Tensor, stride: int) -> None:
        self.numbers, self.stride = numbers, stride

    def __len__(self) -> int:
        return (len(self.numbers) - CONTEXT - 1) // self.stride

    def __getitem__(self, index: int) -> Tensor:
        return self.numbers[index * self.stride : index * self.stride + CONTEXT + 1]


class HelpPages(L.LightningDataModule):
    """About 700 thousand letters; the last tenth is held out."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        text = "\n".join(topics.values())
        self.alphabet = sorted(set(text))
        number = {letter: index for index, letter in enumerate(self.alphabet)}
        numbers = torch.tensor([number[letter] for letter in text])
        cut = int(0.9 * len(numbers))
        self.train, self.val = Letters(numbers[:cut], stride=7), Letters(numbers[cut:], stride=CONTEXT)
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=128)


class LetterModel(L.LightningModule):
    """A decoder-only transformer: about 200 thousand parameters."""

    def __init__(self, letters: int, width: int = 96, heads: int = 4, layers: int = 2, rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.letters = nn.Embedding(letters, width)
        self.places = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, letters)

    def forward(self, numbers: Tensor) -> Tensor:
        """Shape (batch, up to CONTEXT) to logits (batch, the same, letters)."""
        length = numbers.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=numbers.device)
        hidden = self.letters(numbers) + self.places.weight[:length]
        return self.out(self.layers(hidden, mask=mask, is_causal=True))

    def loss(self, windows: Tensor) -> Tensor:
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.rate, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def write(self, start: Tensor, letters: int) -> Tensor:
        """Go on from ``start``, shape (length,), by so many letters, each drawn from what the model expects."""
        for _ in range(letters):
            chances = (self(start[None, -CONTEXT:])[0, -1] / 0.8).softmax(dim=0)
            start = torch.cat([start, torch.multinomial(chances, 1)])
        return start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, mps or auto (default cpu)")
    parser.add_argument("--max-steps", type=int, default=450, help="optimizer steps to train (default 450)")
    parser.add_argument("--out", type=Path, default=Path("demo_output/language_model"), help="where all is written")
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)

    data = HelpPages()
    best = ModelCheckpoint(dirpath=args.out, filename="best-{step}", monitor="val_loss", enable_version_counter=False)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_steps=args.max_steps,
        val_check_interval=min(90, args.max_steps),
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        callbacks=[best, LearningRateMonitor("step")],
        logger=CSVLogger(args.out, name="csv"),
        default_root_dir=args.out,
    )
    started = time.perf_counter()
    trainer.fit(LetterModel(len(data.alphabet)), datamodule=data)
    seconds = time.perf_counter() - started

    model = LetterModel.load_from_checkpoint(best.best_model_path).eval()
    start = torch.tensor([data.alphabet.index(letter) for letter in "The statement"])
    text = "".join(data.alphabet[index] for index in model.write(start, 300))
    loss, baseline = float(best.best_model_score), pairs_loss(data)
    draw(args.out / "language_model.png", trainer.log_dir, baseline)
    print(f"\nTrained {trainer.global_step} steps in {seconds:.1f} s.")
    print(f"Held-out loss: {loss:.3f} nats a letter ({loss / math.log(2):.2f} bits); counting pairs: {baseline:.3f}")
    print(f"It writes: {text!r}")
    print(f"Look at: {args.out / 'language_model.png'}")


def pairs_loss(data: HelpPages) -> float:
    """The held-out loss, nats a letter, of predicting each letter from how often it followed the one before."""
    train, val = data.train.numbers.tolist(), data.val.numbers.tolist()
    pairs, firsts = Counter(itertools.pairwise(train)), Counter(train)
    letters = len(data.alphabet)
    losses = [-math.log((pairs[pair] + 1) / (firsts[pair[0]] + letters)) for pair in itertools.pairwise(val)]
    return sum(losses) / len(losses)


def draw(path: Path, log_dir: str | None, baseline: float) -> None:
    figure, (losses, rates) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    curves = read_curves(log_dir)
    losses.axhline(baseline, color="grey", linestyle="--", label="counting pairs of letters")
    names = {"train_loss": "training", "val_loss": "held out"}
    draw_curves(losses, curves, names, ylabel="nats a letter", title="Loss")
    draw_curves(rates, curves, {"lr-AdamW": "AdamW"}, title="Learning rate")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()

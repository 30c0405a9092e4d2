"""Train a small convolutional network on 1,797 handwritten digits, and leave a report that a person can look at.

The data set ships inside scikit-learn, so nothing is downloaded. Run it again and it resumes where it stopped::

    python docs/examples/digits.py
    python docs/examples/digits.py --devices 2               # two processes, DDP
    python docs/examples/digits.py --accelerator cuda        # one GPU, no line changed
    python docs/examples/digits.py --no-resume               # start anew
"""

import argparse
import base64
import csv
import html
import time
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen as L
from fulmen.callbacks import ModelCheckpoint
from fulmen.loggers import CSVLogger, TensorBoardLogger

mpl.use("Agg")  # pictures go to files: no screen is needed
import matplotlib.pyplot as plt

FIRST_RUN_EPOCHS = 30
LATER_RUN_EPOCHS = 10


class Digits(L.LightningDataModule):
    """8x8 grey pictures of handwritten digits: 1,180 to train on, 257 to choose the checkpoint, 360 held out."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        pictures = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8) in [0, 1]
        labels = torch.tensor(digits.target, dtype=torch.int64)
        # The same split in every process and every run, with every digit as frequent in each part.
        rest, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
        train, val = train_test_split(rest, test_size=257, stratify=labels[rest], random_state=0)
        self.train, self.val, self.test = (TensorDataset(pictures[part], labels[part]) for part in (train, val, test))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=257)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=180)


class DigitClassifier(L.LightningModule):
    """Two convolutions and a linear layer: about 20 thousand parameters."""

    def __init__(self, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 64, kernel_size=3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, 10),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.net(pictures)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pictures, labels = batch
        loss = F.cross_entropy(self(shifted(pictures)), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        pictures, labels = batch
        logits = self(pictures)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log(f"{stage}_acc", accuracy, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)}


def shifted(pictures: Tensor) -> Tensor:
    """Move every picture by up to one pixel each way, differently each time: a digit stays the same digit."""
    y, x = torch.randint(-1, 2, (2, len(pictures), 1, 1), device=pictures.device)
    rows = (torch.arange(8, device=pictures.device)[:, None] + y).clamp(0, 7)
    columns = (torch.arange(8, device=pictures.device)[None, :] + x).clamp(0, 7)
    return pictures[torch.arange(len(pictures), device=pictures.device)[:, None, None], 0, rows, columns].unsqueeze(1)


def main() -> None:
    args = arguments()
    out: Path = args.out
    last = out / "last.ckpt"
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(1)  # so small a network is faster without threads that wait for each other

    resume = args.resume and last.exists()
    done = torch.load(last, weights_only=True, map_location="cpu")["epoch"] + 1 if resume else 0
    epochs = args.max_epochs or (done + LATER_RUN_EPOCHS if resume else FIRST_RUN_EPOCHS)

    best = ModelCheckpoint(
        dirpath=out, filename="best-{epoch}", monitor="val_acc", mode="max", enable_version_counter=False
    )
    newest = ModelCheckpoint(dirpath=out, filename="last", enable_version_counter=False)  # after every epoch
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        max_epochs=epochs,
        callbacks=[best, newest],
        logger=[CSVLogger(out, name="csv"), TensorBoardLogger(out, name="tensorboard")],
        default_root_dir=out,
        log_every_n_steps=10,
    )
    if resume:
        trainer.print(f"Resuming from {last}: {done} epochs done, training until {epochs}. --no-resume starts anew.")
    else:
        trainer.print(f"Training for {epochs} epochs. Run the same command again to go on from where this run ends.")

    data = Digits()
    started = time.perf_counter()
    trainer.fit(DigitClassifier(), datamodule=data, ckpt_path=last if resume else None)
    seconds = time.perf_counter() - started
    [scores] = trainer.test(datamodule=data, ckpt_path="best", verbose=False)

    if trainer.is_global_zero:
        model = DigitClassifier.load_from_checkpoint(best.best_model_path, map_location="cpu")
        pages = write_report(out, model, data, scores["test_acc"], seconds)
        print(f"\nTrained in {seconds:.1f} s. Accuracy on the 360 held-out digits: {scores['test_acc']:.2%}")
        print(f"Best checkpoint: {best.best_model_path}")
        for page in pages:
            print(f"Look at:         {page}")
        print(f"Or run:          tensorboard --logdir {out / 'tensorboard'}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1, help="processes to train on (default 1)")
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, mps or auto (default cpu)")
    parser.add_argument("--max-epochs", type=int, help="total epochs (default 30, or 10 more than are done)")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from last.ckpt if there is one"
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output/digits"), help="where everything is written")
    return parser.parse_args()


def write_report(out: Path, model: DigitClassifier, data: Digits, accuracy: float, seconds: float) -> list[Path]:
    """Draw the curves and the mistakes, and put both on one page that needs no other file."""
    curves, mistakes, page = out / "curves.png", out / "misclassified.png", out / "report.html"
    history = read_history(out / "csv")
    draw_curves(history, curves)
    wrong = draw_mistakes(model, data, mistakes)
    page.write_text(report_page(history, accuracy, wrong, seconds, [curves, mistakes]), encoding="utf-8")
    return [page, curves, mistakes]


def read_history(logs: Path) -> dict[str, dict[int, float]]:
    """Read every run's CSV log, oldest first: metric -> epoch (counted from 1) -> value."""
    history: dict[str, dict[int, float]] = {"train_loss": {}, "val_loss": {}, "val_acc": {}}
    for path in sorted(
        logs.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.removeprefix("version_"))
    ):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, values in history.items():
                    if row.get(name):
                        values[int(row["epoch"]) + 1] = float(row[name])
    return history


def draw_curves(history: dict[str, dict[int, float]], path: Path) -> None:
    figure, (losses, accuracies) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for name, label in (("train_loss", "training"), ("val_loss", "validation")):
        losses.plot(history[name].keys(), history[name].values(), marker=".", label=label)
    losses.set(xlabel="epoch", ylabel="cross-entropy", yscale="log", title="Loss")
    losses.legend()
    percent = [100 * value for value in history["val_acc"].values()]
    accuracies.plot(history["val_acc"].keys(), percent, marker=".", color="C2")
    accuracies.set(xlabel="epoch", ylabel="correct, %", title="Validation accuracy")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_mistakes(model: DigitClassifier, data: Digits, path: Path) -> int:
    """Draw every held-out digit that the model gets wrong; return how many there are."""
    pictures, labels = data.test.tensors
    model.eval()
    with torch.inference_mode():
        guesses = model(pictures).argmax(dim=1)
    wrong = (guesses != labels).nonzero().flatten().tolist()
    columns = 6
    rows = max(1, -(-len(wrong) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(9, 1.9 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, wrong, strict=False):
        axis.imshow(pictures[index, 0], cmap="gray_r")
        axis.set_title(f"is {labels[index]}, read as {guesses[index]}", fontsize=10)
    if not wrong:
        figure.suptitle("None: every held-out digit is read correctly")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return len(wrong)


def report_page(
    history: dict[str, dict[int, float]], accuracy: float, wrong: int, seconds: float, pictures: list[Path]
) -> str:
    curves, mistakes = (base64.b64encode(picture.read_bytes()).decode() for picture in pictures)
    rows = "\n".join(
        f"<tr><td>{epoch}</td>"
        + "".join(f"<td>{history[name].get(epoch, float('nan')):.4f}</td>" for name in history)
        + "</tr>"
        for epoch in sorted(history["val_acc"])
    )
    heads = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in history)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Handwritten digits: training report</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }}
  body {{ color: #222; background: #fff; }}
  img {{ width: 100%; height: auto; }}
  table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .2rem .4rem; text-align: right; border-bottom: 1px solid #ddd; }}
  .score {{ font-size: 2.5rem; font-weight: 600; margin: 0; }}
</style>
</head>
<body>
<h1>Handwritten digits</h1>
<p class="score">{accuracy:.2%} correct</p>
<p>on 360 digits the model never saw ({wrong} wrong). This run trained for {seconds:.0f} s.</p>
<h2>Curves</h2>
<img alt="Loss and validation accuracy by epoch" src="data:image/png;base64,{curves}">
<h2>Digits it gets wrong</h2>
<img alt="Misclassified digits" src="data:image/png;base64,{mistakes}">
<h2>Epochs</h2>
<table><thead><tr><th>epoch</th>{heads}</tr></thead><tbody>
{rows}
</tbody></table>
</body>
</html>
"""


if __name__ == "__main__":
    main()

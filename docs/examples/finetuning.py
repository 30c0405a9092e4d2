"""Finetune an image classifier: a network that has learnt the digits 0 to 4 learns all ten, from 60 pictures of each.

The data set ships inside scikit-learn. The new head is trained alone first, on what the network knew; then the whole
network. A moving average of the weights is what is validated, tested and saved::

    python docs/examples/finetuning.py
"""

import argparse
import time
from pathlib import Path

import torch
from curves import Curve, draw_curves, plt, read_curves
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen as L
from fulmen.callbacks import BackboneFinetuning, EMAWeightAveraging, ModelCheckpoint
from fulmen.loggers import CSVLogger

PICTURES_OF_EACH = 60
UNFREEZE_AT = 15  # epochs


class Digits(L.LightningDataModule):
    """The pictures of the first so many digits: some of each to train on, all others held out."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        digits = load_digits()
        pictures, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, digits.target
        train, held_out = [], []
        for digit in range(classes):
            found = (labels == digit).nonzero()[0].tolist()
            train += found[:PICTURES_OF_EACH]
            held_out += found[PICTURES_OF_EACH:]
        self.train, self.held_out = (
            TensorDataset(pictures[part], torch.tensor(labels[part])) for part in (train, held_out)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=30, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, batch_size=600)

    test_dataloader = val_dataloader


class Classifier(L.LightningModule):
    """A convolutional backbone and a linear head."""

    def __init__(self, classes: int, rate: float = 2e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32 * 4, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.backbone(pictures))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean(), prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_acc", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Frozen parameters join the optimizer when they are unfrozen.
        wanted = (parameter for parameter in self.parameters() if parameter.requires_grad)
        return torch.optim.SGD(wanted, lr=self.hparams.rate, momentum=0.9)


def train(
    out: Path, name: str, model: Classifier, data: Digits, epochs: int, callbacks: list[object]
) -> tuple[float, dict[str, Curve]]:
    """Train, and test the checkpoint of the end; returns its accuracy and the run's curves."""
    kept = ModelCheckpoint(dirpath=out, filename=name, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks, kept],
        logger=CSVLogger(out, name=name),
        default_root_dir=out,
        log_every_n_steps=0,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    [scores] = trainer.test(datamodule=data, ckpt_path=kept.best_model_path, verbose=False)
    return scores["test_acc"], read_curves(trainer.log_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-epochs", type=int, default=40, help="epochs of each training (default 40)")
    parser.add_argument("--out", type=Path, default=Path("demo_output/finetuning"), help="where everything is written")
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(1)  # so small a network is faster without threads that wait for each other
    started = time.perf_counter()

    first, _ = train(args.out, "first", Classifier(classes=5), Digits(5), args.max_epochs, [])
    before = Classifier.load_from_checkpoint(args.out / "first.ckpt")

    model = Classifier(classes=10)
    model.backbone.load_state_dict(before.backbone.state_dict())
    callbacks = [
        BackboneFinetuning(UNFREEZE_AT, lambda_func=lambda epoch: 1.1, backbone_initial_ratio_lr=0.3),
        EMAWeightAveraging(decay=0.98),
    ]
    finetuned, curves = train(args.out, "finetuned", model, Digits(10), args.max_epochs, callbacks)

    head_alone = curves["val_acc"][1][min(UNFREEZE_AT, args.max_epochs) - 1]
    draw(args.out / "finetuning.png", curves)
    print(f"\nTwo trainings in {time.perf_counter() - started:.1f} s.")
    print(f"Digits 0 to 4: {first:.2%} of the held-out pictures")
    print(f"All ten: {head_alone:.2%} by a new head on the frozen backbone, {finetuned:.2%} finetuned")
    print(f"Look at: {args.out / 'finetuning.png'}")


def draw(path: Path, curves: dict[str, Curve]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    unfrozen = UNFREEZE_AT * (10 * PICTURES_OF_EACH // 30)
    for axis, metric, title in zip(
        axes, ("train_loss", "val_acc"), ("Training loss", "Accuracy, held out"), strict=True
    ):
        axis.axvline(unfrozen, color="grey", linestyle="--", label="backbone unfrozen")
        draw_curves(axis, curves, {metric: "averaged weights" if metric == "val_acc" else "training"}, title=title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()

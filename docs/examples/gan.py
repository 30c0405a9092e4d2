"""Train a generative adversarial network on handwritten digits, with two optimizers stepped by hand.

The data set ships inside scikit-learn. A classifier that never saw a generated picture judges the result::

    python docs/examples/gan.py
"""

import argparse
import time
from pathlib import Path

import torch
from curves import draw_curves, plt, read_curves
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen as L
from fulmen.loggers import CSVLogger

NOISE = 32


def real_digits() -> tuple[Tensor, Tensor]:
    """1,797 pictures, shape (1797, 64) in [-1, 1], and the digits they show."""
    digits = load_digits()
    return torch.tensor(digits.data, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)


class DigitGAN(L.LightningModule):
    """A generator that learns to fool a discriminator, which learns not to be fooled."""

    def __init__(self, rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 256), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 64), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Linear(64, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3),
            nn.Linear(256, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3),
            nn.Linear(128, 1),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        (real,) = batch
        of_generator, of_discriminator = self.optimizers()
        fake = self(torch.randn(len(real), NOISE, device=self.device))

        with of_discriminator.toggle_model():
            says_real, says_fake = self.discriminator(real), self.discriminator(fake.detach())
            # Source of the target 0.9: one-sided label smoothing, Salimans et al. 2016, section 3.4.
            loss = F.binary_cross_entropy_with_logits(says_real, torch.full_like(says_real, 0.9))
            loss = loss + F.binary_cross_entropy_with_logits(says_fake, torch.zeros_like(says_fake))
            of_discriminator.zero_grad()
            self.manual_backward(loss)
            of_discriminator.step()
        self.log("discriminator_loss", loss, on_step=False, on_epoch=True)

        with of_generator.toggle_model():
            verdict = self.discriminator(fake)
            loss = F.binary_cross_entropy_with_logits(verdict, torch.ones_like(verdict))
            of_generator.zero_grad()
            self.manual_backward(loss)
            of_generator.step()
        self.log("generator_loss", loss, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        rate, betas = self.hparams.rate, (0.5, 0.999)
        return [
            torch.optim.Adam(self.generator.parameters(), lr=rate, betas=betas),
            torch.optim.Adam(self.discriminator.parameters(), lr=rate / 2, betas=betas),
        ]


class Judge(L.LightningModule):
    """Tells digits apart; it is trained on real ones alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def quiet_trainer(epochs: int) -> L.Trainer:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", max_epochs=epochs, **off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, mps or auto (default cpu)")
    parser.add_argument("--max-epochs", type=int, default=200, help="epochs to train (default 200)")
    parser.add_argument("--out", type=Path, default=Path("demo_output/gan"), help="where everything is written")
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(1)  # so small a network is faster without threads that wait for each other

    pictures, labels = real_digits()
    gan = DigitGAN()
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_epochs=args.max_epochs,
        logger=CSVLogger(args.out, name="csv"),
        default_root_dir=args.out,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(gan, DataLoader(TensorDataset(pictures), batch_size=64, shuffle=True, drop_last=True))
    seconds = time.perf_counter() - started

    judge = Judge()
    quiet_trainer(30).fit(judge, DataLoader(TensorDataset(pictures, labels), batch_size=64, shuffle=True))
    gan.eval()
    judge.eval()
    with torch.inference_mode():
        made = gan(torch.randn(1000, NOISE))
        sure, digit = judge.net(made).softmax(dim=1).max(dim=1)
        noise_sure, _ = judge.net(torch.rand(1000, 64) * 2 - 1).softmax(dim=1).max(dim=1)
    recognized, of_noise = (float((each > 0.9).float().mean()) for each in (sure, noise_sure))
    counts = torch.bincount(digit[sure > 0.9], minlength=10)

    draw(args.out / "gan.png", trainer.log_dir, made)
    print(f"\nTrained {trainer.global_step} optimizer steps in {seconds:.1f} s.")
    print(f"Recognized with 90 % certainty: {recognized:.1%} of generated pictures ({of_noise:.1%} of pure noise)")
    print(f"Digits among them, 0 to 9: {counts.tolist()}")
    print(f"Look at: {args.out / 'gan.png'}")


def draw(path: Path, log_dir: str | None, made: Tensor) -> None:
    figure, (curves, pictures) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    names = {"generator_loss": "generator", "discriminator_loss": "discriminator"}
    draw_curves(curves, read_curves(log_dir), names, ylabel="cross-entropy", title="Loss")
    framed = F.pad(made[:60].reshape(6, 10, 8, 8), (1, 1, 1, 1), value=-1)
    sheet = framed.permute(0, 2, 1, 3).reshape(60, 100)
    pictures.imshow(sheet, cmap="gray_r")
    pictures.axis("off")
    pictures.set_title("Generated digits")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()

"""chemprop: message passing over molecules, from Python and from the library's command line."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

REQUIRES = ["chemprop==2.3.1"]
PACKAGES = ["chemprop"]
WHAT = "MPNN with metrics, a Noam schedule, early stopping, the best checkpoint; the commands train and predict"
ENDS = ["", "O", "N", "Cl", "C(=O)O", "c1ccccc1"]


def molecules() -> list[tuple[str, float]]:
    """Chains of carbon with one of six ends, and a number that depends on both."""
    return [
        ("C" * length + end, 0.3 * length - 0.7 * place + 0.1 * (length % 2))
        for length in range(1, 9)
        for place, end in enumerate(ENDS)
    ]


def from_python() -> dict[str, object]:
    """Train, stop early, resume, load the best checkpoint and predict."""
    import torch
    from chemprop import data, featurizers, models, nn
    from lightning import pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    pl.seed_everything(1)
    points = [data.MoleculeDatapoint.from_smi(smiles, [y]) for smiles, y in molecules()]
    featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
    train, held_out = (data.MoleculeDataset(part, featurizer) for part in (points[::2], points[1::2]))
    scaler = train.normalize_targets()
    held_out.normalize_targets(scaler)
    train_loader = data.build_dataloader(train, batch_size=8, seed=3)
    val_loader = data.build_dataloader(held_out, batch_size=8, shuffle=False)

    def model() -> Any:
        unscale = nn.UnscaleTransform.from_standard_scaler(scaler)
        predictor = nn.RegressionFFN(input_dim=16, hidden_dim=16, output_transform=unscale)
        metrics = [nn.metrics.RMSE(), nn.metrics.MAE()]
        passing = nn.BondMessagePassing(d_h=16, depth=2)
        return models.MPNN(passing, nn.MeanAggregation(), predictor, True, metrics, warmup_epochs=1, max_lr=0.01)

    def trainer(epochs: int) -> Any:
        saved = ModelCheckpoint("saved", "best-{epoch}-{val_loss:.3f}", "val_loss", mode="min", save_last=True)
        return pl.Trainer(
            logger=CSVLogger("logs", name="mpnn"), accelerator="cpu", devices=1, max_epochs=epochs,
            enable_progress_bar=False, callbacks=[saved, EarlyStopping("val_loss", patience=10)], log_every_n_steps=2,
            gradient_clip_val=1.0, deterministic=True,
        )  # fmt: skip

    found: dict[str, object] = {}
    trained, run = model(), trainer(4)
    run.fit(trained, train_loader, val_loader)
    found["metrics"] = {name: float(value) for name, value in run.callback_metrics.items()}
    found["tested"] = run.test(trained, val_loader, weights_only=False, verbose=False)
    found["weights"] = [float(weight.double().sum()) for weight in trained.parameters()]
    best = run.checkpoint_callback.best_model_path
    found["best"] = [Path(best).name, float(run.checkpoint_callback.best_model_score)]
    found["predictions"] = torch.cat(run.predict(trained, val_loader, weights_only=False)).flatten().tolist()
    loaded = models.MPNN.load_from_checkpoint(best)
    from_file = models.MPNN.load_from_file(best)
    found["loaded"] = torch.cat(run.predict(loaded, val_loader, weights_only=False)).flatten().tolist()
    found["from file"] = [float(weight.double().sum()) for weight in from_file.parameters()]
    found["best by name"] = [
        values.tolist() for values in run.predict(dataloaders=val_loader, ckpt_path="best", weights_only=False)
    ]
    resumed, run = model(), trainer(6)
    run.fit(resumed, train_loader, val_loader, ckpt_path="saved/last.ckpt", weights_only=False)
    found["resumed"] = [float(weight.double().sum()) for weight in resumed.parameters()]
    found["resumed to"] = [run.current_epoch, run.global_step, run.optimizers[0].param_groups[0]["lr"]]
    return found


def from_the_command_line() -> dict[str, object]:
    """Train an ensemble of two with ``chemprop train`` and use it with ``chemprop predict``."""
    from chemprop.cli.main import main as command

    with Path("molecules.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("smiles", "y"), *molecules()])
    shared = ["--accelerator", "cpu", "--num-workers", "0", "--batch-size", "8"]
    network = ["--message-hidden-dim", "16", "--ffn-hidden-dim", "16", "--depth", "2"]
    sys.argv = [
        "chemprop", "train", "-i", "molecules.csv", "-o", "trained", "--epochs", "3", "--warmup-epochs", "1",
        "--ensemble-size", "2", "--data-seed", "5", "--pytorch-seed", "5", "--metrics", "rmse", "mae", *shared,
        *network,
    ]  # fmt: skip
    command()
    sys.argv = [
        "chemprop", "predict", "-i", "molecules.csv", "-o", "predicted.csv", "--model-paths", "trained",
        "--uncertainty-method", "ensemble", *shared,
    ]  # fmt: skip
    command()
    with Path("predicted.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    files = sorted(path.name for path in Path("trained").rglob("*") if path.suffix in (".pt", ".ckpt", ".csv", ".yaml"))
    numbers = [[float(cell) for cell in row[1:]] for row in rows[1:]]
    return {"columns": rows[0], "predicted": numbers, "files": files}


def main() -> dict[str, object]:
    """Both."""
    # Its hyperparameters hold classes and metric objects, which its own loading takes from the file.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    return {"python": from_python(), "command line": from_the_command_line()}

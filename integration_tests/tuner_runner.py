"""Tunes one small module under a package with Lightning's names and prints what was found, as JSON.

``python tuner_runner.py fulmen`` or ``python tuner_runner.py lightning.pytorch``. With ``ranks FOLDER`` after it, tries
learning rates on two gloo processes, each of which writes what it found to a file.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

SEARCHES: dict[str, dict[str, Any]] = {
    "exponential": {"num_training": 60},
    "linear": {"num_training": 40, "mode": "linear", "min_lr": 1e-4, "max_lr": 0.5},
    "diverging": {"num_training": 60, "min_lr": 1e-3, "max_lr": 1e4},
    "never stopping": {"num_training": 60, "min_lr": 1e-3, "max_lr": 1e3, "early_stop_threshold": None},
    "strict": {"num_training": 60, "max_lr": 1e2, "early_stop_threshold": 1.5},
    "accumulating": {"num_training": 24, "accumulate_grad_batches": 2},
}
SIZES: dict[str, dict[str, Any]] = {
    "power": {},
    "binsearch": {"mode": "binsearch"},
    "few trials of binsearch": {"mode": "binsearch", "max_trials": 6, "margin": 0.0},
    "up to a limit": {"max_val": 32, "init_val": 4},
    "validate": {"method": "validate", "init_val": 8},
    "test": {"method": "test", "init_val": 8},
    "predict": {"method": "predict", "init_val": 8},
}


def model_of(library: Any) -> Any:
    class Model(library.LightningModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lr, self.batch_size = 0.02, 4
            self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))

        def loss(self, batch: Any) -> Any:
            if len(batch[0]) > 37:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", self.loss(batch))

        def test_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=self.lr)

        def loader(self) -> Any:
            generator = torch.Generator().manual_seed(1)
            inputs = torch.randn(512, 6, generator=generator)
            return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=self.batch_size)

        def train_dataloader(self) -> Any:
            return self.loader()

        def test_dataloader(self) -> Any:
            return self.loader()

        def predict_dataloader(self) -> Any:
            return self.loader()

    class Validated(Model):  # Lightning's batch-size finder fails without this loader
        def val_dataloader(self) -> Any:
            return self.loader()

    return Model, Validated


def trainer(library: Any, **options: Any) -> Any:
    return library.Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def search(library: Any, **arguments: Any) -> dict[str, Any]:
    library.seed_everything(7)
    accumulate = arguments.pop("accumulate_grad_batches", 1)
    model = model_of(library)[0]()
    tuner = importlib.import_module(f"{library.__name__}.tuner").Tuner(
        trainer(library, accumulate_grad_batches=accumulate)
    )
    found = tuner.lr_find(model, **arguments)
    return {**found.results, "suggestion": found.suggestion(), "lr": model.lr, "lrs": found.results["lr"]}


def scale(library: Any, **arguments: Any) -> list[int]:
    model = model_of(library)[1]()
    fit = trainer(library, num_sanity_val_steps=0)
    found = importlib.import_module(f"{library.__name__}.tuner").Tuner(fit).scale_batch_size(model, **arguments)
    return [found, model.batch_size]


def on_two_ranks(folder: Path) -> None:
    import fulmen
    from fulmen.tuner import Tuner

    fulmen.seed_everything(7)
    model = model_of(fulmen)[0]()
    fit = fulmen.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        barebones=True,
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = Tuner(fit).lr_find(model, num_training=40, max_lr=10.0)
    assert found is not None
    unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    try:
        Tuner(fit).scale_batch_size(model)
    except ValueError as error:
        refused = str(error)
    fit.fit(model)
    report = {
        **found.results,
        "lr_of_module": model.lr,
        "unchanged": unchanged,
        "refused": refused,
        "trained": [parameter.sum().item() for parameter in model.parameters()],
    }
    (folder / f"rank{fit.global_rank}.json").write_text(json.dumps(report))


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.argv[2:3] == ["ranks"]:
        on_two_ranks(Path(sys.argv[3]))
        return
    logging.disable(logging.INFO)
    library = importlib.import_module(sys.argv[1])
    found = {
        "lr": {name: search(library, **arguments) for name, arguments in SEARCHES.items()},
        "sizes": {name: scale(library, **arguments) for name, arguments in SIZES.items()},
    }
    print("RESULT" + json.dumps(found))


if __name__ == "__main__":
    main()

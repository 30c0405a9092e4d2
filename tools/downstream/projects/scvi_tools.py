"""scvi-tools: variational autoencoders of single cells, with the library's own Trainer, logger and checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

REQUIRES = ["scvi-tools==1.4.2"]
PACKAGES = ["scvi"]
WHAT = "SCVI, SCANVI and AUTOZI with the library's Trainer, history, SaveCheckpoint, early stopping, save and load"


def cells() -> Any:
    """Counts of 20 genes in 120 cells of three kinds and two batches."""
    import anndata
    import numpy as np

    numbers = np.random.default_rng(0)
    kinds = np.arange(120) % 3
    rates = numbers.gamma(2.0, 2.0, size=(3, 20))[kinds]
    table = anndata.AnnData(numbers.poisson(rates).astype(np.float32))
    table.obs["kind"] = [f"kind {kind}" if place % 4 else "unknown" for place, kind in enumerate(kinds)]
    table.obs["batch"] = [f"batch {place % 2}" for place in range(120)]
    for column in table.obs:
        table.obs[column] = table.obs[column].astype("category")
    return table


def history(model: Any) -> dict[str, list[float]]:
    """Every logged value."""
    return {name: [float(value) for value in frame.to_numpy().ravel()] for name, frame in model.history.items()}


def main() -> dict[str, object]:
    """Train, save the best, stop early, load, annotate."""
    import scvi
    import torch
    from lightning.pytorch.callbacks import LearningRateMonitor
    from scvi.train import SaveCheckpoint

    logging.getLogger("scvi").setLevel(logging.ERROR)
    scvi.settings.seed = 1
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "batch_size": 32}
    found: dict[str, object] = {}

    table = cells()
    scvi.model.SCVI.setup_anndata(table, batch_key="batch", labels_key="kind")
    model = scvi.model.SCVI(table, n_latent=3, n_hidden=16)
    saved = SaveCheckpoint("saved", monitor="elbo_validation", load_best_on_end=True, save_top_k=1)
    model.train(
        max_epochs=4, callbacks=[saved, LearningRateMonitor()], check_val_every_n_epoch=1, early_stopping=True,
        early_stopping_patience=3, enable_checkpointing=True, plan_kwargs={"reduce_lr_on_plateau": True}, **options,
    )  # fmt: skip
    found["history"] = history(model)
    found["latent"] = model.get_latent_representation()[:5].tolist()
    found["elbo"] = float(model.get_elbo())
    found["best"] = [Path(saved.best_model_path).name, float(saved.best_model_score)]
    found["kept"] = sorted(path.name for path in Path("saved").iterdir())
    best = scvi.model.SCVI.load(saved.best_model_path, adata=table)
    found["best latent"] = best.get_latent_representation()[:5].tolist()
    model.save("whole", overwrite=True)
    found["loaded"] = scvi.model.SCVI.load("whole", adata=table).get_latent_representation()[:5].tolist()

    scvi.settings.seed = 2
    annotator = scvi.model.SCANVI.from_scvi_model(model, unlabeled_category="unknown")
    # With n_samples_per_label= the library draws the labels anew when an epoch starts: on Lightning that counts from
    # the second epoch, here from the first (docs/differences.md).
    annotator.train(max_epochs=2, check_val_every_n_epoch=1, **options)
    found["annotator"] = history(annotator)
    found["kinds"] = [str(kind) for kind in annotator.predict()[:20]]

    scvi.settings.seed = 3
    scvi.model.AUTOZI.setup_anndata(table, batch_key="batch")
    zeros = scvi.model.AUTOZI(table, n_latent=2, n_hidden=8)
    zeros.train(max_epochs=2, check_val_every_n_epoch=1, early_stopping=True, **options)
    found["zeros"] = history(zeros)
    found["weights"] = [float(weight.detach().double().sum()) for weight in zeros.module.parameters()]
    found["epochs"] = [each.trainer.current_epoch for each in (model, annotator, zeros)]
    found["device"] = str(torch.device(model.device))
    return found

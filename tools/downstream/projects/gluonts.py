"""gluonts: probabilistic estimators that end in the best checkpoint."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from gluonts.dataset.common import ListDataset
from gluonts.dataset.field_names import FieldName
from gluonts.evaluation import Evaluator, make_evaluation_predictions
from gluonts.model.predictor import Predictor
from gluonts.torch import (
    DeepAREstimator,
    DeepNPTSEstimator,
    DLinearEstimator,
    LagTSTEstimator,
    PatchTSTEstimator,
    SimpleFeedForwardEstimator,
    TemporalFusionTransformerEstimator,
    TiDEEstimator,
    WaveNetEstimator,
)
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

REQUIRES = ["gluonts[torch]==0.17.0"]
PACKAGES = ["gluonts"]
WHAT = (
    "DeepAR, TFT, SimpleFeedForward, PatchTST, DLinear, TiDE, LagTST, WaveNet and DeepNPTS: best "
    "checkpoint restored, plateau schedules, early stopping, clipping, resuming, going on from a predictor, "
    "serialising predictors, sampled forecasts and their evaluation"
)
LENGTH = 4


class Losses(Callback):
    """What a user's callback reads at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the metrics, in alphabetical order, and the counters."""
        self.seen += [float(value) for _, value in sorted(trainer.callback_metrics.items())]
        self.seen += [trainer.current_epoch, trainer.global_step]


def data(until: int, ahead: int = 0) -> ListDataset:
    """Four noisy daily waves with a category and a variable that is known ``ahead``."""
    random = np.random.default_rng(0)
    entries = []
    for index in range(4):
        wave = 10 + np.sin(np.arange(80) * 2 * np.pi / 7 + index) + random.normal(0, 0.1, 80)
        entries.append(
            {
                FieldName.TARGET: wave[:until].astype(np.float32),
                FieldName.START: pd.Period("2020-01-01", freq="D"),
                FieldName.FEAT_STATIC_CAT: [index],
                FieldName.FEAT_DYNAMIC_REAL: [np.cos(np.arange(until + ahead)).astype(np.float32)],
            }
        )
    return ListDataset(entries, freq="D")


def forecast(predictor: Predictor) -> list[object]:
    """The means and some quantiles of all forecasts."""
    pl.seed_everything(3)
    return [
        [one.mean.astype(float).tolist(), one.quantile(0.9).astype(float).tolist()]
        for one in predictor.predict(data(70, LENGTH), num_samples=8)
    ]


def main() -> dict[str, object]:
    """Train each estimator, forecast, and return the forecasts and metrics."""
    result: dict[str, object] = {}

    def trainer(**more: object) -> dict[str, object]:
        quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        return {"max_epochs": 2, **quiet, **more}

    def common(**more: object) -> dict[str, object]:
        return {
            "prediction_length": LENGTH,
            "context_length": 8,
            "batch_size": 8,
            "num_batches_per_epoch": 5,
            "trainer_kwargs": trainer(**more),
        }

    def train(name: str, estimator: object, **how: object) -> Predictor:
        pl.seed_everything(1)
        predictor = estimator.train(data(60), **how)  # type: ignore[attr-defined]
        result[name] = forecast(predictor)
        return predictor

    losses = Losses()
    callbacks = [losses, EarlyStopping("val_loss", patience=1), LearningRateMonitor("epoch")]
    deepar = DeepAREstimator(
        freq="D",
        hidden_size=6,
        num_layers=1,
        num_feat_dynamic_real=1,
        num_feat_static_cat=1,
        cardinality=[4],
        patience=0,
        **common(max_epochs=4, callbacks=callbacks, logger=CSVLogger(".", name="deepar"), log_every_n_steps=2),
    )
    predictor = train("deepar", deepar, validation_data=data(70), cache_data=True)
    result["deepar's epochs"] = losses.seen
    result["deepar's rows"] = len(Path("deepar/version_0/metrics.csv").read_text().splitlines())
    result["deepar's checkpoints"] = sorted(file.name for file in Path("deepar").rglob("*.ckpt"))
    Path("predictor").mkdir()
    predictor.serialize(Path("predictor"))
    result["deserialized"] = forecast(Predictor.deserialize(Path("predictor")))
    pl.seed_everything(1)
    result["gone on"] = forecast(deepar.train_from(predictor, data(60)))

    linear = DLinearEstimator(**common(logger=False, default_root_dir="linear"))
    pl.seed_everything(1)
    output = linear.train_model(data(60))
    result["train loss"] = float(output.trainer.callback_metrics["train_loss"])
    result["linear"] = forecast(output.predictor)
    output.trainer.save_checkpoint("whole.ckpt")
    more = DLinearEstimator(**common(max_epochs=4))
    resumed = more.train_model(data(60), ckpt_path="whole.ckpt")
    # Not the forecasts: fulmen's checkpoints bring the random state of their moment back, Lightning's do not.
    result["resumed"] = [resumed.trainer.current_epoch, resumed.trainer.global_step]

    small = {"d_model": 8, "nhead": 2, "dim_feedforward": 8, "num_encoder_layers": 1}
    train("feed-forward", SimpleFeedForwardEstimator(hidden_dimensions=[8], **common()))
    tft = TemporalFusionTransformerEstimator(freq="D", hidden_dim=4, variable_dim=4, num_heads=2, **common())
    train("tft", tft, validation_data=data(70))
    train("patches", PatchTSTEstimator(patch_len=4, **small, **common()))
    train("tide", TiDEEstimator(freq="D", **common()))
    train("lags", LagTSTEstimator(freq="D", **small, **common()))
    wavenet = {name: value for name, value in common().items() if name != "context_length"}
    train("wavenet", WaveNetEstimator(freq="D", num_bins=16, num_residual_channels=4, num_skip_channels=4, **wavenet))
    npts = {name: value for name, value in common().items() if name != "trainer_kwargs"}
    pl.seed_everything(1)
    estimator = DeepNPTSEstimator(freq="D", num_hidden_nodes=[4], epochs=2, **npts)
    result["npts"] = forecast(estimator.train(data(60)))

    pl.seed_everything(3)
    forecasts, targets = make_evaluation_predictions(data(70), predictor, num_samples=8)
    totals, _ = Evaluator(num_workers=0)(targets, forecasts, num_series=4)
    result["evaluation"] = {name: float(value) for name, value in totals.items() if isinstance(value, float)}
    result["random state"] = torch.rand(2).tolist()
    return result

"""pytorch-forecasting: datasets of series, models with figures and predictions by callbacks, and their tuning."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import optuna
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from optuna.samplers import RandomSampler
from pytorch_forecasting import (
    Baseline,
    DecoderMLP,
    DeepAR,
    NBeats,
    NHiTS,
    RecurrentNetwork,
    TemporalFusionTransformer,
    TiDEModel,
    TimeSeriesDataSet,
)
from pytorch_forecasting.data import NaNLabelEncoder
from pytorch_forecasting.metrics import MAE, NormalDistributionLoss, QuantileLoss
from pytorch_forecasting.models.temporal_fusion_transformer.tuning import optimize_hyperparameters
from pytorch_forecasting.tuning import Tuner

REQUIRES = [
    "pytorch-forecasting==1.8.0",
    "matplotlib",
    "optuna",
    "optuna-integration",
    "statsmodels",
    "tensorboard",
    "pytorch_optimizer<4",
]
PACKAGES = ["pytorch_forecasting"]
OTHERS = ["optuna_integration"]
WHAT = (
    "TFT, DeepAR, NBeats, NHiTS, DecoderMLP, recurrent network and TiDE: TensorBoard with figures, early stopping, "
    "learning rate finder, Ranger, checkpoints and load_from_checkpoint, test, predictions by its callback, also "
    "written to disk, interpretation, and tuning with optuna; with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"
)


class Losses(Callback):
    """What a user's callback reads at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the metrics, in alphabetical order, and the counters."""
        self.seen += [float(value) for _, value in sorted(trainer.callback_metrics.items())]
        self.seen += [trainer.current_epoch, trainer.global_step]


def series() -> pd.DataFrame:
    """Four noisy waves of 60 values with a known and an observed variable."""
    random = np.random.default_rng(0)
    frames = []
    for index in range(4):
        steps = np.arange(60)
        value = 5 + index + np.sin(steps / 4 + index) + random.normal(0, 0.1, 60)
        known, seen = np.cos(steps / 4), random.normal(0, 1, 60)
        frames.append(pd.DataFrame({"t": steps, "group": str(index), "value": value, "known": known, "seen": seen}))
    return pd.concat(frames, ignore_index=True)


def main() -> dict[str, object]:
    """Train each model, predict, and return predictions, metrics and what was written."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # its checkpoints hold data sets and losses
    frame = series()

    def dataset(**more: object) -> TimeSeriesDataSet:
        about = {
            "time_idx": "t",
            "target": "value",
            "group_ids": ["group"],
            "max_encoder_length": 12,
            "min_encoder_length": 12,
            "max_prediction_length": 4,
            "categorical_encoders": {"group": NaNLabelEncoder().fit(frame.group)},
            "time_varying_unknown_reals": ["value"],
        }
        return TimeSeriesDataSet(frame[frame.t < 50], **about | more)

    def loaders(training: TimeSeriesDataSet) -> tuple[object, object]:
        validation = TimeSeriesDataSet.from_dataset(training, frame, min_prediction_idx=50)
        return (
            training.to_dataloader(train=True, batch_size=16, num_workers=0),
            validation.to_dataloader(train=False, batch_size=32, num_workers=0),
        )

    def trainer(**more: object) -> pl.Trainer:
        quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return pl.Trainer(**{**quiet, "max_epochs": 2, "limit_train_batches": 4, "gradient_clip_val": 0.1, **more})

    def cpu() -> dict[str, object]:
        return {"accelerator": "cpu", "logger": False}

    def numbers(predicted: object) -> list[float]:
        return torch.as_tensor(predicted).flatten().double().tolist()

    result: dict[str, object] = {}
    covariates = dataset(
        static_categoricals=["group"],
        time_varying_known_reals=["t", "known"],
        time_varying_unknown_reals=["value", "seen"],
        add_relative_time_idx=True,
        add_target_scales=True,
    )
    train, val = loaders(covariates)
    result["baseline"] = numbers(Baseline().predict(val, trainer_kwargs=cpu()))

    pl.seed_everything(1)
    tft = TemporalFusionTransformer.from_dataset(
        covariates,
        hidden_size=4,
        attention_head_size=1,
        hidden_continuous_size=4,
        loss=QuantileLoss(),
        log_interval=2,
        optimizer="ranger",
        reduce_on_plateau_patience=1,
        learning_rate=0.03,
    )
    found = Tuner(trainer(limit_train_batches=1.0)).lr_find(
        tft, train_dataloaders=train, val_dataloaders=val, num_training=8, min_lr=1e-4, early_stop_threshold=1000.0
    )
    result["learning rates"] = [[float(rate) for rate in found.results["lr"]], found.suggestion()]
    result["their losses"] = [float(loss) for loss in found.results["loss"]]

    losses, kept = Losses(), ModelCheckpoint("kept", monitor="val_loss", save_top_k=1, save_last=True)
    callbacks = [losses, kept, EarlyStopping("val_loss", min_delta=1e-4, patience=2), LearningRateMonitor()]
    logger = TensorBoardLogger("logs")
    pl.seed_everything(1)
    fitting = trainer(max_epochs=3, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    fitting.fit(tft, train, val)
    result["tft's epochs"] = losses.seen
    result["kept"] = sorted(file.name for file in Path("kept").iterdir())
    best = TemporalFusionTransformer.load_from_checkpoint(kept.best_model_path)
    predicted = best.predict(
        val, return_x=True, return_y=True, return_index=True, mode="quantiles", trainer_kwargs=cpu()
    )
    result["tft"] = [numbers(predicted.output), predicted.index["t"].tolist(), numbers(predicted.y[0])]
    raw = best.predict(val, mode="raw", return_x=True, trainer_kwargs=cpu())
    interpretation = best.interpret_output(raw.output, reduction="sum")
    result["interpretation"] = {name: numbers(value) for name, value in interpretation.items()}
    result["tested"] = [{name: float(value) for name, value in row.items()} for row in fitting.test(best, val)]
    Path("written").mkdir()
    Path("whole").mkdir()
    best.predict(val, output_dir="written", write_interval="batch", trainer_kwargs=cpu())
    result["written"] = sorted(file.name for file in Path("written").iterdir())
    best.predict(val, output_dir="whole", write_interval="epoch", trainer_kwargs=cpu())
    result["written whole"] = sorted(file.name for file in Path("whole").iterdir())

    plain = dataset()
    plain_train, plain_val = loaders(plain)
    by_group = dataset(static_categoricals=["group"], time_varying_known_reals=["known"])
    group_train, group_val = loaders(by_group)
    models = [
        (NBeats, plain, plain_train, plain_val, {"widths": [8, 16], "backcast_loss_ratio": 0.1}),
        (NHiTS, by_group, group_train, group_val, {"hidden_size": 8}),
        (DecoderMLP, covariates, train, val, {"hidden_size": 8, "loss": MAE()}),
        (
            DeepAR,
            by_group,
            group_train,
            group_val,
            {"hidden_size": 4, "rnn_layers": 1, "loss": NormalDistributionLoss()},
        ),
        (RecurrentNetwork, by_group, group_train, group_val, {"hidden_size": 4, "optimizer": "sgd"}),
        (TiDEModel, by_group, group_train, group_val, {"hidden_size": 4}),
    ]
    for kind, data, fit_on, validate_on, arguments in models:
        name = kind.__name__
        pl.seed_everything(1)
        model = kind.from_dataset(data, learning_rate=0.01, log_interval=-1, **arguments)
        fitting = trainer(default_root_dir=name)
        fitting.fit(model, fit_on, validate_on)
        result[f"{name}'s metrics"] = {key: float(value) for key, value in sorted(fitting.callback_metrics.items())}
        pl.seed_everything(2)
        result[name] = numbers(model.predict(validate_on, trainer_kwargs=cpu()))

    pl.seed_everything(1)
    study = optimize_hyperparameters(
        train,
        val,
        model_path="study",
        n_trials=2,
        max_epochs=1,
        hidden_size_range=(4, 6),
        hidden_continuous_size_range=(2, 4),
        attention_head_size_range=(1, 2),
        use_learning_rate_finder=False,
        trainer_kwargs={"limit_train_batches": 3, "enable_progress_bar": False, "accelerator": "cpu"},
        log_dir="study_logs",
        verbose=False,
        study=optuna.create_study(sampler=RandomSampler(seed=1)),
    )
    result["trials"] = [[trial.value, len(trial.intermediate_values)] for trial in study.trials]
    return result

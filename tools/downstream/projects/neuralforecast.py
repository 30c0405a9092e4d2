"""neuralforecast: models over several series, with early stopping, schedules, callbacks, loggers and saving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from neuralforecast import NeuralForecast
from neuralforecast.auto import AutoNHITS
from neuralforecast.common.enums import ExplainerEnum
from neuralforecast.losses.pytorch import DistributionLoss, MQLoss
from neuralforecast.models import LSTM, NHITS, TFT, DeepAR, DLinear, NBEATSx, PatchTST, TSMixer
from optuna.samplers import RandomSampler
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

REQUIRES = ["neuralforecast==3.3.0", "captum"]
PACKAGES = ["neuralforecast"]
OTHERS = ["ray"]
WHAT = (
    "NHITS, TFT, DeepAR, NBEATSx, DLinear, PatchTST, TSMixer and LSTM over three series: early stopping, schedules, "
    "callbacks, CSV logger, checkpoints, 16-bit mixed precision, accumulation, explanations, saving and loading, "
    "cross-validation, fitting on, and a search with optuna"
)


def series() -> pd.DataFrame:
    """Three noisy seasonal series of 120 months, with one variable known ahead and one that is not."""
    random = np.random.default_rng(0)
    months = pd.date_range("2000-01-31", periods=120, freq="ME")
    frames = []
    for index in range(3):
        phase = np.arange(120) * 2 * np.pi / 12 + index
        frames.append(
            pd.DataFrame(
                {
                    "unique_id": f"series{index}",
                    "ds": months,
                    "y": 10 * (index + 1) + 3 * np.sin(phase) + random.normal(0, 0.3, 120),
                    "known": np.cos(phase),
                    "seen": random.normal(0, 1, 120),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


class Losses(Callback):
    """What a user's callback reads of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.epochs: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.seen.append(float(outputs["loss"]))  # type: ignore[index]
        self.epochs.append(trainer.current_epoch + batch_idx / 100)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(float(trainer.callback_metrics["ptl/val_loss"]))


def numbers(frame: pd.DataFrame) -> list[list[float]]:
    """The columns that hold forecasts or targets."""
    return frame.drop(columns=["unique_id", "ds", "cutoff"], errors="ignore").to_numpy().astype(float).tolist()


def main() -> dict[str, object]:
    """Train, forecast, save, load and validate; return every forecast and every loss."""
    frame = series()
    short = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "scaler_type": "standard",
        "h": 6,
        "input_size": 12,
    }
    checkpoint = ModelCheckpoint(
        "kept", monitor="ptl/val_loss", save_top_k=2, save_last=True, auto_insert_metric_name=False
    )
    models = [
        NHITS(
            **short,
            max_steps=30,
            val_check_steps=5,
            early_stop_patience_steps=2,
            learning_rate=0.01,
            callbacks=[Losses(), checkpoint, LearningRateMonitor("step")],
            logger=CSVLogger(".", name="nhits", flush_logs_every_n_steps=1),
            log_every_n_steps=1,
            enable_checkpointing=True,
            gradient_clip_val=0.5,
            futr_exog_list=["known"],
            hist_exog_list=["seen"],
        ),
        TFT(**short, max_steps=6, hidden_size=8, loss=MQLoss(level=[80]), hist_exog_list=["seen"], logger=False),
        DeepAR(
            **short,
            max_steps=6,
            lstm_hidden_size=8,
            loss=DistributionLoss("Normal", level=[80]),
            trajectory_samples=20,
            enable_checkpointing=False,
        ),
        NBEATSx(**short, max_steps=8, accumulate_grad_batches=2, mlp_units=[[16, 16]] * 3, val_check_steps=4),
        DLinear(
            **short,
            max_steps=10,
            lr_scheduler=torch.optim.lr_scheduler.OneCycleLR,
            lr_scheduler_kwargs={"max_lr": 0.01, "total_steps": 20},
        ),
        PatchTST(**short, max_steps=4, hidden_size=8, n_heads=2, patch_len=4, precision="bf16-mixed"),
        TSMixer(**short, max_steps=4, n_series=3, ff_dim=8, n_block=1, optimizer=torch.optim.SGD),
        LSTM(
            **short,
            max_steps=4,
            encoder_hidden_size=8,
            decoder_hidden_size=8,
            futr_exog_list=["known"],
            num_lr_decays=2,
        ),
    ]
    forecast = NeuralForecast(models, freq="ME")
    forecast.fit(frame, val_size=12)
    future = forecast.make_future_dataframe().assign(known=0.5)
    result: dict[str, object] = {"forecasts": numbers(forecast.predict(futr_df=future))}
    for model in forecast.models:
        name = type(model).__name__
        result[f"{name} training losses"] = [[step, loss] for step, loss in model.train_trajectories]
        result[f"{name} validation losses"] = [[step, loss] for step, loss in model.valid_trajectories]
        result[f"{name} metrics"] = {key: float(value) for key, value in sorted(model.metrics.items())}
    losses, checkpoint = forecast.models[0].trainer_kwargs["callbacks"][:2]  # copies of what was given
    result["callback"] = [losses.seen, losses.epochs]
    result["checkpoints"] = sorted(file.name for file in Path("kept").iterdir())
    result["best score"] = float(checkpoint.best_model_score)
    result["logged lines"] = len(Path("nhits/version_0/metrics.csv").read_text().splitlines())

    kept = NHITS.load_from_checkpoint(checkpoint.best_model_path, weights_only=False)
    result["loaded from a checkpoint"] = [float(parameter.sum()) for parameter in kept.parameters()]
    forecast.save("saved", overwrite=True)
    loaded = NeuralForecast.load("saved")
    result["forecasts of what was saved"] = numbers(loaded.predict(futr_df=future))
    loaded.fit(frame, val_size=12, use_init_models=False)
    result["forecasts after more training"] = numbers(loaded.predict(futr_df=future))

    explained = NeuralForecast([NHITS(**short, max_steps=3, hist_exog_list=["seen"])], freq="ME")
    explained.fit(frame)
    _, why = explained.explain(outputs=[0], explainer=ExplainerEnum.IntegratedGradients)
    result["explanations"] = why["NHITS"]["insample"].flatten()[:50].tolist()

    validated = NeuralForecast([DLinear(**short, max_steps=5)], freq="ME")
    result["cross-validation"] = numbers(validated.cross_validation(frame, n_windows=2, step_size=6, refit=True))

    def config(trial: object) -> dict[str, object]:
        rate = trial.suggest_float("learning_rate", 1e-3, 1e-1)
        quiet = {name: value for name, value in short.items() if name != "h"}
        return {**quiet, "max_steps": 4, "learning_rate": rate, "val_check_steps": 2, "random_seed": 1}

    auto = AutoNHITS(
        h=6, config=config, num_samples=2, backend="optuna", search_alg=RandomSampler(seed=1), loss=MQLoss(level=[80])
    )
    searched = NeuralForecast([auto], freq="ME")
    searched.fit(frame, val_size=12)
    result["search"] = [trial.value for trial in searched.models[0].results.trials]
    result["forecasts after a search"] = numbers(searched.predict())
    return result

"""darts: torch models with covariates, likelihoods, checkpoints, searches and progress bars of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from darts import TimeSeries
from darts.models import DLinearModel, NBEATSModel, NHiTSModel, RNNModel, TCNModel, TFTModel, TSMixerModel
from darts.utils.callbacks import TFMProgressBar
from darts.utils.likelihood_models.torch import GaussianLikelihood, QuantileRegression
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from torchmetrics import MeanAbsoluteError, MetricCollection

REQUIRES = ["darts[torch]==0.48.1"]
PACKAGES = ["darts"]
WHAT = (
    "NBEATS, NHiTS, TFT, RNN (LSTM), TCN, DLinear and TSMixer: covariates, likelihoods, torchmetrics, early stopping, "
    "schedules, TensorBoard, its own progress bar and checkpoint IO, best and last checkpoints, resuming, weights of "
    "one model in another, SWA, learning rate and batch size finders, historical forecasts, Monte Carlo dropout"
)


class Losses(Callback):
    """What a user's callback reads."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the metrics, in alphabetical order, and the learning rate."""
        self.seen += [float(value) for _, value in sorted(trainer.callback_metrics.items())]
        self.seen += [trainer.current_epoch, trainer.optimizers[0].param_groups[0]["lr"]]


def series(seed: int, length: int = 90) -> TimeSeries:
    """A noisy wave."""
    noise = np.random.default_rng(seed).normal(0, 0.1, length)
    return TimeSeries.from_values((np.sin(np.arange(length) / 5 + seed) + noise).astype(np.float32))


def numbers(forecast: TimeSeries) -> list[float]:
    """All values of a forecast."""
    return forecast.all_values().flatten().astype(float).tolist()


def main() -> dict[str, object]:
    """Train and forecast with each model; return forecasts, metrics and weights."""
    known, seen = series(5, 110), series(6)
    data, held_out = series(1), series(2)
    result: dict[str, object] = {}

    def trainer(**more: object) -> dict[str, object]:
        return {"accelerator": "cpu", "enable_model_summary": False, "enable_progress_bar": False, **more}

    def common(**more: object) -> dict[str, object]:
        return {
            "input_chunk_length": 12,
            "output_chunk_length": 4,
            "batch_size": 16,
            "n_epochs": 2,
            "random_state": 1,
            "pl_trainer_kwargs": trainer(**more),
        }

    losses = Losses()
    blocks = {"generic_architecture": True, "num_stacks": 2, "num_blocks": 1, "num_layers": 2, "layer_widths": 8}
    model = NBEATSModel(
        **common(callbacks=[losses, EarlyStopping("val_loss", patience=1, min_delta=0.01)], gradient_clip_val=1.0)
        | {"n_epochs": 6},
        **blocks,
        save_checkpoints=True,
        force_reset=True,
        model_name="nbeats",
        work_dir="darts_logs",
        log_tensorboard=True,
        torch_metrics=MetricCollection([MeanAbsoluteError()]),
        lr_scheduler_cls=torch.optim.lr_scheduler.ReduceLROnPlateau,
        lr_scheduler_kwargs={"monitor": "val_loss", "patience": 0},
    )
    model.fit(data, val_series=held_out)
    result["nbeats"] = [numbers(model.predict(6, data)), losses.seen, model.epochs_trained]
    result["kept"] = sorted(file.name for file in Path("darts_logs/nbeats/checkpoints").iterdir())
    best = NBEATSModel.load_from_checkpoint("nbeats", "darts_logs", best=True, trusted=True)
    result["the best"] = numbers(best.predict(6, data))
    other = NBEATSModel(**common(), **blocks)
    other.load_weights_from_checkpoint("nbeats", "darts_logs", best=True, trusted=True)
    other.fit(data, epochs=1)
    result["fine-tuned"] = numbers(other.predict(6, data))
    last = NBEATSModel.load_from_checkpoint("nbeats", "darts_logs", best=False, trusted=True)
    # In order: fulmen's checkpoints bring the random state of their moment back, Lightning's do not.
    last.fit(data, val_series=held_out, epochs=8, dataloader_kwargs={"shuffle": False})
    result["resumed"] = [numbers(last.predict(6, data)), last.epochs_trained]
    model.save("nbeats.pt")
    result["saved and loaded"] = numbers(NBEATSModel.load("nbeats.pt", trusted=True).predict(6, data))

    safe = common(callbacks=[EarlyStopping("val_loss")])
    wary = DLinearModel(**safe, save_checkpoints=True, force_reset=True, model_name="wary", work_dir="darts_logs")
    wary.fit(data, val_series=held_out)
    wary.save("wary.pt")
    result["loaded with darts' list of allowed classes"] = [
        numbers(DLinearModel.load("wary.pt").predict(6, data)),
        numbers(DLinearModel.load_from_checkpoint("wary", "darts_logs").predict(6, data)),
    ]

    bar = trainer(callbacks=[TFMProgressBar(enable_train_bar_only=True)], enable_progress_bar=True)
    small = NHiTSModel(**common() | {"n_epochs": 3, "pl_trainer_kwargs": bar}, layer_widths=8)
    small.fit([data, held_out], past_covariates=[seen, seen])
    result["nhits"] = [numbers(one) for one in small.predict(4, [data, held_out], past_covariates=[seen, seen])]

    tft = TFTModel(
        **common(logger=CSVLogger(".", name="tft"), log_every_n_steps=1, accumulate_grad_batches=2),
        hidden_size=4,
        lstm_layers=1,
        num_attention_heads=1,
        likelihood=QuantileRegression([0.1, 0.5, 0.9]),
    )
    tft.fit(
        data,
        past_covariates=seen,
        future_covariates=known,
        val_series=held_out,
        val_past_covariates=seen,
        val_future_covariates=known,
    )
    result["tft"] = numbers(tft.predict(4, data, past_covariates=seen, future_covariates=known, num_samples=3))
    result["tft's rows"] = len(Path("tft/version_0/metrics.csv").read_text().splitlines())

    rnn = RNNModel(
        model="LSTM",
        hidden_dim=6,
        input_chunk_length=12,
        training_length=16,
        n_epochs=2,
        batch_size=16,
        random_state=1,
        dropout=0.1,
        likelihood=GaussianLikelihood(),
        pl_trainer_kwargs=trainer(precision="64-true"),
    )
    double, known_double = data.astype(np.float64), known.astype(np.float64)
    rnn.fit(double, future_covariates=known_double)
    result["rnn"] = numbers(rnn.predict(3, double, future_covariates=known_double, num_samples=3, mc_dropout=True))

    tcn = TCNModel(
        **common(callbacks=[StochasticWeightAveraging(0.01, swa_epoch_start=1)]) | {"n_epochs": 4},
        num_filters=3,
        dropout=0.1,
    )
    tcn.fit(data)
    result["tcn"] = [numbers(tcn.predict(4)), [float(weight.sum()) for weight in tcn.model.parameters()]]

    limits = common(limit_train_batches=3, max_time="00:00:10:00")
    mixer = TSMixerModel(**limits, hidden_size=4, ff_size=4, num_blocks=1)
    mixer.fit(data, past_covariates=seen, future_covariates=known, dataloader_kwargs={"drop_last": True})
    result["mixer"] = numbers(mixer.predict(4, past_covariates=seen, future_covariates=known))

    linear = DLinearModel(**common())
    linear.fit(data, trainer=pl.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, **trainer()))
    predicting = pl.Trainer(logger=False, enable_checkpointing=False, **trainer())
    result["linear"] = numbers(linear.predict(4, trainer=predicting))
    try:
        given = pl.Trainer(max_epochs=1, logger=False, callbacks=[ModelCheckpoint("given")], **trainer())
        DLinearModel(**common()).fit(data, trainer=given)
        result["a given Trainer's checkpoint of darts' loss"] = sorted(file.name for file in Path("given").iterdir())
    except ValueError as refusal:
        result["a given Trainer's checkpoint of darts' loss"] = f"refused: {refusal}"
    result["history"] = numbers(
        linear.historical_forecasts(data, forecast_horizon=4, stride=20, retrain=True, start=0.6, verbose=False)
    )
    # Without validation, and in epochs enough: fulmen does not validate in a search, nor ends it with the epochs.
    searched = DLinearModel(**common() | {"n_epochs": 10})
    found = searched.lr_find(data, num_training=20, min_lr=1e-5)
    result["learning rates"] = [[float(one) for one in found.results["lr"]], float(found.suggestion(skip_begin=2))]
    result["their losses"] = [float(one) for one in found.results["loss"]]
    result["batch size"] = DLinearModel(**common()).scale_batch_size(data, max_trials=3, init_val=4)
    return result

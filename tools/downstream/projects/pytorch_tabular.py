"""pytorch-tabular: models of tables, configured by dataclasses that end up in the hyperparameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

REQUIRES = ["pytorch-tabular==1.2.0"]
PACKAGES = ["pytorch_tabular"]
WHAT = (
    "two models with early stopping, the best checkpoint, accumulation; predict, save and load; a learning rate search"
)


def table(seed: int) -> Any:
    """Two numbers, two categories, a class and a number to be predicted."""
    import numpy as np
    import pandas as pd

    numbers = np.random.default_rng(seed)
    rows = 96
    frame = pd.DataFrame({
        "a": numbers.normal(size=rows), "b": numbers.normal(size=rows),
        "c": numbers.choice(["x", "y", "z"], rows), "d": numbers.choice(["p", "q"], rows),
    })  # fmt: skip
    frame["kind"] = ((frame["a"] > 0) ^ (frame["c"] == "x")).astype(int).astype(str)
    frame["number"] = frame["a"] - 2 * frame["b"] + (frame["d"] == "p")
    return frame


def main() -> dict[str, object]:
    """Classification and regression, and a classification after a search for its learning rate."""
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.callbacks import LearningRateMonitor
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig, FTTransformerConfig
    from pytorch_tabular.models.common.heads import LinearHeadConfig

    # Lightning's learning rate search cannot load the checkpoint that it saves, with OmegaConf in it, without it.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    train, held_out = table(0), table(1)
    found: dict[str, object] = {}

    def made(target: str, model_config: Any, epochs: int = 4) -> TabularModel:
        return TabularModel(
            data_config=DataConfig(target=[target], continuous_cols=["a", "b"], categorical_cols=["c", "d"]),
            model_config=model_config,
            optimizer_config=OptimizerConfig(
                lr_scheduler="ReduceLROnPlateau", lr_scheduler_params={"patience": 0},
                lr_scheduler_monitor_metric="valid_loss",
            ),
            trainer_config=TrainerConfig(
                batch_size=16, max_epochs=epochs, accelerator="cpu", devices=1, early_stopping_patience=2,
                checkpoints_path="saved", progress_bar="none", load_best=True, seed=3, accumulate_grad_batches=2,
                gradient_clip_val=1.0, trainer_kwargs={"enable_model_summary": False, "log_every_n_steps": 1},
            ),
            verbose=False,
        )  # fmt: skip

    head = LinearHeadConfig(layers="", dropout=0.0).__dict__
    configs = {
        "embedding": CategoryEmbeddingModelConfig(
            task="classification", layers="16-8", head="LinearHead", head_config=head, learning_rate=0.01
        ),
        "transformer": FTTransformerConfig(
            task="regression", input_embed_dim=8, num_heads=2, num_attn_blocks=1, head="LinearHead", head_config=head,
            learning_rate=0.01,
        ),
    }  # fmt: skip
    for name, target in (("embedding", "kind"), ("transformer", "number")):
        model = made(target, configs[name])
        model.fit(train=train, validation=held_out, callbacks=[LearningRateMonitor()])
        trainer = model.trainer
        found[f"{name} metrics"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        found[f"{name} steps"] = [trainer.current_epoch, trainer.global_step]
        found[f"{name} best"] = float(trainer.checkpoint_callback.best_model_score)
        found[f"{name} evaluated"] = model.evaluate(held_out, verbose=False)
        predicted = model.predict(held_out)
        found[f"{name} predicted"] = predicted.select_dtypes("number").to_numpy()[:10].tolist()
        model.save_model(f"model-{name}")
        loaded = TabularModel.load_model(f"model-{name}")
        found[f"{name} loaded"] = loaded.predict(held_out).select_dtypes("number").to_numpy()[:10].tolist()
        found[f"{name} files"] = sorted(path.name for path in Path(f"model-{name}").iterdir())

    searching = made("kind", configs["embedding"], epochs=30)
    datamodule = searching.prepare_dataloader(train=train, validation=held_out, seed=4)
    model = searching.prepare_model(datamodule)
    rate, tried = searching.find_learning_rate(
        model, datamodule, num_training=40, early_stop_threshold=None, plot=False
    )
    found["rate found"] = [float(rate), *map(float, tried["loss"])]
    # What a search leaves of the sequence of random numbers is its own.
    pl.seed_everything(5)
    model = searching.prepare_model(datamodule)
    trainer = searching.train(model, datamodule)
    found["after it"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    found["weights"] = [float(weight.detach().double().sum()) for weight in model.parameters()]
    found["threads"] = torch.get_num_threads()
    return found

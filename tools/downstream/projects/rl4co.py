"""rl4co: policies for combinatorial optimization, whose datasets are made anew each epoch."""

from __future__ import annotations

import os
from typing import Any

REQUIRES = ["rl4co==0.7.0", "hydra-core==1.3.8"]
PACKAGES = ["rl4co"]
WHAT = "REINFORCE with rollout and critic baselines, POMO, PPO (manual optimization); new data each epoch, loading"


def main() -> dict[str, object]:
    """Tours through few places, by small attention models."""
    # Its hyperparameters hold the environment and the policy, which its own loading takes from the file.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    import torch
    from lightning.pytorch import seed_everything
    from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from rl4co.envs import TSPEnv
    from rl4co.models import POMO, PPO, REINFORCE, AttentionModelPolicy
    from rl4co.models.rl.common.critic import CriticNetwork
    from rl4co.utils.trainer import RL4COTrainer

    sizes: dict[str, Any] = {
        "batch_size": 8, "train_data_size": 32, "val_data_size": 16, "test_data_size": 16,
        "optimizer_kwargs": {"lr": 1e-3},
    }  # fmt: skip

    class Seeds(Callback):
        """Lightning iterates a loader that it reloads twice, which draws a random number more."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            torch.manual_seed(100 * trainer.current_epoch + batch_idx)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            torch.manual_seed(trainer.current_epoch)

    def environment() -> Any:
        return TSPEnv(generator_params={"num_loc": 6})

    def policy(**more: Any) -> Any:
        return AttentionModelPolicy(
            env_name="tsp", embed_dim=16, num_encoder_layers=1, num_heads=2, feedforward_hidden=16, **more
        )

    def trainer(name: str, epochs: int = 2) -> Any:
        saved = ModelCheckpoint(name, "best", monitor="val/reward", mode="max", save_last=True)
        stopping = EarlyStopping("val/reward", patience=5, mode="max")
        return RL4COTrainer(
            accelerator="cpu", max_epochs=epochs, precision="32-true", enable_progress_bar=False, log_every_n_steps=1,
            callbacks=[saved, stopping, LearningRateMonitor(), Seeds()], logger=CSVLogger("logs", name=name),
        )  # fmt: skip

    def told(model: Any, run: Any) -> dict[str, object]:
        return {
            "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
            "weights": [float(weight.detach().double().sum()) for weight in model.parameters()],
            "steps": [run.current_epoch, run.global_step],
            "best": float(run.checkpoint_callback.best_model_score),
        }

    found: dict[str, object] = {}
    models: dict[str, Any] = {
        "rollout": lambda: REINFORCE(environment(), policy(), baseline="rollout", **sizes),
        "critic": lambda: REINFORCE(
            environment(), policy(), baseline="critic",
            baseline_kwargs={"critic": CriticNetwork(policy().encoder, embed_dim=16, hidden_dim=16)}, **sizes,
        ),
        "pomo": lambda: POMO(
            environment(), policy(use_graph_context=False), num_augment=8, lr_scheduler="MultiStepLR",
            lr_scheduler_kwargs={"milestones": [1], "gamma": 0.1}, **sizes,
        ),
        "ppo": lambda: PPO(
            environment(), policy(), critic=CriticNetwork(policy().encoder, embed_dim=16, hidden_dim=16),
            mini_batch_size=4, ppo_epochs=2, **sizes,
        ),
    }  # fmt: skip
    for name, make in models.items():
        seed_everything(1)
        model, run = make(), trainer(name)
        run.fit(model)
        found[name] = told(model, run)
        seed_everything(2)
        found[f"{name} tested"] = run.test(model, verbose=False)
    loaded = REINFORCE.load_from_checkpoint("rollout/best.ckpt", load_baseline=False)
    found["loaded"] = [float(weight.detach().double().sum()) for weight in loaded.policy.parameters()]
    places = environment().reset(batch_size=[4])
    places["locs"] = torch.linspace(0, 1, 48).reshape(4, 6, 2).sin()
    found["tours"] = loaded.policy(places, environment(), decode_type="greedy")["actions"].tolist()
    return found

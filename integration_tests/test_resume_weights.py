"""A run whose callbacks change weights, optimizers or accumulation resumes bit for bit from any of its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import (
    BackboneFinetuning,
    Checkpoint,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EPOCHS = 4


def dataset(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 8, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


class Model(fulmen.LightningModule):
    """Its layers come into being in ``configure_model``."""

    def __init__(self, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.batch_norm = batch_norm
        self.backbone: Any = None
        self.validated: list[float] = []

    def configure_model(self) -> None:
        if self.backbone is not None:
            return
        norm: nn.Module = nn.BatchNorm1d(12) if self.batch_norm else nn.Identity()
        self.backbone = nn.Sequential(nn.Linear(8, 12), norm, nn.Dropout(0.3), nn.ReLU())
        self.head = nn.Linear(12, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(float(F.cross_entropy(self(batch[0]), batch[1])))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class SavesFirst(fulmen.Callback):
    """Saves after a step before other callbacks have seen it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == (3 if trainer.accumulate_grad_batches == 2 else 2) and trainer.current_epoch == 2:
            trainer.save_checkpoint(self.folder / "first.ckpt")


class Saves(Checkpoint):
    """Saves last of all callbacks, in the middle of epochs and at their end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.step = folder, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped, self.step = trainer.global_step > self.step, trainer.global_step
        if (stepped and batch_idx == 1 + trainer.current_epoch) or (trainer.forward_only and batch_idx == 2):
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-{batch_idx}.ckpt")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch % 2:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-end.ckpt")


def train(
    folder: Path, make: Callable[[], Any], *, batch_norm: bool, resume: Path | None = None, **options: Any
) -> tuple[Any, Model]:
    torch.manual_seed(3)
    saving: list[Any] = [] if resume else [SavesFirst(folder), Saves(folder)]
    trainer = fulmen.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[*saving[:1], make(), *saving[1:]],
        enable_checkpointing=bool(saving),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        **options,
    )
    model = Model(batch_norm=batch_norm)
    trainer.fit(
        model,
        DataLoader(dataset(20), batch_size=4, shuffle=True),
        DataLoader(dataset(10), batch_size=5),
        ckpt_path=resume,
    )
    trainer.save_checkpoint(folder / "final.ckpt")
    return trainer, model


def same(got: Any, want: Any, where: str) -> None:
    """Equal in every bit, through dicts and lists."""
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want), where
    elif isinstance(want, dict):
        assert set(got) == set(want), where
        for key in want:
            same(got[key], want[key], f"{where}.{key}")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), where
        for index, (one, other) in enumerate(zip(got, want, strict=True)):
            same(one, other, f"{where}[{index}]")
    else:
        assert got == want, where


CASES: dict[str, tuple[Callable[[], Any], bool, dict[str, Any]]] = {
    "accumulation": (lambda: GradientAccumulationScheduler({1: 2, 2: 3}), True, {}),
    "swa": (lambda: StochasticWeightAveraging(0.02, 2, annealing_epochs=2), False, {}),
    "swa with batch norm": (lambda: StochasticWeightAveraging(0.02, 0.5, annealing_epochs=2), True, {}),
    "mean": (lambda: WeightAveraging(), True, {"accumulate_grad_batches": 2}),
    "ema": (lambda: EMAWeightAveraging(decay=0.8, update_starting_at_epoch=1), True, {"val_check_interval": 2}),
    "backbone": (lambda: BackboneFinetuning(1, lambda epoch: 1.5), True, {}),
    "pruning": (lambda: ModelPruning("l1_unstructured", amount=0.2), True, {}),
    "pruning without a ticket": (
        lambda: ModelPruning(
            "random_unstructured",
            amount=0.2,
            use_lottery_ticket_hypothesis=False,
            make_pruning_permanent=False,
        ),
        True,
        {},
    ),
}
ITEMS = {"accumulation": "11.11", "swa": "11.12", "mean": "11.13", "ema": "11.13", "backbone": "11.14"}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.proves(ITEMS.get(name.split()[0], "11.15"))) for name in CASES]
)
def test_a_run_resumed_from_any_of_its_checkpoints_ends_like_the_unbroken_one(case: str, tmp_path: Path) -> None:
    make, batch_norm, options = CASES[case]
    whole = tmp_path / "whole"
    trainer, model = train(whole, make, batch_norm=batch_norm, **options)
    expected = torch.load(whole / "final.ckpt", weights_only=True)
    saved = sorted(path for path in whole.glob("*.ckpt") if path.stem != "final")
    assert len(saved) >= 5

    for checkpoint in saved:
        folder = tmp_path / checkpoint.stem
        again, resumed = train(folder, make, batch_norm=batch_norm, resume=checkpoint, **options)

        same(dict(resumed.state_dict()), dict(model.state_dict()), f"weights after {checkpoint.name}")
        ours = torch.load(folder / "final.ckpt", weights_only=True)
        assert set(ours) == set(expected)
        for kind in ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state"):
            same(ours.get(kind), expected.get(kind), f"{kind} after {checkpoint.name}")
        for key in expected["callbacks"]:
            same(ours["callbacks"][key], expected["callbacks"][key], f"{key} after {checkpoint.name}")
        assert (again.global_step, again.current_epoch) == (trainer.global_step, trainer.current_epoch)
        tail = [value for value in resumed.validated if value in model.validated]
        assert tail == model.validated[len(model.validated) - len(tail) :], checkpoint.name
        assert [p.requires_grad for p in resumed.parameters()] == [p.requires_grad for p in model.parameters()]

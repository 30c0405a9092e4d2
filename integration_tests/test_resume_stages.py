"""A checkpoint may be saved in any hook: the run that resumes from it repeats and loses no batch and no validation."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback, OnExceptionCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

BATCHES = 4


def dataset(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 8, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


class Model(fulmen.LightningModule):
    """Keeps a ledger of the batches it trained on and the validations that were completed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))
        self.ledger: list[tuple[Any, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.ledger.append(("batch", self.current_epoch, batch_idx, float(batch[0].sum())))
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        step = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        return [optimizer], [
            {"scheduler": step, "interval": "step"},
            {"scheduler": plateau, "monitor": "val_loss", "interval": "epoch"},
        ]


class Saves(Callback):
    """Saves each time that one hook is called, and notes how long the ledger was then."""

    def __init__(self, hook: str, folder: Path) -> None:
        self.saved: list[tuple[Path, int]] = []

        def save(trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.sanity_checking:
                return
            path = folder / f"{hook}-{len(self.saved)}.ckpt"
            trainer.save_checkpoint(path)
            self.saved.append((path, len(pl_module.ledger)))

        setattr(self, hook, save)


class Validations(Callback):
    """Puts each completed validation into the ledger; to be called before Saves."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            pl_module.ledger.append(("validation", trainer.current_epoch, trainer.global_step))


def train(callbacks: list[Any], resume: Path | None = None, **options: Any) -> tuple[Any, Model]:
    torch.manual_seed(3 if resume is None else 99)
    trainer = fulmen.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "callbacks": callbacks,
            "val_check_interval": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    model = Model()
    loader = DataLoader(dataset(4 * BATCHES), batch_size=4, shuffle=True)
    trainer.fit(model, loader, DataLoader(dataset(10), batch_size=5), ckpt_path=resume)
    return trainer, model


def outcome(trainer: Any, model: nn.Module) -> dict[str, Any]:
    optimizer = trainer.optimizers[0].state_dict()
    return {
        "weights": [value.tolist() for value in model.state_dict().values()],
        "moments": [[v.tolist() for v in entry.values()] for entry in optimizer["state"].values()],
        "rates": [group["lr"] for group in optimizer["param_groups"]],
        "counters": (trainer.global_step, trainer.current_epoch),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


HOOKS = [
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
]


@pytest.mark.proves("5.39", "9.52")
@pytest.mark.parametrize("options", [{}, {"max_epochs": -1, "max_steps": 7}], ids=["epochs", "steps"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_run_resumed_from_any_hook_repeats_and_loses_nothing(
    hook: str, options: dict[str, Any], tmp_path: Path
) -> None:
    saves = Saves(hook, tmp_path)
    whole = train([Validations(), saves], **options)
    expected, ledger = outcome(*whole), whole[1].ledger
    assert len(saves.saved) >= (1 if "train_start" in hook or "train_end" in hook else 2)

    for path, done in saves.saved:
        # Of a validation that a save caught unfinished, the resumed run does all.
        resumed = train([Validations()], path, **options)
        assert ledger[:done] + resumed[1].ledger == ledger, path.name
        ours = outcome(*resumed)
        if hook == "on_train_end":  # nothing was left to do
            ours.pop("metrics"), expected.pop("metrics", None)
        assert ours == expected, path.name


@pytest.mark.proves("5.39")
def test_a_run_that_a_signal_ended_inside_an_epoch_goes_on_with_its_next_batch(tmp_path: Path) -> None:
    class Terminates(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = train([Validations()])
    saver = OnExceptionCheckpoint(str(tmp_path))
    torch.manual_seed(3)
    with pytest.raises(SystemExit) as ended:
        train([Validations(), Terminates(), saver], enable_checkpointing=True)
    assert ended.value.code == 143
    again = train([Validations()], tmp_path / "on_exception.ckpt")

    assert again[1].ledger == whole[1].ledger[-len(again[1].ledger) :]
    assert next(entry for entry in again[1].ledger if entry[0] == "batch")[1:3] == (1, 1)
    assert outcome(*again) == outcome(*whole)

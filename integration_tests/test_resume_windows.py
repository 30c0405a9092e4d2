"""Saving inside an accumulation window: what comes by itself waits, what is asked for resumes bit for bit."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback, ModelCheckpoint
from fulmen_protocols import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:checkpoints are saved in", "ignore:the checkpoint folder")


def dataset(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 8, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class TwoOptimizers(Model):
    """One steps at every batch, the other gathers gradients over three."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        first.step()
        if batch_idx % 3 == 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.net[:2].parameters(), lr=0.01),
            torch.optim.SGD(self.net[2:].parameters(), lr=0.05, momentum=0.9),
        ]


class Each(Callback):
    """Saves after every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.count += 1
        trainer.save_checkpoint(self.folder / f"batch-{self.count:02}.ckpt")


def train(model: Model, callbacks: list[Any], resume: Path | None = None, **options: Any) -> tuple[Any, Model]:
    torch.manual_seed(3 if resume is None else 99)
    for layer in model.net:
        if resume is None and isinstance(layer, nn.Linear):
            layer.reset_parameters()
    trainer = fulmen.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "callbacks": callbacks,
            "logger": False,
            "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **options,
        }
    )
    loader = DataLoader(dataset(28), batch_size=4, shuffle=True)
    trainer.fit(model, loader, DataLoader(dataset(10), batch_size=5), ckpt_path=resume)
    return trainer, model


def outcome(trainer: Any, model: nn.Module) -> dict[str, Any]:
    return {
        "weights": [value.tolist() for value in model.state_dict().values()],
        "moments": [
            [v.tolist() for v in entry.values() if isinstance(v, torch.Tensor)]
            for optimizer in trainer.optimizers
            for entry in optimizer.state_dict()["state"].values()
        ],
        "counters": (trainer.global_step, trainer.current_epoch),
    }


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


@pytest.mark.proves("5.39")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Model, {"accumulate_grad_batches": 3}),
        (Model, {"accumulate_grad_batches": 3, "precision": "16-mixed", "gradient_clip_val": 0.5}),
        (Model, {"accumulate_grad_batches": 5, "val_check_interval": 2}),
        (TwoOptimizers, {}),
    ],
    ids=["plain", "scaler and clipping", "validation inside", "manual"],
)
def test_a_save_in_every_place_of_a_window_resumes_bit_for_bit(
    kind: type[Model], options: dict[str, Any], tmp_path: Path
) -> None:
    expected = outcome(*train(kind(), [Each(tmp_path)], **options))
    undisturbed = outcome(*train(kind(), [], **options))
    assert undisturbed == expected, "saving changes nothing"

    saved = sorted(tmp_path.glob("batch-*.ckpt"))
    assert len(saved) == 14
    open_windows = [path for path in saved if content(path)["fulmen"]["ranks"][0]["gradients"]]
    assert 3 < len(open_windows) < 14, "gradients are saved where a later step needs them, and only there"
    for path in saved:
        assert outcome(*train(kind(), [], path, **options)) == expected, path.name


def test_a_model_that_steps_at_every_batch_saves_no_gradients(tmp_path: Path) -> None:
    train(Model(), [Each(tmp_path)])
    assert all(content(path)["fulmen"]["ranks"][0]["gradients"] is None for path in tmp_path.glob("*.ckpt"))


def test_a_save_by_time_waits_for_the_end_of_the_window(tmp_path: Path) -> None:
    keep = ModelCheckpoint(
        dirpath=str(tmp_path), filename="{step}", train_time_interval=timedelta(microseconds=1), save_top_k=-1
    )
    train(Model(), [keep], accumulate_grad_batches=3)

    saved = [content(path)["fulmen"] for path in tmp_path.glob("*.ckpt")]
    assert sorted(each["progress"]["updates"] for each in saved) == [1, 2, 3, 4, 5, 6]
    assert not any(each["progress"]["window_is_open"] or each["ranks"][0]["gradients"] for each in saved)


def test_the_weights_that_were_validated_inside_a_window_are_the_ones_that_are_saved(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=str(tmp_path), filename="{step}", monitor="val_loss", save_top_k=-1)
    options = {"accumulate_grad_batches": 5, "val_check_interval": 2}
    expected = outcome(*train(Model(), [keep], **options))
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert any(content(path)["fulmen"]["ranks"][0]["gradients"] for path in saved)
    for path in saved:
        again = ModelCheckpoint(dirpath=str(tmp_path / "again"), monitor="val_loss", save_top_k=-1)
        assert outcome(*train(Model(), [again], path, **options)) == expected, path.name


def test_changing_the_run_inside_a_window_keeps_its_gradients() -> None:
    class Changes(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                trainer.callbacks = list(trainer.callbacks)

    expected = outcome(*train(Model(), [], accumulate_grad_batches=3))
    assert outcome(*train(Model(), [Changes()], accumulate_grad_batches=3)) == expected


def test_gradients_of_other_ranks_are_refused_with_what_to_do(tmp_path: Path) -> None:
    train(Model(), [Each(tmp_path)], accumulate_grad_batches=3)
    found = content(tmp_path / "batch-01.ckpt")
    found["fulmen"]["ranks"] *= 2
    torch.save(found, tmp_path / "two.ckpt")

    with pytest.raises(CheckpointError, match=r"inside an accumulation window by 2 processes.*1 cannot share") as info:
        train(Model(), [], tmp_path / "two.ckpt", accumulate_grad_batches=3)
    assert "Resume with 2, or from a checkpoint that was saved at the end of a window" in str(info.value)

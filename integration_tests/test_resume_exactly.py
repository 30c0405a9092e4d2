"""A run resumed from any of its checkpoints ends bit for bit as the run that was never stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import ModelCheckpoint
from fulmen_protocols import CheckpointUnsafe

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
        self.order: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.order.append(float(batch[0].sum()))
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


def train(folder: Path, *, workers: int, accumulate: int, resume: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    keep = ModelCheckpoint(dirpath=str(folder), every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = fulmen.Trainer(
        accelerator="cpu",
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        **options,
    )
    model = Model()
    trainer.fit(
        model,
        DataLoader(dataset(26), batch_size=4, shuffle=True, num_workers=workers),
        DataLoader(dataset(10), batch_size=5),
        ckpt_path=resume,
    )
    return trainer, model


def state(trainer: Any, model: nn.Module) -> dict[str, Any]:
    moments = [
        value
        for entry in trainer.optimizers[0].state_dict()["state"].values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    ]
    return {
        "weights": list(model.state_dict().values()),
        "moments": moments,
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
        "counters": (trainer.global_step, trainer.current_epoch),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


@pytest.mark.proves("3.5", "5.38", "5.39", "9.52")
@pytest.mark.parametrize(
    ("workers", "accumulate", "options"),
    [(0, 1, {}), (0, 3, {}), (2, 2, {}), (0, 1, {"val_check_interval": 3}), (0, 1, {"precision": "16-mixed"})],
)
def test_a_run_resumed_from_any_of_its_checkpoints_ends_like_the_unbroken_one(
    workers: int, accumulate: int, options: dict[str, Any], tmp_path: Path
) -> None:
    trainer, model = train(tmp_path / "whole", workers=workers, accumulate=accumulate, **options)
    expected = state(trainer, model)
    checkpoints = sorted((tmp_path / "whole").glob("step=*.ckpt"))
    assert len(checkpoints) >= 4
    assert expected["rates"] != [0.01], "the schedulers must have changed the rate, or the test proves little"

    for checkpoint in checkpoints if workers == 0 else checkpoints[1::3]:
        resumed = train(
            tmp_path / f"from {checkpoint.stem}", workers=workers, accumulate=accumulate, resume=checkpoint, **options
        )
        ours = state(*resumed)
        for kind in ("weights", "moments"):
            for got, want in zip(ours[kind], expected[kind], strict=True):
                assert torch.equal(got, want), f"{kind} differ after resuming from {checkpoint.name}"
        for kind in ("rates", "counters", "metrics"):
            assert ours[kind] == expected[kind], f"{kind} after resuming from {checkpoint.name}"
        if not options:
            tail = resumed[1].order
            assert tail == model.order[len(model.order) - len(tail) :], "batches go on in the order of the unbroken run"


def test_a_loader_with_a_generator_of_its_own_goes_on_in_its_order_from_the_end_of_an_epoch(tmp_path: Path) -> None:
    def fit(folder: Path, resume: Path | None = None) -> Model:
        torch.manual_seed(3)
        trainer = fulmen.Trainer(
            accelerator="cpu",
            max_epochs=4,
            callbacks=[ModelCheckpoint(dirpath=str(folder), save_top_k=-1, filename="{epoch}")],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = Model()
        train = DataLoader(dataset(26), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(8))
        trainer.fit(model, train, DataLoader(dataset(6), batch_size=3), ckpt_path=resume)
        return model

    whole = fit(tmp_path / "whole")
    resumed = fit(tmp_path / "resumed", tmp_path / "whole" / "epoch=1.ckpt")

    assert resumed.order == whole.order[14:]
    for got, want in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.proves("5.1")
def test_a_checkpoint_saved_after_a_later_evaluation_still_resumes_the_training(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", workers=0, accumulate=1)

    torch.manual_seed(3)
    loaders = DataLoader(dataset(26), batch_size=4, shuffle=True), DataLoader(dataset(10), batch_size=5)

    def trainer(epochs: int) -> fulmen.Trainer:
        return fulmen.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    first, model = trainer(2), Model()
    first.fit(model, *loaders)
    rng = torch.get_rng_state()
    first.validate(model, loaders[1], verbose=False)
    torch.set_rng_state(rng)
    first.save_checkpoint(tmp_path / "after.ckpt")
    second, resumed = trainer(3), Model()
    second.fit(resumed, *loaders, ckpt_path=tmp_path / "after.ckpt")

    expected = state(*whole)
    ours = state(second, resumed)
    for kind in ("weights", "moments"):
        for got, want in zip(ours[kind], expected[kind], strict=True):
            assert torch.equal(got, want), kind
    assert ours["rates"] == expected["rates"]


def test_a_checkpoint_is_readable_by_plain_torch_with_the_documented_keys(tmp_path: Path) -> None:
    trainer, model = train(tmp_path, workers=0, accumulate=1)
    trainer.save_checkpoint(tmp_path / "now.ckpt")

    checkpoint = torch.load(tmp_path / "now.ckpt", weights_only=True)

    assert {
        "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states",
        "lr_schedulers",
    } <= set(checkpoint)  # fmt: skip
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (3, 21)
    assert list(checkpoint["state_dict"]) == list(model.state_dict())


@pytest.mark.proves("5.29")
def test_the_last_whole_checkpoint_is_found_when_the_newest_is_damaged(tmp_path: Path) -> None:
    def trainer(epochs: int) -> fulmen.Trainer:
        keep = ModelCheckpoint(dirpath=str(tmp_path), save_last=True)
        return fulmen.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[keep],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    loader = DataLoader(dataset(8), batch_size=4)
    trainer(1).fit(Model(), loader, loader)
    older = tmp_path / "last.ckpt"
    newer = tmp_path / "last-v1.ckpt"
    newer.write_bytes(older.read_bytes()[:-40])

    again = trainer(2)
    with pytest.warns(UserWarning, match=r"last-v1.ckpt is damaged and is passed over"):
        again.fit(Model(), loader, loader, ckpt_path="last")

    assert again.ckpt_path == str(older)
    assert again.current_epoch == 2


class RunsCode:
    """What a safe load refuses."""

    def __reduce__(self) -> Any:
        return (print, ("code from a file has run",))


@pytest.mark.proves("5.8")
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_every_strategy_loads_weights_before_it_places_the_model_and_keeps_weights_only(
    strategy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    class Noting(Model):
        def on_load_checkpoint(self, checkpoint: Any) -> None:
            order.append("load")

        def on_fit_start(self) -> None:
            order.append("fit start")

        def configure_optimizers(self) -> Any:
            order.append("optimizers")
            return super().configure_optimizers()

    def fit(resume: Any = None, epochs: int = 1) -> Any:
        trainer = fulmen.Trainer(
            accelerator="cpu", devices=1, strategy=strategy, max_epochs=epochs, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        loader = DataLoader(dataset(8), batch_size=4)
        trainer.fit(Noting(), loader, loader, ckpt_path=resume)
        return trainer

    fit().save_checkpoint(tmp_path / "safe.ckpt")
    order.clear()
    fit(tmp_path / "safe.ckpt", epochs=2)
    assert order == ["load", "optimizers", "fit start"]

    content = torch.load(tmp_path / "safe.ckpt", weights_only=True)
    torch.save({**content, "extra": RunsCode()}, tmp_path / "unsafe.ckpt")
    with pytest.raises(CheckpointUnsafe):
        fit(tmp_path / "unsafe.ckpt", epochs=2)
    assert "code from a file has run" not in capfd.readouterr().out

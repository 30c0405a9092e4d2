"""The counters of a checkpoint, beside those that Lightning writes at the same moments of the same run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback

if TYPE_CHECKING:
    from pathlib import Path

lightning = pytest.importorskip("lightning.pytorch")

pytestmark = pytest.mark.filterwarnings("ignore")


def module_class(base: Any) -> Any:
    class Model(base):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self, manual: bool) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.layer = nn.Linear(4, 1)
            self.seen: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(float(batch[0].sum()))
            loss = self.layer(batch[0]).square().mean()
            if self.automatic_optimization:
                return loss
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
            return None

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("value", self.layer(batch[0]).mean())

        def configure_optimizers(self) -> Any:
            count = 1 if self.automatic_optimization else 2
            return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(count)]

    return Model


def callback_class(base: Any) -> Any:
    class Saves(base):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self, folder: Path) -> None:
            self.folder = folder
            self.paths: dict[str, Path] = {}

        def _save(self, trainer: Any, moment: str) -> None:
            if not trainer.sanity_checking:
                name = f"{moment}, epoch {trainer.current_epoch}, number {len(self.paths)}"
                self.paths[name] = self.folder / f"{len(self.paths)}.ckpt"
                trainer.save_checkpoint(self.paths[name])

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self._save(trainer, f"batch {batch_idx}")

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self._save(trainer, "inside a validation")

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self._save(trainer, "end of a validation")

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self._save(trainer, "end of an epoch")

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._save(trainer, "end of training")

    return Saves


KINDS = {
    "lightning": (lightning, module_class(lightning.LightningModule), callback_class(lightning.Callback)),
    "fulmen": (fulmen, module_class(fulmen.LightningModule), callback_class(Callback)),
}


def fit(kind: str, folder: Path, manual: bool, resume: Path | None = None, **options: Any) -> tuple[Any, Any]:
    """The trainer, and where it saved what."""
    package, model_class, saves_class = KINDS[kind]
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    saves = saves_class(folder)
    trainer = package.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[saves],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    data = TensorDataset(torch.arange(32.0).reshape(8, 4) / 32)
    trainer.fit(model_class(manual), DataLoader(data, 2), DataLoader(data, 4), ckpt_path=resume)
    return trainer, saves.paths


def flat(value: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {place: value}
    return {name: leaf for key, item in value.items() for name, leaf in flat(item, f"{place}/{key}").items()}


def told(place: str, moment: str) -> bool:
    """Whether the counter is one that we keep; docs/differences.md has the others."""
    nobody_reads = "scheduler_progress" in place or "val_loop" in place or "zero_grad" in place
    of_this_epoch = "optim" in place and "/current/" in place
    over = moment.startswith("end of training") and "/epoch_loop.batch_progress/" in place and "total" not in place
    return not (nobody_reads or of_this_epoch or over)


@pytest.mark.proves("5.2", "5.4")
@pytest.mark.parametrize(
    ("manual", "options"),
    [
        (False, {}),
        (False, {"accumulate_grad_batches": 3}),
        (False, {"val_check_interval": 2}),
        (True, {}),
    ],
    ids=["plain", "accumulation", "validation inside", "manual, two optimizers"],
)
def test_counters_have_the_places_and_values_that_lightning_gives_them(
    manual: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    saved = {kind: fit(kind, tmp_path / kind, manual, **options)[1] for kind in KINDS}
    assert list(saved["fulmen"]) == list(saved["lightning"]), "the same moments in the same order"
    assert len(saved["fulmen"]) >= 17
    for moment in saved["fulmen"]:
        ours, theirs = (torch.load(saved[kind][moment], weights_only=False) for kind in ("fulmen", "lightning"))
        assert (ours["epoch"], ours["global_step"]) == (theirs["epoch"], theirs["global_step"]), moment
        assert list(ours["loops"]) == ["fit_loop", "validate_loop", "test_loop", "predict_loop"]
        ours, theirs = flat(ours["loops"]), flat(theirs["loops"])
        assert ours.keys() == theirs.keys(), moment
        for place in ours:
            assert type(ours[place]) is type(theirs[place]), place
            if told(place, moment):
                assert ours[place] == theirs[place], f"{place}: {moment}"


@pytest.mark.proves("5.4")
@pytest.mark.parametrize("manual", [False, True])
def test_lightning_goes_on_with_the_right_batch_and_step_from_what_we_saved_anywhere(
    manual: bool, tmp_path: Path
) -> None:
    def seen(resume: Path) -> tuple[int, int, int]:
        trainer, _ = fit("lightning", tmp_path / "again", manual, resume, val_check_interval=2)
        return trainer.global_step, trainer.current_epoch, len(trainer.lightning_module.seen)

    paths = {kind: fit(kind, tmp_path / kind, manual, val_check_interval=2)[1] for kind in KINDS}
    for moment in list(paths["fulmen"])[:-1:3]:
        assert seen(paths["fulmen"][moment]) == seen(paths["lightning"][moment]), moment


def reading_class(base: Any) -> Any:
    class Reads(base):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def _read(self, trainer: Any, moment: str) -> None:
            fit_loop = trainer.fit_loop
            batches, epochs = fit_loop.epoch_loop.batch_progress, fit_loop.epoch_progress.current
            self.seen.append(
                (
                    moment, fit_loop.batch_idx, fit_loop.epoch_loop.batch_idx, fit_loop.epoch_loop.total_batch_idx,
                    batches.current.ready, batches.current.processed, batches.current.completed, batches.total.ready,
                    epochs.ready, epochs.started, epochs.processed, epochs.completed, trainer.is_last_batch,
                )
            )  # fmt: skip

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self._read(trainer, "batch start")

        def on_before_backward(self, trainer: Any, *_: Any) -> None:
            self._read(trainer, "backward")

        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            self._read(trainer, "step")

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self._read(trainer, "batch end")

        def on_validation_start(self, trainer: Any, *_: Any) -> None:
            self._read(trainer, "validation")

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            self._read(trainer, "epoch end")

    return Reads


@pytest.mark.proves("A.6")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"val_check_interval": 2}])
def test_hooks_read_the_counters_that_they_read_in_lightning(options: dict[str, Any]) -> None:
    seen: dict[str, list[Any]] = {}
    for kind, (package, model_class, saves_class) in KINDS.items():
        reads = reading_class(saves_class.__mro__[1])()
        trainer = package.Trainer(
            accelerator="cpu",
            max_epochs=2,
            callbacks=[reads],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )
        data = TensorDataset(torch.arange(32.0).reshape(8, 4) / 32)
        trainer.fit(model_class(False), DataLoader(data, 2), DataLoader(data, 4))
        seen[kind] = reads.seen

    assert len(seen["fulmen"]) > 20
    assert seen["fulmen"] == seen["lightning"]

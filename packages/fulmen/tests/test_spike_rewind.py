"""SpikeRewind in fits of one process: weights against a loop by hand, resuming, what a spike is, limits, reports."""

from __future__ import annotations

import copy
import csv
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from fulmen import LightningModule, Trainer
from fulmen.callbacks import (
    BaseFinetuning,
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    Rewind,
    SpikeRewind,
    TooManyRewindsError,
)
from fulmen.loggers import CSVLogger
from fulmen.strategies import SingleDeviceStrategy
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

pytestmark = pytest.mark.filterwarnings("ignore:checkpoints are saved in", "ignore:the checkpoint folder")

BATCH = 4
POISON = {"nan": math.nan, "huge": 1e4}


def data(batches: int, poisoned: Mapping[int, float]) -> TensorDataset:
    """Noise around a plane; the targets of poisoned batches are replaced."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(batches * BATCH, 6, generator=generator)
    targets = inputs.sum(1, keepdim=True) * 0.1 + 1 + 0.1 * torch.randn(batches * BATCH, 1, generator=generator)
    for index, value in poisoned.items():
        targets[index * BATCH : (index + 1) * BATCH] = value
    return TensorDataset(inputs, targets)


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.1), nn.ReLU(), nn.Linear(5, 1))


def optimizer_and_schedule(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.StepLR]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.8)


class Model(LightningModule):
    def __init__(self, *, manual: bool = False, by_epoch: bool = False) -> None:
        super().__init__()
        self.net = network()
        self.interval = "epoch" if by_epoch else "step"
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            schedule: Any = self.lr_schedulers()
            schedule.step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer, schedule = optimizer_and_schedule(self)
        return [optimizer], [{"scheduler": schedule, "interval": self.interval}]


def trainer(*callbacks: Callback, **flags: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    given = {"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False, **quiet}
    return Trainer(callbacks=list(callbacks), **{**given, **flags})


def fit(
    model: LightningModule, loader: DataLoader[Any], *callbacks: Callback, resume: Path | None = None, **flags: Any
) -> Trainer:
    """A fit whose returns to earlier weights are expected."""
    run = trainer(*callbacks, **flags)
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SpikeRewind:")
        run.fit(model, loader, ckpt_path=resume)
    return run


def state_of(run: Trainer, model: Model) -> list[Any]:
    optimizer = run.optimizers[0].state_dict()
    return [
        *model.net.state_dict().values(),
        *(value for each in optimizer["state"].values() for value in each.values()),
        [group["lr"] for group in optimizer["param_groups"]],
        run.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
        *([run.precision_plugin.scaler.get_scale()] if run.precision == "16-mixed" else []),
    ]


def same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    assert len(ours) == len(theirs)
    return all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(ours, theirs, strict=True)
    )


def by_hand(
    samples: TensorDataset,
    *,
    snapshots: Sequence[int],
    back: Mapping[int, int],
    epochs: int = 1,
    accumulate: int = 1,
    dtype: torch.dtype | None = None,
    by_epoch: bool = False,
) -> list[Any]:
    """A plain loop. ``snapshots``: steps after which to copy; ``back``: after which step to go to which copy."""
    model = network()
    optimizer, schedule = optimizer_and_schedule(model)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    parts = (model, optimizer, schedule, scaler)
    kept: dict[int, Any] = {}
    torch.manual_seed(11)
    loader = DataLoader(samples, BATCH)
    step = ended = 0

    def go_back() -> None:
        states, ended_then = kept[back[step]]
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        for _ in range(ended_then, ended if by_epoch else ended_then):
            schedule.step()  # an epoch that has ended does not go back

    for _ in range(epochs):
        for index, (inputs, targets) in enumerate(loader):
            if index % accumulate == 0:
                if step in back and index:
                    go_back()
                if step in snapshots:
                    kept[step] = copy.deepcopy([part.state_dict() for part in parts]), ended
                optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = F.mse_loss(model(inputs), targets)
            scaler.scale(loss / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(loader):
                scaler.step(optimizer)
                scaler.update()
                step += 1
                if not by_epoch:
                    schedule.step()
        if by_epoch:
            schedule.step()
            ended += 1
        if step in back:  # all steps are judged at the end of an epoch
            go_back()
    moments = [value for each in optimizer.state_dict()["state"].values() for value in each.values()]
    rates = [group["lr"] for group in optimizer.param_groups]
    scale = [scaler.get_scale()] if scaler.is_enabled() else []
    return [*model.state_dict().values(), *moments, rates, schedule.last_epoch, *scale]


@pytest.mark.parametrize("keep_on", ["host", "device"])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("poison", ["nan", "huge"])
def test_weights_are_those_of_a_loop_that_copies_and_restores_by_hand(poison: str, manual: bool, keep_on: Any) -> None:
    samples = data(20, {8: POISON[poison]})
    rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=6, check_every_n_steps=2, keep_on=keep_on)
    model = Model(manual=manual)
    run = fit(model, DataLoader(samples, BATCH), rewind)

    # Step 9 is on its way after step 10 and judged after step 12; the copy of step 6 is older than step 8.
    assert same(state_of(run, model), by_hand(samples, snapshots=[0, 6, 18], back={12: 6}))
    (event,) = rewind.rewinds
    assert (event.step, event.rank, event.noticed_at, event.back_to) == (9, 0, 12, 6)
    assert event.batches == tuple((0, index) for index in range(6, 12))
    assert rewind.dropped_batches == list(event.batches)
    assert math.isnan(event.value) if poison == "nan" else event.value > 1e6
    assert (event.threshold is None) == (poison == "nan")
    assert run.global_step == 20
    assert rewind.steps_undone == 6


def test_without_a_spike_nothing_changes() -> None:
    samples = data(20, {})
    model = Model()
    rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=6)
    run = fit(model, DataLoader(samples, BATCH), rewind)

    assert same(state_of(run, model), by_hand(samples, snapshots=[], back={}))
    assert rewind.rewinds == []


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # torch's scale begins so high that it skips
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_mixed_precision_goes_back_with_its_scale(precision: Any, dtype: torch.dtype) -> None:
    samples = data(20, {8: math.nan})
    rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=6, check_every_n_steps=2)
    model = Model()
    run = fit(model, DataLoader(samples, BATCH), rewind, precision=precision)

    assert same(state_of(run, model), by_hand(samples, snapshots=[0, 6], back={12: 6}, dtype=dtype))
    assert len(rewind.rewinds) == 1


def test_a_step_of_several_batches_is_judged_by_their_mean_and_undone_as_a_whole() -> None:
    samples = data(38, {20: 1e4})
    rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=4, check_every_n_steps=1)
    model = Model()
    run = fit(model, DataLoader(samples, BATCH), rewind, accumulate_grad_batches=3)

    # Batch 20 is in step 7, judged after step 8; step 13 has two batches, and its loss is none the smaller for it.
    assert same(state_of(run, model), by_hand(samples, snapshots=[0, 4, 12], back={8: 4}, accumulate=3))
    (event,) = rewind.rewinds
    assert event.batches == tuple((0, index) for index in range(12, 24))
    assert run.global_step == 13
    known = rewind.state_dict()["ranks"][0]["known"]
    assert 0.3 < known[-1][1] / known[-2][1] < 3


@pytest.mark.parametrize("spike", [7, 8])
def test_a_schedule_that_counts_epochs_misses_none_when_the_weights_go_back_over_an_end(spike: int) -> None:
    epoch = 8
    samples = data(epoch, {})
    noisy = {spike: 1e4}

    class Once(Model):
        """Trains on a spike once, in the whole run."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            step = self.trainer.global_step
            return super().training_step((batch[0], batch[1] if step not in noisy else batch[1] * 0 + 1e4), batch_idx)

    rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=6, check_every_n_steps=2)
    model = Once(by_epoch=True)
    run = fit(model, DataLoader(samples, BATCH), rewind, max_epochs=3)

    class Poisoned(TensorDataset):
        """The same for the loop by hand, which counts its batches."""

        def __init__(self) -> None:
            super().__init__(*samples.tensors)
            self.taken = 0

        def __getitem__(self, index: Any) -> Any:
            inputs, targets = super().__getitem__(index)
            at, self.taken = self.taken // BATCH, self.taken + 1
            return inputs, targets * 0 + 1e4 if at in noisy else targets

    # Step 8 is the epoch's last and judged at its end, step 9 after step 12; both go back to step 6.
    noticed = 8 if spike == 7 else 12
    expected = by_hand(Poisoned(), snapshots=[0, 6], back={noticed: 6}, epochs=3, by_epoch=True)
    assert same(state_of(run, model), expected)
    (event,) = rewind.rewinds
    assert (event.step, event.noticed_at, event.back_to) == (spike + 1, noticed, 6)
    if spike == 8:
        assert event.batches == ((0, 6), (0, 7), (1, 0), (1, 1), (1, 2), (1, 3))


def test_a_spike_right_after_a_return_goes_back_further() -> None:
    samples = data(24, {8: 1e4, 12: math.inf})
    rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=6, check_every_n_steps=2)
    model = Model()
    run = fit(model, DataLoader(samples, BATCH), rewind)

    # The copy of step 6 has stood there since step 12, which may have spoilt it; step 13 is judged after step 16.
    assert same(state_of(run, model), by_hand(samples, snapshots=[0, 6], back={12: 6, 16: 0}))
    assert [(each.step, each.back_to) for each in rewind.rewinds] == [(9, 6), (13, 0)]
    assert rewind.dropped_batches == [(0, index) for index in (*range(6, 12), *range(16))]


def test_averages_of_the_weights_go_back_too() -> None:
    samples = data(20, {8: math.nan})
    rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=6, check_every_n_steps=2)
    model = Model()
    fit(model, DataLoader(samples, BATCH), EMAWeightAveraging(decay=0.9), rewind)

    plain = network()
    average = AveragedModel(plain, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    optimizer, schedule = optimizer_and_schedule(plain)
    parts: tuple[Any, ...] = (plain, average, optimizer, schedule)
    kept: list[Any] = []
    torch.manual_seed(11)
    for step, (inputs, targets) in enumerate(DataLoader(samples, BATCH)):
        if step == 12:
            for part, state in zip(parts, kept, strict=True):
                part.load_state_dict(state)
        if step == 6:
            kept = copy.deepcopy([part.state_dict() for part in parts])
        optimizer.zero_grad()
        F.mse_loss(plain(inputs), targets).backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(plain)

    assert same([*model.net.state_dict().values()], [*average.module.state_dict().values()])
    assert len(rewind.rewinds) == 1


# ---------------------------------------------------------------------------------------------- resuming


class SavesInAStep(Callback):
    """Saves where no weights can go back."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"within={trainer.global_step}.ckpt")


class Validated(Model):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))
        assert all(bool(value.isfinite().all()) for value in self.state_dict().values())

    def configure_optimizers(self) -> Any:
        optimizer, schedule = optimizer_and_schedule(self)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return [optimizer], [
            {"scheduler": schedule, "interval": "step"},
            {"scheduler": plateau, "monitor": "val_loss", "interval": "epoch"},
        ]


@pytest.mark.parametrize(
    ("accumulate", "every", "flags"),
    [(1, 3, {}), (1, 7, {"val_check_interval": 4}), (3, 1, {}), (1, 5, {"precision": "bf16-mixed"})],
)
def test_a_run_resumed_from_any_of_its_checkpoints_ends_like_the_unbroken_one(
    accumulate: int, every: int, flags: dict[str, Any], tmp_path: Path
) -> None:
    samples = data(26 * accumulate, {9 * accumulate: math.nan, 19 * accumulate + accumulate - 1: math.nan})
    loader, validation = DataLoader(samples, BATCH, shuffle=False), DataLoader(data(3, {}), BATCH)

    def train(folder: Path, resume: Path | None = None) -> tuple[Trainer, Model, SpikeRewind]:
        rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=6, check_every_n_steps=2)
        keep = ModelCheckpoint(dirpath=folder, every_n_train_steps=every, save_top_k=-1, filename="{step}")
        run = trainer(
            SavesInAStep(folder, (8, 16)), EMAWeightAveraging(decay=0.9), rewind, keep, enable_checkpointing=True,
            max_epochs=2, accumulate_grad_batches=accumulate, **flags,
        )  # fmt: skip
        model = Validated()
        torch.manual_seed(11)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="SpikeRewind:")
            run.fit(model, loader, validation, ckpt_path=resume)
        return run, model, rewind

    run, model, rewind = train(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(rewind.rewinds) == 4, "two spikes an epoch"
    assert len(checkpoints) > 8

    for checkpoint in checkpoints[:: 3 if every > 1 else 7]:
        saved = torch.load(checkpoint, weights_only=True)
        assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values()), "nothing spoilt is saved"
        resumed, its_model, its = train(tmp_path / f"from {checkpoint.stem}", checkpoint)
        assert same(state_of(resumed, its_model), state_of(run, model)), checkpoint.name
        assert str(its.rewinds) == str(rewind.rewinds), checkpoint.name  # as text, since no NaN equals another
        assert its.steps_undone == rewind.steps_undone
        assert resumed.global_step == run.global_step


def test_a_checkpoint_saved_inside_of_a_step_after_a_spike_is_told_when_a_run_resumes_from_it(tmp_path: Path) -> None:
    loader = DataLoader(data(20, {8: math.nan}), BATCH)

    def rewind() -> SpikeRewind:
        return SpikeRewind(window=4, every_n_steps=6, check_every_n_steps=2)

    whole = rewind()
    fit(Model(), loader, SavesInAStep(tmp_path, [9]), whole)
    assert [each.back_to for each in whole.rewinds] == [6]
    with pytest.raises(TooManyRewindsError, match=r"rank 0 the loss .* step 9.*saved after the spike.*an earlier one"):
        fit(Model(), loader, rewind(), resume=tmp_path / "within=9.ckpt")


# ---------------------------------------------------------------------------------------------- what is a spike


class Given(LightningModule):
    """The loss is what the loader gives."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.extra: dict[int, float] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("twice", 2 * batch.mean(), on_step=True, on_epoch=False)
        return batch.mean() + 0 * self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def spikes(losses: Sequence[float], **options: Any) -> list[tuple[int, float | None]]:
    """At which steps, and above what."""
    rewind = SpikeRewind(every_n_steps=4, **options)
    fit(Given(), DataLoader(torch.tensor(losses), 1), rewind)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
    return [(each.step, each.threshold) for each in rewind.rewinds]


def test_a_spike_is_above_a_multiple_of_the_median() -> None:
    calm = [1.0, 3.0, 1.0, 2.0]  # their median is 1.5
    assert spikes([*calm, 4.5, 1.0], window=4, factor=3.0) == []
    assert spikes([*calm, 4.6, 1.0], window=4, factor=3.0) == [(5, 4.5)]
    assert spikes([-value for value in [*calm, 4.6, 1.0]], window=4, factor=3.0) == []
    assert spikes([-2.0, -2.0, -2.0, 2.1], window=4, factor=3.0) == [(4, 2.0)]


def test_a_spike_is_further_above_the_mean_than_so_many_deviations_where_that_is_asked_for() -> None:
    calm = [1.0, 3.0, 1.0, 3.0]  # mean 2, deviation 1
    assert spikes([*calm, 5.9], window=4, factor=None, sigmas=4.0) == []
    assert spikes([*calm, 6.1], window=4, factor=None, sigmas=4.0) == [(5, 6.0)]
    assert spikes([*calm, 6.1], window=4, factor=3.5, sigmas=4.0) == [], "both must hold"
    assert spikes([*calm, 7.1], window=4, factor=3.5, sigmas=4.0) == [(5, 7.0)]


def test_before_half_a_window_is_known_only_what_is_not_finite_is_a_spike() -> None:
    assert spikes([1.0, 90.0, 1.0], window=4) == []
    assert spikes([1.0, math.inf, 1.0], window=4) == [(2, None)]
    assert spikes([1.0] * 9 + [90.0, -math.inf], window=4, factor=None) == [(11, None)]


def test_after_a_return_a_cooldown_lets_finite_values_pass() -> None:
    losses = [1.0] * 6 + [9.0] + [1.0] * 5 + [9.0] + [1.0] * 5
    assert [step for step, _ in spikes(losses, window=4)] == [7, 13]
    assert [step for step, _ in spikes(losses, window=4, cooldown=8)] == [7]
    losses[12] = math.nan
    assert [step for step, _ in spikes(losses, window=4, cooldown=8)] == [7, 13]


def test_another_value_can_be_monitored() -> None:
    assert spikes([1.0] * 4 + [4.0], monitor="twice", window=4, factor=3.0) == [(5, 6.0)]
    message = r"monitor='twise'.*Did you mean 'twice'\?.*\['twice'\].*Log it"
    with pytest.raises(MisconfigurationException, match=message):
        spikes([1.0] * 4, monitor="twise")


def test_a_gradient_that_is_not_finite_is_undone_before_its_weights_are_saved(tmp_path: Path) -> None:
    class Breaks(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + 0 * (next(self.parameters()) * 0).sqrt().sum() if batch_idx == 7 else loss

    rewind = SpikeRewind(every_n_steps=6, check_every_n_steps=2)
    keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=8, save_top_k=-1)
    fit(Breaks(), DataLoader(data(12, {}), BATCH), rewind, keep, enable_checkpointing=True)

    (event,) = rewind.rewinds
    assert (event.step, event.noticed_at, event.back_to) == (8, 8, 6)
    (saved,) = tmp_path.glob("*.ckpt")
    assert all(bool(value.isfinite().all()) for value in torch.load(saved, weights_only=True)["state_dict"].values())


# ---------------------------------------------------------------------------------------------- limits and reports


def test_one_spike_too_many_ends_the_fit_with_the_weights_before_it() -> None:
    samples = data(30, {8: 1e4, 20: 1e4})
    rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=6, check_every_n_steps=2, max_rewinds=1)
    model = Model()
    with pytest.raises(
        TooManyRewindsError,
        match=r"rank 0 the loss was .* in step 21, above .*step 24\..*step 18 \(of which 12 were not undone\): batches "
        r"18 to 23 of epoch 0 are dropped.*max_rewinds=1, after spikes at steps 9\.",
    ):
        fit(model, DataLoader(samples, BATCH), rewind)
    until = TensorDataset(*(values[: 18 * BATCH] for values in samples.tensors))
    expected = by_hand(until, snapshots=[0, 6], back={12: 6})
    assert same(list(model.net.state_dict().values()), expected[: len(model.net.state_dict())])


def test_each_return_is_said_once_and_is_a_row_of_the_loggers(tmp_path: Path) -> None:
    rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=6, check_every_n_steps=2)
    run = trainer(rewind, logger=CSVLogger(tmp_path), log_every_n_steps=5)
    torch.manual_seed(11)
    with pytest.warns(UserWarning, match="SpikeRewind") as said:
        run.fit(Model(), DataLoader(data(20, {8: math.nan}), BATCH))

    assert [str(each.message) for each in said] == [
        "SpikeRewind: on rank 0 the loss was not finite (nan) in step 9. Noticed at step 12. All ranks go back to the "
        "weights of step 6: batches 6 to 11 of epoch 0 are dropped, training goes on with the next one. Return 1 of 10."
    ]
    assert run.logger is not None
    rows = list(csv.DictReader((Path(str(run.log_dir)) / "metrics.csv").read_text().splitlines()))
    (row,) = [row for row in rows if row["rewind/count"]]
    assert {name: float(value) for name, value in row.items() if value and value != "nan"} == {
        "epoch": 0, "step": 12, "rewind/count": 1, "rewind/spike_step": 9, "rewind/spike_rank": 0,
        "rewind/back_to_step": 6, "rewind/batches_dropped": 6,
    }  # fmt: skip
    assert row["rewind/value"] == "nan"


def test_layers_that_thaw_begin_with_a_copy_of_their_own() -> None:
    class Thaws(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.01)

    class Some(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=0.01)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.trainer.global_step == 14 else loss

    rewind = SpikeRewind(every_n_steps=10, check_every_n_steps=2)
    run = fit(Some(), DataLoader(data(12, {}), BATCH), Thaws(), rewind, max_epochs=2)

    assert [(each.step, each.back_to) for each in rewind.rewinds] == [(15, 12)], "not to the copy of step 10"
    assert len(run.optimizers[0].param_groups) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, r"window=1\): give an integer of at least 2"),
        ({"every_n_steps": 3}, r"every_n_steps=3\): give an integer of at least 4"),
        ({"every_n_steps": 2.5}, r"every_n_steps=2.5\): give an integer"),
        ({"check_every_n_steps": 0}, r"check_every_n_steps=0\): give an integer of at least 1"),
        (
            {"every_n_steps": 20, "check_every_n_steps": 10},
            r"every_n_steps=20, check_every_n_steps=10\).*Check every 9 steps at most, or copy every 22 at least",
        ),
        ({"max_rewinds": -1}, r"max_rewinds=-1\): give an integer of at least 0"),
        ({"cooldown": -1}, r"cooldown=-1\): give an integer of at least 0"),
        ({"factor": 1.0}, r"factor=1.0\): give a number above 1, or None"),
        ({"factor": math.nan}, r"factor=nan\): give a number above 1"),
        ({"sigmas": 0.0}, r"sigmas=0.0\): give a positive number, or None"),
        ({"keep_on": "hots"}, r"keep_on='hots'\) is neither 'host' nor 'device'.*Did you mean 'host'\?"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"SpikeRewind\(.*" + message):
        SpikeRewind(**options)


class Accumulates(SingleDeviceStrategy):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
    """A single device that says of itself that it accumulates."""

    def set_accumulation(self, batches: int) -> None:
        pass


class Steps(SingleDeviceStrategy):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
    """A single device that says of itself that it steps optimizers."""

    def optimizer_step(self, optimizer: Any, module: Any, closure: Any = None) -> Any:
        raise NotImplementedError


def test_engines_that_own_the_optimizer_and_a_second_one_are_refused_before_training() -> None:
    loader = DataLoader(data(2, {}), BATCH)
    with pytest.raises(MisconfigurationException, match=r"SpikeRewind changes a run.*Drop the callback"):
        fit(Model(), loader, SpikeRewind(), strategy=Accumulates("cpu"))
    with pytest.raises(MisconfigurationException, match=r"SpikeRewind gives optimizers.*strategy='Steps'.*use 'ddp'"):
        fit(Model(), loader, SpikeRewind(), strategy=Steps("cpu"))

    class Other(SpikeRewind):
        state_key = "other"  # type: ignore[assignment]  # one value is all there is

    with pytest.raises(MisconfigurationException, match=r"two SpikeRewind.*Leave one"):
        fit(Model(), loader, SpikeRewind(), Other(monitor="loss"))


def test_manual_optimization_that_returns_no_loss_is_told_what_to_do() -> None:
    class Silent(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"other": super().training_step(batch, batch_idx)}

    with pytest.raises(MisconfigurationException, match=r"SpikeRewind found no tensor under 'loss'.*return the loss"):
        fit(Silent(manual=True), DataLoader(data(2, {}), BATCH), SpikeRewind())


def test_a_return_survives_as_plain_data() -> None:
    rewind = SpikeRewind(every_n_steps=6)
    event = Rewind(9, 1, 5.0, 2.0, 12, 6, ((0, 6), (0, 7)))
    rewind.rewinds.append(event)
    other = SpikeRewind(every_n_steps=6)
    other.load_state_dict(rewind.state_dict())

    assert other.rewinds == [event]
    assert other.dropped_batches == [(0, 6), (0, 7)]

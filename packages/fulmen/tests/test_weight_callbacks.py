"""Callbacks that change weights, optimizers or accumulation: against plain PyTorch, and what they refuse."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from fulmen.strategies import SingleDeviceStrategy
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:Model defines validation_step", "ignore:.* defines validation_step")


def dataset(samples: int = 18) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


def loader(samples: int = 18) -> DataLoader[Any]:
    return DataLoader(dataset(samples), batch_size=4)


class Model(fulmen.LightningModule):
    def __init__(self, *, batch_norm: bool = False, manually: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm: nn.Module = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.backbone = nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.automatic_optimization = not manually
        self.validated: list[dict[str, Any]] = []
        self.fails_in_validation = False

    def forward(self, x: Any) -> Any:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(copy.deepcopy(dict(self.state_dict())))
        if self.fails_in_validation:
            raise ZeroDivisionError

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(copy.deepcopy(dict(self.state_dict())))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def trainer(*callbacks: Any, **options: Any) -> fulmen.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"accelerator": "cpu", "max_epochs": 3, "num_sanity_val_steps": 0, "enable_checkpointing": False, **quiet}
    return fulmen.Trainer(callbacks=list(callbacks), **{**given, **options})


def equal(got: nn.Module | dict[str, Any], want: nn.Module | dict[str, Any]) -> bool:
    ours = dict(got.state_dict()) if isinstance(got, nn.Module) else got
    theirs = dict(want.state_dict()) if isinstance(want, nn.Module) else want
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def raw_epoch(
    model: Model, optimizer: Any, accumulate: int = 1, after_step: Callable[[], object] = lambda: None
) -> None:
    batches = list(loader())
    for index, (x, y) in enumerate(batches):
        if index % accumulate == 0:
            optimizer.zero_grad()
        (F.cross_entropy(model(x), y) / accumulate).backward()
        if (index + 1) % accumulate == 0 or index + 1 == len(batches):
            optimizer.step()
            after_step()


# ---------------------------------------------------------------------- accumulation


@pytest.mark.proves("11.11")
def test_accumulation_changes_at_the_first_batch_of_its_epoch_as_in_a_loop_by_hand() -> None:
    scheduling = {1: 2, 2: 4}
    ours, theirs = Model(), Model()
    run = trainer(GradientAccumulationScheduler(scheduling))
    optimizer = theirs.configure_optimizers()

    run.fit(ours, loader())
    for accumulate in (1, 2, 4):
        raw_epoch(theirs, optimizer, accumulate)

    assert equal(ours, theirs)
    assert run.global_step == 5 + 3 + 2
    assert scheduling == {1: 2, 2: 4}, "the user's dict is the user's"
    assert run.accumulate_grad_batches == 1


@pytest.mark.proves("11.11")
def test_the_same_trainer_can_fit_again_with_a_schedule() -> None:
    run = trainer(GradientAccumulationScheduler({0: 2}), max_epochs=1)
    run.fit(Model(), loader())
    run.max_epochs = 2

    run.fit(Model(), loader())

    assert run.global_step == 6


# ---------------------------------------------------------------------- stochastic weight averaging


@pytest.mark.proves("11.12")
def test_swa_is_the_loop_that_torch_documents(tmp_path: Path) -> None:
    ours, theirs = Model(batch_norm=True), Model(batch_norm=True)
    swa = StochasticWeightAveraging(swa_lrs=0.03, swa_epoch_start=2, annealing_epochs=2)
    run = trainer(swa, max_epochs=4, enable_checkpointing=True, default_root_dir=str(tmp_path))

    run.fit(ours, loader())
    optimizer = theirs.configure_optimizers()
    averaged = AveragedModel(theirs)
    schedule: Any = None
    for epoch in range(4):
        if epoch >= 1:
            schedule = schedule or SWALR(optimizer, swa_lr=0.03, anneal_epochs=2)  # type: ignore[no-untyped-call]  # its owner has left it untyped
            averaged.update_parameters(theirs)
        raw_epoch(theirs, optimizer)
        if schedule is not None:
            schedule.step()
    update_bn((x for x, _ in loader()), averaged)

    for (name, got), want in zip(ours.state_dict().items(), averaged.module.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=name)
    assert int(swa.n_averaged or 0) == 3
    assert isinstance(run.lr_scheduler_configs[0].scheduler, SWALR)
    assert [m.momentum for m in ours.modules() if isinstance(m, nn.BatchNorm1d)] == [0.1]
    assert (run.max_epochs, run.forward_only) == (4, False)
    saved = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)
    assert equal(saved["state_dict"], ours), "the last checkpoint holds the averaged weights"


@pytest.mark.proves("11.12")
def test_swa_that_ends_early_averages_or_says_why_it_does_not() -> None:
    class Stops(fulmen.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    def fit(*, batch_norm: bool, **options: Any) -> tuple[Model, StochasticWeightAveraging, fulmen.Trainer]:
        model, swa = Model(batch_norm=batch_norm), StochasticWeightAveraging(0.05, 2)
        run = trainer(swa, Stops(), **{"max_epochs": 6, **options})
        run.fit(model, loader())
        return model, swa, run

    plain, swa, _ = fit(batch_norm=False)
    assert swa._average_model is not None
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), swa._average_model.parameters(), strict=True))
    with pytest.warns(UserWarning, match="keeps the weights as trained"):
        normed, swa, run = fit(batch_norm=True)
    assert swa._average_model is not None
    assert not torch.equal(normed.head.weight, swa._average_model.head.weight)
    assert run.max_epochs == 6
    with pytest.warns(UserWarning, match="update_bn"):
        endless, swa, _ = fit(batch_norm=True, max_epochs=-1)
    assert swa._average_model is not None
    assert torch.equal(endless.head.weight, swa._average_model.head.weight)


@pytest.mark.proves("11.12")
def test_a_failing_run_leaves_trainer_and_batch_norm_as_swa_found_them() -> None:
    class Fails(fulmen.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.forward_only:
                raise ZeroDivisionError

    model = Model(batch_norm=True)
    run = trainer(StochasticWeightAveraging(0.05, 1), Fails(), max_epochs=1)

    with pytest.raises(ZeroDivisionError):
        run.fit(model, loader())

    assert (run.max_epochs, run.forward_only) == (1, False)
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm1d)] == [0.1]


@pytest.mark.proves("11.12")
def test_swa_names_a_scheduler_whose_interval_it_does_not_keep() -> None:
    class BySteps(Model):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5), "interval": "step"}]

    with pytest.warns(UserWarning, match=r"the StepLR it replaces had interval='step'"):
        trainer(StochasticWeightAveraging(0.05, 1)).fit(BySteps(), loader())


# ---------------------------------------------------------------------- averaging


@pytest.mark.proves("11.13", "7.8")
def test_ema_validates_saves_and_leaves_the_average_that_torch_computes(tmp_path: Path) -> None:
    ours, theirs = Model(batch_norm=True), Model(batch_norm=True)
    weights = ModelCheckpoint(dirpath=tmp_path, filename="weights", save_weights_only=True)
    full = ModelCheckpoint(dirpath=tmp_path, filename="full", every_n_epochs=3)
    run = trainer(EMAWeightAveraging(decay=0.7), weights, full, enable_checkpointing=True)

    run.fit(ours, loader(), loader(3))
    run.save_checkpoint(tmp_path / "after.ckpt")
    optimizer = theirs.configure_optimizers()
    averaged = AveragedModel(theirs, avg_fn=get_ema_avg_fn(0.7), use_buffers=True)
    for epoch in range(3):
        raw_epoch(theirs, optimizer, after_step=lambda: averaged.update_parameters(theirs))
        assert equal(ours.validated[epoch], averaged.module), f"validation of epoch {epoch}"

    assert equal(ours, averaged.module)
    for name in ("weights", "full", "after"):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert equal(saved["state_dict"], averaged.module), name
        assert equal(Model.load_from_checkpoint(tmp_path / f"{name}.ckpt", batch_norm=True), averaged.module), name
        if name != "weights":
            assert equal(saved["current_model_state"], theirs), name
            assert list(saved["averaging_state"]) == ["n_averaged"]
            assert int(saved["averaging_state"]["n_averaged"]) == 15
        else:
            assert "current_model_state" not in saved


@pytest.mark.proves("11.13")
def test_the_average_of_a_16_bit_model_is_float32_and_outlives_validation(tmp_path: Path) -> None:
    class Recording(fulmen.Callback):
        def __init__(self) -> None:
            self.mean: Any = None

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            current = pl_module.head.weight.detach()
            update: Any = get_ema_avg_fn(0.999)  # type: ignore[no-untyped-call]  # its owner has left it untyped
            self.mean = current.float() if self.mean is None else update(self.mean, current, None)

    recording, model = Recording(), Model()
    run = trainer(recording, EMAWeightAveraging(decay=0.999), precision="bf16-true", val_check_interval=1)

    run.fit(model, loader(), loader(3))
    run.save_checkpoint(tmp_path / "now.ckpt")

    saved = torch.load(tmp_path / "now.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["head.weight"], recording.mean)
    assert saved["current_model_state"]["head.weight"].dtype == torch.bfloat16
    assert torch.equal(model.head.weight, recording.mean.bfloat16())


@pytest.mark.proves("11.13")
def test_tests_run_with_the_average_from_model_and_checkpoint(tmp_path: Path) -> None:
    model = Model()
    run = trainer(WeightAveraging(), enable_checkpointing=True, default_root_dir=str(tmp_path))
    run.fit(model, loader())
    averaged = copy.deepcopy(dict(model.state_dict()))

    run.validate(model, loader(3), verbose=False)
    run.test(model, loader(3), verbose=False)
    with torch.no_grad():
        model.head.weight.zero_()
    run.test(model, loader(3), ckpt_path="best", verbose=False)

    assert [equal(seen, averaged) for seen in model.validated] == [True, True, True]
    assert equal(model, averaged)


@pytest.mark.proves("11.13")
def test_a_validation_that_fails_gives_the_model_its_own_weights_back(tmp_path: Path) -> None:
    model = Model()
    model.fails_in_validation = True
    keep = ModelCheckpoint(dirpath=tmp_path, filename="failed", save_on_exception=True)
    run = trainer(WeightAveraging(), keep, enable_checkpointing=True)
    theirs = Model()
    raw_epoch(theirs, theirs.configure_optimizers())

    with pytest.raises(ZeroDivisionError):
        run.fit(model, loader(), loader(3))

    assert equal(model, theirs)
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    assert equal(saved["current_model_state"], theirs)
    assert equal(saved["state_dict"], model.validated[0])
    assert saved["averaging_state"]["n_averaged"] == 5


@pytest.mark.proves("11.13")
def test_a_checkpoint_without_an_average_starts_one_from_its_weights(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Model(), loader())
    first.save_checkpoint(tmp_path / "plain.ckpt")
    seen: list[dict[str, Any]] = []

    class Averaging(WeightAveraging):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(copy.deepcopy(dict(self._average().module.state_dict())))

        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return False

    model = Model()
    with pytest.warns(UserWarning, match="was saved without Averaging"):
        trainer(Averaging(), max_epochs=2).fit(model, loader(), ckpt_path=tmp_path / "plain.ckpt")

    plain = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    assert equal(seen[0], plain)
    assert equal(model, plain), "an average that is never updated is what training leaves"


# ---------------------------------------------------------------------- finetuning


@pytest.mark.proves("11.14")
def test_batch_norm_is_frozen_only_if_asked_and_its_statistics_with_it() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ModuleList([nn.Linear(2, 2)]))

    def state() -> tuple[list[bool], bool]:
        return [p.requires_grad for p in module.parameters()], module[1].track_running_stats

    BaseFinetuning.freeze(module)
    assert state() == ([False, False, True, True, False, False], True)
    BaseFinetuning.freeze([module[0], {"norm": module[1]}.values()], train_bn=False)
    assert state() == ([False] * 6, False)
    before = module[1].running_mean.clone()
    module[1](torch.randn(4, 2))
    assert torch.equal(module[1].running_mean, before)
    assert list(BaseFinetuning.filter_params(module, requires_grad=True)) == []
    assert len(list(BaseFinetuning.filter_params(module, train_bn=False, requires_grad=False))) == 4
    BaseFinetuning.make_trainable(module)
    assert state() == ([True] * 6, True)


@pytest.mark.proves("11.14")
def test_parameters_of_equal_value_all_join_the_optimizer() -> None:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    BaseFinetuning.freeze(layers[1])
    optimizer = torch.optim.SGD(layers[0].parameters(), lr=1.0)

    BaseFinetuning.unfreeze_and_add_param_group(layers[1], optimizer, initial_denom_lr=4.0)

    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert optimizer.param_groups[1]["lr"] == 0.25
    with pytest.warns(UserWarning, match="2 of 2 parameters to add are in a group of SGD already"):
        assert BaseFinetuning.filter_on_optimizer(optimizer, layers[0].parameters()) == []


# ---------------------------------------------------------------------- pruning


@pytest.mark.proves("11.15", "7.8")
def test_pruning_with_the_lottery_ticket_is_the_loop_by_hand_and_leaves_no_mask_behind(tmp_path: Path) -> None:
    ours, theirs = Model(), Model()
    weights = ModelCheckpoint(dirpath=tmp_path, filename="weights", save_weights_only=True)
    full = ModelCheckpoint(dirpath=tmp_path, filename="full", every_n_epochs=3)
    pruning = ModelPruning("l1_unstructured", amount=0.25, parameter_names=["weight"])
    run = trainer(pruning, weights, full, enable_checkpointing=True)

    run.fit(ours, loader())
    pairs = [(theirs.backbone[0], "weight"), (theirs.head, "weight")]
    first = [getattr(module, name).detach().clone() for module, name in pairs]
    optimizer = theirs.configure_optimizers()
    for _ in range(3):
        raw_epoch(theirs, optimizer)
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=0.25)  # type: ignore[no-untyped-call]  # its owner has left it untyped
        for (module, name), value in zip(pairs, first, strict=True):
            getattr(module, name + "_orig").data.copy_(value)
    for module, name in pairs:
        prune.remove(module, name)  # type: ignore[no-untyped-call]  # its owner has left it untyped

    assert equal(ours, theirs)
    zeros = sum(int((getattr(module, name) == 0).sum()) for module, name in pairs)
    assert zeros == 18 + 14 + 10, "a quarter of what is left, three times, of 72 weights"
    for name in ("weights", "full"):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert equal(saved["state_dict"], theirs), name
        assert equal(Model.load_from_checkpoint(tmp_path / f"{name}.ckpt"), theirs), name
    assert not any(module._forward_pre_hooks for module in ours.modules())


@pytest.mark.proves("11.15")
def test_masks_stay_in_model_and_checkpoint_where_pruning_is_not_permanent(tmp_path: Path) -> None:
    model = Model()
    run = trainer(ModelPruning("l1_unstructured", make_pruning_permanent=False), max_epochs=1)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "masked.ckpt")

    saved = torch.load(tmp_path / "masked.ckpt", weights_only=True)["state_dict"]

    assert {"head.weight_orig", "head.weight_mask", "head.bias_mask"} <= set(saved)
    assert "head.weight" not in saved


@pytest.mark.proves("7.8")
def test_a_buffer_that_is_called_like_a_mask_is_left_alone() -> None:
    pruning = ModelPruning("l1_unstructured")
    state = {
        "attention_mask": torch.ones(1),
        "a.weight_orig": torch.tensor([2.0, 3.0]),
        "a.weight_mask": torch.tensor([0.0, 1.0]),
    }

    clean = pruning.weights_to_save(trainer(), Model(), state)

    assert set(clean) == {"attention_mask", "a.weight"}
    assert clean["a.weight"].tolist() == [0.0, 3.0]


@pytest.mark.proves("11.15")
def test_how_sparse_the_model_is_can_be_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        pruning = ModelPruning("l1_unstructured", amount=9, parameter_names=["weight"], verbose=2)
        trainer(pruning, max_epochs=1).fit(Model(), loader())

    assert "L1Unstructured: 9 of 72 entries are pruned (12.50%), up from 0" in caplog.text
    assert "on backbone.0.weight with amount=9" in caplog.text


# ---------------------------------------------------------------------- bad input


def fits(*callbacks: Any, model: Model | None = None, **options: Any) -> Callable[[], object]:
    return lambda: trainer(*callbacks, **options).fit(model or Model(), loader())


class TwoOptimizers(Model):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.head.parameters(), lr=0.1), torch.optim.SGD(self.backbone.parameters(), lr=0.1)]


class NoBackbone(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = self.backbone
        del self.backbone


SWA, EMA, GAS = StochasticWeightAveraging, EMAWeightAveraging, GradientAccumulationScheduler
WRONG: list[tuple[str, Callable[[], object], str]] = [
    ("11.11", lambda: GAS({}), r"scheduling=\{\}.*at least one entry"),
    ("11.11", lambda: GAS({-1: 2}), r"scheduling=\{-1: 2\}.* the epoch -1.*the first is 0"),
    ("11.11", lambda: GAS({1: 0}), r"scheduling=\{1: 0\}.*has 0 batches from epoch 1.*at least 1"),
    ("11.11", fits(GAS({1: 2}), accumulate_grad_batches=2), r"accumulate_grad_batches=2.*scheduling=.*Drop one"),
    ("11.11", fits(GAS({1: 2}), model=Model(manually=True)), r"scheduling=.*automatic_optimization=False.*Drop the"),
    ("11.12", lambda: SWA(-0.1), r"swa_lrs=-0.1\): give a positive number"),
    ("11.12", lambda: SWA([0.1, "x"]), r"swa_lrs=\[0.1, 'x'\]\): give a positive number"),  # type: ignore[list-item]  # wrong on purpose
    ("11.12", lambda: SWA(0.1, 0), r"swa_epoch_start=0\): give an integer of at least 1"),
    ("11.12", lambda: SWA(0.1, 1.5), r"swa_epoch_start=1.5\): give .* a float from 0 to 1"),
    ("11.12", lambda: SWA(0.1, annealing_epochs=-1), r"annealing_epochs=-1\): give an integer"),
    ("11.12", lambda: SWA(0.1, annealing_strategy="exp"), r"annealing_strategy='exp'\): use 'cos'"),  # type: ignore[arg-type]  # wrong on purpose
    ("11.12", lambda: SWA(0.1, avg_fn=3), r"avg_fn=3\): give a function"),  # type: ignore[arg-type]  # wrong on purpose
    ("11.12", lambda: SWA(0.1, device=3), r"device=3\): give a torch.device"),  # type: ignore[arg-type]  # wrong on purpose
    ("11.12", fits(SWA(0.1), max_epochs=-1, max_steps=3), r"swa_epoch_start=0.8\).*max_epochs=-1.*as an integer"),
    ("11.12", fits(SWA(0.1, 7)), r"swa_epoch_start=7\) never begins: max_epochs=3.*earlier epoch"),
    ("11.12", fits(SWA([0.1, 0.2])), r"swa_lrs=\[0.1, 0.2\]\) has 2 learning rates for 1 parameter group"),
    ("11.12", fits(SWA(0.1), model=TwoOptimizers(manually=True)), r"returned 2 and 0. Return fewer"),
    (
        "11.12",
        fits(SWA(0.1), model=Model(batch_norm=True, manually=True)),
        r"automatic_optimization=False.*Use automatic optimization, or WeightAveraging",
    ),
    ("11.13", lambda: WeightAveraging(avg_fun=max), r"avg_fun=.*does not have. Did you mean 'avg_fn'"),
    ("11.13", lambda: WeightAveraging(avg_fn=3), r"avg_fn=3\): give a function"),
    ("11.13", lambda: WeightAveraging(avg_fn=max, multi_avg_fn=max), r"avg_fn and multi_avg_fn.*Drop one"),
    ("11.13", lambda: EMA(decay=1.5), r"decay=1.5\): give a number from 0 to 1"),
    ("11.13", lambda: EMA(update_every_n_steps=-1), r"update_every_n_steps=-1\): give an integer"),
    ("11.13", lambda: EMA(update_starting_at_step=-2), r"update_starting_at_step=-2\): give an integer"),
    ("11.13", lambda: EMA(update_every_n_steps=0), r"update_every_n_steps=0\) would never.*Give at least 1"),
    ("11.13", lambda: EMA(avg_fn=max), r"avg_fn=.*has an averaging function already. Use WeightAveraging"),
    ("11.14", fits(BackboneFinetuning(), model=NoBackbone()), r"NoBackbone.backbone, and found None. Assign it"),
    ("11.15", lambda: ModelPruning("l2_unstructured"), r"pruning_fn='l2_unstructured'\).*Did you mean 'l1_uns"),
    ("11.15", lambda: ModelPruning(max), r"pruning_fn=<built-in function max>\): give one of"),
    ("11.15", lambda: ModelPruning("ln_structured"), r"pruning_dim=None. Give pruning_dim"),
    ("11.15", lambda: ModelPruning("ln_structured", pruning_dim=0), r"pruning_norm=None. Give pruning_norm"),
    (
        "11.15",
        lambda: ModelPruning("random_structured", pruning_dim=0),
        r"use_global_unstructured=True\): its type is 'structured'.*Give use_global_unstructured=False",
    ),
    (
        "11.15",
        lambda: ModelPruning(prune.L1Unstructured, use_global_unstructured=False),
        r"pruning_fn=L1Unstructured, use_global_unstructured=False\).*Use a name",
    ),
    ("11.15", lambda: ModelPruning("l1_unstructured", parameter_names=["scale"]), r"holds 'scale'; use 'weight'"),
    ("11.15", lambda: ModelPruning("l1_unstructured", amount="half"), r"amount='half'\): give a"),  # type: ignore[arg-type]  # wrong on purpose
    ("11.15", lambda: ModelPruning("l1_unstructured", amount=1.5), r"amount=1.5\): give a fraction from 0.0 to 1.0"),
    ("11.15", lambda: ModelPruning("l1_unstructured", verbose=3), r"verbose=3\): use 0, 1 or 2"),
    (
        "11.15",
        fits(ModelPruning("l1_unstructured", parameters_to_prune=[nn.Linear(1, 1)])),  # type: ignore[list-item]  # wrong on purpose
        r"parameters_to_prune=\[Linear.*give a list of \(nn.Module, name",
    ),
    (
        "11.15",
        fits(ModelPruning("l1_unstructured", parameters_to_prune=[(nn.Linear(1, 1), "weight")])),
        r"holds Linear.*which is no layer of Model. Give layers",
    ),
]


@pytest.mark.parametrize(
    ("make", "message"), [pytest.param(make, message, marks=pytest.mark.proves(item)) for item, make, message in WRONG]
)
def test_what_cannot_work_is_refused_with_what_was_given_and_what_to_do(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=f"(?s){message}"):
        make()


def test_an_unknown_name_of_a_given_layer_gets_the_nearest_one() -> None:
    model = Model()
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(model.head, "wieght")])

    with pytest.raises(MisconfigurationException, match=r"holds 'wieght' of Linear.*Did you mean 'weight'"):
        trainer(pruning).fit(model, loader())


def test_a_wrong_type_is_a_type_error_too() -> None:
    for make in (lambda: GAS([1]), lambda: SWA(0.1, avg_fn=3), lambda: WeightAveraging(model=1)):  # type: ignore[arg-type]  # wrong on purpose
        with pytest.raises(MisconfigurationTypeError):
            make()


class Sharding(SingleDeviceStrategy):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
    """A single device that says of itself that it shards; nothing is trained with it here."""

    state_kind = "full"

    def module_state(self, module: Any, *, full: bool) -> Any:
        raise NotImplementedError

    load_module_state = optimizer_state = load_optimizer_state = module_state


class Engine(SingleDeviceStrategy):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
    """A single device that says of itself that it accumulates."""

    def set_accumulation(self, batches: int) -> None:
        pass


@pytest.mark.proves("11.11", "11.12", "11.13", "11.14", "11.15")
def test_strategies_that_shard_or_own_the_optimizer_are_refused_by_name() -> None:
    whole = [SWA(0.1, 1), WeightAveraging(), EMA(), ModelPruning("l1_unstructured")]
    for callback in (*whole, GAS({1: 2}), BackboneFinetuning()):
        with pytest.raises(
            MisconfigurationException, match=f"{type(callback).__name__}.*set up once. Drop the callback"
        ):
            trainer(callback, strategy=Engine("cpu")).fit(Model(), loader())
    for callback in whole:
        with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__}.*shards it. Drop the callback"):
            trainer(callback, strategy=Sharding("cpu")).fit(Model(), loader())

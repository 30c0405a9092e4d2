"""The learning-rate finder: what it finds, where it writes it, and that nothing else is left of it."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import LambdaCallback, LearningRateFinder
from fulmen.tuner import Tuner
from fulmen.tuner.lr_finder import _LRFinder  # pyright: ignore[reportPrivateUsage]
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from pathlib import Path


def dataset(samples: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


class Model(fulmen.LightningModule):
    """Everything that a careless range test would leave its marks on."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.outputs: list[Any] = []
        self.total = torch.zeros(())  # as the state of a metric: neither parameter nor buffer
        self.batches = 0
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noise = random.random() * torch.rand(())
        loss = F.cross_entropy(self.net(batch[0]), batch[1]) * (1 + 0.1 * noise + 0.001 * self.batches)
        self.seen += 1
        self.batches += 1
        self.total = self.total + loss.detach()
        self.outputs.append(loss.detach())
        self.made_on_the_way = 3
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("total", self.total)
        self.mean(loss)
        self.log("mean", self.mean, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), batch_size=8, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(dataset(16), batch_size=8)


def trainer(**options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return fulmen.Trainer(**{**quiet, **options})


class Trace(fulmen.Callback):
    """Writes down what it is told, and where the random generators are then."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def _note(self, name: str, trainer: Any, *numbers: float) -> None:
        draws = float(torch.get_rng_state().float().sum())
        self.events.append((name, trainer.current_epoch, trainer.global_step, draws, *numbers))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._note("train_start", trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._note("batch_end", trainer, batch_idx, outputs["loss"].item(), batch[0].sum().item())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._note("validation", trainer, trainer.callback_metrics["val_loss"].item())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._note("epoch_end", trainer, trainer.callback_metrics["loss_epoch"].item())


class AtEpochOne(LearningRateFinder):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


def left_behind(how: str, tmp_path: Path, accelerator: str = "cpu") -> dict[str, Any]:
    """Train with a learning rate that does not change, with or without a search, and say all that came of it."""
    fulmen.seed_everything(3)
    trace, model = Trace(), Model()
    callbacks: list[Any] = [trace]
    if how == "as a callback":
        callbacks.insert(0, LearningRateFinder(update_attr=False, num_training_steps=30))
    if how == "at an epoch":
        callbacks.insert(0, AtEpochOne(update_attr=False, num_training_steps=30))
    folder = tmp_path / how.replace(" ", "_")
    fit = trainer(
        accelerator=accelerator,
        devices=1,
        callbacks=callbacks,
        logger=fulmen.loggers.CSVLogger(str(folder), version=0),
        log_every_n_steps=1,
    )
    given: list[Any] = []
    if how.endswith("loaders"):
        generator = torch.Generator().manual_seed(5)
        given = [DataLoader(dataset(), batch_size=8, shuffle=True, generator=generator)]
    if how.startswith("in a call"):
        Tuner(fit).lr_find(model, *given, update_attr=False, num_training=30)
        assert trace.events == []
    fit.fit(model, *given)
    (optimizer,) = fit.optimizers
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "seen": model.seen,
        "metric": (model.mean.update_count, model.mean.mean_value.clone(), model.mean.weight.clone()),
        "python data": (model.batches, [x.item() for x in model.outputs], model.total.item()),
        "optimizer": [
            {key: value.clone() for key, value in state.items()} for state in optimizer.state_dict()["state"].values()
        ],
        "groups": optimizer.state_dict()["param_groups"],
        "events": trace.events,
        "random": (torch.get_rng_state(), random.getstate()),
        "rows": (folder / "lightning_logs" / "version_0" / "metrics.csv").read_text(),
        "counters": (fit.global_step, fit.current_epoch, fit.batches_that_stepped),
        "callbacks": [type(each) for each in fit.callbacks if not isinstance(each, LearningRateFinder)],
    }


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, other, f"{where}/{index}")
    else:
        assert ours == theirs, where


@pytest.mark.proves("11.17", "13.1", "13.3")
@pytest.mark.parametrize(
    ("how", "without"),
    [
        ("in a call", "no search"),
        ("in a call, loaders", "no search, loaders"),
        ("as a callback", "no search"),
        ("at an epoch", "no search"),
    ],
)
def test_a_training_after_the_search_has_the_bits_of_one_without_it(how: str, without: str, tmp_path: Path) -> None:
    assert_same(left_behind(how, tmp_path), left_behind(without, tmp_path))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("how", ["in a call", "at an epoch"])
def test_on_a_gpu_too_a_training_after_the_search_has_the_bits_of_one_without_it(how: str, tmp_path: Path) -> None:
    assert_same(left_behind(how, tmp_path, "cuda"), left_behind("no search", tmp_path, "cuda"))


@pytest.mark.proves("13.1")
def test_module_and_trainer_are_as_before_after_a_search_in_a_call_of_its_own() -> None:
    model, fit = Model(), trainer(callbacks=[Trace()])
    model.net[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [each.training for each in model.modules()]
    callbacks, draws = list(fit.callbacks), torch.get_rng_state()

    with pytest.warns(UserWarning, match="in evaluation mode"):
        Tuner(fit).lr_find(model, num_training=20, update_attr=False)

    assert_same(dict(model.state_dict()), before)
    assert [each.training for each in model.modules()] == flags
    assert (model.batches, model.outputs, model.total.item(), model.seen.item()) == (0, [], 0.0, 0.0)
    assert not hasattr(model, "made_on_the_way")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert fit.callbacks == callbacks
    assert (fit.global_step, fit.current_epoch, fit.should_stop, fit.max_epochs) == (0, 0, False, 3)
    assert fit.state.finished
    assert torch.equal(torch.get_rng_state(), draws)


@pytest.mark.proves("13.1")
def test_nothing_is_left_of_a_search_that_fails() -> None:
    class Breaks(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.batches == 5:
                raise KeyError("of the user")
            return super().training_step(batch, batch_idx)

    model, fit = Breaks(), trainer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError, match="of the user"):
        Tuner(fit).lr_find(model)

    assert_same(dict(model.state_dict()), before)
    assert (model.batches, model.lr, fit.callbacks) == (0, 0.05, [])


@pytest.mark.proves("13.1")
@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_the_learning_rate_rises_from_the_first_to_the_last_and_is_the_one_trained_with(mode: str) -> None:
    used: list[float] = []

    class Watched(Model):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            used.append(optimizer.param_groups[0]["lr"])

    found = Tuner(trainer()).lr_find(
        Watched(), min_lr=1e-4, max_lr=0.1, num_training=20, mode=mode, early_stop_threshold=None
    )

    assert found is not None
    share = [0.0, *((k + 1) / 20 for k in range(1, 20))]
    expected = [1e-4 + s * (0.1 - 1e-4) if mode == "linear" else 1e-4 * (0.1 / 1e-4) ** s for s in share]
    assert found.results["lr"] == pytest.approx(expected)
    assert used == found.results["lr"]
    assert found.results["lr"][-1] == pytest.approx(0.1)


@pytest.mark.proves("13.1")
def test_the_loss_is_a_moving_average_with_weight_098_for_the_past() -> None:
    losses: list[float] = []

    class Watched(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    found = Tuner(trainer()).lr_find(Watched(), num_training=12, early_stop_threshold=None, update_attr=False)

    average, expected = 0.0, []
    for k, loss in enumerate(losses, start=1):
        average = 0.98 * average + 0.02 * loss
        expected.append(average / (1 - 0.98 ** (k + 1)))
    assert found is not None
    assert found.results["loss"] == pytest.approx(expected)


@pytest.mark.proves("13.1")
def test_one_point_for_each_optimizer_step_where_gradients_are_accumulated() -> None:
    found = Tuner(trainer(accumulate_grad_batches=3)).lr_find(
        Model(), num_training=10, early_stop_threshold=None, update_attr=False
    )

    assert found is not None
    assert len(found.results["lr"]) == len(found.results["loss"]) == 10


class Scripted(Model):
    """Its loss follows a script, whatever the weights are."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.script = script

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        value = self.script(self.batches)
        self.batches += 1
        return None if value is None else self.net(batch[0]).sum() * 0 + value


@pytest.mark.proves("13.1")
@pytest.mark.parametrize(
    ("script", "threshold", "points"),
    [
        (lambda k: 1.0 if k < 10 else 1000.0, 4.0, 11),
        (lambda k: 1.0 if k < 10 else 1000.0, None, 30),
        (lambda k: -1.0 - k, 4.0, 30),  # falling below zero is no divergence
        (lambda k: -1.0 if k < 10 else 1000.0, 4.0, 11),
    ],
)
def test_the_search_ends_when_the_loss_is_so_many_times_the_best_one(
    script: Any, threshold: float | None, points: int
) -> None:
    found = Tuner(trainer()).lr_find(
        Scripted(script), num_training=30, early_stop_threshold=threshold, update_attr=False
    )

    assert found is not None
    assert len(found.results["loss"]) == points


@pytest.mark.proves("13.1")
def test_batches_without_a_loss_are_points_that_do_not_count() -> None:
    found = Tuner(trainer()).lr_find(
        Scripted(lambda k: None if k % 2 else 1.0), num_training=30, update_attr=False, early_stop_threshold=None
    )

    assert found is not None
    assert [math.isnan(loss) for loss in found.results["loss"]] == [bool(k % 2) for k in range(30)]
    assert found.suggestion() is not None


def curve(losses: list[float]) -> _LRFinder:
    finder = _LRFinder("linear", 0.1, 0.1 * len(losses), len(losses))
    finder.results = {"lr": [0.1 * (k + 1) for k in range(len(losses))], "loss": losses}
    return finder


@pytest.mark.proves("13.1")
def test_the_suggestion_is_where_the_loss_falls_fastest_by_the_learning_rate() -> None:
    finder = curve([9.0, 1.0, 5.0, 4.9, 4.8, 3.0, 1.2, 1.1, 1.0, 0.0])

    # Central differences, one-sided at the ends, of the points that count.
    assert finder.suggestion(skip_begin=2, skip_end=1) == pytest.approx(0.6)
    assert finder.suggestion(skip_begin=0, skip_end=1) == pytest.approx(0.1)
    assert finder.suggestion(skip_begin=8, skip_end=0) == pytest.approx(0.9)


@pytest.mark.proves("13.1")
def test_points_that_are_not_finite_are_passed_over() -> None:
    finder = curve([5.0, math.nan, 4.0, math.inf, 1.0, math.nan, 0.9])

    assert finder.suggestion(skip_begin=0, skip_end=0) == pytest.approx(0.3)


@pytest.mark.proves("13.1")
def test_too_few_points_suggest_nothing_and_change_nothing() -> None:
    model = Model()
    with pytest.warns(UserWarning, match="can suggest nothing: of 11 points, 0 finite ones are left"):
        found = Tuner(trainer()).lr_find(model, num_training=11)

    assert model.lr == 0.05
    assert found is not None
    with pytest.warns(UserWarning, match="1 finite ones are left"):
        assert found.suggestion(skip_begin=9) is None


@pytest.mark.proves("13.1")
def test_the_plot_shows_the_curve_and_marks_the_suggestion() -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    finder = curve([9.0, 1.0, 5.0, 4.9, 4.8, 3.0, 1.2, 1.1, 1.0, 0.0])
    finder.mode = "exponential"
    figure = finder.plot()
    assert figure is not None
    (axes,) = figure.axes
    assert list(axes.lines[0].get_xdata()) == finder.results["lr"]
    assert list(axes.lines[0].get_ydata()) == finder.results["loss"]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "Learning rate", "Loss")

    other, mine = plt.subplots()
    with pytest.warns(UserWarning, match="suggest nothing"):
        assert curve([1.0, 2.0]).plot(suggest=True, ax=mine) is other
    assert mine.get_xscale() == "linear"
    assert len(mine.lines) == 1
    falling = curve([float(20 - k) if k < 15 else 0.0 for k in range(20)])
    falling.plot(suggest=True, ax=mine)
    (marked,) = mine.lines[-1].get_xdata()
    assert marked == falling.suggestion() == pytest.approx(1.5)
    assert mine.lines[-1].get_color() == "red"
    plt.close("all")


class WithHparams(fulmen.LightningModule):
    def __init__(self, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), batch_size=8)


class Data(fulmen.LightningDataModule):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), batch_size=8)


class Plain(WithHparams):
    def __init__(self) -> None:
        fulmen.LightningModule.__init__(self)
        self.net = nn.Linear(6, 3)
        self.step_size = 0.05


@pytest.mark.proves("13.1")
def test_the_suggestion_is_written_to_module_hparams_and_datamodule() -> None:
    both = WithHparams()
    both.learning_rate = 0.05
    found = Tuner(trainer()).lr_find(both)
    assert found is not None
    assert both.learning_rate == both.hparams.learning_rate == found.suggestion() != 0.05

    model, data = Plain(), Data()
    found = Tuner(trainer()).lr_find(model, datamodule=data)
    assert found is not None
    assert data.lr == data.hparams.lr == found.suggestion() != 0.05

    found = Tuner(trainer()).lr_find(model, data, attr_name="step_size")
    assert found is not None
    assert model.step_size == found.suggestion() != 0.05

    Tuner(trainer()).lr_find(model, attr_name="step_size", update_attr=False)
    assert model.step_size == found.suggestion()


@pytest.mark.proves("11.17", "13.1", "13.3")
def test_the_fit_in_hand_trains_with_the_suggestion() -> None:
    rates: list[float] = []
    record = LambdaCallback(
        on_train_batch_start=lambda trainer, *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    )
    finder = LearningRateFinder(num_training_steps=30)
    model = Model()
    trainer(callbacks=[finder, record], max_steps=3).fit(model)

    assert finder.optimal_lr is not None
    assert rates == [finder.optimal_lr.suggestion()] * 3 == [model.lr] * 3


@pytest.mark.proves("11.17", "13.1", "13.3")
def test_a_schedule_starts_from_the_suggestion() -> None:
    class Scheduled(Model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
            halving = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return [optimizer], [{"scheduler": halving, "interval": "step"}]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            rates.append(self.lr_schedulers().get_last_lr()[0])
            return super().training_step(batch, batch_idx)

    for kind, first in ((LearningRateFinder, 0), (AtEpochOne, 8)):
        rates: list[float] = []
        finder = kind(num_training_steps=30, min_lr=1e-4)
        trainer(callbacks=[finder], max_steps=12, max_epochs=-1).fit(Scheduled())

        assert finder.optimal_lr is not None
        lr = finder.optimal_lr.suggestion()
        assert lr is not None
        trained = rates[:first] + rates[first + 30 :]
        assert trained[first:] == pytest.approx([lr * 0.5**k for k in range(12 - first)])


@pytest.mark.proves("13.1")
def test_manual_optimization_is_searched_too() -> None:
    used: list[float] = []

    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            used.append(optimizer.param_groups[0]["lr"])
            return loss

    found = Tuner(trainer()).lr_find(Manual(), num_training=20, early_stop_threshold=None)

    assert found is not None
    assert used == found.results["lr"]
    assert len(used) == 20


@pytest.mark.proves("13.1")
def test_the_gradient_scaler_is_as_before() -> None:
    class Overflows(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * float("inf")

    fit = trainer(precision="16-mixed")
    before = fit.scaler.get_scale()
    Tuner(fit).lr_find(Overflows(), num_training=5, update_attr=False)

    assert fit.scaler.get_scale() == before


@pytest.mark.proves("13.1")
def test_the_module_logs_nothing_while_learning_rates_are_tried(tmp_path: Path) -> None:
    class Draws(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.logger.experiment.add_scalar("drawn by hand", 1.0)
            return super().training_step(batch, batch_idx)

    fit = trainer(logger=fulmen.loggers.CSVLogger(str(tmp_path)), log_every_n_steps=1)
    Tuner(fit).lr_find(Draws(), num_training=10, update_attr=False)

    assert not list(tmp_path.rglob("*.csv"))
    assert not list(tmp_path.rglob("*.ckpt"))


# ---------------------------------------------------------------------- bad input


def refused(*, model: Any = None, options: dict[str, Any] | None = None, **arguments: Any) -> str:
    with pytest.raises(MisconfigurationException) as raised:
        Tuner(trainer(**(options or {}))).lr_find(Model() if model is None else model, **arguments)
    return str(raised.value)


@pytest.mark.proves("13.1")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"mode": "cosine"}, ["mode='cosine'", "'linear', 'exponential'"]),
        ({"min_lr": 0.1, "max_lr": 0.01}, ["min_lr=0.1 must be smaller than max_lr=0.01"]),
        ({"min_lr": 0.0}, ["min_lr=0.0 must be positive", "mode='linear' takes 0"]),
        ({"num_training": 0}, ["number of learning rates to try is 0", "at least 1"]),
        ({"early_stop_threshold": -1.0}, ["early_stop_threshold=-1.0 must be positive", "None never"]),
        ({"method": "test"}, ["method='test'", "method='fit'"]),
        ({"dataloaders": []}, ["dataloaders was given with method='fit'", "train_dataloaders"]),
        ({"attr_name": "rate"}, ["'rate'", "Model", "attr_name"]),
    ],
)
def test_wrong_arguments_are_named_with_what_to_do(arguments: dict[str, Any], parts: list[str]) -> None:
    message = refused(**arguments)

    for part in parts:
        assert part in message


@pytest.mark.proves("13.1")
def test_every_wrong_number_is_told_at_once() -> None:
    message = refused(mode="up", num_training=-1)

    assert "mode='up'" in message
    assert "is -1" in message


@pytest.mark.proves("13.1")
def test_a_module_without_a_learning_rate_is_refused_also_as_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'lr' or 'learning_rate'.*Plain"):
        Tuner(trainer()).lr_find(Plain())


@pytest.mark.proves("13.1")
def test_more_or_less_than_one_optimizer_is_refused() -> None:
    class Two(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(self.net[0].parameters()), torch.optim.SGD(self.net[4].parameters(), lr=0.1)]

    class NoneAtAll(Model):
        def configure_optimizers(self) -> Any:
            return None

    message = refused(model=Two())
    assert "exactly one optimizer" in message
    assert "returned 2 (Adam, SGD)" in message
    with pytest.warns(UserWarning, match="configure_optimizers"):
        assert "returned None" in refused(model=NoneAtAll())


@pytest.mark.proves("13.3")
def test_only_one_finder_at_a_time() -> None:
    message = refused(options={"callbacks": [LearningRateFinder()]})
    assert "hold a LearningRateFinder" in message
    assert "Remove one" in message

    with pytest.raises(MisconfigurationException, match="2 LearningRateFinders; keep one"):
        trainer(callbacks=[LearningRateFinder(), AtEpochOne()]).fit(Model())


@pytest.mark.proves("13.3")
def test_a_quick_run_searches_nothing_and_says_so() -> None:
    model, finder = Model(), LearningRateFinder()
    with pytest.warns(UserWarning, match="fast_dev_run is on: no learning rate is searched"):
        assert Tuner(trainer(fast_dev_run=True)).lr_find(model) is None
    with pytest.warns(UserWarning, match="fast_dev_run is on"):
        trainer(fast_dev_run=True, callbacks=[finder]).fit(model)

    assert (model.lr, finder.optimal_lr) == (0.05, None)


@pytest.mark.proves("13.3")
def test_a_search_inside_of_an_epoch_is_refused() -> None:
    class TooLate(LearningRateFinder):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            pass

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.lr_find(trainer, pl_module)

    with pytest.raises(MisconfigurationException, match="lr_find was called in epoch 0 after its batch 2"):
        trainer(callbacks=[TooLate()]).fit(Model())


@pytest.mark.proves("13.1")
def test_a_search_takes_as_many_steps_as_it_was_asked_to_whatever_the_epochs_of_the_run() -> None:
    fit, model = trainer(max_epochs=1, limit_train_batches=4), Model()
    found = Tuner(fit).lr_find(model, num_training=15)
    assert found is not None
    assert len(found.results["lr"]) == len(found.results["loss"]) == 15
    assert (fit.global_step, fit.max_epochs) == (0, 1)

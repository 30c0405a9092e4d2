"""``Trainer(loss_weighting="weights")`` in one process: hooks, precision, resume, logs, and what is refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import Callback, SpikeDetection
from fulmen.callbacks.spike import TrainingSpikeException
from fulmen.strategies import SingleDeviceStrategy
from fulmen.tuner import Tuner
from fulmen_protocols import CheckpointError, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:checkpoints are saved in", "ignore:the checkpoint folder")

PADDED = -100
Batch = tuple[Tensor, Tensor]


def batches(*lengths: int, seed: int = 0, width: int = 4) -> list[Batch]:
    """One for each length: rows, and their classes, of which the last third is padding."""
    draw = torch.Generator().manual_seed(seed)
    made: list[Batch] = []
    for length in lengths:
        targets = torch.randint(0, 3, (length,), generator=draw)
        targets[length - length // 3 :] = PADDED
        made.append((torch.randn(length, width, generator=draw), targets))
    return made


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.gradients: list[Tensor] = []

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "weight": (batch[1] != PADDED).sum()}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append(torch.cat([each.grad.flatten() for each in self.parameters() if each.grad is not None]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def trainer(**options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "loss_weighting": "weights",
    }  # fmt: skip
    return fulmen.Trainer(**{**quiet, **options})


def loader(made: Sequence[Batch]) -> DataLoader[Any]:
    return DataLoader(list(made), batch_size=None)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def fit(model: Model, made: Sequence[Batch], *, ckpt_path: Any = None, **options: Any) -> fulmen.Trainer:
    run = trainer(**options)
    run.fit(model, loader(made), ckpt_path=ckpt_path)
    return run


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def plain(made: Sequence[Batch], accumulate: int, *, clip: float | None = None) -> tuple[Model, Tensor]:
    """A window of batches at once, divided by its tokens."""
    model = Model()
    optimizer = model.configure_optimizers()
    gradients: list[Tensor] = []
    for start in range(0, len(made), accumulate):
        window = made[start : start + accumulate]
        optimizer.zero_grad()
        rows, targets = torch.cat([rows for rows, _ in window]), torch.cat([targets for _, targets in window])
        F.cross_entropy(model.net(rows), targets).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model, torch.stack(gradients)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_hooks_clipping_and_norms_see_the_gradient_of_the_mean_over_the_windows_tokens(clip: float | None) -> None:
    made = batches(3, 12, 6, 30, 9)
    model = Model()
    fit(model, made, accumulate_grad_batches=2, gradient_clip_val=clip)

    expected, gradients = plain(made, 2, clip=clip)
    torch.testing.assert_close(torch.stack(model.gradients), gradients, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights_of(model), weights_of(expected), rtol=1e-5, atol=1e-6)


def test_a_mean_stays_what_it_was_without_the_flag() -> None:
    class Mean(Model):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return {"loss": F.cross_entropy(self.net(batch[0]), batch[1]), "weight": 1_000}

    made, models = batches(3, 12, 6), (Mean(), Mean(), Mean())
    for model, asked in zip(models, (None, "mean", "weights"), strict=True):
        fit(model, made, loss_weighting=asked)
    assert torch.equal(weights_of(models[0]), weights_of(models[1]))
    assert not torch.allclose(weights_of(models[0]), weights_of(models[2])), "with it the weight counts"


@pytest.mark.parametrize("kind", ["optimizer_step", "backward", "optimizer_zero_grad", "on_before_zero_grad"])
def test_a_step_that_the_module_overrides_gets_the_same_gradients(kind: str) -> None:
    class Overrides(Model):
        calls = 0

    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.calls += 1
        optimizer.step(closure=optimizer_closure)

    def backward(self: Any, loss: Tensor) -> None:
        self.calls += 1
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def optimizer_zero_grad(self: Any, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.calls += 1
        optimizer.zero_grad()

    def on_before_zero_grad(self: Any, optimizer: Any) -> None:
        self.calls += 1

    setattr(Overrides, kind, locals()[kind])
    made, model = batches(3, 12, 6, 30, 9), Overrides()
    fit(model, made, accumulate_grad_batches=2)

    assert model.calls > 0
    torch.testing.assert_close(weights_of(model), weights_of(plain(made, 2)[0]), rtol=1e-5, atol=1e-6)


def test_lbfgs_evaluates_the_same_mean_each_time() -> None:
    class Newton(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    made, model, alone = batches(9, 12), Newton(), Model()
    fit(model, made)
    optimizer = torch.optim.LBFGS(alone.parameters(), lr=0.1, max_iter=3)
    for rows, targets in made:

        def closure(rows: Tensor = rows, targets: Tensor = targets) -> Any:
            optimizer.zero_grad()
            loss = F.cross_entropy(alone.net(rows), targets)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return loss

        optimizer.step(closure)
    # LBFGS also looks at the loss itself, which is a sum there: with max_iter it only decides when to stop.
    torch.testing.assert_close(weights_of(model), weights_of(alone), rtol=1e-4, atol=1e-5)

    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches=2 cannot work with it"):
        fit(Newton(), made, accumulate_grad_batches=2)


def test_a_batch_that_is_left_out_has_no_weight() -> None:
    class Skips(Model):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return None if batch_idx in (1, 2, 3) else super().training_step(batch, batch_idx)

    made, model = batches(3, 12, 6, 30, 9, 6), Skips()
    fit(model, made, accumulate_grad_batches=2)

    kept = [*made[:1], *made[4:]]
    assert len(model.gradients) == 2, "a window without any batch takes no step"
    alone = Model()
    optimizer = alone.configure_optimizers()
    for window in (kept[:1], kept[1:]):
        optimizer.zero_grad()
        rows, targets = torch.cat([rows for rows, _ in window]), torch.cat([targets for _, targets in window])
        F.cross_entropy(alone.net(rows), targets).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    torch.testing.assert_close(weights_of(model), weights_of(alone), rtol=1e-5, atol=1e-6)


def test_settings_that_change_inside_a_window_keep_its_weight() -> None:
    class Changes(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                trainer.gradient_clip_val = 1e6  # the loop is composed anew

    made, model = batches(3, 12, 6, 30, 9, 6), Model()
    fit(model, made, accumulate_grad_batches=3, callbacks=[Changes()])
    torch.testing.assert_close(weights_of(model), weights_of(plain(made, 3)[0]), rtol=1e-5, atol=1e-6)


def test_a_compiled_module_returns_its_weight_as_well() -> None:
    made, model = batches(3, 12, 6, 30, 9), Model()
    run = trainer(accumulate_grad_batches=2)
    run.fit(torch.compile(model, backend="eager"), loader(made))  # type: ignore[arg-type]  # a compiled module is one
    torch.testing.assert_close(weights_of(model), weights_of(plain(made, 2)[0]), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- precision


class Wide(Model):
    """Batches of thousands of tokens: the gradient of a sum times the scaler's first factor overflows in float16."""

    def __init__(self, overflows_at: int | None = None) -> None:
        super().__init__()
        self.overflows_at = overflows_at
        self.factors: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        if batch_idx == self.overflows_at:
            output["loss"] = output["loss"] * float("inf")
        return output

    def on_train_batch_end(self, *_: Any) -> None:
        self.factors.append(self.trainer.scaler.get_scale())


def test_float16_starts_without_skipping_a_step_although_the_losses_are_sums() -> None:
    made, model = batches(3_000, 9_000, 6_000, 3_000), Wide()
    fit(model, made, accumulate_grad_batches=2, precision="16-mixed")

    assert model.factors == [65_536.0] * 4
    torch.testing.assert_close(weights_of(model), weights_of(plain(made, 2)[0]), rtol=0.02, atol=2e-3)

    summed, scaler = Model(), torch.amp.GradScaler("cpu")
    optimizer = summed.configure_optimizers()
    with torch.autocast("cpu", torch.float16):
        loss = summed.loss(made[1])
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 65_536.0, "the sum itself does overflow"


def test_a_window_that_overflows_is_skipped_with_its_weight() -> None:
    made = batches(30, 90, 60, 30, 120, 60)
    model, alone = Wide(overflows_at=2), Wide()
    fit(model, made, accumulate_grad_batches=2, precision="16-mixed")
    fit(alone, [*made[:2], *made[4:]], accumulate_grad_batches=2, precision="16-mixed")

    assert model.factors[-1] == 32_768.0
    torch.testing.assert_close(weights_of(model), weights_of(alone), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 0.02), ("bf16-true", 0.05), ("64-true", 1e-12)])
def test_other_precisions_train_on_the_same_mean(precision: str, tolerance: float) -> None:
    made, model = batches(300, 12, 60), Model()
    fit(model, made, accumulate_grad_batches=3, precision=precision)
    alone = Model().double()
    rows, targets = torch.cat([rows for rows, _ in made]).double(), torch.cat([targets for _, targets in made])
    F.cross_entropy(alone.net(rows), targets).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    expected = torch.cat([each.grad.flatten() for each in alone.parameters() if each.grad is not None])
    if precision == "64-true":
        made = [(rows.double(), targets) for rows, targets in made]
        model = Model()
        fit(model, made, accumulate_grad_batches=3, precision=precision)
    distance = (model.gradients[0].double() - expected).norm() / expected.norm()
    assert distance < tolerance


# ---------------------------------------------------------------------- checkpoints


class Each(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_save_in_every_place_of_a_window_resumes_bit_for_bit(precision: str, tmp_path: Path) -> None:
    made = batches(30, 3, 600, 90, 6, 9, 30)
    options = {"accumulate_grad_batches": 3, "precision": precision}
    whole = Model()
    fit(whole, made, callbacks=[Each(tmp_path)], **options)
    for batch in range(6):
        model = Model()
        fit(model, made, ckpt_path=tmp_path / f"{batch}.ckpt", **options)
        assert torch.equal(weights_of(model), weights_of(whole)), batch


def test_a_window_saved_with_weights_is_not_finished_without_them(tmp_path: Path) -> None:
    made = batches(3, 6, 9, 12)
    for saved, now in (("weights", "mean"), ("mean", "weights")):
        folder = tmp_path / saved
        fit(Model(), made, callbacks=[Each(folder)], accumulate_grad_batches=3, loss_weighting=saved)
        message = (
            f"saved inside an accumulation window with loss_weighting='{saved}', and this Trainer has "
            f"loss_weighting='{now}'.* Resume with loss_weighting='{saved}', or from a checkpoint"
        )
        with pytest.raises(CheckpointError, match=message):
            fit(Model(), made, ckpt_path=folder / "1.ckpt", accumulate_grad_batches=3, loss_weighting=now)
        fit(Model(), made, ckpt_path=folder / "2.ckpt", accumulate_grad_batches=3, loss_weighting=now)


# ---------------------------------------------------------------------- what others see of the loss


def test_the_guides_recipe_logs_the_mean_over_the_epochs_tokens() -> None:
    class Logs(Model):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            loss, tokens = output["loss"].detach(), output["weight"]
            self.log("batch_loss", loss / tokens.clamp(min=1), prog_bar=True)
            self.log_dict({"sum": loss, "tokens": tokens.float()}, on_step=False, on_epoch=True, reduce_fx="sum")
            return output

        def on_train_epoch_end(self) -> None:
            found = self.trainer.callback_metrics
            self.log("train_loss", found["sum"] / found["tokens"])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    made, model = [*batches(3, 12, 30), (torch.randn(2, 4), torch.full((2,), PADDED))], Logs()
    run = fit(model, made)

    rows, targets = torch.cat([rows for rows, _ in made]), torch.cat([targets for _, targets in made])
    expected = F.cross_entropy(model.net(rows), targets)
    torch.testing.assert_close(run.callback_metrics["train_loss"], expected.detach())
    assert run.callback_metrics["batch_loss"] == 0.0, "of the last batch, which is padding"


def test_a_spike_is_one_of_the_mean_and_not_of_a_long_batch(tmp_path: Path) -> None:
    class Jumps(Model):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            return {**output, "loss": output["loss"] * (1 if batch_idx < 4 else 100)}

    made = batches(3, 3, 3, 300, 3)
    with pytest.raises(TrainingSpikeException, match="in batch 4"):
        fit(Jumps(), made, callbacks=[SpikeDetection(rtol=1.0)], default_root_dir=tmp_path)


def test_the_learning_rate_finder_compares_means() -> None:
    class Numbers(Model):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.1

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            return {"loss": output["loss"], "weight": int(output["weight"])}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    run = trainer(max_epochs=3)
    found = Tuner(run).lr_find(Numbers(), loader(batches(*[300, 600] * 20)), num_training=30, update_attr=False)
    assert found is not None
    assert all(0 < loss < 10 for loss in found.results["loss"]), "and not the sums of hundreds"


def test_explain_says_where_gradients_are_divided() -> None:
    row = "gradients are divided by the window's weights, over all ranks"
    assert row in trainer().explain(Model())
    assert row not in trainer(loss_weighting=None).explain(Model())


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (lambda loss: loss, "a Tensor"),
        (lambda loss: {"loss": loss}, "a mapping with the keys ['loss']"),
        (lambda loss: {"loss": loss, "weights": 3}, "a mapping with the keys ['loss', 'weights']"),
        (lambda loss: {"weight": 3}, "a mapping with the keys ['weight']"),
        (lambda loss: {"loss": loss, "weight": "3"}, "'weight' of type str"),
        (lambda loss: {"loss": 3.0, "weight": 3}, "'loss' of type float"),
    ],
)
def test_a_missing_weight_is_one_error_that_shows_what_to_return(returned: Any, found: str) -> None:
    class Wrong(Model):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return returned(self.loss(batch))

    with pytest.raises(MisconfigurationException, match=re.escape(f"training_step returned {found}.")) as raised:
        fit(Wrong(), batches(3))
    message = str(raised.value)
    assert "loss_weighting='weights' takes each loss as a sum, with 'weight' beside it" in message
    assert "    loss = F.cross_entropy(logits, targets, reduction='sum')\n" in message
    assert "    return {'loss': loss, 'weight': (targets != -100).sum()}\n" in message
    assert "leave loss_weighting out, and return a mean" in message


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.ones(3), r"has shape \(3,\); it must be one number, of shape \(\). Sum it: weight.sum\(\)"),
        (-1, "the weight of a loss is -1; it must be finite and at least 0"),
        (float("nan"), "the weight of a loss is nan; it must be finite"),
        (True, "the weight of a loss is True; give the number of things summed"),
    ],
)
def test_a_weight_that_is_no_number_of_things_is_refused(weight: Any, says: str) -> None:
    class Wrong(Model):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return {"loss": self.loss(batch), "weight": weight}

    with pytest.raises((ValueError, TypeError), match=says):
        fit(Wrong(), batches(3))


def test_an_unknown_weighting_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(MisconfigurationException, match=r"loss_weighting='sum' must be 'mean' .* or 'weights'"):
        trainer(loss_weighting="sum")


def test_manual_optimization_is_refused_with_what_to_use() -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    message = "loss_weighting='weights' cannot work with automatic_optimization=False.*use fulmen_fabric.LossWeights"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Manual(), batches(3))


def test_manual_optimization_gets_the_same_gradients_with_what_the_error_names() -> None:
    from fulmen_fabric import LossWeights

    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def on_train_start(self) -> None:
            self.weights = LossWeights(self.trainer.world.collectives)

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            is_last = batch_idx % 2 == 1
            self.manual_backward(self.weights.add(self.loss(batch), (batch[1] != PADDED).sum(), is_last=is_last))
            if is_last:
                self.weights.scale_gradients(optimizer)
                optimizer.step()
                optimizer.zero_grad()

    made, model = batches(3, 12, 6, 30), Manual()
    fit(model, made, loss_weighting=None)
    torch.testing.assert_close(weights_of(model), weights_of(plain(made, 2)[0]), rtol=1e-5, atol=1e-6)


def test_a_strategy_whose_engine_takes_the_step_is_refused_when_the_trainer_is_made() -> None:
    class Engine(SingleDeviceStrategy):
        def optimizer_step(self, optimizer: Any, module: Any, closure: Any = None) -> object:
            return optimizer.step(closure)

    with pytest.raises(MisconfigurationException, match=r"loss_weighting='weights' cannot work with strategy=.*engine"):
        trainer(strategy=Engine())

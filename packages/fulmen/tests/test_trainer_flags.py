"""The Trainer's flags do what they say, seen from what the module and its loaders experience."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen

pytestmark = pytest.mark.filterwarnings("ignore:.*validation is left out")


class Counting(fulmen.LightningModule):
    """Notes what it is given and in which mode it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.frozen = nn.Dropout(0.5)
        self.train_batches: list[list[float]] = []
        self.val_batches: list[list[float]] = []
        self.grad_modes: list[tuple[bool, bool]] = []
        self.modes: list[tuple[str, bool, bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.train_batches.append(batch.flatten().tolist())
        self.modes.append(("train", self.layer.training, self.frozen.training))
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_batches.append(batch.flatten().tolist())
        self.grad_modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        self.modes.append(("val", self.layer.training, self.frozen.training))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.grad_modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def numbers(samples: int, **options: Any) -> DataLoader[Any]:
    values = torch.arange(samples, dtype=torch.float32).repeat_interleave(2).reshape(samples, 2)
    return DataLoader(values, batch_size=2, **options)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def trainer(**options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return fulmen.Trainer(**{**quiet, **options})


@pytest.mark.proves("9.7")
@pytest.mark.parametrize(
    ("limit", "batches"), [(1, 1), (1.0, 5), (0.5, 2), (3, 3), (99, 5)], ids=["one", "all", "half", "three", "more"]
)
def test_an_int_limit_counts_batches_and_a_float_is_a_fraction(limit: float, batches: int) -> None:
    model = Counting()
    run = trainer(limit_train_batches=limit, limit_val_batches=limit)
    run.fit(model, numbers(10), numbers(10))

    assert (len(model.train_batches), len(model.val_batches)) == (batches, batches)
    assert run.num_training_batches == batches
    assert run.num_val_batches == [batches]


@pytest.mark.proves("9.7")
def test_a_limit_of_zero_turns_a_loop_off() -> None:
    model = Counting()
    trainer(limit_val_batches=0).fit(model, numbers(4), numbers(4))
    assert (len(model.train_batches), len(model.val_batches)) == (2, 0)

    other = Counting()
    run = trainer(limit_train_batches=0)
    run.fit(other, numbers(4), numbers(4))
    assert (other.train_batches, run.global_step) == ([], 0)


@pytest.mark.proves("9.8")
def test_overfitting_trains_on_the_same_unshuffled_batches_and_validates_on_the_validation_loader() -> None:
    model = Counting()
    with pytest.warns(UserWarning, match="shuffling is turned off"):
        trainer(overfit_batches=2, max_epochs=2).fit(model, numbers(10, shuffle=True), numbers(10))

    assert model.train_batches == [[0, 0, 1, 1], [2, 2, 3, 3]] * 2
    assert model.val_batches == [[0, 0, 1, 1], [2, 2, 3, 3]] * 2


@pytest.mark.proves("9.11")
@pytest.mark.parametrize(("steps", "seen"), [(0, 0), (2, 2), (-1, 5)])
def test_the_sanity_check_tries_that_many_batches_and_draws_no_random_number(steps: int, seen: int) -> None:
    tried: list[int] = []

    class Watched(Counting):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            torch.rand(3)
            if self.trainer.sanity_checking:
                tried.append(batch_idx)

        def on_train_start(self) -> None:
            self.first_draw = torch.rand(1)

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = Watched()
    torch.manual_seed(5)
    trainer(num_sanity_val_steps=steps).fit(model, numbers(4), numbers(10))

    assert len(tried) == seen
    assert torch.equal(model.first_draw, expected)


@pytest.mark.proves("9.16")
def test_validation_inside_fit_runs_without_gradients_and_alone_in_inference_mode() -> None:
    model = Counting()
    trainer().fit(model, numbers(4), numbers(2))
    trainer().validate(model, numbers(2), verbose=False)
    trainer(inference_mode=False).test(model, numbers(2), verbose=False)

    assert model.grad_modes == [(False, False), (False, True), (False, False)]


@pytest.mark.proves("9.31")
def test_evaluation_gives_every_submodule_its_own_mode_back() -> None:
    model = Counting()
    model.frozen.eval()
    with pytest.warns(UserWarning, match="in evaluation mode at the start of training"):
        trainer(val_check_interval=1).fit(model, numbers(4), numbers(2))

    assert model.modes == [("train", True, False), ("val", False, False)] * 2


def test_loaders_are_asked_for_again_every_so_many_epochs() -> None:
    asked: list[str] = []

    class Asked(Counting):
        def train_dataloader(self) -> Any:
            asked.append("train")
            return numbers(4)

        def val_dataloader(self) -> Any:
            asked.append("val")
            return numbers(2)

    trainer(max_epochs=4, reload_dataloaders_every_n_epochs=2).fit(Asked())

    assert asked.count("train") == 2
    assert asked.count("val") == 2


@pytest.mark.proves("9.18")
def test_barebones_logs_nothing_and_says_so_once() -> None:
    class Logging(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    run = fulmen.Trainer(accelerator="cpu", max_epochs=1, barebones=True)
    with pytest.warns(UserWarning, match="barebones=True") as caught:
        run.fit(Logging(), numbers(6))

    assert len([w for w in caught if "barebones" in str(w.message)]) == 1
    assert (run.callback_metrics, run.loggers, run.callbacks) == ({}, [], [])


def test_predict_returns_every_batch_in_order_one_list_per_loader_where_there_are_several() -> None:
    model = Counting()
    one = trainer().predict(model, numbers(6))

    class Several(Counting):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return dataloader_idx

    several = trainer().predict(Several(), [numbers(4), numbers(2)])

    assert one is not None
    assert torch.equal(torch.cat(one), model.layer(torch.cat(list(numbers(6)))))
    assert several == [[0, 0], [1]]
    assert trainer().predict(model, numbers(6), return_predictions=False) is None


def test_predict_leaves_no_sample_out_where_the_loader_drops_its_last_batch() -> None:
    outputs = trainer().predict(Counting(), numbers(5, drop_last=True))

    assert outputs is not None
    assert [len(batch) for batch in outputs] == [2, 2, 1]


@pytest.mark.proves("9.22")
def test_a_later_call_without_a_model_takes_the_last_one() -> None:
    model = Counting()
    run = trainer()
    run.fit(model, numbers(4))
    run.test(dataloaders=numbers(2), verbose=False)

    assert model.grad_modes == [(False, True)]


@pytest.mark.proves("9.43")
def test_the_state_says_what_is_running_and_how_it_ended() -> None:
    seen: list[tuple[str, str, str]] = []

    class Watched(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            state = self.trainer.state
            seen.append((str(state.fn), str(state.stage), str(state.status)))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append((str(self.trainer.state.fn), str(self.trainer.state.stage), str(self.trainer.state.status)))

    run = trainer()
    run.fit(Watched(), numbers(2), numbers(2))

    assert seen == [("fit", "train", "running"), ("fit", "validate", "running")]
    assert (run.state.status, run.state.stage, run.interrupted) == ("finished", None, False)


@pytest.mark.proves("9.49", "9.50")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_reaches_callbacks_and_datamodule_and_then_the_caller_unchanged(error: type[BaseException]) -> None:
    heard: list[str] = []

    class Failing(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise error("here")

    class Listening(fulmen.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            heard.append(f"callback {exception}")

    class Data(fulmen.LightningDataModule):
        def train_dataloader(self) -> Any:
            return numbers(2)

        def on_exception(self, exception: BaseException) -> None:
            heard.append(f"datamodule {exception}")

    run = trainer(callbacks=[Listening()])
    with pytest.raises(error, match="here"):
        run.fit(Failing(), datamodule=Data())

    assert heard == ["callback here", "datamodule here"]
    assert run.interrupted


def test_the_number_of_steps_of_a_run_can_be_asked_in_configure_optimizers() -> None:
    class Planned(Counting):
        def configure_optimizers(self) -> Any:
            self.total = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    model = Planned()
    run = trainer(max_epochs=3, accumulate_grad_batches=2)
    run.fit(model, numbers(10))

    assert model.total == 3 * math.ceil(5 / 2) == run.global_step


@pytest.mark.proves("3.8")
def test_a_step_that_the_scaler_skips_counts_and_steps_the_schedule() -> None:
    class Overflowing(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch).float().sum()
            return loss * float("inf") if batch_idx == 0 else loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            self.before = self.layer.weight.detach().clone()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]

    model = Overflowing()
    run = trainer(precision="16-mixed", limit_train_batches=1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):  # torch's: the scaler skipped the first optimizer step
        run.fit(model, numbers(4))

    assert torch.equal(model.layer.weight, model.before), "the step must have been skipped"
    assert run.global_step == 1
    assert run.optimizers[0].param_groups[0]["lr"] == 0.5

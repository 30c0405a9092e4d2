"""The batch-size finder, with modules that run out of memory above a known size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fulmen
from fulmen.callbacks import BasePredictionWriter, BatchSizeFinder
from fulmen.tuner import Tuner
from fulmen.tuner.batch_size_scaling import largest
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Iterator

MESSAGES = [
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    torch.OutOfMemoryError("Allocation on device"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


class Model(fulmen.LightningModule):
    """Runs out of memory when a batch has more than ``fits`` samples."""

    def __init__(self, fits: int = 37, samples: int = 512, stage: str = "train", batch_size: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fits, self.samples, self.stage, self.batch_size = fits, samples, stage, batch_size
        self.error: Exception = MESSAGES[0]
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
        self.sizes: list[int] = []

    def needs_memory(self, batch: Any, stage: str) -> None:
        SEEN.append((stage, len(batch[0])))
        if stage == self.stage and len(batch[0]) > self.fits:
            raise self.error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.needs_memory(batch, "train")
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.needs_memory(batch, "val")
        self.log("seen", float(len(batch[0])), reduce_fx="sum")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.needs_memory(batch, "test")
        self.log("seen", float(len(batch[0])), reduce_fx="sum")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.needs_memory(batch, "predict")
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def loader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(
            torch.randn(self.samples, 6, generator=generator), torch.randint(0, 3, (self.samples,), generator=generator)
        )
        return DataLoader(data, batch_size=self.batch_size, shuffle=True)

    def train_dataloader(self) -> Any:
        return self.loader()

    def val_dataloader(self) -> Any:
        return self.loader()

    def test_dataloader(self) -> Any:
        return self.loader()

    def predict_dataloader(self) -> Any:
        return self.loader()


SEEN: list[tuple[str, int]] = []


@pytest.fixture(autouse=True)
def _nothing_seen() -> Iterator[None]:
    SEEN.clear()
    yield
    SEEN.clear()


def tried(stage: str = "train") -> list[int]:
    """The sizes of a stage's batches, without repetitions."""
    sizes = [size for where, size in SEEN if where == stage]
    return [size for index, size in enumerate(sizes) if index == 0 or size != sizes[index - 1]]


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


# ---------------------------------------------------------------------- the search


@pytest.mark.proves("13.2")
@given(
    fits=st.integers(1, 3000),
    start=st.integers(1, 300),
    limit=st.integers(1, 3000),
    bisect=st.booleans(),
)
@example(fits=2, start=3, limit=3, bisect=False)
def test_the_search_ends_with_a_size_that_fits_and_is_as_large_as_its_mode_can_tell(
    fits: int, start: int, limit: int, bisect: bool
) -> None:
    trials: list[int] = []

    def attempt(size: int) -> bool:
        trials.append(size)
        assert 1 <= size <= limit
        return size <= fits

    found = largest(attempt, start=start, limit=lambda: limit, max_trials=25, bisect=bisect)

    assert found in trials
    assert found <= fits
    best = min(fits, limit)
    if bisect:
        assert found == best
    else:
        assert 2 * found >= best  # equal where an odd size was halved: of 3, 1 is tried and 2 is not
    assert len(trials) <= 2 * 12 + 1


@pytest.mark.proves("13.2")
@pytest.mark.parametrize(
    ("options", "expected", "sizes"),
    [
        ({}, 32, [2, 4, 8, 16, 32, 64]),
        ({"mode": "binsearch", "margin": 0.0}, 37, [2, 4, 8, 16, 32, 64, 48, 40, 36, 38, 37]),
        ({"mode": "binsearch"}, 35, [2, 4, 8, 16, 32, 64, 48, 40, 36, 38, 37]),  # 5 % less than 37
        ({"mode": "power", "margin": 0.5}, 32, [2, 4, 8, 16, 32, 64]),
        ({"max_trials": 3}, 8, [2, 4, 8]),
        ({"max_val": 20}, 20, [2, 4, 8, 16, 20]),
        ({"init_val": 300}, 18, [300, 150, 75, 37, 18]),
    ],
)
def test_sizes_are_tried_until_memory_runs_out(options: dict[str, Any], expected: int, sizes: list[int]) -> None:
    model = Model(fits=18 if "init_val" in options else 37)
    found = Tuner(trainer()).scale_batch_size(model, steps_per_trial=1, **options)

    assert found == model.batch_size == expected
    assert tried() == sizes


@pytest.mark.proves("13.2")
@pytest.mark.parametrize("error", MESSAGES, ids=["CUDA", "type", "cuDNN", "CPU", "Python"])
def test_running_out_of_memory_is_recognised(error: Exception) -> None:
    model = Model(fits=5)
    model.error = error

    assert Tuner(trainer()).scale_batch_size(model) == 4


@pytest.mark.proves("13.2")
@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory")])
def test_any_other_error_goes_on_and_leaves_everything_as_it_was(error: Exception) -> None:
    model, fit = Model(fits=5), trainer()
    model.error = error
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(type(error), match=str(error)):
        Tuner(fit).scale_batch_size(model)

    assert (model.batch_size, fit.callbacks) == (5, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.proves("13.2")
def test_a_module_that_does_not_fit_at_all_raises_what_it_ran_into() -> None:
    model = Model(fits=0)
    with pytest.raises(RuntimeError, match="CUDA out of memory") as raised:
        Tuner(trainer()).scale_batch_size(model, init_val=4)

    assert "ran out of memory with batch_size=1" in "".join(raised.value.__notes__)
    assert model.batch_size == 5
    assert tried() == [4, 2, 1]


@pytest.mark.proves("13.2")
def test_a_trial_takes_optimizer_steps_and_then_validates() -> None:
    # Memory that only validation needs counts too: a size that trains and cannot be validated is of no use.
    model = Model(fits=10, stage="val")
    found = Tuner(trainer(accumulate_grad_batches=2)).scale_batch_size(model, steps_per_trial=3)

    assert found == 8
    assert SEEN[:9] == [("train", 2)] * 6 + [("val", 2)] * 3
    assert SEEN[-7:] == [("train", 16)] * 6 + [("val", 16)]


@pytest.mark.proves("13.2")
def test_memory_that_only_the_second_step_needs_counts() -> None:
    class SecondStep(Model):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if optimizer.state and self.batch_size > 8:
                raise RuntimeError("CUDA out of memory.")

    assert Tuner(trainer()).scale_batch_size(SecondStep()) == 8


@pytest.mark.proves("13.2")
@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_every_method_is_tried_with_its_own_loader(method: str) -> None:
    stage = {"validate": "val"}.get(method, method)
    model = Model(fits=20, stage=stage)
    model.train()
    found = Tuner(trainer()).scale_batch_size(model, method=method, steps_per_trial=2, mode="binsearch", margin=0)

    assert found == model.batch_size == 20
    assert {where for where, _ in SEEN} == {stage}
    assert SEEN[:4] == [(stage, 2)] * 2 + [(stage, 4)] * 2
    assert model.training


@pytest.mark.proves("13.2")
def test_no_size_is_tried_that_is_larger_than_the_data_set() -> None:
    assert Tuner(trainer()).scale_batch_size(Model(samples=11)) == 11
    assert Tuner(trainer()).scale_batch_size(Model(samples=3), init_val=64) == 3


@pytest.mark.proves("13.2")
def test_a_data_set_without_a_length_is_bounded_by_max_val() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            generator = torch.Generator().manual_seed(1)
            while True:
                yield torch.randn(6, generator=generator), torch.tensor(1)

    class Streams(Model):
        def loader(self) -> Any:
            return DataLoader(Stream(), batch_size=self.batch_size)

    model = Streams(fits=10_000)
    assert Tuner(trainer(limit_val_batches=2)).scale_batch_size(model, max_val=100, steps_per_trial=1) == 100


class Data(fulmen.LightningDataModule):
    def __init__(self, batch_size: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(64, 6), torch.zeros(64).long()), batch_size=self.hparams.batch_size)


class NoLoader(Model):
    train_dataloader = fulmen.LightningModule.train_dataloader
    val_dataloader = fulmen.LightningModule.val_dataloader

    def __init__(self) -> None:
        super().__init__(fits=9)
        del self.batch_size
        self.save_hyperparameters({"samples_per_batch": 4})


@pytest.mark.proves("13.2")
def test_the_size_is_written_to_module_hparams_and_datamodule() -> None:
    data, model = Data(), NoLoader()
    with pytest.warns(UserWarning, match="no validation loader"):
        assert Tuner(trainer()).scale_batch_size(model, datamodule=data) == 8
    assert data.hparams.batch_size == 8

    class Named(Model):
        def __init__(self) -> None:
            super().__init__(fits=9)
            self.save_hyperparameters({"samples_per_batch": 4})

        def loader(self) -> Any:
            self.batch_size = self.hparams.samples_per_batch
            return super().loader()

    named = Named()
    assert Tuner(trainer()).scale_batch_size(named, batch_arg_name="samples_per_batch") == 8
    assert named.hparams.samples_per_batch == 8


@pytest.mark.proves("13.2")
def test_a_training_after_the_search_has_the_bits_of_one_with_that_size_from_the_start() -> None:
    def weights(search: str) -> list[torch.Tensor]:
        fulmen.seed_everything(3)
        model = Model(batch_size=32)
        finder = [BatchSizeFinder()] if search == "callback" else []
        fit = trainer(max_epochs=2, callbacks=finder, log_every_n_steps=1)
        if search == "tuner":
            model.batch_size = 7
            Tuner(fit).scale_batch_size(model)
        SEEN.clear()
        fit.fit(model)
        if search != "callback":
            assert SEEN[:16] == [("train", 32)] * 16
        assert fit.global_step == 32
        return [value.clone() for value in model.state_dict().values()] + [torch.get_rng_state()]

    expected = weights("none")
    for search in ("tuner", "callback"):
        assert all(torch.equal(a, b) for a, b in zip(weights(search), expected, strict=True)), search


# ---------------------------------------------------------------------- the callback


@pytest.mark.proves("11.17", "13.3")
@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_the_call_in_hand_goes_on_with_the_size_found(method: str) -> None:
    stage = {"fit": "train", "validate": "val"}.get(method, method)
    finder = BatchSizeFinder(steps_per_trial=1)
    model = Model(fits=40, samples=128, stage=stage)
    results = getattr(trainer(callbacks=[finder]), method)(model)

    assert finder.optimal_batch_size == model.batch_size == 32
    real = [size for where, size in SEEN if where == stage][-4:]
    assert real == [32] * 4
    if method in ("validate", "test"):
        assert results == [{"seen": 128.0}]
    if method == "predict":
        assert [len(batch) for batch in results] == [32] * 4


@pytest.mark.proves("11.17", "13.3")
def test_a_prediction_writer_hears_of_the_batches_of_the_size_found() -> None:
    class Writer(BasePredictionWriter):
        def __init__(self) -> None:
            super().__init__("batch")
            self.indices: list[list[int]] = []

        def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, indices: Any, *_: Any) -> None:
            self.indices.append(indices)

    writer = Writer()
    trainer(callbacks=[writer, BatchSizeFinder(max_val=16)]).predict(Model(samples=48))

    assert [len(each) for each in writer.indices] == [16] * 3
    assert sorted(index for each in writer.indices for index in each) == list(range(48))


@pytest.mark.proves("11.17", "13.3")
def test_a_schedule_made_for_the_number_of_batches_is_made_again() -> None:
    totals: list[float] = []

    class Scheduled(Model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            totals.append(self.trainer.estimated_stepping_batches)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    fit = trainer(callbacks=[BatchSizeFinder(max_val=32)], max_epochs=2)
    fit.fit(Scheduled(samples=128))

    assert totals == [2 * 26, 2 * 4]
    assert fit.global_step == 8


class AtEpochOne(BatchSizeFinder):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.scale_batch_size(trainer, pl_module)


@pytest.mark.proves("11.17", "13.3")
def test_a_search_at_a_chosen_epoch_changes_the_epochs_from_there_on() -> None:
    finder = AtEpochOne(max_val=16, steps_per_trial=1)
    epochs: list[list[int]] = []

    class Watch(fulmen.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            epochs.append([])

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            epochs[-1].append(len(batch[0]))
            assert batch_idx == len(epochs[-1]) - 1

    fit = trainer(callbacks=[finder, Watch()], max_epochs=3, val_check_interval=0.5)
    fit.fit(Model(samples=64, batch_size=8))

    assert epochs == [[8] * 8, [16] * 4, [16] * 4]
    assert fit.global_step == 16
    validated = [size for where, size in SEEN if where == "val"]
    assert validated[:16] == [8] * 16  # twice in the first epoch
    assert validated[-16:] == [16] * 16  # twice in each of the others, with the new size


class OnlyTest(BatchSizeFinder):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pass


@pytest.mark.proves("11.17", "13.3")
def test_a_subclass_may_search_for_some_calls_only() -> None:
    model, finder = Model(fits=40, stage="test", samples=128), OnlyTest()
    fit = trainer(callbacks=[finder])
    fit.fit(model)
    assert {size for where, size in SEEN if where == "train"} == {5, 3}
    assert model.batch_size == 5

    fit.test(model)
    assert model.batch_size == 32


@pytest.mark.proves("11.17", "13.3")
def test_both_finders_may_work_in_one_fit() -> None:
    from fulmen.callbacks import LearningRateFinder

    model = Model()
    model.lr = 0.01  # type: ignore[assignment]  # replaced on purpose
    finders = [BatchSizeFinder(), LearningRateFinder(num_training_steps=30)]
    trainer(callbacks=finders).fit(model)

    assert model.batch_size == 32
    assert model.lr != 0.01


# ---------------------------------------------------------------------- bad input


@pytest.mark.proves("13.2")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"mode": "linear"}, ["mode='linear'", "'power', 'binsearch'"]),
        ({"steps_per_trial": 0}, ["steps_per_trial=0 must be at least 1"]),
        ({"init_val": 0}, ["init_val=0 must be at least 1"]),
        ({"max_trials": -1}, ["max_trials=-1 must be at least 1"]),
        ({"max_val": 0}, ["max_val=0 must be at least 1"]),
        ({"margin": 1.0}, ["margin=1.0", "less than 1.0"]),
        ({"method": "train"}, ["method='train'", "'fit', 'validate', 'test', 'predict'"]),
        ({"dataloaders": []}, ["dataloaders was given with method='fit'", "train_dataloaders"]),
        (
            {"train_dataloaders": [], "method": "test"},
            ["train_dataloaders was given with method='test'", "dataloaders"],
        ),
        ({"val_dataloaders": [], "method": "test"}, ["val_dataloaders was given with method='test'", "dataloaders"]),
        ({"batch_arg_name": "size"}, ["'size'", "Model", "batch_arg_name"]),
    ],
)
def test_wrong_arguments_are_named_with_what_to_do(arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(MisconfigurationException) as raised:
        Tuner(trainer()).scale_batch_size(Model(), **arguments)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.proves("13.2")
def test_loaders_that_were_passed_are_refused() -> None:
    loader = Model().loader()
    with pytest.raises(MisconfigurationException) as raised:
        Tuner(trainer()).scale_batch_size(Model(), loader)
    assert "train_dataloaders passed to fit" in str(raised.value)
    assert "Define train_dataloader in the module" in str(raised.value)

    with pytest.raises(MisconfigurationException, match=r"dataloaders passed to test.*Define test_dataloader"):
        Tuner(trainer()).scale_batch_size(Model(), dataloaders=loader, method="test")


@pytest.mark.proves("13.2")
def test_several_loaders_to_evaluate_on_are_refused() -> None:
    class Two(Model):
        def test_dataloader(self) -> Any:
            return [self.loader(), self.loader()]

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]  # with other arguments, on purpose
            raise AssertionError("nothing must start")

    with pytest.raises(MisconfigurationException, match=r"with 2 loaders in test.*one by one"):
        Tuner(trainer()).scale_batch_size(Two(), method="test")


@pytest.mark.proves("13.3")
def test_only_one_finder_at_a_time() -> None:
    with pytest.raises(MisconfigurationException, match=r"hold a BatchSizeFinder.*Remove one"):
        Tuner(trainer(callbacks=[BatchSizeFinder()])).scale_batch_size(Model())
    with pytest.raises(MisconfigurationException, match="2 BatchSizeFinders; keep one"):
        trainer(callbacks=[BatchSizeFinder(), AtEpochOne()]).fit(Model())


@pytest.mark.proves("13.3")
def test_a_quick_run_searches_nothing_and_says_so() -> None:
    model, finder = Model(), BatchSizeFinder()
    with pytest.warns(UserWarning, match="fast_dev_run is on: no batch size is searched"):
        assert Tuner(trainer(fast_dev_run=True)).scale_batch_size(model) is None
    with pytest.warns(UserWarning, match="fast_dev_run is on"):
        trainer(fast_dev_run=True, callbacks=[finder]).fit(model)

    assert (model.batch_size, finder.optimal_batch_size) == (5, None)


@pytest.mark.proves("13.2")
def test_two_different_values_are_pointed_out() -> None:
    class Twice(Model):
        def __init__(self) -> None:
            super().__init__(fits=9)
            self.save_hyperparameters({"batch_size": 4})

    model = Twice()
    with pytest.warns(UserWarning, match=r"Twice\.batch_size and its hparams hold different values"):
        Tuner(trainer()).scale_batch_size(model)
    assert model.batch_size == model.hparams.batch_size == 8


@pytest.mark.proves("13.3")
def test_a_search_inside_of_an_epoch_is_refused() -> None:
    class TooLate(OnlyTest):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.scale_batch_size(trainer, pl_module)

    with pytest.raises(MisconfigurationException, match="scale_batch_size was called in epoch 0 after its batch 1"):
        trainer(callbacks=[TooLate()]).fit(Model())


@pytest.mark.proves("13.2")
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_real_device_that_runs_out_of_memory_is_filled_as_far_as_it_goes() -> None:
    gibibyte = 2**30

    class OneGibibyteEach(Model):
        def needs_memory(self, batch: Any, stage: str) -> None:
            torch.empty(len(batch[0]) * gibibyte, dtype=torch.uint8, device=self.device)

    _, total = torch.cuda.mem_get_info()
    fit = trainer(accelerator="cuda", devices=1)
    found = Tuner(fit).scale_batch_size(OneGibibyteEach(fits=10_000), steps_per_trial=1)

    assert found is not None
    assert found * gibibyte < total < (2 * found + 8) * gibibyte  # what the process itself needs is less than 8 GiB
    exact = Tuner(fit).scale_batch_size(OneGibibyteEach(fits=10_000), steps_per_trial=1, mode="binsearch", margin=0.0)
    assert exact is not None
    assert total - 8 * gibibyte < exact * gibibyte < total
    assert torch.cuda.memory_allocated() < gibibyte

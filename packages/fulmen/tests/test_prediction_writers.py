"""Prediction writers in one process: what they are given, and the indices of samples through all kinds of samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler

import fulmen
from fulmen.callbacks import BasePredictionWriter, Callback
from fulmen_data import CombinedLoader
from fulmen_protocols import MisconfigurationException


class Model(fulmen.LightningModule):
    """Predicts each sample's value, times ten."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch * 10


class Writer(BasePredictionWriter):
    def __init__(self, write_interval: Any) -> None:
        super().__init__(write_interval)
        self.batches: list[tuple[Any, ...]] = []
        self.epochs: list[tuple[Any, Any]] = []

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, batch_idx: int,
        dataloader_idx: int,
    ) -> None:  # fmt: skip
        assert pl_module is trainer.lightning_module
        self.batches.append((prediction.tolist(), batch_indices, batch.tolist(), batch_idx, dataloader_idx))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        assert pl_module is trainer.lightning_module
        assert trainer.predicting
        self.epochs.append((as_lists(predictions), [list(loader) for loader in batch_indices]))


def as_lists(predictions: Any) -> Any:
    return predictions.tolist() if isinstance(predictions, torch.Tensor) else [as_lists(p) for p in predictions]


def trainer(*callbacks: Callback, **options: Any) -> fulmen.Trainer:
    return fulmen.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def data(count: int = 5, start: int = 100) -> Any:
    """Sample i has the value ``start + i``."""
    return torch.arange(start, start + count)


@pytest.mark.proves("11.16")
def test_a_writer_by_batch_gets_each_prediction_with_its_samples_indices() -> None:
    writer = Writer("batch")
    returned = trainer(writer).predict(Model(), DataLoader(data(), batch_size=2))

    assert writer.batches == [
        ([1000, 1010], [0, 1], [100, 101], 0, 0),
        ([1020, 1030], [2, 3], [102, 103], 1, 0),
        ([1040], [4], [104], 2, 0),
    ]
    assert writer.epochs == []
    assert as_lists(returned) == [[1000, 1010], [1020, 1030], [1040]]


@pytest.mark.proves("11.16")
@pytest.mark.parametrize("returns", [True, False])
def test_a_writer_by_epoch_gets_all_predictions_also_where_none_are_returned(returns: bool) -> None:
    writer = Writer("epoch")
    run = trainer(writer)
    returned = run.predict(Model(), DataLoader(data(), batch_size=2), return_predictions=returns)

    assert writer.epochs == [([[1000, 1010], [1020, 1030], [1040]], [[[0, 1], [2, 3], [4]]])]
    assert writer.batches == []
    assert (returned is not None) is returns
    if not returns:
        assert run.predict_loop.predictions == [], "nothing is held longer than the writer needs it"


@pytest.mark.proves("11.16")
def test_a_writer_by_batch_and_epoch_does_both_and_loaders_are_told_apart() -> None:
    writer = Writer("batch_and_epoch")
    trainer(writer).predict(Model(), [DataLoader(data(3), batch_size=2), DataLoader(data(2, start=7), batch_size=2)])

    assert [(indices, batch_idx, loader) for _, indices, _, batch_idx, loader in writer.batches] == [
        ([0, 1], 0, 0), ([2], 1, 0), ([0, 1], 0, 1),
    ]  # fmt: skip
    assert writer.epochs == [([[[1000, 1010], [1020]], [[70, 80]]], [[[0, 1], [2]], [[0, 1]]])]


@pytest.mark.proves("11.16")
@pytest.mark.parametrize(
    ("kind", "workers"),
    [("shuffle", 0), ("shuffle", 2), ("sampler", 0), ("batch_sampler", 0), ("limited", 0), ("limited", 2)],
)
def test_indices_follow_any_sampler_and_workers_that_run_ahead(kind: str, workers: int) -> None:
    values = data(9)
    loaders = {
        "shuffle": lambda: DataLoader(values, batch_size=2, shuffle=True, num_workers=workers),
        "sampler": lambda: DataLoader(
            values, batch_size=2, sampler=SubsetRandomSampler([8, 3, 5]), num_workers=workers
        ),
        "batch_sampler": lambda: DataLoader(
            values, batch_sampler=BatchSampler(RandomSampler(values), 4, drop_last=False), num_workers=workers
        ),
        "limited": lambda: DataLoader(values, batch_size=3, num_workers=workers),
    }
    writer = Writer("batch_and_epoch")
    trainer(writer, limit_predict_batches=2 if kind == "limited" else 1.0).predict(Model(), loaders[kind]())

    for _, indices, batch, _, _ in writer.batches:
        assert [100 + index for index in indices] == batch
    seen = sorted(index for _, indices, *_ in writer.batches for index in indices)
    assert seen == {"sampler": [3, 5, 8], "limited": [0, 1, 2, 3, 4, 5]}.get(kind, list(range(9)))
    assert writer.epochs[0][1] == [[indices for _, indices, *_ in writer.batches]]


@pytest.mark.proves("11.16")
def test_where_samples_have_no_index_none_is_given_and_a_warning_says_why() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(data(3))

    for loader, kind in ((DataLoader(Stream(), batch_size=2), "DataLoader"), ([data(2), data(1)], "list")):
        writer = Writer("batch_and_epoch")
        with pytest.warns(UserWarning, match=rf"no indices of the samples of loader 0 \({kind}\): it is no DataLoader"):
            trainer(writer).predict(Model(), loader)
        assert [indices for _, indices, *_ in writer.batches] == [None, None]
        assert [len(predictions) for predictions in writer.epochs[0][0]] == [2, 1]
        assert writer.epochs[0][1] == [[]]


def test_a_loader_that_cannot_be_made_again_predicts_without_indices() -> None:
    class Own(DataLoader[Any]):
        def __init__(self, rows: int, secret: str) -> None:
            super().__init__(data(rows), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset

    writer = Writer("batch")
    with pytest.warns(UserWarning, match="needs 'rows'"):
        trainer(writer).predict(Model(), Own(3, "x"))

    assert [indices for _, indices, *_ in writer.batches] == [None, None]


@pytest.mark.proves("9.32")
def test_predict_leaves_no_sample_out_where_a_loader_would_drop_its_last_batch() -> None:
    writer = Writer("batch")
    trainer(writer).predict(Model(), DataLoader(data(5), batch_size=2, drop_last=True))

    assert [indices for _, indices, *_ in writer.batches] == [[0, 1], [2, 3], [4]]


@pytest.mark.proves("9.32")
def test_predict_takes_loaders_one_after_the_other_only() -> None:
    both = {"a": DataLoader(data(3)), "b": DataLoader(data(2))}
    with pytest.raises(MisconfigurationException, match=r"CombinedLoader\(mode='max_size'\).*Use mode='sequential'"):
        trainer().predict(Model(), CombinedLoader(both, "max_size"))

    outputs = trainer().predict(Model(), CombinedLoader(both, "sequential"))
    assert as_lists(outputs) == [[[1000], [1010], [1020]], [[1000], [1010]]]


@pytest.mark.proves("9.32")
def test_the_hooks_of_a_prediction_come_in_order() -> None:
    order: list[str] = []

    class Recording(Model):
        def on_predict_model_eval(self) -> None:
            order.append("model_eval")

    for name in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end"):
        setattr(Recording, f"on_predict_{name}", lambda self, *_, name=name: order.append(name))
    trainer().predict(Recording(), DataLoader(data(2)))

    batch = ["batch_start", "batch_end"]
    assert order == ["model_eval", "start", "epoch_start", *batch, *batch, "epoch_end", "end"]


def test_every_predict_begins_with_new_indices() -> None:
    writer = Writer("epoch")
    run, model = trainer(writer), Model()
    for count in (3, 2):
        run.predict(model, DataLoader(data(count), batch_size=2))

    assert [indices for _, indices in writer.epochs] == [[[[0, 1], [2]]], [[[0, 1]]]]


def test_an_unknown_interval_and_a_missing_method_are_named() -> None:
    with pytest.raises(MisconfigurationException, match=r"write_interval='epochs'\).*Did you mean 'epoch'"):
        Writer("epochs")

    class OnlyBatches(BasePredictionWriter):
        def write_on_batch_end(self, *_: Any) -> None:
            pass

    with pytest.raises(
        MisconfigurationException, match=r"OnlyBatches\(write_interval='epoch'\) does not override write_on_epoch_end"
    ):
        trainer(OnlyBatches("epoch")).predict(Model(), DataLoader(data(2)))


@pytest.mark.parametrize("interval", ["batch", "epoch"])
def test_hooks_that_a_writer_overrides_itself_are_called_whatever_its_interval(interval: str) -> None:
    class Collecting(Writer):
        def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *batch: Any) -> None:
            seen.append(outputs.tolist())

        def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append("end")

    seen: list[Any] = []
    trainer(Collecting(interval)).predict(Model(), DataLoader(data(3), batch_size=2))

    assert seen == [[1000, 1010], [1020], "end"]

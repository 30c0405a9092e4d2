"""LightningDataModule."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from fulmen.datamodule import LightningDataModule
from fulmen_protocols import MisconfigurationException


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.proves("10.21")
def test_loaders_are_made_from_datasets() -> None:
    data = LightningDataModule.from_datasets(
        numbers(10), [numbers(4), numbers(5)], {"a": numbers(6)}, Stream(), batch_size=2, num_workers=0
    )

    train, validation, test, predict = (
        data.train_dataloader(),
        data.val_dataloader(),
        data.test_dataloader(),
        data.predict_dataloader(),
    )
    assert isinstance(train.sampler, RandomSampler)
    assert isinstance(validation[1].sampler, SequentialSampler)
    assert [len(loader) for loader in validation] == [2, 3]
    assert list(test) == ["a"]
    assert [batch.tolist() for batch in predict] == [[0, 1], [2]]
    assert sorted(int(x) for (batch,) in train for x in batch) == list(range(10))


def test_a_stream_is_not_shuffled_and_a_data_module_can_be_pickled() -> None:
    data = pickle.loads(pickle.dumps(LightningDataModule.from_datasets(Stream(), batch_size=3)))

    assert [batch.tolist() for batch in data.train_dataloader()] == [[0, 1, 2]]


def test_what_is_no_dataset_is_refused() -> None:
    data = LightningDataModule.from_datasets(3)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(MisconfigurationException, match="got a int"):
        data.train_dataloader()


def test_a_loader_that_is_not_defined_is_named() -> None:
    with pytest.raises(MisconfigurationException, match=r"val_dataloader\(\) was called but is not defined"):
        LightningDataModule().val_dataloader()


@pytest.mark.proves("10.21")
def test_keyword_arguments_go_to_the_constructor() -> None:
    class Mine(LightningDataModule):
        def __init__(self, root: str) -> None:
            super().__init__()
            self.save_hyperparameters()

    assert Mine.from_datasets(numbers(1), root="r").hparams.root == "r"


@pytest.mark.proves("10.21")
def test_it_shows_its_sizes() -> None:
    class Mine(LightningDataModule):
        def setup(self, stage: Any) -> None:
            self.data = numbers(7)

        def train_dataloader(self) -> Any:
            return DataLoader(self.data)

        def predict_dataloader(self) -> Any:
            return {"a": DataLoader(Stream()), "b": [1, 2]}

    data = Mine()
    assert str(data) == "Mine(train: not set up; prediction: unknown size, 2 samples)"
    data.setup("fit")
    assert str(data) == "Mine(train: 7 samples; prediction: unknown size, 2 samples)"
    assert str(LightningDataModule()) == "LightningDataModule(no data)"
    assert "validation: 3 samples, 4 samples" in str(LightningDataModule.from_datasets(None, [numbers(3), numbers(4)]))


@pytest.mark.proves("10.21")
def test_its_defaults_are_lightnings() -> None:
    data = LightningDataModule()

    assert (data.name, data.prepare_data_per_node, data.trainer) == (None, True, None)
    assert data.allow_zero_length_dataloader_with_multiple_devices is False
    assert data.state_dict() == {}
    for hook in (data.prepare_data, lambda: data.setup("fit"), lambda: data.teardown("fit")):
        assert hook() is None  # type: ignore[func-returns-value]  # that it is None is the claim
    batch = [torch.ones(1)]
    assert data.on_before_batch_transfer(batch, 0) is batch
    assert data.on_after_batch_transfer(batch, 0) is batch
    assert data.transfer_batch_to_device(batch, torch.device("meta"), 0)[0].is_meta


def test_pickling_leaves_the_trainer_behind() -> None:
    data = LightningDataModule()
    data.trainer = lambda: None  # type: ignore[assignment]  # a stand-in

    assert pickle.loads(pickle.dumps(data)).trainer is None

"""The smallest module that uses everything: a linear layer on random rows, with every step, loader and a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from fulmen.datamodule import LightningDataModule
from fulmen.module import LightningModule

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "BoringDataModule",
    "BoringDataModuleNoLen",
    "BoringModel",
    "DemoModel",
    "IterableBoringDataModule",
    "ManualOptimBoringModel",
    "Net",
    "RandomDataset",
    "RandomDictDataset",
    "RandomIterableDataset",
    "RandomIterableDatasetWithLen",
]

_WIDTH = 32
_ROWS = 64


class RandomDataset(Dataset[Tensor]):
    """``length`` rows of ``size`` normal numbers, drawn when it is made."""

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def __len__(self) -> int:
        return self.len


class RandomDictDataset(Dataset[dict[str, Tensor]]):
    """Like ``RandomDataset``, but a sample is a dict of two tensors, ``a`` and ``b``."""

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.data[index]
        return {"a": row, "b": row + 2}

    def __len__(self) -> int:
        return self.len


class RandomIterableDataset(IterableDataset[Tensor]):
    """A stream of ``count`` rows of ``size`` normal numbers; it does not know its length."""

    def __init__(self, size: int, count: int) -> None:
        self.size, self.count = size, count

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            yield torch.randn(self.size)


class RandomIterableDatasetWithLen(RandomIterableDataset):
    """A stream that does know its length."""

    def __len__(self) -> int:
        return self.count


class BoringModel(LightningModule):
    """A linear layer pulled towards ones; every step and every loader is there, to be overridden.

    It is made to run, not to learn: with its rate and batches of one row the weights soon grow.

    >>> model = BoringModel()
    >>> model(torch.zeros(4, 32)).shape
    torch.Size([4, 2])
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(_WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(rows, 32)`` to ``(rows, 2)``."""
        out: Tensor = self.layer(x)
        return out

    def loss(self, preds: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean squared distance to ``labels`` (None: ones), shape ``()``."""
        return F.mse_loss(preds, torch.ones_like(preds) if labels is None else labels)

    def step(self, batch: Any) -> Tensor:
        """What the three steps with a loss do."""
        return self.loss(self(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Returns a mapping, as many modules do."""
        return {"loss": self.step(batch)}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Returns the loss under ``x``."""
        return {"x": self.step(batch)}

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """Returns the loss under ``y``."""
        return {"y": self.step(batch)}

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LRScheduler]]:
        """SGD with a rate of 0.1, ten times smaller after each epoch."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, step_size=1)]

    def train_dataloader(self) -> Any:
        """64 batches of one row."""
        return DataLoader(RandomDataset(_WIDTH, _ROWS))

    def val_dataloader(self) -> Any:
        """64 batches of one row."""
        return DataLoader(RandomDataset(_WIDTH, _ROWS))

    def test_dataloader(self) -> Any:
        """64 batches of one row."""
        return DataLoader(RandomDataset(_WIDTH, _ROWS))

    def predict_dataloader(self) -> Any:
        """64 batches of one row."""
        return DataLoader(RandomDataset(_WIDTH, _ROWS))


class ManualOptimBoringModel(BoringModel):
    """The same with the optimizer stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Forward, backward and step, in the user's own order."""
        optimizer = self.optimizers()
        loss = self.step(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class BoringDataModule(LightningDataModule):
    """256 random rows, a quarter for each of fit, validation, test and prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.random_full: Dataset[Tensor] = RandomDataset(_WIDTH, _ROWS * 4)
        self.random_train: Dataset[Tensor] | None = None
        self.random_val: Dataset[Tensor] | None = None
        self.random_test: Dataset[Tensor] | None = None
        self.random_predict: Dataset[Tensor] | None = None

    def setup(self, stage: str) -> None:
        """Make the parts that ``stage`` needs."""
        if stage == "fit":
            self.random_train = self._quarter(0)
        if stage in ("fit", "validate"):
            self.random_val = self._quarter(1)
        if stage == "test":
            self.random_test = self._quarter(2)
        if stage == "predict":
            self.random_predict = self._quarter(3)

    def _quarter(self, index: int) -> Dataset[Tensor]:
        return Subset(self.random_full, range(index * _ROWS, (index + 1) * _ROWS))

    def train_dataloader(self) -> Any:
        """64 batches of one row."""
        return _loader(self.random_train)

    def val_dataloader(self) -> Any:
        """64 batches of one row."""
        return _loader(self.random_val)

    def test_dataloader(self) -> Any:
        """64 batches of one row."""
        return _loader(self.random_test)

    def predict_dataloader(self) -> Any:
        """64 batches of one row."""
        return _loader(self.random_predict)


class BoringDataModuleNoLen(BoringDataModule):
    """The same rows from streams that do not know their length."""

    def _quarter(self, index: int) -> Dataset[Tensor]:
        return RandomIterableDataset(_WIDTH, _ROWS)


class IterableBoringDataModule(LightningDataModule):
    """A list of two training loaders: one batch of an epoch holds a batch of each."""

    def __init__(self) -> None:
        super().__init__()
        self.train_datasets: list[Dataset[Tensor]] = []
        self.val_datasets: list[Dataset[Tensor]] = []
        self.test_datasets: list[Dataset[Tensor]] = []
        self.predict_datasets: list[Dataset[Tensor]] = []

    def setup(self, stage: str) -> None:
        """Make the data sets that ``stage`` needs."""
        pair = [RandomDataset(4, 16), RandomDataset(4, 16)]
        if stage == "fit":
            self.train_datasets = list(pair)
        if stage in ("fit", "validate"):
            self.val_datasets = list(pair)
        if stage == "test":
            self.test_datasets = list(pair)
        if stage == "predict":
            self.predict_datasets = list(pair)

    def train_dataloader(self) -> Iterable[Any]:
        """Two loaders of eight batches."""
        return [_pairs(dataset) for dataset in self.train_datasets]

    def val_dataloader(self) -> Any:
        """Two loaders, one after the other."""
        return [_pairs(dataset) for dataset in self.val_datasets]

    def test_dataloader(self) -> Any:
        """Two loaders, one after the other."""
        return [_pairs(dataset) for dataset in self.test_datasets]

    def predict_dataloader(self) -> Any:
        """Two loaders, one after the other."""
        return [_pairs(dataset) for dataset in self.predict_datasets]


def _loader(dataset: Dataset[Tensor] | None) -> DataLoader[Tensor]:
    if dataset is None:
        raise RuntimeError("setup() makes the data sets; let a Trainer call it, or call it with the stage's name.")
    return DataLoader(dataset)


def _pairs(dataset: Dataset[Tensor]) -> DataLoader[Tensor]:
    return DataLoader(dataset, batch_size=2)


class DemoModel(LightningModule):
    """A linear layer with two hyperparameters."""

    def __init__(self, out_dim: int = 10, learning_rate: float = 0.02) -> None:
        super().__init__()
        self.l1 = nn.Linear(_WIDTH, out_dim)
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(rows, ...)`` with 32 numbers a row to ``(rows, out_dim)``."""
        return torch.relu(self.l1(x.view(x.size(0), -1)))

    def training_step(self, batch: Any, batch_nb: int) -> Any:
        """The sum of the answers: there is nothing to learn."""
        return {"loss": self(batch).sum()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with the given rate."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Net(nn.Module):
    """A convolutional network for MNIST: ``(rows, 1, 28, 28)`` to log-probabilities ``(rows, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(64 * 12 * 12, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities of the ten digits."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout1(F.max_pool2d(x, 2)).flatten(1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)

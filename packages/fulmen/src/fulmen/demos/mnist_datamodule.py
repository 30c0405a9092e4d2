"""MNIST from its original files, without torchvision."""

from __future__ import annotations

import gzip
import hashlib
import math
import shutil
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, random_split

from fulmen.datamodule import LightningDataModule

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

__all__ = ["MNIST", "MNISTDataModule"]

_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_MEAN, _STD = 0.1307, 0.3081  # of the training pictures, in [0, 1]


class MNIST(Dataset[tuple[Tensor, int]]):
    """Pictures ``(1, 28, 28)``, float32, and their digits.

    Args:
        root: the four files lie, or will, in ``root/MNIST/raw``.
        train: the 60,000 pictures to train on, or the 10,000 held out.
        normalize: mean and standard deviation taken off values in [0, 1]; None: values stay in [0, 1].
        download: fetch files that are not there.

    Raises:
        FileNotFoundError: a file is not there, and ``download`` is False.
        ValueError: a file is not in MNIST's format.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        train: bool = True,
        normalize: tuple[float, float] | None = (_MEAN, _STD),
        download: bool = True,
    ) -> None:
        super().__init__()
        folder = Path(root) / "MNIST" / "raw"
        part = "train" if train else "t10k"
        names = [f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"]
        for name in names:
            if not (folder / name).exists():
                if not download:
                    raise FileNotFoundError(f"MNIST found no {folder / name}. Put it there, or pass download=True.")
                _fetch(name, folder)
        images, labels = (_read_idx(folder / name) for name in names)
        self.data = images.unsqueeze(1).float() / 255
        if normalize is not None:
            mean, std = normalize
            self.data = (self.data - mean) / std
        self.targets = labels.long()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Picture and digit."""
        return self.data[index], int(self.targets[index])

    def __len__(self) -> int:
        return len(self.targets)


def _fetch(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        part = Path(staging) / name
        with urllib.request.urlopen(_URL + name, timeout=60) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        found = hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest()
        if found != _MD5[name]:
            raise ValueError(f"{_URL + name} came with MD5 {found}, and {_MD5[name]} was expected. Try again.")
        part.rename(folder / name)


def _read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes: two zeros, type 8, the number of dimensions, their sizes, the data."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3] if len(content) >= 4 else 0
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:3] != b"\x00\x00\x08" or len(content) != start + math.prod(sizes):
        raise ValueError(f"{path} is no IDX file of bytes, which MNIST is made of. Remove it to fetch it anew.")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(sizes)


class MNISTDataModule(LightningDataModule):
    """MNIST split into training and validation, and the held-out pictures for tests.

    Args:
        data_dir: where the files lie, or will.
        val_split: pictures of the training part kept for validation.
        num_workers: of each loader.
        normalize: take off the mean and the standard deviation.
        seed: of the split.
        batch_size: of each loader.
        kwargs: for every ``DataLoader``.
    """

    name = "mnist"

    def __init__(
        self,
        data_dir: str | PathLike[str] = "Datasets",
        val_split: int = 5000,
        num_workers: int = 0,
        normalize: bool = False,
        seed: int = 42,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.data_dir, self.val_split, self.normalize = data_dir, val_split, normalize
        self.num_workers, self.seed, self.batch_size = num_workers, seed, batch_size
        self._loader_arguments = kwargs
        self.dataset_train: Dataset[tuple[Tensor, int]] | None = None
        self.dataset_val: Dataset[tuple[Tensor, int]] | None = None
        self.dataset_test: Dataset[tuple[Tensor, int]] | None = None

    @property
    def num_classes(self) -> int:
        """Ten digits."""
        return 10

    @property
    def default_transforms(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to a picture in [0, 1], or None."""
        return (lambda picture: (picture - _MEAN) / _STD) if self.normalize else None

    def _mnist(self, train: bool, *, download: bool = False) -> MNIST:
        return MNIST(self.data_dir, train, normalize=(_MEAN, _STD) if self.normalize else None, download=download)

    def prepare_data(self) -> None:
        """Fetch the files once."""
        for train in (True, False):
            self._mnist(train, download=True)

    def setup(self, stage: str) -> None:
        """Make the parts that ``stage`` needs; the split is the same in every process."""
        if stage in ("fit", "validate"):
            whole = self._mnist(train=True)
            if not 0 < self.val_split < len(whole):
                raise ValueError(f"val_split={self.val_split!r} must lie between 0 and {len(whole)}, the pictures.")
            sizes = [len(whole) - self.val_split, self.val_split]
            generator = torch.Generator().manual_seed(self.seed)
            self.dataset_train, self.dataset_val = random_split(whole, sizes, generator=generator)
        if stage in ("test", "predict"):
            self.dataset_test = self._mnist(train=False)

    def _loader(self, dataset: Dataset[tuple[Tensor, int]] | None, *, shuffle: bool = False) -> DataLoader[Any]:
        if dataset is None:
            raise RuntimeError("setup() makes the data sets; let a Trainer call it, or call it with the stage's name.")
        arguments: dict[str, Any] = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        return DataLoader(dataset, shuffle=shuffle, **{**arguments, **self._loader_arguments})

    def train_dataloader(self) -> Any:
        """Shuffled."""
        return self._loader(self.dataset_train, shuffle=True)

    def val_dataloader(self) -> Any:
        """In order."""
        return self._loader(self.dataset_val)

    def test_dataloader(self) -> Any:
        """The held-out pictures, in order."""
        return self._loader(self.dataset_test)

    def predict_dataloader(self) -> Any:
        """The held-out pictures, in order."""
        return self._loader(self.dataset_test)

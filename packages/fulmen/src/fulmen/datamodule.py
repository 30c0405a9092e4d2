"""LightningDataModule: data with its preparation, its splits and its loaders, apart from any model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fulmen._loading import class_only, load_datamodule
from fulmen._module_hooks import DataHooks
from fulmen.hparams import HyperparametersMixin
from fulmen_protocols import MisconfigurationTypeError

if TYPE_CHECKING:
    from os import PathLike

    from fulmen.trainer import Trainer

__all__ = ["LightningDataModule"]


class LightningDataModule(DataHooks, HyperparametersMixin):
    """Prepares data once, sets it up on every rank and gives the loaders of each stage.

    Define ``train_dataloader`` and its siblings, and give it to ``Trainer.fit(model, datamodule=...)``.
    """

    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str] = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME: ClassVar[str] = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE: ClassVar[str] = "datamodule_hparams_type"
    """Where Lightning's checkpoints have its hyperparameters."""

    name: str | None = None
    """Name of the data, for logs."""
    allow_zero_length_dataloader_with_multiple_devices: bool = False
    """Whether a rank may have an empty loader while others have data."""
    trainer: Trainer | None = None
    """The Trainer it was given to, or None."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, as plain data and tensors. An empty dict is not stored."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""

    def on_exception(self, exception: BaseException) -> None:
        """Called when the run ends by any exception."""

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Dataset[Any] | Iterable[Dataset[Any]] | None = None,
        val_dataset: Dataset[Any] | Iterable[Dataset[Any]] | None = None,
        test_dataset: Dataset[Any] | Iterable[Dataset[Any]] | None = None,
        predict_dataset: Dataset[Any] | Iterable[Dataset[Any]] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> Self:
        """A data module over data sets; several of a kind give several loaders, a mapping gives named ones.

        Args:
            train_dataset: shuffled, unless iterable.
            val_dataset: in order.
            test_dataset: in order.
            predict_dataset: in order.
            batch_size: samples per batch.
            num_workers: worker processes per loader.
            datamodule_kwargs: for the class's ``__init__``.
        """
        datamodule = cls(**datamodule_kwargs)
        for hook, data in (
            ("train_dataloader", train_dataset),
            ("val_dataloader", val_dataset),
            ("test_dataloader", test_dataset),
            ("predict_dataloader", predict_dataset),
        ):
            if data is not None:
                loaders = _Loaders(data, batch_size, num_workers, shuffle=hook == "train_dataloader")
                setattr(datamodule, hook, loaders)
        return datamodule

    @class_only
    def load_from_checkpoint(
        cls,  # noqa: N805  class_only is a classmethod
        checkpoint_path: str | PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | PathLike[str] | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build a data module with the hyperparameters and the state that a checkpoint holds.

        Args:
            checkpoint_path: path, URL, or an open binary file, which is read from where it stands.
            map_location: device for the tensors in it (None: CPU).
            hparams_file: YAML or CSV file with hyperparameters to use in place of the stored ones.
            weights_only: False runs code from the file; None means True.
            kwargs: arguments of ``__init__`` that override stored hyperparameters.
        """
        return load_datamodule(cls, checkpoint_path, map_location, hparams_file, weights_only, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "trainer"}

    def __str__(self) -> str:
        lines: list[str] = []
        for label, hook in (("train", "train"), ("validation", "val"), ("test", "test"), ("prediction", "predict")):
            defined = getattr(self, f"{hook}_dataloader")
            if getattr(defined, "__func__", None) is getattr(DataHooks, f"{hook}_dataloader"):
                continue
            lines.append(f"{label}: {_sizes(defined)}")
        return f"{type(self).__name__}({'; '.join(lines) or 'no data'})"


class _Loaders:
    """A dataloader hook over given data sets; a class, so that the data module can be pickled."""

    def __init__(self, data: Any, batch_size: int, num_workers: int, *, shuffle: bool) -> None:
        self.data, self.batch_size, self.num_workers, self.shuffle = data, batch_size, num_workers, shuffle

    def __call__(self) -> Any:
        if isinstance(self.data, Mapping):
            named = cast("Mapping[object, Any]", self.data)
            return {name: self._loader(dataset) for name, dataset in named.items()}
        if isinstance(self.data, Sequence) and not isinstance(self.data, Dataset):
            several = cast("Sequence[object]", self.data)
            return [self._loader(dataset) for dataset in several]
        return self._loader(self.data)

    def _loader(self, dataset: Any) -> DataLoader[Any]:
        if not hasattr(dataset, "__getitem__") and not hasattr(dataset, "__iter__"):
            raise MisconfigurationTypeError(
                f"from_datasets got a {type(dataset).__name__}; a data set has __getitem__ or can be iterated."
            )
        in_any_order = self.shuffle and not isinstance(cast("object", dataset), IterableDataset)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=in_any_order,
            num_workers=self.num_workers,
            pin_memory=torch.accelerator.is_available(),  # without an accelerator torch only warns
        )


def _sizes(hook: Any) -> str:
    try:
        loaders = hook.data if isinstance(hook, _Loaders) else hook()
    except Exception:  # noqa: BLE001  describing an object that is not set up yet must not fail
        return "not set up"
    several: list[Any] = []
    if isinstance(loaders, Mapping):
        several = list(cast("Mapping[str, Any]", loaders).values())
    elif isinstance(loaders, (list, tuple)):
        several = list(cast("Sequence[object]", loaders))
    else:
        several = [loaders]
    return ", ".join(_size(loader) for loader in several)


def _size(loader: Any) -> str:
    data = getattr(loader, "dataset", loader)
    return f"{len(data)} samples" if isinstance(data, Sized) else "unknown size"

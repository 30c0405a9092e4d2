"""Building a module or a data module from a checkpoint."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fulmen import _instantiator
from fulmen._storable import names_left_out
from fulmen.hparams import load_hparams_from_csv, load_hparams_from_yaml, restored
from fulmen_fabric.compiled import as_named_here
from fulmen_protocols import CHECKPOINT_IOS, MisconfigurationException, MisconfigurationTypeError, load

if TYPE_CHECKING:
    from os import PathLike

    from fulmen.datamodule import LightningDataModule
    from fulmen.module import LightningModule

__all__ = ["class_only", "load_datamodule", "load_module"]

M = TypeVar("M", bound="LightningModule")
D = TypeVar("D", bound="LightningDataModule")


if TYPE_CHECKING:
    from builtins import classmethod as class_only
else:

    class class_only(classmethod):  # noqa: N801  a decorator
        """A class method that an instance refuses: the result would be another object, easily dropped by mistake."""

        def __get__(self, instance: object, owner: type | None = None) -> Callable[..., Any]:
            """The method bound to the class; bound to an instance, a function that raises."""
            bound = super().__get__(instance, owner)
            if instance is None:
                return bound
            name, cls = self.__wrapped__.__name__, type(instance).__name__

            def refused(*args: object, **kwargs: object) -> None:
                raise TypeError(
                    f"{name} was called on an instance, which it does not change. "
                    f"Call {cls}.{name}(...) and use what it returns."
                )

            return refused


def load_module(
    cls: type[M],
    path: str | PathLike[str] | IO[bytes],
    map_location: object,
    hparams_file: str | PathLike[str] | None,
    strict: bool | None,
    weights_only: bool | None,
    overrides: Mapping[str, Any],
) -> M:
    """See ``LightningModule.load_from_checkpoint``."""
    checkpoint = _read(path, map_location, weights_only)
    if hparams_file is not None:
        checkpoint["hyper_parameters"] = _read_hparams(hparams_file)
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        raise MisconfigurationException(
            f"{str(path)!r} holds no model: its keys are {sorted(checkpoint)!r} and 'state_dict' is not among them."
        )
    module: M = _construct(cls, checkpoint, "", overrides, path, weights_only)
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    state = cast("Mapping[str, Any]", checkpoint["state_dict"])  # the hook may have replaced it
    result = cast("Any", module.load_state_dict(as_named_here(state, module), strict=_strictness(module, strict)))
    for what, keys in (("lacks", result.missing_keys), ("has no place for", result.unexpected_keys)):
        if keys:
            subject = "the checkpoint" if what == "lacks" else cls.__name__
            warnings.warn(f"{str(path)!r}: {subject} {what} {sorted(keys)!r}.", stacklevel=3)
    device = next((value.device for value in state.values() if isinstance(value, Tensor)), torch.device("cpu"))
    return module.to(device)


def load_datamodule(
    cls: type[D],
    path: str | PathLike[str] | IO[bytes],
    map_location: object,
    hparams_file: str | PathLike[str] | None,
    weights_only: bool | None,
    overrides: Mapping[str, Any],
) -> D:
    """See ``LightningDataModule.load_from_checkpoint``."""
    checkpoint = _read(path, map_location, weights_only)
    if hparams_file is not None:
        checkpoint["datamodule_hyper_parameters"] = _read_hparams(hparams_file)
    datamodule: D = _construct(cls, checkpoint, "datamodule_", overrides, path, weights_only)
    state = checkpoint.get(cls.__qualname__)
    if isinstance(state, dict):
        datamodule.load_state_dict(cast("dict[str, Any]", state))
    return datamodule


def _read(path: str | PathLike[str] | IO[bytes], map_location: object, weights_only: bool | None) -> dict[str, Any]:
    io = load(CHECKPOINT_IOS, "torch")
    place = _location(map_location)
    if not hasattr(path, "read"):
        return io.load_checkpoint(cast("str", path), map_location=place, weights_only=weights_only)
    # Tensors may go on reading the file after it is deleted, where the system lets it be deleted.
    with TemporaryDirectory(prefix="fulmen-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, "checkpoint")
        with copy.open("wb") as file:
            copyfileobj(cast("IO[bytes]", path), file)
        return io.load_checkpoint(copy, map_location=place, weights_only=weights_only)


def _location(map_location: object) -> torch.device | str | None:
    if map_location is None or isinstance(map_location, (str, torch.device)):
        return map_location
    if callable(map_location):
        # Files are read into host memory, whatever device wrote them: ask where a storage of the host would go.
        storage = cast("Any", map_location)(torch.UntypedStorage(0), "cpu")  # type: ignore[no-untyped-call]  # its owner has left it untyped
        return None if storage is None else torch.device(storage.device)
    raise MisconfigurationTypeError(
        f"load_from_checkpoint got map_location={map_location!r}. Give a device: tensors are read into host memory and "
        "go from there to that device, wherever they were when they were saved."
    )


def _read_hparams(path: str | PathLike[str]) -> dict[str, Any]:
    name = str(path)
    if name.endswith((".yaml", ".yml")):
        return load_hparams_from_yaml(path)
    if name.endswith(".csv"):
        return load_hparams_from_csv(path)
    raise MisconfigurationException(
        f"load_from_checkpoint got hparams_file={name!r}. Its name ends in .yaml, .yml or .csv."
    )


def _construct(
    cls: type[Any],
    checkpoint: Mapping[str, Any],
    prefix: str,
    overrides: Mapping[str, Any],
    path: str | PathLike[str] | IO[bytes],
    weights_only: bool | None,
) -> Any:
    hparams = restored(checkpoint, prefix)
    if _instantiator.is_known(hparams):
        return _construct_configured(cls, hparams, overrides, path, weights_only)
    parameters, takes_any = _parameters(cls)
    name = checkpoint.get(f"{prefix}hparams_name")
    if isinstance(name, str) and name != "kwargs" and name in parameters:
        # It was saved as one configuration object; what __init__ does not take by itself overrides a part of that.
        direct = {key: value for key, value in overrides.items() if key in parameters or takes_any}
        hparams.update({key: value for key, value in overrides.items() if key not in direct})
        return cls(**{name: hparams, **direct})
    # No builder but ours is used, whatever the file names; what it saved as plain values needs none.
    _, saved = _instantiator.split(hparams)
    if not takes_any:
        saved = {key: value for key, value in saved.items() if key in parameters}
    try:
        return cls(**{**saved, **overrides})
    except TypeError as error:
        missing = [name for name in names_left_out(checkpoint, prefix) if name not in overrides]
        if missing:
            error.add_note(
                f"fulmen: {str(path)!r} was saved without {', '.join(missing)}, which only code from the file could "
                f"bring back. Write {cls.__name__}.load_from_checkpoint(path, {missing[0]}=...)."
            )
        raise


def _construct_configured(
    cls: type[Any],
    hparams: Mapping[str, Any],
    overrides: Mapping[str, Any],
    path: str | PathLike[str] | IO[bytes],
    weights_only: bool | None,
) -> Any:
    """Build what the command line had built."""
    class_path, saved = _instantiator.split(hparams)
    saved = {key: value for key, value in saved.items() if key not in overrides}
    named = {} if class_path is None else {_instantiator.CLASS_PATH: class_path}
    if weights_only is not False:
        _instantiator.refuse_foreign_code(cls, {**named, **saved}, repr(str(path)))
    if class_path is None:
        parameters, takes_any = _parameters(cls)
        if not takes_any:
            saved = {key: value for key, value in saved.items() if key in parameters}
    return _instantiator.instantiate_module(cls, {**named, **saved, **overrides})


def _parameters(cls: type[Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters of ``cls.__init__``, and whether it takes any keyword besides."""
    found = {} if cls.__init__ is nn.Module.__init__ else dict(inspect.signature(cls.__init__).parameters)
    return found, any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values())


def _strictness(module: LightningModule, strict: bool | None) -> bool:
    own = module._strict_loading  # pyright: ignore[reportPrivateUsage]
    if strict is None:
        return module.strict_loading
    if own is not None and own is not strict:
        raise MisconfigurationException(
            f"load_from_checkpoint got strict={strict}, and {type(module).__name__}.strict_loading is {own}. "
            "Leave strict out, or set the same."
        )
    return strict

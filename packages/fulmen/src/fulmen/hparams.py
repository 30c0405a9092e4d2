"""Hyperparameters: ``save_hyperparameters`` reads what a class was constructed with, for checkpoints and loggers."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from argparse import Namespace
from collections.abc import Generator, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from fulmen._files import open_text
from fulmen_fabric import rank_zero_warn
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError, MissingPackage, did_you_mean

if TYPE_CHECKING:
    from os import PathLike
    from types import CodeType, FrameType

__all__ = [
    "AttributeDict",
    "HyperparametersMixin",
    "given_hyperparameters",
    "load_hparams_from_csv",
    "load_hparams_from_yaml",
]


_given: ContextVar[tuple[type, Mapping[str, Any]] | None] = ContextVar("_given", default=None)


@contextmanager
def given_hyperparameters(cls: type, hparams: Mapping[str, Any]) -> Generator[None]:
    """Inside, an object of exactly ``cls`` saves ``hparams`` in place of what its ``__init__`` received.

    For those who build objects from a configuration: it is plain data, where ``__init__`` gets what was built from it.
    """
    token = _given.set((cls, hparams))
    try:
        yield
    finally:
        _given.reset(token)


class AttributeDict(dict[str, Any]):
    """A dict whose items are attributes as well: ``hparams.lr`` and ``hparams["lr"]`` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            hint = did_you_mean(name, (str(key) for key in self))
            raise AttributeError(f"there is no hyperparameter {name!r}.{hint} There are: {sorted(self)!r}.") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"there is no hyperparameter {name!r}.") from None

    def __repr__(self) -> str:
        width = max((len(str(key)) + 1 for key in self), default=0)
        return "\n".join(f"{f'{key}:':{width}} {value!r}" for key, value in self.items())

    def __copy__(self) -> AttributeDict:
        return AttributeDict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return AttributeDict, (dict(self),)


class HyperparametersMixin:
    """Gives a class ``save_hyperparameters`` and ``hparams``."""

    _hparams: MutableMapping[str, Any] | None = None
    _hparams_initial: MutableMapping[str, Any] | None = None
    _hparams_name: str | None = None
    _log_hyperparams: bool = False

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Iterable[str] | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of ``__init__`` in ``hparams``, in checkpoints and in loggers. Call it in ``__init__``.

        Args:
            args: names of the arguments to keep; none: all of them, subclasses' included. A single object that is not a
                string (mapping, namespace or dataclass instance) is taken as the whole configuration.
            ignore: names to leave out, also of what a base class has saved.
            frame: the frame of the ``__init__`` to read; by default the caller's.
            logger: whether loggers get them.

        Raises:
            MisconfigurationException: a name is no argument of ``__init__``, or a configuration is not a mapping.
        """
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        if frame is None:
            current = inspect.currentframe()
            frame = current.f_back if current is not None else None
        given = _given_for(self) or _constructor_arguments(self, frame)
        given = {name: value for name, value in given.items() if name not in ignored}

        objects = [argument for argument in args if not isinstance(argument, str)]
        if len(objects) > 1 or (objects and len(args) > 1):
            raise MisconfigurationTypeError(
                f"save_hyperparameters() got {[type(o).__name__ for o in objects]!r} beside other arguments. "
                "Give names of arguments, or one configuration object alone."
            )
        if objects:
            self._set_hparams(_as_mapping(objects[0]))
            self._hparams_name = next((name for name, value in given.items() if value is objects[0]), None)
        else:
            unknown = [name for name in args if name not in given and name not in ignored]
            if unknown:
                raise MisconfigurationException(
                    f"save_hyperparameters() got {unknown[0]!r}, which {type(self).__name__}.__init__ does not take."
                    f"{did_you_mean(unknown[0], given)} Its arguments are {sorted(given)!r}."
                )
            chosen = {name: given[name] for name in args if name in given} if args else given
            self._set_hparams(AttributeDict(chosen))
            self._hparams_name = "kwargs" if chosen or self._hparams_name else None
        hparams = self.hparams
        for name in ignored:
            hparams.pop(name, None)
        self._log_hyperparams = logger
        _warn_about_modules(hparams)
        self._hparams_initial = _deep_copy(hparams)

    @property
    def hparams(self) -> Any:
        """The saved hyperparameters: an ``AttributeDict`` that may be changed, or the configuration that was given."""
        # Any: what it holds is the user's, and a configuration may be of another library's type.
        if self._hparams is None:
            self._hparams = AttributeDict()
        return self._hparams

    @property
    def hparams_initial(self) -> Any:
        """A deep copy of the hyperparameters as they were when they were saved."""
        return AttributeDict() if self._hparams_initial is None else _deep_copy(self._hparams_initial)

    def _set_hparams(self, hparams: MutableMapping[str, Any]) -> None:
        if isinstance(self._hparams, dict) and isinstance(hparams, dict):
            self._hparams.update(hparams)
        else:
            self._hparams = hparams


def _given_for(owner: object) -> dict[str, Any] | None:
    given = _given.get()
    return dict(given[1]) if given is not None and given[0] is type(owner) else None


def _deep_copy(hparams: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if not isinstance(hparams, AttributeDict):
        return copy.deepcopy(hparams)
    result = AttributeDict()
    for name, value in hparams.items():
        try:
            result[name] = copy.deepcopy(value)
        except (TypeError, RuntimeError, pickle.PicklingError):
            result[name] = value  # a lock or an open file: it is shared, and dropped when fit starts
    return result


def _as_mapping(config: object) -> MutableMapping[str, Any]:
    if isinstance(config, Namespace):
        return AttributeDict(vars(config))
    if isinstance(config, dict):
        return AttributeDict(cast("dict[str, Any]", config))
    if is_dataclass(config) and not isinstance(config, type):
        return AttributeDict({field.name: getattr(config, field.name) for field in fields(config)})
    if isinstance(config, MutableMapping):
        return cast("MutableMapping[str, Any]", config)  # another library's configuration is kept as it is
    if isinstance(config, Mapping):
        return AttributeDict(cast("Mapping[str, Any]", config))
    raise MisconfigurationTypeError(
        f"save_hyperparameters() got {config!r} of type {type(config).__name__}. "
        "Give a mapping, an argparse.Namespace, a dataclass instance, or names of arguments."
    )


def _constructor_arguments(owner: object, frame: FrameType | None) -> dict[str, Any]:
    collected: dict[str, Any] = {}
    # A base class's __init__ is called from its subclass's, so the outer frames are those nearer to the user: they win.
    for local, cls in _constructor_frames(owner, frame):
        collected.update(_arguments_in(local, cls))
    if is_dataclass(owner) and not isinstance(owner, type):
        # A generated __init__ holds a sentinel where a field has a default factory; the object holds the value.
        collected.update({field.name: getattr(owner, field.name) for field in fields(owner) if field.init})
    return collected


def _constructor_frames(owner: object, frame: FrameType | None) -> Iterator[tuple[Mapping[str, Any], type]]:
    while frame is not None:
        code = frame.f_code
        # Frames of helpers and decorators between two constructors are passed over.
        if code.co_name == "__init__" and code.co_argcount:
            local = frame.f_locals
            if local.get(code.co_varnames[0]) is not owner:
                return  # the constructor of something that contains owner
            cls = _class_of_code(owner, code)
            if cls is not None:
                yield local, cls
        frame = frame.f_back


def arguments_of_frame(frame: FrameType) -> dict[str, Any]:
    """What the constructor that runs in ``frame`` was given; nothing where it is none, or never says ``super()``."""
    local = frame.f_locals
    cls = local.get("__class__")
    return _arguments_in(local, cls) if isinstance(cls, type) and "__init__" in vars(cls) else {}


def _class_of_code(owner: object, code: CodeType) -> type | None:
    for cls in type(owner).__mro__:
        init = cls.__dict__.get("__init__")
        if callable(init) and getattr(inspect.unwrap(init), "__code__", None) is code:
            return cls
    return None


def _arguments_in(local: Mapping[str, Any], cls: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
    for parameter in parameters:
        if parameter.name not in local or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            found.update(local[parameter.name])
        else:
            found[parameter.name] = local[parameter.name]
    return found


def _warn_about_modules(hparams: Mapping[str, Any]) -> None:
    from torch import nn  # only classes that hold modules get here, and they have imported torch

    for name, value in hparams.items():
        if isinstance(value, nn.Module):
            warnings.warn(
                f"hyperparameter {name!r} is an nn.Module. Checkpoints hold its weights and leave it out: give it to "
                f"load_from_checkpoint(path, {name}=...), and write save_hyperparameters(ignore=[{name!r}]).",
                stacklevel=3,
            )


def checkpoint_entries(owner: HyperparametersMixin, prefix: str = "") -> dict[str, Any]:
    """The keys that a checkpoint gets for ``owner``'s hyperparameters; none if it saved none.

    ``prefix`` is ``"datamodule_"`` for a data module. A configuration of OmegaConf is stored as plain containers, so
    that the file can be read without running code.
    """
    hparams: Any = owner.hparams
    if not hparams:
        return {}
    hparams_type = None
    if type(hparams).__module__.partition(".")[0] == "omegaconf":
        hparams, hparams_type = _omegaconf().to_container(hparams), "omegaconf"
    key = "hparams_name" if not prefix else f"{prefix}hparams_name"
    entries: dict[str, Any] = {key: owner._hparams_name, f"{prefix}hyper_parameters": dict(hparams)}  # pyright: ignore[reportPrivateUsage]
    if hparams_type is not None:
        entries[f"fulmen_{prefix}hparams_type"] = hparams_type
    return entries


def restored(checkpoint: Mapping[str, Any], prefix: str = "") -> Any:
    """The hyperparameters in a checkpoint, of the type they had."""
    hparams: object = checkpoint.get(f"{prefix}hyper_parameters") or {}
    if checkpoint.get(f"fulmen_{prefix}hparams_type") == "omegaconf":
        return _omegaconf().create(hparams)
    return AttributeDict(cast("dict[str, Any]", hparams)) if isinstance(hparams, dict) else hparams


def _omegaconf() -> Any:
    try:
        return cast("Any", import_module("omegaconf")).OmegaConf
    except ImportError as error:
        raise MissingPackage(
            "these hyperparameters are an OmegaConf configuration, and omegaconf is not installed. "
            "Get it with: pip install omegaconf"
        ) from error


def drop_unpicklable(owner: HyperparametersMixin) -> None:
    """Remove hyperparameters that a checkpoint could not hold (open files, lambdas, locks), with a warning each."""
    hparams: Any = owner.hparams
    for name in list(hparams):
        try:
            pickle.dumps(hparams[name])
        except (pickle.PicklingError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
            rank_zero_warn(
                f"hyperparameter {name!r} cannot be pickled ({error}); it is left out of checkpoints and loggers."
            )
            del hparams[name]
            initial = owner._hparams_initial  # pyright: ignore[reportPrivateUsage]
            if initial is not None:
                initial.pop(name, None)


def hyperparameters_for_loggers(
    module: HyperparametersMixin, datamodule: HyperparametersMixin | None = None
) -> dict[str, Any] | None:
    """What loggers are told: the initial hyperparameters of both; None if neither wants them logged.

    Raises:
        MisconfigurationException: both have a key, with different values.
    """
    owners = [o for o in (module, datamodule) if o is not None and o._log_hyperparams]  # pyright: ignore[reportPrivateUsage]
    if not owners:
        return None
    merged: dict[str, Any] = {}
    for owner in owners:
        for name, value in owner.hparams_initial.items():
            if name in ("_class_path", "_instantiator"):
                continue  # how to build the object again is for checkpoints
            if name in merged and not _same(merged[name], value):
                raise MisconfigurationException(
                    f"hyperparameter {name!r} is {merged[name]!r} in {type(module).__name__} and {value!r} in "
                    f"{type(datamodule).__name__}. Rename one, or call save_hyperparameters(logger=False) in one."
                )
            merged[name] = value
    return merged


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except (ValueError, RuntimeError):  # arrays and tensors compare elementwise
        return bool(getattr(one == other, "all", lambda: False)())


def load_hparams_from_yaml(path: str | PathLike[str]) -> dict[str, Any]:
    """Hyperparameters from a ``hparams.yaml`` file of plain data, local or remote."""
    try:
        import yaml
    except ImportError as error:
        raise MissingPackage(f"reading {str(path)!r} needs PyYAML. Get it with: pip install pyyaml") from error
    with open_text(path) as stream:
        return dict(yaml.safe_load(stream) or {})


def load_hparams_from_csv(path: str | PathLike[str]) -> dict[str, Any]:
    """Hyperparameters from a CSV file with columns ``key`` and ``value``; values are read as Python literals."""
    import ast
    import csv

    hparams: dict[str, Any] = {}
    with open_text(path) as stream:
        for row in csv.DictReader(stream):
            try:
                hparams[row["key"]] = ast.literal_eval(row["value"])
            except (ValueError, SyntaxError):
                hparams[row["key"]] = row["value"]
    return hparams

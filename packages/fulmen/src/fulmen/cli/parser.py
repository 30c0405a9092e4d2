"""The parser: jsonargparse's, which knows how to add modules, data, callbacks, optimizers and the Trainer."""

from __future__ import annotations

import itertools
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Union, cast

from torch.optim import Optimizer

from fulmen._jsonargparse import ArgumentParser, Namespace, class_from_function
from fulmen.callbacks.callback import Callback
from fulmen.cli.optimizers import AUTOMATIC, LRSchedulerType, LRSchedulerTypeTuple
from fulmen.cli.trainer_arguments import add_trainer_arguments
from fulmen.datamodule import LightningDataModule
from fulmen.module import LightningModule
from fulmen.trainer import Trainer
from fulmen_protocols import MisconfigurationTypeError, MissingPackage

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ArgsType", "LightningArgumentParser"]

# typing.Union: it is read at run time by code that takes these apart.
ArgsType = Union[list[str], dict[str, Any], Namespace, None]  # noqa: UP007

_LANGUAGES = {"jsonnet": ("_jsonnet", "jsonnet"), "omegaconf": ("omegaconf", "omegaconf"), "toml": ("toml", "toml")}
_COUNT = itertools.count()


@cache
def class_of(factory: Callable[..., Any]) -> type:
    """A class that a function stands for: constructing it calls the function, whose annotation says what it returns.

    Raises:
        MisconfigurationTypeError: the function has no return annotation, or one that is not a class.
    """
    # jsonargparse keeps the class under its name in this module: two functions of one name need two names.
    name = f"{factory.__qualname__.replace('.', '_').replace('<', '').replace('>', '')}_{next(_COUNT)}"
    try:
        return class_from_function(factory, name=name)
    except (ValueError, TypeError) as error:
        raise MisconfigurationTypeError(
            f"{factory!r} stands for a class, and its return annotation does not say which ({error}). "
            "Annotate it: def make(...) -> MyModule."
        ) from error


class LightningArgumentParser(ArgumentParser):
    """An ``ArgumentParser`` of jsonargparse with methods for the classes of a run.

    Args:
        args: for ``ArgumentParser``.
        description: shown by ``--help``.
        env_prefix: what the names of environment variables begin with: ``PL_TRAINER__MAX_EPOCHS``.
        default_env: whether environment variables are read.
        kwargs: for ``ArgumentParser``.

    Raises:
        MissingPackage: ``parser_mode`` names a language whose library is not installed.
    """

    def __init__(
        self,
        *args: Any,
        description: str = "Train, validate, test and predict with a configuration.",
        env_prefix: str = "PL",
        default_env: bool = False,
        **kwargs: Any,
    ) -> None:
        mode = str(kwargs.get("parser_mode", "yaml")).rstrip("+")
        needed, install = _LANGUAGES.get(mode, ("yaml", "pyyaml"))
        if find_spec(needed) is None:
            raise MissingPackage(f"parser_mode={mode!r} needs {needed}. Get it with: pip install {install}")
        super().__init__(*args, description=description, env_prefix=env_prefix, default_env=default_env, **kwargs)
        self.callback_keys: list[str] = []
        """The keys of callbacks that are always part of the Trainer."""
        self.optimizers: dict[str, tuple[type | tuple[type, ...], str]] = {}
        """For each key: which classes it takes, and what they are linked to."""
        self.lr_schedulers: dict[str, tuple[type | tuple[type, ...], str]] = {}
        """The same for schedules."""

    def add_lightning_class_args(
        self,
        lightning_class: Callable[..., Trainer | LightningModule | LightningDataModule | Callback]
        | type[Trainer | LightningModule | LightningDataModule | Callback],
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        """Add the arguments of a Trainer, module, datamodule or callback below ``nested_key``.

        Args:
            lightning_class: the class, or a function annotated with the class that it returns.
            nested_key: the key; that of a callback makes it part of every Trainer.
            subclass_mode: whether a subclass may be chosen, as ``class_path`` and ``init_args``.
            required: in subclass mode, whether one must be.

        Returns:
            The keys that were added.

        Raises:
            MisconfigurationTypeError: it is another kind of thing.
        """
        cls: Any = lightning_class
        if callable(cls) and not isinstance(cls, type):
            cls = class_of(cls)
        if not isinstance(cls, type) or not issubclass(cls, (Trainer, LightningModule, LightningDataModule, Callback)):
            raise MisconfigurationTypeError(
                f"add_lightning_class_args got {lightning_class!r} for {nested_key!r}. Give a subclass of Trainer, "
                "LightningModule, LightningDataModule or Callback, or a function annotated as returning one."
            )
        if issubclass(cls, Callback):
            self.callback_keys.append(nested_key)
        if subclass_mode:
            self.add_subclass_arguments(cls, nested_key, fail_untyped=False, required=required)
            return [nested_key]
        if issubclass(cls, Trainer):
            return add_trainer_arguments(self, cls, nested_key)
        added: list[str] = self.add_class_arguments(cls, nested_key, fail_untyped=False, sub_configs=True)
        return added

    def add_optimizer_args(
        self,
        optimizer_class: type[Optimizer] | tuple[type[Optimizer], ...] = (Optimizer,),
        nested_key: str = "optimizer",
        link_to: str = AUTOMATIC,
    ) -> None:
        """Add an optimizer: its parameters, or in subclass mode its class too.

        Args:
            optimizer_class: the class; a tuple allows subclasses of any in it.
            nested_key: the key.
            link_to: the argument that gets the configuration, as a dict with ``class_path`` and ``init_args``;
                ``"AUTOMATIC"``: the module's ``configure_optimizers`` is made from it.
        """
        self._add_group("add_optimizer_args", optimizer_class, (Optimizer,), nested_key, "params")
        self.optimizers[nested_key] = (optimizer_class, link_to)

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: LRSchedulerType | tuple[LRSchedulerType, ...] = LRSchedulerTypeTuple,
        nested_key: str = "lr_scheduler",
        link_to: str = AUTOMATIC,
    ) -> None:
        """Add a learning rate schedule, as ``add_optimizer_args`` adds an optimizer."""
        classes = cast("type | tuple[type, ...]", lr_scheduler_class)
        self._add_group("add_lr_scheduler_args", classes, LRSchedulerTypeTuple, nested_key, "optimizer")
        self.lr_schedulers[nested_key] = (classes, link_to)

    def _add_group(
        self,
        method: str,
        classes: type | tuple[type, ...],
        bases: tuple[type, ...],
        nested_key: str,
        supplied: str,
    ) -> None:
        for cls in cast("tuple[object, ...]", classes if isinstance(classes, tuple) else (classes,)):
            if not isinstance(cls, type) or not issubclass(cls, bases):
                names = " or ".join(base.__name__ for base in bases)
                raise MisconfigurationTypeError(
                    f"{method} got {cls!r} for {nested_key!r}. Give a subclass of {names}, or a tuple of such."
                )
        options: dict[str, Any] = {"instantiate": False, "fail_untyped": False, "skip": {supplied}}
        if isinstance(classes, tuple):
            self.add_subclass_arguments(classes, nested_key, **options)
        else:
            self.add_class_arguments(classes, nested_key, sub_configs=True, **options)

"""LightningCLI: a command line for a module, its data and a Trainer."""

from __future__ import annotations

import sys
from functools import cached_property
from importlib.metadata import version
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Union, cast, get_type_hints

from torch.optim import Optimizer

from fulmen._instantiator import CLASS_PATH, INSTANTIATOR, OURS
from fulmen._jsonargparse import ActionConfigFile, Namespace, instantiate
from fulmen.cli import optimizers
from fulmen.cli._checkpoint import merge_hyperparameters
from fulmen.cli.optimizers import LRSchedulerTypeTuple, LRSchedulerTypeUnion, ReduceLROnPlateau
from fulmen.cli.parser import ArgsType, LightningArgumentParser, class_of
from fulmen.cli.save_config import SaveConfigCallback
from fulmen.datamodule import LightningDataModule
from fulmen.hparams import given_hyperparameters
from fulmen.module import LightningModule
from fulmen.trainer import Trainer
from fulmen_fabric import rank_zero_warn, seed_everything
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fulmen.callbacks.callback import Callback

__all__ = ["LightningCLI"]


class LightningCLI:
    """Reads arguments, files and the environment; builds module, data and Trainer from them; runs what was asked.

    Constructing it does all that. The order is: parse, complete the configuration from ``--ckpt_path``, seed,
    ``before_instantiate_classes``, build, ``after_instantiate_classes``, run.

    Args:
        model_class: the module's class or a function that returns it; None: ``--model`` chooses one.
        datamodule_class: the same for the data; None: ``--data`` may choose one.
        save_config_callback: writes the configuration beside the results; None: it is not written.
        save_config_kwargs: arguments for it.
        trainer_class: a subclass of Trainer, or a function that returns a Trainer.
        trainer_defaults: values that replace the Trainer's defaults; ``"callbacks"`` are added to every Trainer.
        seed_everything_default: a seed; True: ``PL_GLOBAL_SEED``, or 0 with a warning; False: nothing is seeded.
        parser_kwargs: arguments for the parser; under a subcommand's name, for that one's parser.
        parser_class: the parser's class.
        subclass_mode_model: whether ``--model`` may choose a subclass of ``model_class``.
        subclass_mode_data: whether ``--data`` may choose a subclass of ``datamodule_class``.
        args: what to parse, as words, as a dict or as a namespace; None: the process's arguments.
        run: whether there are subcommands, one of which is run; False: everything is only built.
        auto_configure_optimizers: whether ``--optimizer`` and ``--lr_scheduler`` are there, and replace the module's
            ``configure_optimizers`` where they are used.
        load_from_checkpoint_support: whether ``save_hyperparameters`` keeps the configuration, from which
            ``load_from_checkpoint`` can build nested objects, in place of what ``__init__`` received.

    Attributes:
        parser: the main parser.
        config: what was parsed.
        config_init: the same, with objects in place of their configurations.
        model: the module.
        datamodule: the data, or None.
        trainer: the Trainer.
        subcommand: what is run, or None.
    """

    parser: LightningArgumentParser
    config: Namespace
    config_init: Namespace
    model: LightningModule
    datamodule: LightningDataModule | None
    trainer: Trainer
    subcommand: str | None

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[Trainer] | Callable[..., Trainer] = Trainer,
        trainer_defaults: dict[str, Any] | None = None,
        seed_everything_default: bool | int = True,
        parser_kwargs: dict[str, Any] | dict[str, dict[str, Any]] | None = None,
        parser_class: type[LightningArgumentParser] = LightningArgumentParser,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: ArgsType = None,
        run: bool = True,
        auto_configure_optimizers: bool = True,
        load_from_checkpoint_support: bool = True,
    ) -> None:
        self.model_class = model_class
        self.subclass_mode_model = model_class is None or subclass_mode_model
        self.datamodule_class = datamodule_class
        self.subclass_mode_data = datamodule_class is None or subclass_mode_data
        self.save_config_callback = save_config_callback
        self.save_config_kwargs = save_config_kwargs or {}
        self.trainer_class = trainer_class
        self.trainer_defaults = trainer_defaults or {}
        self.seed_everything_default = seed_everything_default
        self.parser_kwargs: dict[str, Any] = parser_kwargs or {}
        self.parser_class = parser_class
        self.auto_configure_optimizers = auto_configure_optimizers
        self.load_from_checkpoint_support = load_from_checkpoint_support
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        self._subcommand_arguments: dict[str, list[str]] = {}

        names = self.subcommands()
        common = {key: value for key, value in self.parser_kwargs.items() if key not in names}
        own = {key: value for key, value in self.parser_kwargs.items() if key in names}
        self.setup_parser(run, common, own)
        self.parse_arguments(self.parser, args)
        self.subcommand = self.config["subcommand"] if run else None
        if self.subcommand is not None:
            module_class = _returned(self.model_class or LightningModule)
            self.config = merge_hyperparameters(self.parser, self.config, self.subcommand, module_class)
        self._seed()
        self.before_instantiate_classes()
        self.instantiate_classes()
        self.after_instantiate_classes()
        if self.subcommand is not None:
            self._run_subcommand(self.subcommand)

    # ------------------------------------------------------------------ the parser

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that reads configuration files."""
        kwargs.setdefault("dump_header", [f"fulmen=={version('fulmen')}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="A configuration file; may be repeated.")
        return parser

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Make ``self.parser``, and one for each subcommand."""
        self.parser = self.init_parser(**main_kwargs)
        if not add_subcommands:
            self._add_arguments(self.parser)
            return
        choice = self.parser.add_subcommands()
        trainer_class = self.trainer_class if isinstance(self.trainer_class, type) else class_of(self.trainer_class)
        for name, skipped in self.subcommands().items():
            method = getattr(trainer_class, name, None)
            if method is None:
                raise MisconfigurationTypeError(
                    f"{type(self).__name__}.subcommands() has {name!r}, and {trainer_class.__name__} has no such "
                    f"method. Define {name} in a subclass of Trainer and pass it as trainer_class."
                )
            text = (method.__doc__ or "").strip().partition("\n")[0]
            parser = self.init_parser(**{"description": text, **subparser_kwargs.get(name, {})})
            self._add_arguments(parser)
            self._subcommand_arguments[name] = parser.add_method_arguments(trainer_class, name, skip=set(skipped))
            self._subcommand_parsers[name] = parser
            choice.add_subcommand(name, parser, help=text)

    def _add_arguments(self, parser: LightningArgumentParser) -> None:
        self.add_default_arguments_to_parser(parser)
        self.add_core_arguments_to_parser(parser)
        self.add_arguments_to_parser(parser)
        if self.auto_configure_optimizers:
            if not parser.optimizers:
                parser.add_optimizer_args((Optimizer,))
            if not parser.lr_schedulers:
                parser.add_lr_scheduler_args(LRSchedulerTypeTuple)
        self.link_optimizers_and_lr_schedulers(parser)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments that belong to no class: ``--seed_everything``."""
        parser.add_argument(
            "--seed_everything",
            type=Union[bool, int],  # noqa: UP007  jsonargparse shows it
            default=self.seed_everything_default,
            help="The seed. True: that of PL_GLOBAL_SEED, or 0 with a warning. False: nothing is seeded.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of Trainer, module and data."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        for key, value in self.trainer_defaults.items():
            if key != "callbacks":
                self._set_trainer_default(parser, key, value)
        parser.add_lightning_class_args(
            self.model_class or LightningModule, "model", subclass_mode=self.subclass_mode_model
        )
        # Without a datamodule the module may have the loaders itself.
        parser.add_lightning_class_args(
            self.datamodule_class or LightningDataModule,
            "data",
            subclass_mode=self.subclass_mode_data,
            required=self.datamodule_class is not None,
        )

    def _set_trainer_default(self, parser: LightningArgumentParser, key: str, value: object) -> None:
        try:
            parser.set_defaults({f"trainer.{key}": value})
        except KeyError:
            known = list(cast("dict[str, Any]", vars(parser.get_defaults().trainer)))
            raise MisconfigurationException(
                f"trainer_defaults has {key!r}, which {self.trainer_class.__qualname__} does not take."
                f"{did_you_mean(key, known)} Its arguments are {sorted(known)!r}."
            ) from None
        except ValueError as error:
            cls = type(value).__name__
            raise MisconfigurationException(
                f"trainer_defaults[{key!r}] is a {cls} object, which a configuration cannot show or replace. Give "
                f"{{'class_path': '...{cls}', 'init_args': {{...}}}}, or jsonargparse.lazy_instance({cls}, ...)."
            ) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Override to add arguments, link them or set defaults."""

    @staticmethod
    def link_optimizers_and_lr_schedulers(parser: LightningArgumentParser) -> None:
        """Link what was added with ``link_to`` to the argument that gets it."""
        optimizers.link_groups(parser)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that are subcommands, and which of their arguments are no arguments here."""
        evaluation = {"model", "dataloaders", "datamodule"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": evaluation,
            "test": evaluation,
            "predict": evaluation,
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Set ``self.config`` from ``args``, or from the process's arguments."""
        if args is not None and len(sys.argv) > 1:
            rank_zero_warn(
                f"{type(self).__name__} was given args={args!r}, so that the arguments of this process, "
                f"{sys.argv[1:]!r}, are not read. Leave args out to read those."
            )
        if isinstance(args, (dict, Namespace)):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)

    def _seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is False:
            return
        chosen = seed_everything(None if seed is True or seed is None else seed, workers=True)
        (self.config if self.subcommand is None else self.config[self.subcommand])["seed_everything"] = chosen

    # ------------------------------------------------------------------ the objects

    def before_instantiate_classes(self) -> None:
        """Override to do something before anything is built; ``self.config`` may be changed."""

    def instantiate_classes(self) -> None:
        """Build data, module and Trainer, and everything they are given."""
        self.config_init = instantiate(self.parser, self.config, self._builders())
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self._configure_optimizers_automatically()
        self.trainer = self.instantiate_trainer()

    def _builders(self) -> list[Any]:
        """What builds the module and the data in place of their classes."""
        if not self.load_from_checkpoint_support:
            return []
        chosen = (
            ("model", self.model_class or LightningModule, self.subclass_mode_model),
            ("data", self.datamodule_class or LightningDataModule, self.subclass_mode_data),
        )
        # What a function was given is not what the class that it returns can be built from.
        return [(_Builder(self, key), cls, several) for key, cls, several in chosen if isinstance(cls, type)]

    def after_instantiate_classes(self) -> None:
        """Override to do something after everything is built, before the subcommand runs."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer.

        Args:
            kwargs: arguments that replace configured ones.
        """
        forced = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        settings = cast("dict[str, Any]", vars(self._get(self.config_init, "trainer")))
        return self._instantiate_trainer({**settings, **kwargs}, forced)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if "callbacks" in config:
            config["callbacks"] = [
                *_as_list(config["callbacks"]),
                *callbacks,
                *_as_list(self.trainer_defaults.get("callbacks")),
            ]
            if self.save_config_callback is not None and not config.get("fast_dev_run", False):
                parsed = self.config if self.subcommand is None else self.config[self.subcommand]
                saver = self.save_config_callback(self._parser(self.subcommand), parsed, **self.save_config_kwargs)
                config["callbacks"].append(saver)
        else:
            rank_zero_warn(
                f"{self.trainer_class.__qualname__} takes no callbacks: those of {type(self).__name__}, which saves "
                "the configuration among them, are not part of this run."
            )
        return self.trainer_class(**config)

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """What the module's ``configure_optimizers`` returns. Override to combine optimizer and schedule otherwise.

        Args:
            lightning_module: the module.
            optimizer: built from ``--optimizer``.
            lr_scheduler: built from ``--lr_scheduler``, if it was given.
        """
        if lr_scheduler is None:
            return optimizer
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            schedule = {"scheduler": lr_scheduler, "monitor": lr_scheduler.monitor}
            return {"optimizer": optimizer, "lr_scheduler": schedule}
        return [optimizer], [lr_scheduler]

    def _configure_optimizers_automatically(self) -> None:
        if not self.auto_configure_optimizers:
            return
        name = type(self).__name__
        found = optimizers.automatic(
            self._parser(self.subcommand), lambda key: self._get(self.config_init, key), owner=name
        )
        if found is not None:
            optimizers.override_configure_optimizers(self.model, *found, self.configure_optimizers, owner=name)

    @cached_property
    def config_dump(self) -> dict[str, Any]:
        """The configuration as plain data, the subcommand's part of it if there is one."""
        import yaml

        text = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False, format="yaml")
        dumped = cast("dict[str, Any]", yaml.safe_load(text))
        return dumped if self.subcommand is None else dumped[self.subcommand]

    # ------------------------------------------------------------------ the run

    def _run_subcommand(self, subcommand: str) -> None:
        before = getattr(self, f"before_{subcommand}", None)
        if callable(before):
            before()
        run = getattr(self, subcommand, None) or getattr(self.trainer, subcommand)
        run(**self._prepare_subcommand_kwargs(subcommand))
        after = getattr(self, f"after_{subcommand}", None)
        if callable(after):
            after()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        configured = self.config_init[subcommand]
        arguments: dict[str, Any] = {key: configured[key] for key in self._subcommand_arguments[subcommand]}
        arguments["model"] = self.model
        if self.datamodule is not None:
            arguments["datamodule"] = self.datamodule
        return arguments

    def _parser(self, subcommand: str | None) -> LightningArgumentParser:
        """The parser that read the values: the subcommand's, if there is one."""
        return self.parser if subcommand is None else self._subcommand_parsers[subcommand]

    def _get(self, config: Namespace, key: str, default: Any = None) -> Any:
        """A value of the configuration, in the subcommand's part of it if there is one."""
        return (config if self.subcommand is None else config[self.subcommand]).get(key, default)


class _Builder:
    """Builds the module or the data, such that ``save_hyperparameters`` keeps the configuration it is built from."""

    def __init__(self, cli: LightningCLI, key: str) -> None:
        self.cli, self.key = cli, key

    def __call__(
        self, class_type: type[Any], *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any
    ) -> Any:
        hparams = self._hyperparameters(class_type, applied_instantiation_links)
        if hparams is None:
            return class_type(*args, **kwargs)
        with given_hyperparameters(class_type, {**hparams, INSTANTIATOR: OURS}):
            return class_type(*args, **kwargs)

    def _hyperparameters(self, class_type: type, links: Mapping[str, Any]) -> dict[str, Any] | None:
        dumped = self.cli.config_dump.get(self.key)
        hparams: dict[str, Any] = dict(dumped or {})
        if "class_path" in hparams:
            if resolve_name(hparams["class_path"]) is not class_type:
                return None  # a module that this one is given, built on the way
            inner: dict[str, Any] = {**(hparams.get("init_args") or {}), **(hparams.get("dict_kwargs") or {})}
            hparams = {CLASS_PATH: hparams["class_path"], **inner}
        for target, value in links.items():
            if target.startswith(f"{self.key}."):
                _set_nested(hparams, target.removeprefix(f"{self.key}.").removeprefix("init_args."), value)
        return hparams


def _set_nested(target: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for name in outer:
        target = target.setdefault(name, {})
    target[last] = value


def _returned(cls: type[Any] | Callable[..., Any]) -> type[Any]:
    """The class, or the one that a function's annotation names."""
    return cls if isinstance(cls, type) else cast("type[Any]", get_type_hints(cls)["return"])


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else [value]

"""What a call needs, checked before anything starts: every problem in one error."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from fulmen._layer_sync import TorchSyncBatchNorm
from fulmen._preparation import batch_norms
from fulmen._raw_batches import fetches_itself
from fulmen.hooks import check_hook_names
from fulmen.module import LightningModule
from fulmen.states import TrainerFn
from fulmen.utilities.compile import from_compiled, is_compiled
from fulmen_data import CombinedLoader
from fulmen_fabric import PossibleUserWarning, rank_zero_warn
from fulmen_fabric.abilities import supports
from fulmen_protocols import (
    MisconfigurationException,
    MisconfigurationTypeError,
    OwnsAccumulation,
    OwnsBackward,
    OwnsOptimizerStep,
    SupportsBoundMethods,
    SupportsDevices,
    SupportsModuleCheck,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from torch import nn

    from fulmen._loaders import LoaderSource
    from fulmen.settings import Settings
    from fulmen_fabric import Assembly
    from fulmen_protocols import Strategy

__all__ = [
    "collected",
    "compiled_module",
    "lightning_module",
    "loaders_or_datamodule",
    "loss_weighting",
    "modules_in_eval_mode",
    "overrides",
    "placeable_module",
    "predicts_one_after_the_other",
    "raise_all",
    "run",
    "step_takes_dataloader_idx",
    "strategy",
    "sync_batchnorm",
    "vendors_flags",
]


def lightning_module(fn: TrainerFn, model: object) -> LightningModule:
    """``model``, if the Trainer can run it."""
    if model is None:
        raise MisconfigurationTypeError(
            f"trainer.{fn.value}() was called without a model, and this trainer has none yet. Pass the model."
        )
    if is_compiled(model):
        model = from_compiled(cast("nn.Module", model))
    if not isinstance(model, LightningModule):
        _refuse_lightnings(model, "model", "LightningModule")
        raise MisconfigurationTypeError(
            f"model is of type {type(model).__name__}; the Trainer needs a LightningModule. "
            "Put the model inside one, or keep your own loop with fulmen.Fabric."
        )
    return model


def loaders_or_datamodule(fn: TrainerFn, given: Mapping[str, object], datamodule: object) -> None:
    """Refuse loaders and a datamodule together, and a datamodule that is none."""
    passed = [stage for stage, value in given.items() if value is not None]
    if passed and datamodule is not None:
        arguments = " and ".join(f"{stage}_dataloaders" for stage in passed)
        raise MisconfigurationException(
            f"trainer.{fn.value}() was given both {arguments} and datamodule={type(datamodule).__name__}. "
            "Pass one of them."
        )
    for stage in passed:
        _refuse_lightnings(given[stage], f"{stage}_dataloaders", "LightningDataModule")
    _refuse_lightnings(datamodule, "datamodule", "LightningDataModule")
    if datamodule is not None and not hasattr(datamodule, "prepare_data"):
        raise MisconfigurationException(
            f"datamodule is of type {type(datamodule).__name__}, not a LightningDataModule. Pass loaders as "
            f"trainer.{fn.value}(model, loaders)."
        )


def _refuse_lightnings(value: object, argument: str, name: str) -> None:
    """Say what to do about an object made for the other framework."""
    for base in type(value).__mro__:
        package = base.__module__.partition(".")[0]
        if base.__name__ == name and package in ("lightning", "pytorch_lightning"):
            raise MisconfigurationTypeError(
                f"{argument} is a {type(value).__name__}, whose {name} is that of {package}. Import {name} from "
                f"fulmen, as the Trainer is: `import fulmen`, not `import {base.__module__.rpartition('.core')[0]}`."
            )


def compiled_module(module: LightningModule, assembly: Assembly) -> None:
    """Refuse a compiled module where somebody else than torch runs it."""
    if module.compiled_from is None:
        return
    if supports(assembly.strategy, OwnsOptimizerStep) or assembly.devices[0].type == "xla":
        raise MisconfigurationException(
            f"model is a compiled {type(module).__name__}, but strategy={assembly.strategy_name!r} on "
            f"{assembly.devices[0].type} runs the module in its own way, without torch.compile. Pass the module "
            "itself, or use one device, DDP or FSDP."
        )


def placeable_module(module: LightningModule, assembly: Assembly) -> None:
    """Let the strategy refuse what it could not place."""
    if supports(assembly.strategy, SupportsModuleCheck):
        assembly.strategy.check_module(module)


def sync_batchnorm(module: LightningModule, assembly: Assembly, settings: Settings) -> None:
    """Refuse what torch's synchronised layers cannot do, and layers that would be replaced twice."""
    plugin = assembly.layer_sync
    if settings.sync_batchnorm and plugin is not None and not isinstance(plugin, TorchSyncBatchNorm):
        raise MisconfigurationException(
            f"sync_batchnorm=True and plugins={type(plugin).__name__}(...) both replace layers by ones that "
            "communicate. Give one of the two."
        )
    asked = settings.sync_batchnorm or isinstance(plugin, TorchSyncBatchNorm)
    if not asked or assembly.world_size == 1 or assembly.devices[0].type != "cpu":
        return
    if batch_norms(module):
        flag = "sync_batchnorm=True" if settings.sync_batchnorm else "plugins=TorchSyncBatchNorm()"
        raise MisconfigurationException(
            f"{flag} with {assembly.world_size} processes on the CPU: torch's SyncBatchNorm runs on GPUs "
            "only. Leave it out here, or use accelerator='gpu'."
        )


def loss_weighting(assembly: Assembly, settings: Settings) -> None:
    """Refuse weights where an engine divides losses, or reduces and clips gradients, by itself."""
    strategy = assembly.strategy
    owns = (
        supports(strategy, OwnsBackward)
        or supports(strategy, OwnsAccumulation)
        or supports(strategy, OwnsOptimizerStep)
    )
    if settings.loss_weighting == "weights" and owns:
        raise MisconfigurationException(
            f"loss_weighting='weights' cannot work with strategy={assembly.strategy_name!r}, whose engine divides "
            "losses or reduces gradients by itself. Leave loss_weighting out, or use one device, DDP, FSDP or model "
            "parallel."
        )


def vendors_flags(model_registry: object, suggest_integrations: object) -> None:
    """Flags of Lightning's that belong to a service: refused where it would be needed, else taken."""
    if model_registry is not None:
        raise MisconfigurationException(
            f"model_registry={model_registry!r} names a model in Lightning's own registry, which needs its client "
            "(litmodels) and an account. Save with ModelCheckpoint(dirpath='s3://...') or another storage URL instead."
        )
    if not isinstance(suggest_integrations, int):
        raise MisconfigurationTypeError(f"suggest_integrations={suggest_integrations!r} must be True or False.")


def overrides(module: LightningModule, name: str) -> bool:
    """Whether ``module`` has its own ``name``."""
    method = getattr(module, name, None)
    return method is not None and getattr(method, "__func__", method) is not getattr(LightningModule, name, None)


def run(
    fn: TrainerFn,
    module: LightningModule,
    sources: Mapping[str, LoaderSource],
    callbacks: Sequence[Any],
    settings: Settings,
    *,
    engine_makes_optimizers: bool = False,
) -> None:
    """Raise one error with everything that is missing or contradicts itself."""
    problems = check_hook_names(callbacks)
    name = type(module).__name__
    if fn is TrainerFn.FITTING:
        problems += _fit(module, name, sources, settings, engine_makes_optimizers=engine_makes_optimizers)
    else:
        stage, step = {
            TrainerFn.VALIDATING: ("val", "validation_step"),
            TrainerFn.TESTING: ("test", "test_step"),
            TrainerFn.PREDICTING: ("predict", "predict_step"),
        }[fn]
        if step != "predict_step" and not overrides(module, step):
            problems.append(f"{name} has no {step}, which trainer.{fn.value}() runs. Define it.")
        if step == "predict_step" and not overrides(module, step) and not _has_forward(module):
            problems.append(f"{name} has neither predict_step nor forward, one of which trainer.predict() runs.")
        _raw_steps(module, (step,))
        if not sources[stage].is_defined:
            problems.append(
                f"trainer.{fn.value}() has no loader: pass dataloaders=, or define {stage}_dataloader in the module or "
                "a datamodule."
            )
    if callable(getattr(module, "configure_sharded_model", None)):
        both = " It defines both; keep configure_model." if overrides(module, "configure_model") else ""
        problems.append(
            f"{name} defines configure_sharded_model, which is no longer called. Rename it to configure_model, and let "
            f"it leave a model alone that it has already made.{both}"
        )
    if problems:
        raise MisconfigurationException(" ".join(problems))


def _has_forward(module: LightningModule) -> bool:
    import torch

    return type(module).forward is not torch.nn.Module.forward and type(module).forward is not LightningModule.forward


def _fit(
    module: LightningModule,
    name: str,
    sources: Mapping[str, LoaderSource],
    settings: Settings,
    *,
    engine_makes_optimizers: bool,
) -> list[str]:
    needs = ("training_step",) if engine_makes_optimizers else ("training_step", "configure_optimizers")
    problems = [
        f"{name} has no {needed}, which trainer.fit() runs. Define it."
        for needed in needs
        if not overrides(module, needed)
    ]
    if not sources["train"].is_defined:
        problems.append(
            "trainer.fit() has no training loader: pass train_dataloaders=, or define train_dataloader in the module "
            "or a datamodule."
        )
    if not module.automatic_optimization:
        if settings.gradient_clip_val is not None and settings.gradient_clip_val > 0:
            problems.append(
                f"gradient_clip_val={settings.gradient_clip_val} cannot work with automatic_optimization=False: call "
                "self.clip_gradients(optimizer, ...) in training_step."
            )
        if settings.accumulate_grad_batches != 1:
            problems.append(
                f"accumulate_grad_batches={settings.accumulate_grad_batches} cannot work with "
                "automatic_optimization=False: step the optimizer every so many batches in training_step."
            )
        if settings.loss_weighting == "weights":
            problems.append(
                "loss_weighting='weights' cannot work with automatic_optimization=False, where training_step steps "
                "whenever it wants to: leave it out, and use fulmen_fabric.LossWeights in training_step."
            )
    if overrides(module, "training_step") and "optimizer_idx" in inspect.signature(module.training_step).parameters:
        problems.append(
            f"{name}.training_step takes optimizer_idx, which no longer exists. Set self.automatic_optimization = "
            "False and step the optimizers in training_step."
        )
    if overrides(module, "training_step"):
        _raw_steps(module, ("training_step", "validation_step"))
    for gone, instead in _GONE.items():
        if callable(getattr(module, gone, None)):
            problems.append(f"{name} defines {gone}, which is no longer called. Use {instead}.")
    validates, has_loader = overrides(module, "validation_step"), sources["val"].is_defined
    if has_loader and not validates:
        rank_zero_warn(f"there is a validation loader, but {name} has no validation_step: validation is left out.")
    if validates and not has_loader and settings.limit_val_batches != 0:
        rank_zero_warn(
            f"{name} defines validation_step, but there is no validation loader: validation is left out.",
            category=PossibleUserWarning,
        )
    return problems


_GONE = {
    "training_epoch_end": "on_train_epoch_end, and keep outputs in an attribute",
    "validation_epoch_end": "on_validation_epoch_end, and keep outputs in an attribute",
    "test_epoch_end": "on_test_epoch_end, and keep outputs in an attribute",
    "training_step_end": "training_step",
    "validation_step_end": "validation_step",
    "test_step_end": "test_step",
}


def _raw_steps(module: LightningModule, steps: Sequence[str]) -> None:
    """Say what does not happen for steps that fetch their batches themselves."""
    fetching = [name for name in steps if fetches_itself(getattr(module, name))]
    if fetching:
        rank_zero_warn(
            f"{type(module).__name__}.{' and '.join(fetching)} take{'s' * (len(fetching) == 1)} dataloader_iter, which "
            "is experimental: such a step moves its batches to the device itself, the transfer hooks are not called, "
            "batch hooks are told of the batch fetched last, and a step should fetch as many batches each time. Take "
            "(batch, batch_idx) if you do not need it."
        )


def step_takes_dataloader_idx(module: LightningModule, stage: str, *, several: bool) -> None:
    """The step must take ``dataloader_idx`` exactly where there are several loaders."""
    name = {"val": "validation_step"}.get(stage, f"{stage}_step")
    parameters = inspect.signature(getattr(module, name)).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()) or "dataloader_iter" in parameters:
        return
    takes = parameters.get("dataloader_idx")
    if several and takes is None:
        raise MisconfigurationException(
            f"there are several {stage} loaders, but {type(module).__name__}.{name} does not take dataloader_idx. "
            f"Add it: def {name}(self, batch, batch_idx, dataloader_idx=0)."
        )
    if not several and takes is not None and takes.default is inspect.Parameter.empty:
        raise MisconfigurationException(
            f"there is one {stage} loader, but {type(module).__name__}.{name} requires dataloader_idx. "
            "Give it a default: dataloader_idx=0."
        )


def predicts_one_after_the_other(loaders: object) -> None:
    """Refuse to predict on batches of several loaders at a time: a prediction belongs to samples of one."""
    if isinstance(loaders, CombinedLoader) and loaders.mode != "sequential":
        raise MisconfigurationException(
            f"trainer.predict() got CombinedLoader(mode={loaders.mode!r}), whose batches are of several loaders at a "
            "time, and some come twice or never. Use mode='sequential', or pass the loaders as a list."
        )


def modules_in_eval_mode(module: LightningModule) -> None:
    """Warn of submodules that start training in evaluation mode: often a leftover, sometimes meant."""
    count = sum(not submodule.training for submodule in module.modules())
    if count:
        rank_zero_warn(
            f"{count} module(s) are in evaluation mode at the start of training. If that is not meant, "
            "call model.train().",
            category=PossibleUserWarning,
        )


@contextmanager
def collected(errors: list[MisconfigurationException]) -> Generator[None, None, None]:
    """Note what is wrong and go on, so that everything can be told at once."""
    try:
        yield
    except MisconfigurationException as error:
        errors.append(error)


def raise_all(errors: list[MisconfigurationException]) -> None:
    """Raise one error for all of ``errors``; a single one as it is."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise MisconfigurationException("\n".join(map(str, errors)))


def strategy(asked: str | Strategy) -> str | Strategy:
    """``asked``, unless it is for loops of one's own.

    Raises:
        MisconfigurationException: it drives several devices from one process, through a wrapper that splits arguments.
    """
    if (isinstance(asked, str) and asked.lower() == "dp") or (
        not isinstance(asked, (str, type))
        and supports(asked, SupportsDevices)
        and supports(asked, SupportsBoundMethods)
    ):
        name = repr(asked) if isinstance(asked, str) else type(asked).__name__
        raise MisconfigurationException(
            f"strategy={name} is for Fabric only: it splits what forward is given, and a Trainer's steps return one "
            "loss. Use strategy='ddp'."
        )
    return asked

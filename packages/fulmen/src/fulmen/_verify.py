"""What a call needs, checked before anything starts: every problem in one error."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fulmen.hooks import check_hook_names
from fulmen.module import LightningModule
from fulmen.states import TrainerFn
from fulmen_data import CombinedLoader
from fulmen_fabric import PossibleUserWarning, rank_zero_warn
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from fulmen._loaders import LoaderSource
    from fulmen.settings import Settings

__all__ = [
    "collected",
    "lightning_module",
    "loaders_or_datamodule",
    "modules_in_eval_mode",
    "predicts_one_after_the_other",
    "raise_all",
    "run",
    "step_takes_dataloader_idx",
]


def lightning_module(fn: TrainerFn, model: object) -> LightningModule:
    """``model``, if the Trainer can run it."""
    if model is None:
        raise MisconfigurationTypeError(
            f"trainer.{fn.value}() was called without a model, and this trainer has none yet. Pass the model."
        )
    if not isinstance(model, LightningModule):
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
    if datamodule is not None and not hasattr(datamodule, "prepare_data"):
        raise MisconfigurationException(
            f"datamodule is of type {type(datamodule).__name__}, not a LightningDataModule. Pass loaders as "
            f"trainer.{fn.value}(model, loaders)."
        )


def _overrides(module: LightningModule, name: str) -> bool:
    method = getattr(module, name, None)
    return method is not None and getattr(method, "__func__", method) is not getattr(LightningModule, name, None)


def run(
    fn: TrainerFn,
    module: LightningModule,
    sources: Mapping[str, LoaderSource],
    callbacks: Sequence[Any],
    settings: Settings,
) -> None:
    """Raise one error with everything that is missing or contradicts itself."""
    problems = check_hook_names(callbacks)
    name = type(module).__name__
    if fn is TrainerFn.FITTING:
        problems += _fit(module, name, sources, settings)
    else:
        stage, step = {
            TrainerFn.VALIDATING: ("val", "validation_step"),
            TrainerFn.TESTING: ("test", "test_step"),
            TrainerFn.PREDICTING: ("predict", "predict_step"),
        }[fn]
        if step != "predict_step" and not _overrides(module, step):
            problems.append(f"{name} has no {step}, which trainer.{fn.value}() runs. Define it.")
        if step == "predict_step" and not _overrides(module, step) and not _has_forward(module):
            problems.append(f"{name} has neither predict_step nor forward, one of which trainer.predict() runs.")
        if not sources[stage].is_defined:
            problems.append(
                f"trainer.{fn.value}() has no loader: pass dataloaders=, or define {stage}_dataloader in the module or "
                "a datamodule."
            )
    if callable(getattr(module, "configure_sharded_model", None)):
        both = " It defines both; keep configure_model." if _overrides(module, "configure_model") else ""
        problems.append(
            f"{name} defines configure_sharded_model, which is no longer called. Rename it to configure_model, and let "
            f"it leave a model alone that it has already made.{both}"
        )
    if problems:
        raise MisconfigurationException(" ".join(problems))


def _has_forward(module: LightningModule) -> bool:
    import torch

    return type(module).forward is not torch.nn.Module.forward and type(module).forward is not LightningModule.forward


def _fit(module: LightningModule, name: str, sources: Mapping[str, LoaderSource], settings: Settings) -> list[str]:
    problems = [
        f"{name} has no {needed}, which trainer.fit() runs. Define it."
        for needed in ("training_step", "configure_optimizers")
        if not _overrides(module, needed)
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
    if _overrides(module, "training_step") and "optimizer_idx" in inspect.signature(module.training_step).parameters:
        problems.append(
            f"{name}.training_step takes optimizer_idx, which no longer exists. Set self.automatic_optimization = "
            "False and step the optimizers in training_step."
        )
    for gone, instead in _GONE.items():
        if callable(getattr(module, gone, None)):
            problems.append(f"{name} defines {gone}, which is no longer called. Use {instead}.")
    validates, has_loader = _overrides(module, "validation_step"), sources["val"].is_defined
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


def step_takes_dataloader_idx(module: LightningModule, stage: str, *, several: bool) -> None:
    """The step must take ``dataloader_idx`` exactly where there are several loaders."""
    name = {"val": "validation_step"}.get(stage, f"{stage}_step")
    parameters = inspect.signature(getattr(module, name)).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
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

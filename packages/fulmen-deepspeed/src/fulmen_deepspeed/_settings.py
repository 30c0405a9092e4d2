"""What an engine will be made with: a configuration, and what the run adds to it before there is an engine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from fulmen_deepspeed import _verify
from fulmen_deepspeed import config as configs
from fulmen_deepspeed._casting import SINGLE, Casting

if TYPE_CHECKING:
    from fulmen_deepspeed.config import Config
    from fulmen_protocols import PrecisionPlan

__all__ = ["Settings", "settings_from"]


class Settings:
    """A configuration that is complete only when the run has said its part.

    Args:
        config: the user's, or that of the arguments; it is never changed.
        scale: how float16 losses are scaled, where the configuration leaves it to the precision.
        logs_throughput: whether DeepSpeed's timer has a listener.

    Attributes:
        config: as given.
        casting: what the precision of the run means for calls of a module; full precision until it is known.
    """

    def __init__(self, config: Config, scale: configs.LossScale, *, logs_throughput: bool) -> None:
        self.config = config
        self.casting = Casting(SINGLE)
        self._scale = scale
        self._logs_throughput = logs_throughput
        self._from_run = configs.FromRun()

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return configs.stage_of(self.config)

    @property
    def makes_optimizer(self) -> bool:
        """Whether the configuration defines the optimizer."""
        return "optimizer" in self.config

    @property
    def wants_batch_size(self) -> bool:
        """Whether the configuration leaves the number of samples in a batch open."""
        known = ("train_micro_batch_size_per_gpu", "train_batch_size")
        return not any(name in self.config for name in known)

    def apply_plan(self, plan: PrecisionPlan, device_type: str) -> None:
        """Take over the dtypes of ``plan``.

        Raises:
            MisconfigurationException: the engine does not compute so on this kind of device, or the configuration says
                something else.
        """
        configs.with_precision(self.config, plan, self._scale, device_type)
        self.casting = Casting(plan)

    def set_accumulation(self, batches: int) -> None:
        """Step after so many batches.

        Raises:
            MisconfigurationException: the configuration has a number of its own.
        """
        configs.check_accumulation(self.config)
        self._from_run = dataclasses.replace(self._from_run, accumulation=batches)

    def set_clipping(self, value: float | None, algorithm: Literal["norm", "value"]) -> None:
        """Clip gradients to the norm ``value``; None leaves it to the configuration.

        Raises:
            MisconfigurationException: clipping by value, or the configuration has another norm.
        """
        configs.check_clipping(self.config, value, algorithm)
        self._from_run = dataclasses.replace(self._from_run, clipping=value)

    def set_batch_size(self, samples: int) -> None:
        """Know the number of samples in a batch of one rank."""
        self._from_run = dataclasses.replace(self._from_run, batch_size=samples)

    def for_training(self, device_type: str) -> Config:
        """The configuration of an engine that trains."""
        made = configs.with_precision(self.config, self.casting.plan, self._scale, device_type)
        return configs.for_engine(made, self._from_run, logs_throughput=self._logs_throughput)

    def for_evaluation(self, device_type: str) -> Config:
        """The configuration of an engine without an optimizer."""
        return configs.for_evaluation(self.for_training(device_type))

    def activation_checkpointing(self) -> dict[str, Any] | None:
        """Arguments of ``deepspeed.checkpointing.configure``; None where nothing of it is switched on."""
        found: object = self.config.get("activation_checkpointing")
        wanted: dict[str, Any] = dict(cast("Mapping[str, Any]", found)) if isinstance(found, Mapping) else {}
        if not any(wanted.values()):
            return None
        return {
            "partition_activations": wanted.get("partition_activations"),
            "contiguous_checkpointing": wanted.get("contiguous_memory_optimization"),
            "num_checkpoints": wanted.get("number_checkpoints"),
            "checkpoint_in_cpu": wanted.get("cpu_checkpointing"),
            "synchronize": wanted.get("synchronize_checkpoint_boundary"),
            "profile": wanted.get("profile"),
        }


def settings_from(strategy: type, given: Mapping[str, Any]) -> Settings:
    """Settings of the user's own configuration, which then is alone, or of the arguments.

    Args:
        strategy: the class whose arguments they are; its defaults tell what was really given.
        given: every argument by name.

    Raises:
        MisconfigurationException: arguments without a meaning, or beside a configuration that would replace them.
    """
    config, source = configs.load_config(given["config"])
    if config is None:
        configs.check_options(given)
        config = configs.default_config(given)
    else:
        _verify.no_arguments_beside(strategy, given, source)
    scale = configs.LossScale(**{one.name: given[one.name] for one in dataclasses.fields(configs.LossScale)})
    return Settings(config, scale, logs_throughput=given["logging_level"] <= logging.INFO)

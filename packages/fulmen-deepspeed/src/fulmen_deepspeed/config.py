"""The configuration that DeepSpeed's engine is made with: from arguments, from the user's own, and from the run."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from fulmen_protocols.precision import PrecisionPlan

__all__ = [
    "CONFIG_VARIABLE",
    "Config",
    "LossScale",
    "check_options",
    "default_config",
    "for_engine",
    "load_config",
    "stage_of",
    "with_precision",
]

# Any: a tree of JSON values, as DeepSpeed's documentation describes it.
Config = dict[str, Any]

CONFIG_VARIABLE = "PL_DEEPSPEED_CONFIG_PATH"
"""Environment variable with the path of a configuration, for runs that are given none."""

_STAGES = (0, 1, 2, 3)
_OFFLOAD_DEVICES = ("cpu", "nvme")


@dataclass(frozen=True, slots=True)
class LossScale:
    """How float16 losses are scaled."""

    loss_scale: float = 0
    """A fixed factor; 0: it adapts."""
    initial_scale_power: int = 16
    """The first factor is two to this power."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the factor is doubled."""
    hysteresis: int = 2
    """Overflows that are let pass before the factor is halved."""
    min_loss_scale: int = 1
    """The smallest factor."""


def check_options(options: Mapping[str, object]) -> None:
    """Refuse arguments that DeepSpeed has no meaning for.

    Args:
        options: arguments of ``DeepSpeedStrategy`` by name.

    Raises:
        MisconfigurationException: one of them.
    """
    stage = options["stage"]
    if isinstance(stage, bool) or stage not in _STAGES:
        raise MisconfigurationException(
            f"DeepSpeedStrategy got stage={stage!r}. There are {', '.join(map(str, _STAGES))}."
        )
    for name in ("offload_params_device", "offload_optimizer_device"):
        if options[name] not in _OFFLOAD_DEVICES:
            raise MisconfigurationException(f"DeepSpeedStrategy got {name}={options[name]!r}. Give 'cpu' or 'nvme'.")
    if options["remote_device"] not in (None, *_OFFLOAD_DEVICES):
        raise MisconfigurationException(
            f"DeepSpeedStrategy got remote_device={options['remote_device']!r}. Give 'cpu' or 'nvme', or leave it out."
        )
    if options["offload_parameters"] and stage != 3:
        raise MisconfigurationException(
            f"DeepSpeedStrategy got offload_parameters=True with stage={stage}. Only stage 3 spreads parameters, and "
            "can offload them: give stage=3."
        )
    if options["offload_optimizer"] and (stage == 0 or not options["zero_optimization"]):
        raise MisconfigurationException(
            f"DeepSpeedStrategy got offload_optimizer=True with zero_optimization={options['zero_optimization']} and "
            f"stage={stage}, where optimizers stay as they are. Give a stage of 1 to 3."
        )


def default_config(options: Mapping[str, Any]) -> Config:
    """The configuration that the arguments of ``DeepSpeedStrategy`` stand for.

    Args:
        options: every argument by name.
    """
    config: Config = {
        "activation_checkpointing": {
            name: options[name]
            for name in (
                "partition_activations",
                "cpu_checkpointing",
                "contiguous_memory_optimization",
                "synchronize_checkpoint_boundary",
            )
        },
        "aio": {
            name: options[name]
            for name in ("block_size", "queue_depth", "single_submit", "overlap_events", "thread_count")
        },
    }
    if options["zero_optimization"]:
        zero: Config = {
            name: options[name]
            for name in (
                "stage",
                "contiguous_gradients",
                "overlap_comm",
                "allgather_partitions",
                "reduce_scatter",
                "allgather_bucket_size",
                "reduce_bucket_size",
                "sub_group_size",
            )
        }
        if options["offload_optimizer"]:
            zero["offload_optimizer"] = {
                "device": options["offload_optimizer_device"],
                "nvme_path": options["nvme_path"],
                "buffer_count": options["optimizer_buffer_count"],
                "pin_memory": options["pin_memory"],
            }
        if options["offload_parameters"]:
            zero["offload_param"] = {
                "device": options["offload_params_device"],
                "nvme_path": options["nvme_path"],
                "buffer_count": options["params_buffer_count"],
                "buffer_size": options["params_buffer_size"],
                "max_in_cpu": options["max_in_cpu"],
                "pin_memory": options["pin_memory"],
            }
        config["zero_allow_untested_optimizer"] = options["zero_allow_untested_optimizer"]
        config["zero_optimization"] = zero
    batch_size = options["logging_batch_size_per_gpu"]
    if batch_size not in (None, "auto"):
        config["train_micro_batch_size_per_gpu"] = batch_size
    return config


def load_config(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> tuple[Config | None, str]:
    """The user's own configuration, copied or read, and where it comes from.

    Without one it is that of the environment variable ``PL_DEEPSPEED_CONFIG_PATH``, or None.

    Raises:
        MisconfigurationException: there is no such file, or it holds no JSON object.
    """
    source = "config="
    if config is None:
        config = os.environ.get(CONFIG_VARIABLE)
        source = CONFIG_VARIABLE
        if not config:
            return None, ""
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config)), source
    if not isinstance(cast("object", config), (str, os.PathLike)):
        raise MisconfigurationException(
            f"DeepSpeedStrategy got {source}{config!r}. Give DeepSpeed's configuration as a dict, or the path of a "
            "JSON file."
        )
    path = os.fspath(config)
    named = f"{source}{path!r}" if source.endswith("=") else f"{source}={path!r}"
    if not os.path.isfile(path):
        raise MisconfigurationException(
            f"{named} names DeepSpeed's configuration, but there is no such file. Check the path."
        )
    with open(path, encoding="utf-8") as file:
        try:
            loaded: object = json.load(file)
        except ValueError as error:
            raise MisconfigurationException(f"{named} holds no JSON: {error}. Correct the file.") from error
    if not isinstance(loaded, dict):
        raise MisconfigurationException(
            f"{named} holds a {type(loaded).__name__}, but DeepSpeed's configuration is a JSON object."
        )
    return cast("Config", loaded), named


def stage_of(config: Config) -> int:
    """The ZeRO stage that a configuration asks for; 0 for none."""
    zero: object = config.get("zero_optimization")
    if isinstance(zero, Mapping):
        return int(cast("Mapping[str, Any]", zero).get("stage", 0))
    return 1 if zero is True else 0


def _is_enabled(config: Config, section: str) -> bool | None:
    """Whether ``section`` is switched on; None where the configuration does not say."""
    found: object = config.get(section, config.get("bfloat16") if section == "bf16" else None)
    if not isinstance(found, Mapping):
        return None
    return bool(cast("Mapping[str, object]", found).get("enabled", True))


def with_precision(config: Config, plan: PrecisionPlan, scale: LossScale, device_type: str) -> Config:
    """``config`` with the engine's 16-bit training switched on where ``plan`` computes in 16 bits.

    Raises:
        MisconfigurationException: the engine cannot compute so (here), or the configuration says something else.
    """
    compute = plan["compute"]
    sections = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: None}
    if compute not in sections:
        raise MisconfigurationException(
            f"strategy 'deepspeed' computes in float32, bfloat16 or float16, and the precision asks for {compute}. "
            "Use precision='32-true', 'bf16-mixed', 'bf16-true', '16-mixed' or '16-true'."
        )
    section = sections[compute]
    for other, names in (("fp16", "16-mixed"), ("bf16", "bf16-mixed")):
        said = _is_enabled(config, other)
        if said is True and other != section:
            raise MisconfigurationException(
                f"DeepSpeed's configuration switches {other!r} on, but the precision of this run computes in "
                f"{str(compute).removeprefix('torch.')}. Give precision={names!r}, or take {other!r} out of the "
                "configuration."
            )
        if said is False and other == section:
            raise MisconfigurationException(
                f"DeepSpeed's configuration switches {other!r} off, but the precision of this run computes in "
                f"{str(compute).removeprefix('torch.')}. Give precision='32-true', or take {other!r} out of the "
                "configuration."
            )
    if section == "fp16" and device_type == "cpu":
        raise MisconfigurationException(
            "strategy 'deepspeed' was asked for float16 (precision='16-mixed' or '16-true') on 'cpu', where the "
            "engine of DeepSpeed has none. Use precision='bf16-mixed', or accelerator='gpu'."
        )
    if section is None or _is_enabled(config, section):
        return config
    settings: Config = {"enabled": True}
    if section == "fp16":
        settings |= {
            "loss_scale": scale.loss_scale,
            "initial_scale_power": scale.initial_scale_power,
            "loss_scale_window": scale.loss_scale_window,
            "hysteresis": scale.hysteresis,
            "min_loss_scale": scale.min_loss_scale,
        }
    return {**config, section: settings}


@dataclass(frozen=True, slots=True)
class FromRun:
    """What the run decides; None where it leaves it to the configuration."""

    accumulation: int | None = None
    """Batches per optimizer step."""
    clipping: float | None = None
    """Largest norm of the gradients; 0 or None: they are not clipped, unless the configuration says so."""
    batch_size: int | None = None
    """Samples in a batch of one rank."""


def check_accumulation(config: Config) -> None:
    """Refuse a configuration that accumulates by itself, for a run that decides it.

    Raises:
        MisconfigurationException: it does.
    """
    if "gradient_accumulation_steps" in config:
        raise MisconfigurationException(
            f"DeepSpeed's configuration has gradient_accumulation_steps={config['gradient_accumulation_steps']!r}, "
            "which a Trainer sets. Take it out, and give Trainer(accumulate_grad_batches=...)."
        )


def check_clipping(config: Config, value: float | None, algorithm: Literal["norm", "value"] | None) -> None:
    """Refuse a clipping that the engine cannot do, or that the configuration contradicts.

    Raises:
        MisconfigurationException: one of the two.
    """
    if algorithm == "value" and value:
        raise MisconfigurationException(
            f"gradient_clip_algorithm='value' with gradient_clip_val={value}: DeepSpeed's engine clips by norm only. "
            "Use gradient_clip_algorithm='norm'."
        )
    own = config.get("gradient_clipping")
    if value is not None and own is not None and float(own) != float(value):
        raise MisconfigurationException(
            f"gradient_clip_val={value}, but DeepSpeed's configuration has gradient_clipping={own!r}. Give one of the "
            "two."
        )


def for_engine(config: Config, run: FromRun, *, logs_throughput: bool) -> Config:
    """``config`` with what the run decides, ready for the engine.

    Args:
        config: the user's or the default one; it is left as it is.
        run: the run's part.
        logs_throughput: whether DeepSpeed's timer has a listener; it makes the host wait for the device at each step.
    """
    made = copy.deepcopy(config)
    if run.accumulation is not None:
        made["gradient_accumulation_steps"] = run.accumulation
    # DeepSpeed clips to a norm of 1 where nobody says anything.
    made.setdefault("gradient_clipping", run.clipping or 0.0)
    if "train_batch_size" not in made:
        made.setdefault("train_micro_batch_size_per_gpu", run.batch_size or 1)
    if not logs_throughput:
        made.setdefault("timers", {"throughput": {"enabled": False}})
    return made


def for_evaluation(config: Config) -> Config:
    """The part of ``config`` that an engine without an optimizer needs: dtypes, and parameters spread over ranks."""
    kept = ("fp16", "bf16", "bfloat16", "zero_optimization", "zero_allow_untested_optimizer", "aio", "timers")
    made = copy.deepcopy({name: config[name] for name in kept if name in config})
    zero = made.get("zero_optimization")
    if isinstance(zero, dict):
        cast("Config", zero).pop("offload_optimizer", None)  # there is none, and DeepSpeed asks for its step
    return {**made, "train_micro_batch_size_per_gpu": 1}

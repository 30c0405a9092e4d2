"""Strategies and precisions written for Lightning: what they override there and nobody calls here is said at once.

Both frameworks let users subclass ``DDPStrategy`` or ``MixedPrecision``, but the methods are others. An override that
is never called would change a run silently.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, NamedTuple

from fulmen_fabric import PossibleUserWarning, rank_zero_warn
from fulmen_protocols import MisconfigurationException, Precision

if TYPE_CHECKING:
    from fulmen_fabric import Assembly

__all__ = ["check_backends"]


class _Seam(NamedTuple):
    noun: str
    instead: str
    """Where the reader learns what to write."""
    uncalled: frozenset[str]
    """Methods that Lightning calls and fulmen does not."""


_STRATEGY = _Seam(
    "strategy",
    "docs/guides/write-a-strategy.md lists the methods that are called",
    frozenset(
        {
            "all_gather", "all_reduce", "barrier", "batch_to_device", "block_backward_sync", "broadcast",
            "clip_gradients_norm", "clip_gradients_value", "configure_ddp", "connect",
            "determine_ddp_device_ids", "dispatch", "get_module_state_dict", "get_optimizer_state",
            "get_registered_strategies", "lightning_module_state_dict", "load_model_state_dict",
            "load_module_state_dict", "load_optimizer_state_dict", "model_sharded_context",
            "model_to_device", "module_init_context", "module_sharded_context", "module_to_device",
            "on_exception", "on_predict_end", "on_predict_start", "on_test_end", "on_test_start",
            "on_train_batch_start", "on_train_end", "on_train_start", "on_validation_end",
            "on_validation_start", "post_backward", "post_training_step", "pre_backward", "predict_step",
            "process_dataloader", "reduce", "reduce_boolean_decision", "register_strategies",
            "remove_checkpoint", "set_world_ranks", "setup", "setup_distributed", "setup_module",
            "setup_module_and_optimizers", "setup_optimizer", "setup_optimizers", "setup_precision_plugin",
            "tensor_init_context", "test_step", "training_step", "validation_step",
        }
    ),
)  # fmt: skip
_PRECISION = _Seam(
    "precision",
    "fulmen_protocols.Precision and its abilities list the methods that are called",
    frozenset(
        {
            "autocast_context_manager", "backward", "clip_grad_by_norm", "clip_grad_by_value",
            "clip_gradients", "connect", "main_params", "module_init_context", "on_load_checkpoint",
            "on_save_checkpoint", "optimizer_step", "post_backward", "pre_backward", "predict_step_context",
            "teardown", "tensor_init_context", "test_step_context", "train_step_context",
            "unscale_gradients", "val_step_context",
        }
    ),
)  # fmt: skip
_SECOND_ARGUMENT = {
    "optimizer_step": ("closure", "optimizer_step(self, optimizer, module, closure=None)"),
    "backward": ("optimizer", "backward(self, loss, module, **kwargs)"),
}
"""Name of the second argument in Lightning, and the signature here, where that is the placed module."""


def check_backends(assembly: Assembly) -> None:
    """Look at what the user's own strategy and precision override.

    Raises:
        MisconfigurationException: a method has Lightning's arguments, or is only declared by a protocol.
    """
    strategy, precision = assembly.strategy, assembly.precision
    _warn_of_uncalled(_STRATEGY, strategy)
    _refuse_other_arguments(strategy)
    _warn_of_uncalled(_PRECISION, precision)
    _refuse_declarations(precision)


def _warn_of_uncalled(seam: _Seam, backend: object) -> None:
    names = sorted({name for cls in _users_classes(backend) for name in vars(cls) if name in seam.uncalled})
    if names:
        rank_zero_warn(
            f"{type(backend).__name__} defines {', '.join(names)}, which Lightning calls on a {seam.noun}. fulmen does "
            f"not, so nothing happens there: {seam.instead}.",
            PossibleUserWarning,
        )


def _refuse_other_arguments(strategy: object) -> None:
    for cls in _users_classes(strategy):
        for name, (second, ours) in _SECOND_ARGUMENT.items():
            method = vars(cls).get(name)
            if inspect.isfunction(method) and list(inspect.signature(method).parameters)[2:3] == [second]:
                raise MisconfigurationException(
                    f"strategy={type(strategy).__name__}: {cls.__name__}.{name}{inspect.signature(method)} takes "
                    f"Lightning's arguments. Here the second one is the placed module: def {ours}."
                )


def _refuse_declarations(precision: object) -> None:
    missing = [name for name in _NEEDED if getattr(type(precision), name, None) is vars(Precision)[name]]
    if missing:
        raise MisconfigurationException(
            f"plugins={type(precision).__name__}: it inherits {', '.join(missing)} from Precision, which only declares "
            "what there must be. Derive from fulmen.plugins.FullPrecision or another precision, or define them."
        )


_NEEDED = ("plan", "convert_module", "init_context")


def _users_classes(backend: object) -> list[type]:
    """The user's own classes among those of ``backend``, if it derives from one of fulmen's."""
    classes = type(backend).__mro__
    users = [cls for cls in classes if cls.__module__.partition(".")[0] not in _STANDARD and not _is_ours(cls)]
    return users if any(_is_ours(cls) for cls in classes) else []


_STANDARD = ("builtins", "typing", "abc")


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _PACKAGES


_PACKAGES = frozenset(f"fulmen{end}" for end in ("", "_fabric", "_precision", "_protocols", "_strategies"))

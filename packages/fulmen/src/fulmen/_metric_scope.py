"""Which hooks may log, and what ``on_step`` and ``on_epoch`` mean in each when the user leaves them open."""

from __future__ import annotations

from fulmen_protocols.errors import MisconfigurationException, did_you_mean

__all__ = ["LogScope", "scope_for"]


class LogScope:
    """One hook, as seen by ``self.log``. Made once per hook name: scopes are compared by identity.

    Attributes:
        hook: name of the hook.
        allowed: whether values may be logged from it.
        per_batch: whether it runs once a batch; the others know epoch values only.
        on_step: what ``on_step=None`` means.
        on_epoch: what ``on_epoch=None`` means.
        advice: what to do instead, for a hook that may not log.
    """

    __slots__ = ("advice", "allowed", "hook", "on_epoch", "on_step", "per_batch")

    def __init__(self, hook: str, *, allowed: bool, per_batch: bool, on_step: bool, advice: str = "") -> None:
        self.hook = hook
        self.allowed = allowed
        self.per_batch = per_batch
        self.on_step = on_step
        self.on_epoch = not on_step
        self.advice = advice

    def __repr__(self) -> str:
        return f"LogScope({self.hook!r})"


_TRAIN_BATCH = (
    "training_step",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "clip_gradients",
    "optimizer_step",
)
_EVAL_BATCH = (
    "validation_step",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "test_step",
    "on_test_batch_start",
    "on_test_batch_end",
)
_EPOCH = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_test_start",
    "on_test_epoch_start",
    "on_test_epoch_end",
)
_OUTSIDE = "no epoch is running there: pass the value to logger.log_metrics, or log it from on_train_epoch_end"
_ENDED = "the epoch's values are already reduced there: log from the hook ending in _epoch_end instead"
_PREDICT = "prediction has no metrics: return the value from predict_step, or use trainer.test"
_DATA = "it may run ahead of the step it belongs to: log from training_step or validation_step"
_FORBIDDEN = {
    **dict.fromkeys(("on_train_end", "on_validation_end", "on_test_end"), _ENDED),
    **dict.fromkeys(
        (
            "predict_step",
            "on_predict_start",
            "on_predict_end",
            "on_predict_epoch_start",
            "on_predict_epoch_end",
            "on_predict_batch_start",
            "on_predict_batch_end",
        ),
        _PREDICT,
    ),
    **dict.fromkeys(("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"), _DATA),
    **dict.fromkeys(
        (
            "setup",
            "teardown",
            "prepare_data",
            "train_dataloader",
            "val_dataloader",
            "test_dataloader",
            "predict_dataloader",
            "on_fit_start",
            "on_fit_end",
            "on_sanity_check_start",
            "on_sanity_check_end",
            "on_exception",
            "configure_model",
            "configure_sharded_model",
            "configure_optimizers",
            "configure_callbacks",
            "lr_scheduler_step",
            "state_dict",
            "load_state_dict",
            "on_save_checkpoint",
            "on_load_checkpoint",
            "on_validation_model_zero_grad",
            "on_validation_model_eval",
            "on_validation_model_train",
            "on_test_model_eval",
            "on_test_model_train",
            "on_predict_model_eval",
            "on_predict_model_train",
        ),
        _OUTSIDE,
    ),
}

_SCOPES: dict[str, LogScope] = {
    **{hook: LogScope(hook, allowed=True, per_batch=True, on_step=True) for hook in _TRAIN_BATCH},
    **{hook: LogScope(hook, allowed=True, per_batch=True, on_step=False) for hook in _EVAL_BATCH},
    **{hook: LogScope(hook, allowed=True, per_batch=False, on_step=False) for hook in _EPOCH},
    **{
        hook: LogScope(hook, allowed=False, per_batch=False, on_step=False, advice=advice)
        for hook, advice in _FORBIDDEN.items()
    },
}


def scope_for(hook_name: str) -> LogScope:
    """The scope of a hook: always the same object for the same name, so loops look it up once, before they start.

    Raises:
        MisconfigurationException: no hook has that name.
    """
    try:
        return _SCOPES[hook_name]
    except KeyError:
        message = f"no hook is named {hook_name!r}.{did_you_mean(hook_name, _SCOPES)}"
        raise MisconfigurationException(message) from None

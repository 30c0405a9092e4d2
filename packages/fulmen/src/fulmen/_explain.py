"""``trainer.explain()``: what a fit does, in order, and who supplies each part."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import TYPE_CHECKING, Any

from fulmen._measuring import Measuring
from fulmen.callbacks.callback import Callback
from fulmen.callbacks.checkpoint import Checkpoint
from fulmen.callbacks.early_stopping import EarlyStopping
from fulmen.module import LightningModule

if TYPE_CHECKING:
    from fulmen.trainer import Trainer

__all__ = ["explain_run"]

# (indentation, what happens; a name in <> is a hook of callbacks and module, in [] of the module alone)
_ORDER = (
    (0, "[configure_callbacks]"),
    (0, "processes start and meet"),
    (0, "[prepare_data]  (local rank 0)"),
    (0, "<setup>"),
    (0, "[configure_model]"),
    (0, "weights and callbacks are restored  (with ckpt_path)"),
    (0, "the strategy places the module"),
    (0, "[configure_optimizers]"),
    (0, "<on_fit_start>"),
    (0, "hyperparameters go to the loggers"),
    (0, "counters, optimizers and schedulers are restored  (with ckpt_path)"),
    (0, "sanity check: {sanity} validation batches"),
    (0, "[train_dataloader]"),
    (0, "<on_train_start>"),
    (0, "each epoch  ({epochs}):"),
    (1, "<on_train_epoch_start>"),
    (1, "each batch:"),
    (2, "{transfer}"),
    (2, "<on_train_batch_start>"),
    (2, "{zeroed_first}"),
    (2, "{forward}[training_step]"),
    (2, "<on_before_zero_grad>"),
    (2, "{zeroed_after}"),
    (2, "<on_before_backward>"),
    (2, "backward{scaled}"),
    (2, "<on_after_backward>"),
    (2, "{weighed}"),
    (2, "<on_before_optimizer_step>  ({window_end})"),
    (2, "{clip}"),
    (2, "optimizer step{skipped}"),
    (2, "[lr_scheduler_step]"),
    (2, "<on_train_batch_end>"),
    (2, "a row to the loggers  ({log})"),
    (2, "validation  ({validate}):"),
    (3, "[on_validation_model_eval]"),
    (3, "<on_validation_start>"),
    (3, "<on_validation_epoch_start>"),
    (3, "each batch: <on_validation_batch_start>"),
    (3, "each batch: [validation_step]"),
    (3, "each batch: <on_validation_batch_end>"),
    (3, "metrics are reduced over ranks"),
    (3, "<on_validation_epoch_end>"),
    (3, "<on_validation_end>"),
    (3, "[on_validation_model_train]"),
    (1, "metrics are reduced over ranks"),
    (1, "<on_train_epoch_end>  (callbacks, module, then those that watch metrics)"),
    (1, "a row to the loggers"),
    (0, "<on_train_end>"),
    (0, "<on_fit_end>"),
    (0, "<teardown>"),
)


def explain_run(trainer: Trainer, model: LightningModule | None) -> str:
    """The text of ``Trainer.explain``."""
    session = trainer._session  # pyright: ignore[reportPrivateUsage]
    module = session.module if model is None and session is not None else model
    assembly, settings = trainer.assembly, trainer.settings
    rows = ["Parts"]
    rows += [f"  {noun:<20} {source}" for noun, source in assembly.sources.items()]
    rows.append(f"  {'devices':<20} {', '.join(map(str, assembly.devices))} on {assembly.num_nodes} node(s)")
    rows += [f"  {'logger':<20} {_origin(logger)}" for logger in trainer.loggers]
    for callback in trainer.callbacks:
        rows.append(f"  {'callback':<20} {_origin(callback)}")
        if hasattr(callback, "describe_plan"):
            rows.append(f"  {'':<20} {callback.describe_plan(trainer)}")
    if Measuring(trainer.profiler).is_on:
        rows.append(f"  {'profiler':<20} {_origin(trainer.profiler)}")
    if module is not None:
        rows.append(f"  {'module':<20} {_origin(module)}")
    rows += ["", "Order of fit"]
    words = _words(trainer, module)
    manual = module is not None and not module.automatic_optimization
    for depth, template in _ORDER:
        text = template
        for word, value in words.items():
            text = text.replace("{" + word + "}", value)
        if not text.strip() or (manual and depth == 2 and _is_automatic_only(template)):
            continue
        rows.append("  " * (depth + 1) + _with_suppliers(text, trainer, module))
    if settings.barebones:
        rows.append("barebones: no loggers, checkpoints, bars, summary or sanity check")
    return "\n".join(rows)


def _is_automatic_only(template: str) -> bool:
    return any(part in template for part in ("zeroed", "zero_grad", "{clip}", "optimizer step", "lr_scheduler_step"))


def _words(trainer: Trainer, module: LightningModule | None) -> dict[str, str]:
    settings, precision = trainer.settings, trainer.assembly.precision_name
    every = settings.accumulate_grad_batches
    interval = settings.val_check_interval
    validate = "at the end of the epoch" if interval == 1.0 else f"every {interval} of the epoch"
    if isinstance(interval, int):
        validate = f"every {interval} batches"
    mixed = precision.endswith("mixed")
    zeroed = f"gradients are zeroed  ({'every batch' if every == 1 else f'first of every {every} batches'})"
    is_seen = (
        bool(_suppliers("on_before_zero_grad", trainer, module, with_callbacks=True))
        or (module is not None and _overrides(module, LightningModule, "optimizer_zero_grad"))
        or Measuring(trainer.profiler).is_on
    )
    return {
        "sanity": "no" if settings.num_sanity_val_steps == 0 else f"{settings.num_sanity_val_steps:g}",
        "epochs": f"at most {settings.max_epochs}" if settings.max_epochs != -1 else "until max_steps or a stop",
        "transfer": f"the batch goes to {trainer.world.device}",
        "forward": f"under autocast ({precision}): " if mixed else "",
        "zeroed_first": "" if is_seen else zeroed,
        "zeroed_after": zeroed if is_seen else "",
        "window_end": "every batch" if every == 1 else f"last of every {every} batches, and of the epoch",
        "scaled": " of the scaled loss; then gradients are unscaled" if precision == "16-mixed" else "",
        "weighed": "gradients are divided by the window's weights, over all ranks  (before an optimizer step)"
        if settings.loss_weighting == "weights"
        else "",
        "skipped": ", skipped where a gradient is not finite" if precision == "16-mixed" else "",
        "clip": ""
        if not settings.gradient_clip_val
        else f"gradients are clipped ({settings.gradient_clip_algorithm}, {settings.gradient_clip_val:g})",
        "log": f"every {settings.log_every_n_steps} steps" if settings.log_every_n_steps else "never",
        "validate": validate,
    }


def _with_suppliers(text: str, trainer: Trainer, module: LightningModule | None) -> str:
    for left, right, with_callbacks in (("<", ">", True), ("[", "]", False)):
        start, end = text.find(left), text.find(right)
        if start == -1 or end == -1:
            continue
        hook = text[start + 1 : end]
        names = _suppliers(hook, trainer, module, with_callbacks=with_callbacks)
        return text[:start] + hook + text[end + 1 :] + (f"  <- {', '.join(names)}" if names else "")
    return text


def _suppliers(hook: str, trainer: Trainer, module: LightningModule | None, *, with_callbacks: bool) -> list[str]:
    names: list[str] = []
    if with_callbacks:
        callbacks = trainer.callbacks
        if hook == "on_train_epoch_end":
            callbacks = [c for c in callbacks if not isinstance(c, (Checkpoint, EarlyStopping))]
        names += [type(c).__name__ for c in callbacks if _overrides(c, Callback, hook)]
    if module is not None and _overrides(module, LightningModule, hook):
        names.append(type(module).__name__)
    if with_callbacks and hook == "on_train_epoch_end":
        watching = [c for c in trainer.callbacks if isinstance(c, (Checkpoint, EarlyStopping))]
        names += [type(c).__name__ for c in watching if _overrides(c, Callback, hook)]
    return names


def _overrides(owner: Any, base: type, hook: str) -> bool:
    method = getattr(owner, hook, None)
    return method is not None and getattr(method, "__func__", method) is not getattr(base, hook, None)


def _origin(thing: object) -> str:
    """The class of ``thing`` and the distribution it comes from, or its module where that is in none."""
    kind = type(thing)
    package = kind.__module__.split(".")[0]
    # An editable install lists no files, so the mapping does not know it: its name is then the package's.
    for distribution in (*packages_distributions().get(package, ()), package.replace("_", "-")):
        try:
            return f"{kind.__name__} from {distribution} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return f"{kind.__name__} from {kind.__module__}"

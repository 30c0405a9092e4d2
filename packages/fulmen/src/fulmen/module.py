"""LightningModule: a model together with how it is trained, evaluated and saved."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from numbers import Number
from typing import IO, TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, Self, cast

import torch
from torch import Tensor

from fulmen._attached import AttachedModule
from fulmen._collection import map_leaves
from fulmen._dynamo import never_compiled
from fulmen._exports import Exports
from fulmen._loading import class_only, load_module
from fulmen._module_hooks import CheckpointHooks, DataHooks, ModuleHooks
from fulmen.hparams import HyperparametersMixin
from fulmen.optimizer import LightningOptimizer
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from os import PathLike

    from torch.optim import Optimizer


__all__ = ["LightningModule"]


class SupportsItems(Protocol):
    """A mapping, or a torchmetrics ``MetricCollection``, which is none."""

    def items(self) -> Iterable[tuple[str, Any]]:
        """Names and what is under them."""
        ...


class LightningModule(Exports, ModuleHooks, DataHooks, CheckpointHooks, HyperparametersMixin, AttachedModule):
    """An ``nn.Module`` that knows its training step, its optimizers and its data.

    Define ``training_step`` and ``configure_optimizers``, and give it to ``Trainer.fit``.
    """

    automatic_optimization: bool = True
    """Whether the Trainer calls backward and steps the optimizer; False leaves both to ``training_step``."""
    example_input_array: Any = None
    """One example of ``forward``'s input (a tensor, or a tuple or dict of arguments), for summaries and graphs."""

    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str] = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME: ClassVar[str] = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE: ClassVar[str] = "hparams_type"
    """Where Lightning's checkpoints have the hyperparameters, for ``on_save_checkpoint`` and its sibling."""

    _requires_grad_before: Mapping[Tensor, bool] | None = None
    compiled_from: dict[str, Any] | None = None
    """The methods that ``from_compiled`` replaced; None: the module is not compiled."""

    # TorchScript would read the annotations above, which are texts here, as its own types.
    __jit_ignored_attributes__: ClassVar[list[str]] = [
        "automatic_optimization",
        "example_input_array",
        "_requires_grad_before",
    ]

    # -- what users define ------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor | Mapping[str, Any] | None:
        """Take ``(batch, batch_idx)``; return the loss, a mapping with ``"loss"``, or None to skip the batch."""
        self._not_defined("training_step", "fit")

    def validation_step(self, *args: Any, **kwargs: Any) -> Tensor | Mapping[str, Any] | None:
        """Take ``(batch, batch_idx, dataloader_idx=0)``."""
        self._not_defined("validation_step", "validate")

    def test_step(self, *args: Any, **kwargs: Any) -> Tensor | Mapping[str, Any] | None:
        """Take ``(batch, batch_idx, dataloader_idx=0)``."""
        self._not_defined("test_step", "test")

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take ``(batch, batch_idx, dataloader_idx=0)``; return the prediction. By default that is ``self(batch)``."""
        return self(kwargs["batch"] if "batch" in kwargs else args[0])

    def configure_callbacks(self) -> Any:
        """Return a callback or several; each replaces those of the Trainer that are of its class or a base of it."""
        return []

    def configure_optimizers(self) -> Any:
        """Return the optimizer and, if wanted, its learning rate scheduler.

        Allowed are an optimizer; a list of them; two lists ``(optimizers, schedulers)``; a dict with ``"optimizer"``
        and optionally ``"lr_scheduler"`` (a scheduler, or a dict of ``LRSchedulerConfig``'s fields) and ``"monitor"``;
        a list of such dicts; None.
        """
        return None

    def _not_defined(self, step: str, method: str) -> NoReturn:
        raise MisconfigurationException(
            f"{type(self).__name__} does not define {step}. Define {step}(self, batch, batch_idx) to {method} it."
        )

    # -- logging ------------------------------------------------------------------------------------------------------

    @never_compiled
    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Record a value under ``name``. Neither waits for the device nor communicates.

        Args:
            name: of the value; logged both on step and on epoch it appears as ``name_step`` and ``name_epoch``.
            value: a number, a tensor of one element, or a torchmetrics ``Metric``.
            prog_bar: whether the progress bar shows it.
            logger: whether loggers get it (None: yes).
            on_step: whether it is recorded at this step (None: in training steps).
            on_epoch: whether it is combined over the epoch (None: everywhere else).
            reduce_fx: how: ``"mean"``, ``"sum"``, ``"min"``, ``"max"`` or torch's function of that name.
            enable_graph: accepted; recorded values never hold a graph.
            sync_dist: whether it is combined over all ranks.
            sync_dist_group: the ranks to combine over (None: all).
            add_dataloader_idx: whether the loader's index is appended to ``name`` when there are several.
            batch_size: weight of this value in a mean over the epoch (None: found from the batch).
            metric_attribute: name under which this module holds a ``Metric``, where it cannot be found by itself.
            rank_zero_only: whether only rank 0 calls this.

        Raises:
            MisconfigurationException: nothing can be logged at this moment, or ``name`` was logged otherwise before.
            ValueError: ``value`` is none of the allowed.
        """
        store = self.__dict__.get("_metric_store")
        if store is None:
            self._log_without_store(name, value, logger)
            return
        store.log(
            name,
            value,
            prog_bar,
            logger,
            on_step,
            on_epoch,
            reduce_fx,
            sync_dist,
            sync_dist_group,
            add_dataloader_idx,
            batch_size,
            metric_attribute,
            rank_zero_only,
            module=self,
        )

    @never_compiled
    def log_dict(
        self,
        dictionary: SupportsItems,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """``log`` every item of a dict or of a torchmetrics ``MetricCollection``; the other arguments are ``log``'s."""
        if self._trainer is None and self._fabric is not None:
            if logger is not False:
                self._fabric.log_dict(_for_fabric(dictionary))
            return
        for name, value in _items_to_log(dictionary):
            self.log(
                name,
                value,
                prog_bar,
                logger,
                on_step,
                on_epoch,
                reduce_fx,
                enable_graph,
                sync_dist,
                sync_dist_group,
                add_dataloader_idx,
                batch_size,
                None,
                rank_zero_only,
            )

    def _log_without_store(self, name: str, value: Any, logger: bool | None) -> None:
        if self._trainer is None and self._fabric is not None:
            if logger is not False:  # a Fabric has nothing else to log to
                self._fabric.log_dict(_for_fabric({name: value}))
            return
        if self._trainer is not None and not self._trainer.barebones:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was called outside of a run. Log in steps and hooks that the Trainer calls."
            )
        if self.__dict__.get("_warned_about_log"):
            return
        self.__dict__["_warned_about_log"] = True
        why = "it is not attached to a Trainer" if self._trainer is None else "its Trainer was made with barebones=True"
        warnings.warn(f"{type(self).__name__}.log({name!r}, ...) and further calls are ignored: {why}.", stacklevel=3)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print`` on rank 0, without disturbing a progress bar."""
        owner = self._trainer if self._trainer is not None else self._fabric
        (print if owner is None else owner.print)(*args, **kwargs)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Collect ``data`` from every rank; every rank must call this, with tensors of equal shapes.

        Args:
            data: a tensor or number, or nested collections of them.
            group: the ranks to collect from (None: all).
            sync_grads: whether gradients flow back to each rank's input.

        Returns:
            The same collections; a tensor of shape ``S`` becomes ``(world_size, *S)``. With one process it is ``data``.
        """
        if self._trainer is None and self._fabric is not None:
            return self._fabric.all_gather(data, group=group, sync_grads=sync_grads)
        trainer, device = self.trainer, self.device

        def gather(leaf: Any) -> Any:
            if isinstance(leaf, (bool, int, float)):
                leaf = torch.tensor(leaf, device=device)
            if not isinstance(leaf, Tensor):
                return leaf
            return trainer.strategy.all_gather(leaf, group=group, sync_grads=sync_grads)

        return map_leaves(gather, data)

    @property
    def _current_fx_name(self) -> str | None:
        """The hook that runs now, as ``self.log`` sees it, under the name that outside code reads."""
        store = self.__dict__.get("_metric_store")
        return None if store is None else str(store.scope.hook)

    # -- optimization -------------------------------------------------------------------------------------------------

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or the list of several. Any, so that manual optimization need not narrow it.

        Args:
            use_pl_optimizer: whether to get them wrapped, so that ``step`` goes through the Trainer (precision,
                strategy, hooks). With automatic optimization they are never wrapped.
        """
        trainer = self._trainer
        if trainer is None and self._fabric is not None:
            optimizers = self.__dict__.get("_fabric_optimizers", [])
        else:
            manual = self.trainer._manual if use_pl_optimizer else None  # pyright: ignore[reportPrivateUsage]
            optimizers = manual.optimizers if manual is not None else self.trainer.optimizers
        return optimizers[0] if len(optimizers) == 1 else list(optimizers)

    def lr_schedulers(self) -> Any:
        """The learning rate scheduler, the list of several, or None."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if not schedulers:
            return None
        return schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """``loss.backward(*args, **kwargs)`` through precision and strategy, for manual optimization.

        Raises:
            MisconfigurationException: the module uses automatic optimization.
        """
        if self._trainer is None and self._fabric is not None:
            self._fabric.backward(loss, *args, **kwargs)
            return
        self._must_be_manual("manual_backward")
        manual = self.trainer._manual  # pyright: ignore[reportPrivateUsage]
        if manual is None:
            raise MisconfigurationException("manual_backward was called outside of training. Call it in training_step.")
        manual.backward(loss, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients of ``loss``; override to do it otherwise."""
        if self._trainer is None and self._fabric is not None:
            self._fabric.backward(loss, *args, **kwargs)
        else:
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]  # its owner has left it untyped

    @never_compiled
    def toggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Let only the parameters of ``optimizer`` need gradients, until ``untoggle_optimizer``."""
        if self._requires_grad_before is not None:  # toggling from one to the next
            self._restore_requires_grad()
        before: dict[Tensor, bool] = {}
        for other in self._raw_optimizers():
            for parameter in _parameters_of(other):
                before.setdefault(parameter, parameter.requires_grad)
        for parameter in before:
            parameter.requires_grad = False
        for parameter in _parameters_of(optimizer):
            parameter.requires_grad = before.get(parameter, parameter.requires_grad)
        self.__dict__["_requires_grad_before"] = before

    @never_compiled
    def untoggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Give the parameters of all other optimizers back what ``toggle_optimizer`` took."""
        self._restore_requires_grad(keep=set(_parameters_of(optimizer)))

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> Generator[None, None, None]:
        """Within the block only the parameters of ``optimizer`` need gradients."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def _restore_requires_grad(self, keep: set[Tensor] | frozenset[Tensor] = frozenset()) -> None:
        for parameter, needed in (self._requires_grad_before or {}).items():
            if parameter not in keep:
                parameter.requires_grad = needed
        self.__dict__["_requires_grad_before"] = None

    def _raw_optimizers(self) -> Sequence[Optimizer]:
        optimizers = self.optimizers(use_pl_optimizer=False)
        return cast("list[Optimizer]", optimizers) if isinstance(optimizers, list) else [optimizers]

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of ``optimizer``'s parameters in place.

        Args:
            optimizer: whose parameters.
            gradient_clip_val: largest norm or value (None: the Trainer's; with none there nothing is clipped).
            gradient_clip_algorithm: ``"norm"`` or ``"value"`` (None: the Trainer's, else ``"norm"``).

        Raises:
            MisconfigurationException: the Trainer was given another value or algorithm, or the algorithm is unknown.
        """
        if self._trainer is None and self._fabric is not None:
            limit = {"clip_val" if gradient_clip_algorithm == "value" else "max_norm": gradient_clip_val}
            self._fabric.clip_gradients(self, optimizer, **cast("Any", limit))
            return
        trainer = self.trainer
        value = _one_of("gradient_clip_val", gradient_clip_val, trainer.gradient_clip_val)
        # The Trainer's algorithm counts only with its value: it has a default.
        trainers = None if trainer.gradient_clip_val is None else trainer.gradient_clip_algorithm
        algorithm = _one_of("gradient_clip_algorithm", gradient_clip_algorithm, trainers) or "norm"
        if algorithm not in ("norm", "value"):
            raise MisconfigurationException(f"gradient_clip_algorithm={algorithm!r}; it is 'norm' or 'value'.")
        if value:
            raw = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
            trainer.strategy.clip_gradients(raw, value, cast("Any", algorithm))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip before a step; override to clip otherwise, and call ``clip_gradients``."""
        self.clip_gradients(
            optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
        )

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step ``optimizer``; an override must call ``optimizer.step(closure=optimizer_closure)``, or the closure."""
        optimizer.step(closure=optimizer_closure)  # pyright: ignore[reportUnknownMemberType]

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients of ``optimizer``."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step ``scheduler``; ``metric`` is the monitored value, None if it has no monitor."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def _must_be_manual(self, method: str) -> None:
        if self.automatic_optimization:
            raise MisconfigurationException(
                f"{method} needs manual optimization, and automatic_optimization is True. "
                "Set self.automatic_optimization = False in __init__."
            )

    def freeze(self) -> Self:
        """Let no parameter need gradients, and switch to evaluation mode."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        return self.eval()

    def unfreeze(self) -> Self:
        """Let all parameters need gradients, and switch to training mode."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        return self.train()

    # -- saving -------------------------------------------------------------------------------------------------------

    @class_only
    def load_from_checkpoint(
        cls,  # noqa: N805  class_only is a classmethod
        checkpoint_path: str | PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build a module from a checkpoint, with the hyperparameters and the weights that are in it.

        Args:
            checkpoint_path: path, URL, or an open binary file, which is read from where it stands.
            map_location: device for the tensors, and so for the module (None: CPU, wherever they were saved).
            hparams_file: YAML or CSV file with hyperparameters to use in place of the stored ones.
            strict: whether keys must match exactly, or differences are warned of (None: as ``strict_loading`` says).
            weights_only: False runs code from the file, for files that hold more than plain data; None means True.
            kwargs: arguments of ``__init__`` that override stored hyperparameters.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is damaged, or holds objects that only code could rebuild.
            MisconfigurationException: it holds no model, or ``strict`` contradicts ``strict_loading``.
            RuntimeError: keys or shapes do not match.
            TypeError: called on an instance.
        """
        return load_module(cls, checkpoint_path, map_location, hparams_file, strict, weights_only, kwargs)


def _for_fabric(values: SupportsItems) -> dict[str, Any]:
    """What a Fabric's loggers get of ``values``: they take numbers and tensors of one element."""
    for name, value in values.items():
        if not isinstance(value, (Number, Tensor)) or (isinstance(value, Tensor) and value.numel() != 1):
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise ValueError(
                f"self.log({name!r}, ...) got a {type(value).__name__}{shape}; under a Fabric give a number or a "
                "tensor of one element."
            )
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}


def _parameters_of(optimizer: Optimizer | LightningOptimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _one_of(name: str, given: Any, trainers: Any) -> Any:
    if given is not None and trainers is not None and given != trainers:
        raise MisconfigurationException(
            f"clip_gradients got {name}={given!r}, and the Trainer has {name}={trainers!r}. Set it in one place."
        )
    return trainers if given is None else given


def _items_to_log(dictionary: SupportsItems) -> list[tuple[str, Any]]:
    torchmetrics = sys.modules.get("torchmetrics")
    if torchmetrics is not None and isinstance(dictionary, torchmetrics.MetricCollection):
        # Names with the collection's prefix and postfix; states that are shared within it stay shared.
        return list(cast("Any", dictionary).items(keep_base=False, copy_state=False))
    return list(dictionary.items())

"""One call of a Trainer: the module, its placed form, its optimizers and loaders; how they become a loop's parts."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from fulmen._compiled_log import let_log_in_graphs, recording
from fulmen._measuring import Measuring
from fulmen._partial_resume import EVERYTHING
from fulmen._raw_batches import fetches_itself, step_of_raw
from fulmen.metrics import scope_for
from fulmen.module import LightningModule
from fulmen.optimizer import LightningOptimizer
from fulmen_fabric import LossWeights, move_data_to_device, rank_zero_warn
from fulmen_fabric.abilities import supports
from fulmen_protocols import (
    SupportsBoundMethods,
    SupportsForwardContext,
    SupportsInputConversion,
    SupportsLoaderProcessing,
    SupportsManualBackward,
    SupportsOpenGradients,
    SupportsPrecisionPlan,
    SupportsShardedState,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from torch import nn
    from torch.optim import Optimizer

    from fulmen._data_waits import DataWaits
    from fulmen._engine import EngineSettings
    from fulmen._exact_state import CutEpoch
    from fulmen._loaders import EvalLoaders, LoaderSource
    from fulmen._predictions import PredictionRecord
    from fulmen._train_loader import TrainLoader
    from fulmen.datamodule import LightningDataModule
    from fulmen.hooks import HookBinder
    from fulmen.manual import ManualOptimization
    from fulmen.metrics import MetricStore
    from fulmen.optimizer import LRSchedulerConfig
    from fulmen.resume import Resume
    from fulmen.states import TrainerFn
    from fulmen_fabric import Assembly, World
    from fulmen_fabric.seed import RNGState
    from fulmen_fabric.steps import Gradients

__all__ = ["ModelModes", "Session", "unchanged"]


@dataclass
class Session:
    """The objects of one ``fit``, ``validate``, ``test`` or ``predict``."""

    fn: TrainerFn
    module: LightningModule
    datamodule: LightningDataModule | None
    assembly: Assembly
    world: World
    sources: dict[str, LoaderSource]
    """By stage: ``train``, ``val``, ``test``, ``predict``."""
    placed: nn.Module | None = None
    store: MetricStore | None = None
    """What ``self.log`` feeds now."""
    optimizers: list[Optimizer] = field(default_factory=list["Optimizer"])
    """Those that the strategy returned."""
    wrapped: list[LightningOptimizer] = field(default_factory=list[LightningOptimizer])
    schedulers: list[LRSchedulerConfig] = field(default_factory=list["LRSchedulerConfig"])
    train_loader: TrainLoader | None = None
    data_waits: DataWaits | None = None
    """Knows how long the running fit has waited for its training data."""
    eval_loaders: dict[str, EvalLoaders] = field(default_factory=dict[str, "EvalLoaders"])
    manual: ManualOptimization | None = None
    gradients: Gradients | None = None
    weighs_losses: bool = False
    """Whether losses are sums with a weight beside them."""
    batch_norms: dict[str, nn.Module] = field(default_factory=dict[str, "nn.Module"])
    """The user's layers that ``sync_batchnorm`` has replaced, by name."""
    is_layer_synced: bool = False
    """Whether the user's LayerSync plugin has replaced layers and not put them back yet."""
    said: set[str] = field(default_factory=set[str])
    """Advice that the Trainer has given already."""
    forward_only: bool = False
    """Whether training batches are run forward and nothing else."""
    measuring: Measuring = field(default_factory=Measuring)
    """Measures what is composed here, if the user gave a profiler."""
    predictions: PredictionRecord | None = None
    """What the running prediction has found so far."""
    resumed: dict[str, Any] | None = None
    """What the checkpoint holds for an exact resume, until the loop has begun."""
    cut_epoch: CutEpoch | None = None
    """What a checkpoint holds of an epoch that was left before its end, until the next one begins."""
    resume: Resume = EVERYTHING
    """What the call takes of its checkpoint."""
    rng_before_validation: RNGState | None = None
    """The random state in which the validation that is running within a fit began."""
    told_engine: EngineSettings | None = None
    """What the strategy's engine was told of this fit."""
    engine_checkpoint: str | None = None
    """The checkpoint to load, where the strategy's engine loads module and optimizers from it."""
    engine_weights_only: bool | None = None
    """Whether code from that checkpoint may run: only if this is False."""
    has_open_gradients: bool = False
    """Whether the checkpoint held gradients that manual optimization had not stepped on yet."""

    _loss_weights: LossWeights | None = field(default=None, init=False)  # a copy of the session counts for itself

    def __post_init__(self) -> None:
        for source in self.sources.values():
            source.scoped = self.scoped

    @property
    def loss_weights(self) -> LossWeights | None:
        """The weights of the open window, where losses have some; from then on that the processes have met."""
        if self.weighs_losses and self._loss_weights is None:
            self._loss_weights = LossWeights(self.world.collectives)
        return self._loss_weights

    def keep_training_of(self, previous: Session | None) -> None:
        """Hold on to what a fit of the same module left: it belongs in checkpoints that are saved after ``test``."""
        if previous is None or previous.module is not self.module:
            return
        self.optimizers, self.schedulers = previous.optimizers, previous.schedulers
        self.train_loader, self.eval_loaders = previous.train_loader, {}
        self.cut_epoch = previous.cut_epoch

    def scoped(self, name: str, hook: Callable[..., Any], owner: object = None) -> Callable[..., Any]:
        """``hook``, inside which ``self.log`` knows that it is in ``name``.

        ``owner`` is whose hook it is, for a profiler; None: the module's.
        """
        return self.within(name, self.measuring.hook(self.module if owner is None else owner, name, hook))

    def within(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The same for what is measured elsewhere, or not at all."""
        scope = scope_for(name)

        def call(*args: object, **kwargs: object) -> Any:
            store = self.store
            if store is None:
                return hook(*args, **kwargs)
            outer, store.scope = store.scope, scope
            try:
                return hook(*args, **kwargs)
            finally:
                store.scope = outer

        return call

    def call_everybodys(self, name: Literal["setup", "teardown"], binder: HookBinder) -> None:
        """Call this hook of the datamodule, the callbacks and the module, in this order."""
        if self.datamodule is not None:
            self.measuring.hook(self.datamodule, name, getattr(self.datamodule, name))(self.fn.value)
        for hook in binder.of_callbacks(name):
            hook(stage=self.fn.value)
        self.scoped(name, getattr(self.module, name))(self.fn.value)

    def logging_modules(self) -> list[LightningModule]:
        """The module and every LightningModule inside it: all may call ``self.log``."""
        return [module for module in self.module.modules() if isinstance(module, LightningModule)]

    def bound(self, name: str) -> Callable[..., Any]:
        """The module's method ``name``, entered through the strategy's wrapper where it has one."""
        strategy = self.assembly.strategy
        if self.placed is not None and supports(strategy, SupportsBoundMethods):
            return strategy.bind_method(self.placed, name)
        return getattr(self.module, name)  # type: ignore[no-any-return]  # Any by its nature

    def step_method(
        self, name: str, *, several_loaders: bool = False, bind: bool = True, manually: bool = False
    ) -> Callable[..., Any]:
        """A step of the module, called with ``(batch, batch_idx)``, and ``dataloader_idx`` where there are several.

        Args:
            name: of the module's method.
            several_loaders: whether ``dataloader_idx`` is passed.
            bind: whether to enter it through the strategy's wrapper.
            manually: whether it runs its own backward passes.
        """
        strategy = self.assembly.strategy
        if manually and self.placed is not None and supports(strategy, SupportsManualBackward):
            method: Callable[..., Any] = strategy.bind_manual_method(self.placed, name)
        else:
            method = self.bound(name) if bind else getattr(self.module, name)
        compiled = [each for each in self.logging_modules() if let_log_in_graphs(each)]
        if compiled:
            method = recording(method)
        if fetches_itself(getattr(self.module, name)):
            return step_of_raw(method)
        takes = _positional(getattr(self.module, name))
        given = 3 if several_loaders else 2
        return self.measuring.strategy(name, method if takes >= given else lambda *args: method(*args[:takes]))

    def told_of_raw_batch(self, batch: object) -> object:
        """What a step that fetches its batches itself has fetched: it weighs what is logged now."""
        return batch if self.store is None else self.store.start_batch(batch)

    def transfer(self) -> Callable[[object, int], object]:
        """Put a batch on the device: precision's casts, then the transfer hooks of datamodule or module."""
        device = self.world.device
        precision = self.assembly.precision
        convert = None
        if supports(precision, SupportsInputConversion) and not supports(self.assembly.strategy, SupportsPrecisionPlan):
            convert = precision.convert_input
        before = self._transfer_hook("on_before_batch_transfer")
        custom = self._transfer_hook("transfer_batch_to_device")
        after = self._transfer_hook("on_after_batch_transfer")
        moves = device.type != "cpu"
        processed = supports(self.assembly.strategy, SupportsLoaderProcessing)
        if convert is None and before is None and custom is None and after is None and (not moves or processed):
            return self.measuring.strategy("batch_to_device", unchanged)

        def transfer(batch: object, dataloader_idx: int) -> object:
            if convert is not None:
                batch = convert(batch)
            if before is not None:
                batch = before(batch, dataloader_idx)
            if custom is not None:
                batch = custom(batch, device, dataloader_idx)
            elif moves and not processed:
                batch = move_data_to_device(batch, device)
            if after is not None:
                batch = after(batch, dataloader_idx)
            return batch

        return self.measuring.strategy("batch_to_device", transfer)

    def _transfer_hook(self, name: str) -> Callable[..., Any] | None:
        # A datamodule's own version wins over the module's.
        found: list[tuple[object, Callable[..., Any]]] = []
        for owner in (self.datamodule, self.module):
            method = getattr(owner, name, None)
            if method is None:
                continue
            base = next(c for c in reversed(type(owner).__mro__) if name in vars(c))
            if getattr(method, "__func__", method) is not vars(base)[name]:
                found.append((owner, method))
        if len(found) > 1:
            rank_zero_warn(
                f"both {type(self.datamodule).__name__} and {type(self.module).__name__} define {name}: the "
                "datamodule's is called, the module's is not. Define it in one of them."
            )
        return self.scoped(name, found[0][1], found[0][0]) if found else None

    def process_loader(self) -> Callable[[Iterable[object]], Iterable[object]] | None:
        """How the strategy feeds its device, if it wants to."""
        strategy = self.assembly.strategy
        return strategy.process_loader if supports(strategy, SupportsLoaderProcessing) else None

    def has_gradients(self) -> bool:
        """Whether any parameter holds one, or the strategy one for it."""
        strategy = self.assembly.strategy
        if supports(strategy, SupportsOpenGradients) and self.placed is not None:
            return strategy.has_open_gradients(self.placed)
        return any(parameter.grad is not None for parameter in self.module.parameters())

    def place_again(self) -> None:
        """Let a strategy that wraps the module wrap it anew, for the parameters that need a gradient now.

        A sharded module is left as it is: its strategy looks at each backward pass.
        """
        strategy = self.assembly.strategy
        if supports(strategy, SupportsBoundMethods) and not supports(strategy, SupportsShardedState):
            self.placed = strategy.place(self.module)

    def close_loaders(self) -> None:
        """Let all loaders' workers go."""
        if self.train_loader is not None:
            self.train_loader.close()
        for loaders in self.eval_loaders.values():
            loaders.close()

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers (running statistics), as DDP does before a forward pass."""
        if self.world.world_size > 1:
            for buffer in self.module.buffers():
                self.world.collectives.broadcast(buffer)

    def forward_context(self) -> Callable[[], AbstractContextManager[object]] | None:
        """The context in which the precision wants every forward pass; None where it, or the strategy, needs none."""
        precision = self.assembly.precision
        if supports(self.assembly.strategy, SupportsPrecisionPlan):
            return None
        return precision.forward_context if supports(precision, SupportsForwardContext) else None

    def no_grad(self, *, inference_mode: bool) -> Callable[[], AbstractContextManager[object]]:
        """What evaluation runs under."""
        return torch.inference_mode if inference_mode else torch.no_grad


def unchanged(batch: object, dataloader_idx: int) -> object:
    """What transfer is where batches are already on their device and nobody overrides its hooks."""
    return batch


def _positional(function: Callable[..., Any]) -> int:
    """How many positional arguments ``function`` takes; a large number for ``*args``."""
    inner: object = getattr(function, "__wrapped__", None)
    if inspect.ismethod(inner):  # fully_shard's wrapper of a method: of itself inspect would leave out one too many
        function = inner
    count = 0
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return 1_000
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            count += 1
    return count


class ModelModes:
    """Puts a module into evaluation mode and gives every submodule its own flag back afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._flags: list[tuple[nn.Module, bool]] = []

    def remember(self) -> None:
        """Take the flags down, for whoever switches to evaluation himself."""
        self._flags = [(module, module.training) for module in self._module.modules()]

    def eval(self) -> None:
        """Remember the flags and switch to evaluation."""
        self.remember()
        self._module.eval()

    def restore(self) -> None:
        """Give the flags back; a submodule that was frozen in evaluation mode stays so."""
        for module, training in self._flags:
            module.training = training
        self._flags = []

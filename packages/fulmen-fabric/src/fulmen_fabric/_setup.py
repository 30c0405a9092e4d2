"""Putting strategy and precision around a module and its optimizers, once; nothing is decided later."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fulmen_fabric._in_use import InUse
from fulmen_fabric.abilities import supports
from fulmen_fabric.compiled import is_compiled, uncompiled
from fulmen_fabric.optimizers import refuse_closure, wrap_optimizer
from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_fabric.wrappers import FabricModule, Pass, require_fabric_backward
from fulmen_protocols import (
    MisconfigurationException,
    MisconfigurationRuntimeError,
    OwnsBackward,
    OwnsCheckpoints,
    OwnsGradClipping,
    OwnsOptimizerStep,
    OwnsSchedulers,
    SupportsBoundMethods,
    SupportsForwardContext,
    SupportsGradClipping,
    SupportsGradScaling,
    SupportsInputConversion,
    SupportsLayerReplacement,
    SupportsManualBackward,
    SupportsModuleCheck,
    SupportsNoSync,
    SupportsOptimizerPreparation,
    SupportsOutputConversion,
    SupportsPrecisionPlan,
    SupportsShardedSave,
    SupportsShardedState,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor
    from torch.optim import Optimizer

    from fulmen_fabric.assembly import Assembly

__all__ = ["Composer"]


class Composer:
    """Composes calls of module, backward and step from what strategy and precision can do."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._strategy = assembly.strategy
        self._precision = assembly.precision
        self._plan_is_applied = supports(assembly.strategy, SupportsPrecisionPlan)
        self._running_backward = False
        # The placed module whose training_step runs now and calls backward itself (manual optimization).
        self._in_manual_step: nn.Module | None = None
        # Of the modules set up, those whose wrapper is still in use.
        self._wrappers: InUse[FabricModule] = InUse()
        self._optimizers: InUse[Optimizer] = InUse()

    @property
    def is_sharded(self) -> bool:
        """Whether a checkpoint of this run is written by every rank: shards, and a format for them."""
        strategy = self._strategy
        return (
            supports(strategy, SupportsShardedState)
            and strategy.state_kind == "sharded"
            and supports(self._assembly.checkpoint_io, SupportsShardedSave)
        )

    # -- modules ------------------------------------------------------------------------------------------------------

    def place(self, module: nn.Module, device: torch.device, *, move: bool, recompile: bool) -> FabricModule:
        """Convert, place and wrap ``module``."""
        compiled, module = module, uncompiled(module)
        kinds = {str(parameter.device) for parameter in module.parameters()}
        if move and len(kinds) > 1:
            rank_zero_warn(
                f"{type(module).__name__} has parameters on {', '.join(sorted(kinds))}; setup moves all of them to "
                f"{device}. Pass move_to_device=False to keep them where they are."
            )
        if supports(self._strategy, SupportsModuleCheck):
            self._strategy.check_module(module)
        if not self._plan_is_applied:
            module = self._precision.convert_module(module)
        elif supports(self._precision, SupportsLayerReplacement):
            module = self._precision.replace_layers(module)
        placed = self._strategy.place(module) if move else self._place_in_position(module, kinds, device)
        called = placed
        if is_compiled(compiled):
            # The same options as the user's: dynamo_ctx is the compiler with its settings, not what it has compiled.
            compiler = cast("Callable[..., Any]", compiled.dynamo_ctx)
            if recompile:
                called = cast("Callable[..., nn.Module]", type(compiled))(placed, compiler)
            else:
                module.__dict__["_compiled_call_impl"] = compiler(_calls_of(module))
        wrapped = self._wrap(called, placed, module)
        self._wrappers.add(wrapped)
        return wrapped

    def _place_in_position(self, module: nn.Module, kinds: set[str], device: torch.device) -> nn.Module:
        if kinds <= {str(device)}:
            return self._strategy.place(module)  # where it is, is where the strategy would put it
        if supports(self._strategy, SupportsBoundMethods):
            raise MisconfigurationException(
                f"move_to_device=False leaves {type(module).__name__} on {', '.join(sorted(kinds))}, but strategy "
                f"{self._assembly.strategy_name!r} wraps modules on {device} only. Leave move_to_device at True."
            )
        return module

    def _wrap(self, called: nn.Module, placed: nn.Module, original: nn.Module) -> FabricModule:
        strategy = self._strategy
        sharded = strategy if supports(strategy, SupportsShardedState) else None

        def module_state(one: nn.Module) -> Mapping[str, object]:
            assert sharded is not None
            return sharded.module_state(one, full=not self.is_sharded)

        def load_state(one: nn.Module, state: Mapping[str, object], strict: bool) -> object:
            assert sharded is not None
            sharded.load_module_state(one, state, strict=strict)
            return None

        return FabricModule(
            called,
            placed,
            original,
            self._around(),
            self._bind(original) if supports(strategy, SupportsBoundMethods) else None,
            module_state if sharded is not None else None,
            load_state if sharded is not None else None,
        )

    def _bind(self, original: nn.Module) -> Callable[[nn.Module, str], Callable[..., object]]:
        strategy = self._strategy
        assert supports(strategy, SupportsBoundMethods)
        plain = strategy.bind_method
        if getattr(original, "automatic_optimization", True) or not supports(strategy, SupportsManualBackward):
            return plain
        manual = strategy.bind_manual_method

        def bind(placed: nn.Module, name: str) -> Callable[..., object]:
            if name != "training_step":
                return plain(placed, name)
            step = manual(placed, name)

            def manual_step(*args: object, **kwargs: object) -> object:
                before, self._in_manual_step = self._in_manual_step, placed
                try:
                    return step(*args, **kwargs)
                finally:
                    self._in_manual_step = before

            return manual_step

        return bind

    def _around(self) -> Pass:
        precision = self._precision
        watch = None
        if self._scales() or supports(self._strategy, OwnsBackward):
            name = self._assembly.precision_name if self._scales() else self._assembly.strategy_name
            watch = require_fabric_backward(lambda: self._running_backward, f"{name!r}")
        if self._plan_is_applied:
            return Pass(watch_output=watch)
        return Pass(
            precision.forward_context if supports(precision, SupportsForwardContext) else None,
            precision.convert_input if supports(precision, SupportsInputConversion) else None,
            precision.convert_output if supports(precision, SupportsOutputConversion) else None,
            watch,
        )

    def _scales(self) -> bool:
        # An engine that runs backward scales by itself.
        return supports(self._precision, SupportsGradScaling) and not supports(self._strategy, OwnsBackward)

    def placed(self, module: nn.Module) -> nn.Module:
        """What the strategy placed for ``module``, a wrapper or the user's own."""
        module = uncompiled(module)
        if isinstance(module, FabricModule):
            return module.placed
        return next((wrapper.placed for wrapper in self._wrappers if wrapper.module is module), module)

    def placed_for(self, optimizers: Sequence[Optimizer]) -> nn.Module | None:
        """The placed module whose parameters these optimizers hold; the only one, if there is only one."""
        distinct = self._all_placed()
        if len(distinct) == 1:
            return distinct[0]
        held = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
        return next((one for one in distinct if any(id(param) in held for param in one.parameters())), None)

    def module_of(self, placed: nn.Module | None) -> nn.Module | None:
        """The user's module inside what the strategy placed."""
        return next((wrapper.module for wrapper in self._wrappers if wrapper.placed is placed), None)

    def modules_in_use(self) -> list[nn.Module]:
        """The user's modules whose wrappers somebody holds."""
        return [wrapper.module for wrapper in self._wrappers]

    def optimizers_in_use(self) -> list[Optimizer]:
        """The optimizers that were set up and that somebody holds, as the strategy prepared them."""
        return list(self._optimizers)

    # -- the step -----------------------------------------------------------------------------------------------------

    def backward(self) -> Callable[..., None]:
        """``(loss, model, *args, **kwargs)``: one backward pass."""
        strategy, run = self._strategy, self._backward_pass()
        if not supports(strategy, SupportsManualBackward):
            return run
        prepare = strategy.manual_backward

        def run_anywhere(loss: Tensor, model: nn.Module | None, *args: object, **kwargs: object) -> None:
            placed = self._in_manual_step
            with nullcontext() if placed is None else prepare(placed, loss):
                run(loss, model, *args, **kwargs)

        return run_anywhere

    def _backward_pass(self) -> Callable[..., None]:
        strategy, precision = self._strategy, self._precision
        if supports(strategy, OwnsBackward):
            engine = strategy.backward

            def run_by_engine(loss: Tensor, model: nn.Module | None, *args: object, **kwargs: object) -> None:
                if args:
                    raise MisconfigurationException(
                        f"strategy {self._assembly.strategy_name!r} runs backward itself and takes no positional "
                        "argument besides the loss. Pass them by name."
                    )
                with self._in_backward():
                    engine(loss, self.placed(model) if model is not None else self._only_placed(), **kwargs)

            return run_by_engine
        if supports(precision, SupportsGradScaling):
            scale = precision.scale

            def run_scaled(loss: Tensor, _model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
                with self._in_backward():
                    scale(loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch leaves it untyped

            return run_scaled
        return _plain_backward

    @contextmanager
    def _in_backward(self) -> Generator[None, None, None]:
        self._running_backward = True
        try:
            yield
        finally:
            self._running_backward = False

    def _all_placed(self) -> list[nn.Module]:
        return [wrapper.placed for wrapper in self._wrappers]

    def _only_placed(self) -> nn.Module:
        distinct = self._all_placed()
        if len(distinct) == 1:
            return distinct[0]
        name = self._assembly.strategy_name
        if not distinct:
            raise MisconfigurationRuntimeError(
                f"fabric.backward() was called under strategy {name!r}, whose engine runs it, but no module was set "
                "up. Call fabric.setup() first."
            )
        kinds = ", ".join(type(wrapper.module).__name__ for wrapper in self._wrappers)
        raise MisconfigurationException(
            f"fabric.backward(loss) cannot tell which of {len(distinct)} modules ({kinds}) the loss came from, and "
            f"strategy {name!r} has an engine for each. Say it: fabric.backward(loss, model=model)."
        )

    def wrap_optimizers(
        self,
        placed: nn.Module | None,
        optimizers: Sequence[Optimizer],
        after_step: Sequence[Callable[[Optimizer], object]],
    ) -> list[Optimizer]:
        """Prepare and wrap optimizers; their parameters belong to ``placed``."""
        strategy = self._strategy
        prepared = list(optimizers)
        if placed is not None:
            prepared = list(strategy.prepare_optimizers(placed, optimizers))
        if supports(self._precision, SupportsOptimizerPreparation):
            for one in prepared:
                self._precision.prepare_optimizer(one)
        sharded = strategy if supports(strategy, SupportsShardedState) and placed is not None else None

        def state(optimizer: Optimizer) -> Mapping[str, object]:
            assert sharded is not None
            assert placed is not None
            return sharded.optimizer_state(placed, optimizer, full=not self.is_sharded)

        def load_state(optimizer: Optimizer, saved: Mapping[str, object]) -> object:
            assert sharded is not None
            assert placed is not None
            sharded.load_optimizer_state(placed, optimizer, saved)
            return None

        step = self._step(placed)
        self._optimizers.update(prepared)
        return [
            wrap_optimizer(
                one,
                step,
                after_step,
                state if sharded is not None else None,
                load_state if sharded is not None else None,
            )
            for one in prepared
        ]

    def take_scheduler(self, placed: nn.Module, scheduler: object) -> None:
        """Let an engine that steps schedulers step this one; otherwise the user does."""
        if supports(self._strategy, OwnsSchedulers):
            self._strategy.take_scheduler(placed, scheduler)

    @property
    def checkpoint_owner(self) -> OwnsCheckpoints | None:
        """The strategy, if its engine writes checkpoints itself."""
        return self._strategy if supports(self._strategy, OwnsCheckpoints) else None

    def _step(self, placed: nn.Module | None) -> Callable[[Optimizer, Callable[[], object] | None], object] | None:
        strategy, precision = self._strategy, self._precision
        if supports(strategy, OwnsOptimizerStep):
            engine = strategy.optimizer_step

            def by_engine(optimizer: Optimizer, closure: Callable[[], object] | None) -> object:
                return engine(optimizer, placed, closure)

            return by_engine
        if supports(precision, SupportsGradScaling) and self._scales():
            step, update, name = precision.step, precision.update, self._assembly.precision_name

            def scaled(optimizer: Optimizer, closure: Callable[[], object] | None) -> object:
                refuse_closure(closure, f"precision {name!r}")
                result = step(optimizer)
                update()
                return result

            return scaled
        return None

    def clip(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None,
        max_norm: float | None,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> Tensor | None:
        """Unscale where gradients are scaled, then clip by value or by norm; returns the norm, or None."""
        strategy, precision = self._strategy, self._precision
        if supports(strategy, OwnsGradClipping):
            asked = f"clip_val={clip_val!r}" if max_norm is None else f"max_norm={max_norm!r}"
            raise MisconfigurationException(
                f"clip_gradients({asked}) under strategy {self._assembly.strategy_name!r}, whose engine clips inside "
                "its step. Leave the call out, and set the norm in the engine's own configuration."
            )
        if supports(precision, SupportsGradScaling) and self._scales():
            precision.unscale(optimizer)
        if supports(strategy, SupportsGradClipping):
            placed = self.placed(module)
            if max_norm is None:
                strategy.clip_grad_value(placed, optimizer, cast("float", clip_val))
                return None
            return strategy.clip_grad_norm(
                placed, optimizer, max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite
            )
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        if max_norm is None:
            nn.utils.clip_grad_value_(parameters, cast("float", clip_val))
            return None
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite=error_if_nonfinite)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Within the block gradients stay local, where the strategy can do that."""
        strategy = self._strategy
        if supports(strategy, SupportsNoSync):
            return strategy.no_sync(self.placed(module))
        if self._assembly.world_size > 1:
            rank_zero_warn(
                f"strategy {self._assembly.strategy_name!r} cannot hold back the reduction of gradients: "
                "no_backward_sync() has no effect."
            )
        return nullcontext()


def _calls_of(module: nn.Module) -> Callable[..., object]:
    """What ``nn.Module.compile`` compiles: the module's own calls. In a function of ours, as torch skips its own."""
    # torch has no public way to it
    run = cast("Callable[..., object]", module._call_impl)  # pyright: ignore[reportPrivateUsage]

    def call(*args: object, **kwargs: object) -> object:
        return run(*args, **kwargs)

    return call


def _plain_backward(loss: Tensor, _model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
    loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch leaves it untyped

"""The user's optimizer, stepped through strategy and precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.optim import Optimizer

    from fulmen_protocols import Optimizable

__all__ = ["FabricOptimizer"]


class FabricOptimizer:
    """The user's optimizer, stepped through strategy and precision. Instances are also of the optimizer's own class.

    ``param_groups``, ``state`` and ``defaults`` are the optimizer's, also after it has loaded a state.
    """

    _fabric_optimizer: Optimizer
    _fabric_step: Callable[..., object]
    _fabric_state: Callable[[Optimizer], Mapping[str, object]] | None
    _fabric_load_state: Callable[[Optimizer, Mapping[str, object]], object] | None

    @property
    def optimizer(self) -> Optimizer:
        """The user's optimizer."""
        return self._fabric_optimizer

    # Any: as torch declares them.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own list."""
        return self._fabric_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._fabric_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The optimizer's own mapping."""
        return self._fabric_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self._fabric_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's own defaults."""
        return self._fabric_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._fabric_optimizer.defaults = value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update once. With a ``closure`` the optimizer evaluates the loss again."""
        return self._fabric_step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients."""
        self._fabric_optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's layout."""
        if self._fabric_state is not None:
            return dict(self._fabric_state(self._fabric_optimizer))
        return self._fabric_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave."""
        if self._fabric_load_state is not None:
            self._fabric_load_state(self._fabric_optimizer, state_dict)
        else:
            self._fabric_optimizer.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"Fabric{self._fabric_optimizer!r}"


def wrap_optimizer(
    optimizer: Optimizer | Optimizable,
    step: Callable[[Optimizer, Callable[[], object] | None], object] | None,
    after_step: Sequence[Callable[[Optimizer], object]] = (),
    state: Callable[[Optimizer], Mapping[str, object]] | None = None,
    load_state: Callable[[Optimizer, Mapping[str, object]], object] | None = None,
) -> Optimizer:
    """Wrap ``optimizer`` so that ``isinstance`` still finds its class.

    Args:
        optimizer: any optimizer.
        step: how strategy and precision step it; None: ``optimizer.step``.
        after_step: called with the optimizer after each step.
        state: the optimizer's state where one rank does not hold it whole.
        load_state: the way back.
    """
    inner = cast("Optimizer", optimizer)
    kind = type(inner)
    wrapper: FabricOptimizer = object.__new__(type(f"Fabric{kind.__name__}", (FabricOptimizer, kind), {}))
    # The hooks' dictionaries are shared, so a hook registered on either is seen by both. A step on the instance is a
    # scheduler's counter around the inner step, and belongs there.
    ours = {"step", "param_groups", "state", "defaults"}
    shared = {name: value for name, value in inner.__dict__.items() if name not in ours}
    wrapper.__dict__.update(
        shared,
        _fabric_optimizer=inner,
        _fabric_state=state,
        _fabric_load_state=load_state,
        _fabric_step=_compose_step(inner, step, tuple(after_step)),
    )
    return cast("Optimizer", wrapper)


def _compose_step(
    inner: Optimizer,
    step: Callable[[Optimizer, Callable[[], object] | None], object] | None,
    after_step: tuple[Callable[[Optimizer], object], ...],
) -> Callable[..., object]:
    def plain(closure: Callable[[], Any] | None) -> object:
        # Looked up each time: a scheduler replaces it on the instance.
        return inner.step(closure) if closure is not None else inner.step()

    def special(closure: Callable[[], object] | None) -> object:
        return plain(closure) if step is None else step(inner, closure)

    chosen = plain if step is None else special
    if not after_step:
        return chosen

    def with_callbacks(closure: Callable[[], object] | None) -> object:
        result = chosen(closure)
        for callback in after_step:
            callback(inner)
        return result

    return with_callbacks


def refuse_closure(closure: object, what: str) -> None:
    """Raises: MisconfigurationException: a closure was given to ``what``, which evaluates the loss once only."""
    if closure is not None:
        raise MisconfigurationException(
            f"{what} cannot be used with a closure (LBFGS): the loss is scaled once per update. "
            "Use precision='bf16-mixed'."
        )

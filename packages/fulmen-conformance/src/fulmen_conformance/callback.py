"""The kit for callbacks."""

from __future__ import annotations

import inspect
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fulmen_conformance._kit import Kit
from fulmen_protocols import HOOKS, Callback, Stateful, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CallbackConformance"]


class CallbackConformance(Kit):
    """Proves a callback: any object with hook methods. Give the fixture ``callback``."""

    @pytest.fixture
    def callback(self) -> Callback:
        """The callback under test, new for each test."""
        raise NotImplementedError("define a fixture `callback` that returns the callback under test")

    def test_every_on_method_is_a_hook(self, callback: Callback) -> None:
        """A misspelt hook would never be called. On failure look at the spelling of the method named."""
        unknown = [name for name in dir(callback) if name.startswith("on_") and name not in HOOKS]

        assert not unknown, "; ".join(f"{name} is no hook.{did_you_mean(name, HOOKS)}" for name in unknown)

    def test_it_has_at_least_one_hook(self, callback: Callback) -> None:
        """An object without hooks does nothing. On failure look at the names of its methods."""
        assert _hooks(callback), f"{type(callback).__name__} defines none of: {', '.join(HOOKS)}"

    def test_every_hook_takes_the_arguments_it_is_given(self, callback: Callback) -> None:
        """Hooks get ``(trainer, pl_module, *arguments)``. On failure look at the signature of the hook named."""
        for name, hook in _hooks(callback).items():
            signature = inspect.signature(hook)
            given = ("trainer", "pl_module", *HOOKS[name])
            try:
                signature.bind(*given)
            except TypeError as error:
                pytest.fail(f"{name}{signature} cannot be called with ({', '.join(given)}): {error}")

    def test_a_stage_can_be_given_by_name(self, callback: Callback) -> None:
        """``setup`` and ``teardown`` get ``stage=``. On failure look at the name of their last argument."""
        for name in ("setup", "teardown"):
            hook = _hooks(callback).get(name)
            if hook is not None:
                inspect.signature(hook).bind("trainer", "pl_module", stage="fit")

    def test_no_hook_is_a_coroutine_or_a_generator(self, callback: Callback) -> None:
        """Its body would never run: hooks are plain calls. On failure look for ``async def`` and ``yield``."""
        for name, hook in _hooks(callback).items():
            lazy = inspect.iscoroutinefunction(hook) or inspect.isgeneratorfunction(hook)
            assert not lazy, f"{name} only makes a coroutine or generator when it is called"

    def test_state_is_taken_and_given_back_or_neither(self, callback: Callback) -> None:
        """One without the other loses state on resume. On failure add the method that is missing."""
        assert hasattr(callback, "state_dict") == hasattr(callback, "load_state_dict")

    def test_its_state_survives_a_file_that_runs_no_code(self, callback: Callback) -> None:
        """Checkpoints are read with ``weights_only=True``. On failure look in ``state_dict()`` for your own classes."""
        before = _stateful(callback).state_dict()
        file = io.BytesIO()
        torch.save(before, file)

        after = torch.load(io.BytesIO(file.getvalue()), weights_only=True)

        assert _same(after, before)

    def test_loading_its_own_state_changes_nothing(self, callback: Callback) -> None:
        """The round trip of a resume. On failure look at what ``load_state_dict`` leaves out or adds."""
        stateful = _stateful(callback)
        before = stateful.state_dict()

        stateful.load_state_dict(before)

        assert _same(stateful.state_dict(), before)

    def test_taking_its_state_changes_nothing(self, callback: Callback) -> None:
        """A save must not alter the run. On failure look for counters moved in ``state_dict()``."""
        stateful = _stateful(callback)

        assert _same(stateful.state_dict(), stateful.state_dict())

    def test_its_state_key_is_text_and_stays_the_same(self, callback: Callback) -> None:
        """It finds the state in a checkpoint of another process. On failure look for ``id(self)`` in ``state_key``."""
        if not hasattr(callback, "state_key"):
            pytest.skip(f"{type(callback).__name__} has no state_key; its class name is used")
        keyed: Any = callback  # state_key is optional, so the protocol does not have it
        key: object = keyed.state_key

        assert isinstance(key, str)
        assert key
        assert keyed.state_key == key
        assert hex(id(callback)).removeprefix("0x") not in key.lower()
        assert str(id(callback)) not in key


def _hooks(callback: object) -> dict[str, Callable[..., object]]:
    return {name: getattr(callback, name) for name in HOOKS if callable(getattr(callback, name, None))}


def _stateful(callback: object) -> Stateful:
    if not isinstance(callback, Stateful):
        pytest.skip(f"{type(callback).__name__} keeps no state")
    return callback


# Any: state is whatever the callback keeps, compared item by item.
def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if issubclass(type(a), torch.Tensor):
        return bool(a.dtype == b.dtype and torch.equal(a, b))
    if issubclass(type(a), dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if issubclass(type(a), (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)

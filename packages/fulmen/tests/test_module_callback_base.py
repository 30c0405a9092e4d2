"""The Callback base class and LambdaCallback."""

from __future__ import annotations

import inspect

import pytest

from fulmen.callbacks import Callback, Checkpoint, LambdaCallback
from fulmen_protocols import HOOKS, MisconfigurationException


@pytest.mark.proves("11.1")
def test_every_hook_exists_with_the_arguments_of_the_protocol() -> None:
    for name, arguments in HOOKS.items():
        parameters = list(inspect.signature(getattr(Callback, name)).parameters)
        assert parameters == ["self", "trainer", "pl_module", *arguments], name


def test_hooks_do_nothing() -> None:
    callback = Callback()
    for name, arguments in HOOKS.items():
        assert getattr(callback, name)(None, None, *arguments) is None


@pytest.mark.proves("11.3")
def test_a_state_key_tells_instances_with_other_arguments_apart() -> None:
    class Mine(Callback):
        def __init__(self, what: str) -> None:
            self.what = what

        @property
        def state_key(self) -> str:
            return self._generate_state_key(what=self.what)

    assert Mine("a").state_key != Mine("b").state_key
    assert Mine("a").state_key == Mine("a").state_key
    assert Checkpoint().state_key == "Checkpoint"
    assert Callback().state_dict() == {}


@pytest.mark.proves("11.21")
def test_functions_run_as_hooks_with_the_hooks_arguments() -> None:
    calls: list[object] = []
    callback = LambdaCallback(
        on_train_batch_end=lambda *arguments: calls.append(arguments), on_fit_end=None, setup=lambda *a: calls.append(a)
    )

    callback.setup("trainer", "module", "fit")  # type: ignore[arg-type]  # a stand-in
    callback.on_train_batch_end("trainer", "module", "outputs", "batch", 3)  # type: ignore[arg-type]  # a stand-in
    callback.on_fit_end("trainer", "module")  # type: ignore[arg-type]  # a stand-in

    assert calls == [("trainer", "module", "fit"), ("trainer", "module", "outputs", "batch", 3)]


@pytest.mark.proves("11.21")
def test_a_misspelt_hook_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(MisconfigurationException, match="Did you mean 'on_train_start'"):
        LambdaCallback(on_train_starts=print)
    with pytest.raises(MisconfigurationException, match="give a function"):
        LambdaCallback(on_train_start=3)  # type: ignore[arg-type]  # wrong on purpose

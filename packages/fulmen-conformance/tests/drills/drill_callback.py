"""A minimal correct callback, and broken ones that CallbackConformance must catch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest

from fulmen_conformance import CallbackConformance

if TYPE_CHECKING:
    from fulmen_protocols import Callback


class Good:
    """Counts batches."""

    state_key = "Counter"

    def __init__(self) -> None:
        self.batches = 2

    def setup(self, trainer: object, pl_module: object, stage: str) -> None:
        self.stage = stage

    def on_train_batch_end(
        self, trainer: object, pl_module: object, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, object]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.batches = state_dict["batches"]


class TestGood(CallbackConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def callback(self) -> Callback:
        return Good()


def broken(backend: type, *tests: str) -> type[CallbackConformance]:
    """A subclass of the kit for ``backend``, which exactly ``tests`` must catch."""

    class Drill(CallbackConformance):
        caught_by: ClassVar[set[str]] = set(tests)

        @pytest.fixture
        def callback(self) -> Callback:
            return backend()

    return Drill


class Misspelt(Good):
    def on_train_epoch_finish(self, trainer: object, pl_module: object) -> None:
        pass


class OldSignature(Good):
    def on_train_batch_end(self, trainer: object, pl_module: object) -> None:
        pass


class StageByAnotherName(Good):
    def setup(self, trainer: object, pl_module: object, phase: str) -> None:
        pass


class Asynchronous(Good):
    async def on_train_start(self, trainer: object, pl_module: object) -> None:
        pass


class Forgetful(Good):
    load_state_dict = property()


class OwnClassInState(Good):
    def state_dict(self) -> dict[str, object]:
        return {"batches": frozenset([self.batches])}


class LoadsWrong(Good):
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.batches = 0


class CountsSaves(Good):
    def state_dict(self) -> dict[str, object]:
        self.batches += 1
        return {"batches": self.batches}


class KeyOfThisProcess(Good):
    @property
    def state_key(self) -> str:
        return f"Counter-{id(self)}"


class Nothing:
    pass


TestMisspelt = broken(Misspelt, "test_every_on_method_is_a_hook")
TestOldSignature = broken(OldSignature, "test_every_hook_takes_the_arguments_it_is_given")
TestStageByAnotherName = broken(StageByAnotherName, "test_a_stage_can_be_given_by_name")
TestAsynchronous = broken(Asynchronous, "test_no_hook_is_a_coroutine_or_a_generator")
TestForgetful = broken(
    Forgetful, "test_state_is_taken_and_given_back_or_neither", "test_loading_its_own_state_changes_nothing"
)
TestOwnClassInState = broken(
    OwnClassInState, "test_its_state_survives_a_file_that_runs_no_code", "test_loading_its_own_state_changes_nothing"
)
TestLoadsWrong = broken(LoadsWrong, "test_loading_its_own_state_changes_nothing")
TestCountsSaves = broken(
    CountsSaves, "test_taking_its_state_changes_nothing", "test_loading_its_own_state_changes_nothing"
)
TestKeyOfThisProcess = broken(KeyOfThisProcess, "test_its_state_key_is_text_and_stays_the_same")
TestNothing = broken(Nothing, "test_it_has_at_least_one_hook")

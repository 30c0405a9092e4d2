"""A minimal correct strategy, and broken ones that StrategyConformance must catch."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch

from fulmen_conformance import StrategyConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fulmen_protocols import Strategy, Topology


class Single:
    """One device, nothing more than the protocol asks."""

    def __init__(self) -> None:
        self.root_device = torch.device("meta")

    def setup_environment(self, topology: Topology) -> None:
        self.root_device = topology.device

    def module_context(self, *, empty: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.root_device)

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        return optimizers

    def teardown(self) -> None:
        pass


class TestSingle(StrategyConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def strategy(self) -> Strategy:
        return Single()


def broken(backend: type[Single], *tests: str) -> type[StrategyConformance]:
    """A subclass of the kit for ``backend``, which exactly ``tests`` must catch."""

    class Drill(StrategyConformance):
        caught_by: ClassVar[set[str]] = set(tests)

        @pytest.fixture
        def strategy(self) -> Strategy:
            return backend()

    return Drill


_TRAINS = (
    "test_training_gives_the_weights_of_plain_pytorch_bit_for_bit",
    "test_gradients_accumulate_over_batches",
    "test_teardown_can_be_called_twice_and_the_cycle_starts_again",
)


class HalvesTheLoss(Single):
    def backward(self, loss: Tensor, module: nn.Module | None, **kwargs: object) -> None:
        (loss * 0.5).backward()


class PlacesACopy(Single):
    def place(self, module: nn.Module) -> nn.Module:
        return copy.deepcopy(module)


class ChangesWeights(Single):
    def place(self, module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1e-7)
        return module


class DropsOptimizers(Single):
    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        return []


class ResetsOptimizers(Single):
    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        return [torch.optim.SGD(module.parameters(), lr=0.1) for _ in optimizers]


class WrongDevice(Single):
    def setup_environment(self, topology: Topology) -> None:
        self.root_device = torch.device("cpu", 0)


class Reseeds(Single):
    def module_context(self, *, empty: bool) -> contextlib.AbstractContextManager[object]:
        torch.manual_seed(99)
        return contextlib.nullcontext()


class LeaksDtype(Single):
    def module_context(self, *, empty: bool) -> contextlib.AbstractContextManager[object]:
        @contextlib.contextmanager
        def context() -> Iterator[None]:
            torch.set_default_dtype(torch.float64)
            yield
            torch.set_default_dtype(torch.float32)

        return context()


class TearsDownOnce(Single):
    def setup_environment(self, topology: Topology) -> None:
        super().setup_environment(topology)
        self.joined = True

    def teardown(self) -> None:
        del self.joined


class ClosureDropped(Single):
    def optimizer_step(
        self, optimizer: Optimizer, module: nn.Module | None, closure: Callable[[], object] | None = None
    ) -> object:
        return optimizer.step()


class StepsEveryTime(Single):
    def set_accumulation(self, batches: int) -> None:
        pass


class IgnoresWindowEnds(StepsEveryTime):
    def set_window_end(self, module: nn.Module | None, is_end: bool) -> None:
        pass


class ClipsNothing(Single):
    def set_clipping(self, value: float | None, algorithm: str = "norm") -> None:
        pass


class ForgetsSchedulers(Single):
    def take_scheduler(self, module: nn.Module, scheduler: object) -> None:
        pass

    def release_schedulers(self, module: nn.Module) -> Sequence[object]:
        return []


class SavesTheRestOnly(Single):
    rest: ClassVar[dict[str, object]] = {}

    def owns_checkpoint(self, path: str) -> bool:
        return True

    def save_checkpoint(self, module: nn.Module, rest: dict[str, object], path: str) -> None:
        self.rest.update(rest)

    def read_rest(self, path: str, weights_only: bool | None) -> dict[str, object]:
        return dict(self.rest)

    def load_checkpoint(
        self, module: nn.Module, path: str, *, optimizers: bool, strict: bool, weights_only: bool | None = None
    ) -> None:
        pass


class UsesUpTheLoader(Single):
    def process_loader(self, loader: Iterable[object]) -> Iterable[object]:
        return iter(list(loader))


class PlanIgnored(Single):
    def apply_precision_plan(self, plan: object) -> None:
        pass


class HalfOfClipping(Single):
    def clip_grad_value(self, module: nn.Module, optimizer: Optimizer, clip_value: float) -> None:
        pass


TestHalvesTheLoss = broken(HalvesTheLoss, *_TRAINS)
TestPlacesACopy = broken(
    PlacesACopy,
    *_TRAINS,
    "test_the_module_itself_has_the_trained_weights_by_canonical_name",
    "test_an_empty_module_can_be_placed_and_loaded",
)
TestChangesWeights = broken(ChangesWeights, "test_a_placed_module_computes_what_the_module_computed", *_TRAINS)
TestDropsOptimizers = broken(
    DropsOptimizers, *_TRAINS, "test_the_module_itself_has_the_trained_weights_by_canonical_name"
)
TestResetsOptimizers = broken(
    ResetsOptimizers,
    _TRAINS[0],
    _TRAINS[2],
)
TestWrongDevice = broken(
    WrongDevice,
    "test_its_root_device_is_this_process_s",
    "test_a_placed_module_computes_what_the_module_computed",
)
TestReseeds = broken(Reseeds, "test_modules_are_created_with_the_values_of_plain_pytorch")
TestLeaksDtype = broken(
    LeaksDtype,
    "test_an_empty_module_can_be_placed_and_loaded",
    "test_modules_are_created_with_the_values_of_plain_pytorch",
    "test_module_context_leaves_torch_as_it_was",
)
TestTearsDownOnce = broken(TearsDownOnce, "test_teardown_can_be_called_twice_and_the_cycle_starts_again")
TestClosureDropped = broken(ClosureDropped, "test_an_engine_s_step_evaluates_the_closure")
TestStepsEveryTime = broken(StepsEveryTime, "test_an_engine_that_accumulates_steps_once_a_window")
TestIgnoresWindowEnds = broken(
    IgnoresWindowEnds,
    "test_an_engine_that_accumulates_steps_once_a_window",
    "test_an_engine_that_is_told_where_a_window_ends_steps_there",
)
TestClipsNothing = broken(ClipsNothing, "test_an_engine_that_clips_steps_as_pytorch_does_after_clipping")
TestForgetsSchedulers = broken(
    ForgetsSchedulers, "test_an_engine_steps_the_schedulers_it_has_taken_and_no_longer_those_released"
)
TestSavesTheRestOnly = broken(SavesTheRestOnly, "test_an_engine_s_checkpoint_brings_back_module_optimizer_and_the_rest")
TestUsesUpTheLoader = broken(UsesUpTheLoader, "test_a_processed_loader_gives_the_same_batches_on_the_device")
TestPlanIgnored = broken(PlanIgnored, "test_a_precision_plan_is_honoured_or_refused")
TestHalfOfClipping = broken(HalfOfClipping, "test_each_ability_is_whole_or_absent")

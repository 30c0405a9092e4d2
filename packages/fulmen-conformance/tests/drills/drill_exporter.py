"""A minimal correct exporter, and broken ones that ExporterConformance must catch."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fulmen_conformance import ExporterConformance
from fulmen_protocols import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen_protocols import Exporter


class Good:
    """Saves a trace, whose shapes are all open."""

    def export(
        self,
        module: nn.Module,
        args: tuple[Tensor, ...] | None = None,
        path: Path | io.BytesIO | None = None,
        *,
        kwargs: object = None,
        dynamic_shapes: object = None,
    ) -> object:
        assert args is not None
        modes = [(part, part.training) for part in module.modules()]
        random_state = torch.get_rng_state()
        try:
            self.switch(module)
            expected = module(*args)
            program = self.trace(module, args, dynamic_shapes)
            self.compare(program(*args), expected)
        finally:
            for part, mode in modes:
                self.switch_back(part, mode)
            torch.set_rng_state(random_state)
        self.write(program, path)
        return program

    def switch(self, module: nn.Module) -> None:
        module.eval()

    def switch_back(self, part: nn.Module, mode: bool) -> None:
        part.training = mode

    def trace(self, module: nn.Module, args: tuple[Tensor, ...], dynamic_shapes: object) -> torch.jit.ScriptModule:
        return traced(module, args)

    def compare(self, got: Tensor, expected: Tensor) -> None:
        if not torch.allclose(got, expected):
            raise ExportError("it computes something else")

    def write(self, program: torch.jit.ScriptModule, path: Path | io.BytesIO | None) -> None:
        if path is None:
            return
        if isinstance(path, io.BytesIO):
            save(program, path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.partial")
        with staging.open("wb") as file:
            save(program, file)
        os.replace(staging, path)


def traced(module: nn.Module, args: tuple[Tensor, ...]) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(module, args, check_trace=False)


def save(program: torch.jit.ScriptModule, file: IO[bytes]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(program, file)


def run(path: Path, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(str(path))(x).detach()


class TestGood(ExporterConformance):
    caught_by: ClassVar[set[str]] = set()
    backend: ClassVar[type[Good]] = Good

    @pytest.fixture
    def exporter(self) -> Exporter:
        return self.backend()

    @pytest.fixture
    def run(self) -> Callable[[Path, Tensor], Tensor]:
        return run


def broken(backend: type[Good], *tests: str) -> type[ExporterConformance]:
    """The drill with another backend, which exactly ``tests`` must catch."""
    return type(f"Test{backend.__name__}", (TestGood,), {"backend": backend, "caught_by": set(tests)})


class NeverCompares(Good):
    def compare(self, got: Tensor, expected: Tensor) -> None:
        pass


class LosesWeights(Good):
    def write(self, program: torch.jit.ScriptModule, path: Path | io.BytesIO | None) -> None:
        for parameter in program.parameters():
            parameter.data = torch.zeros_like(parameter)
        super().write(program, path)


class InTrainingMode(Good):
    def switch(self, module: nn.Module) -> None:
        pass

    def compare(self, got: Tensor, expected: Tensor) -> None:
        pass


class StaysInEvaluation(Good):
    def switch_back(self, part: nn.Module, mode: bool) -> None:
        pass


class OneModeForAll(Good):
    def export(self, module: nn.Module, *args: object, **kwargs: object) -> object:
        try:
            return super().export(module, *args, **kwargs)
        finally:
            module.train()


class SizesAreConstants(Good):
    def trace(self, module: nn.Module, args: tuple[Tensor, ...], dynamic_shapes: object) -> torch.jit.ScriptModule:
        class Fixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = module
                self.size = args[0].shape[0]

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x.view(self.size, -1))

        return traced(Fixed(), args)


class PathsOnly(Good):
    def write(self, program: torch.jit.ScriptModule, path: Path | io.BytesIO | None) -> None:
        if path is not None and not isinstance(path, io.BytesIO):
            super().write(program, path)


class DefaultName(Good):
    def write(self, program: torch.jit.ScriptModule, path: Path | io.BytesIO | None) -> None:
        super().write(program, Path("model.bin") if path is None else path)


class LeavesItsStaging(Good):
    def write(self, program: torch.jit.ScriptModule, path: Path | io.BytesIO | None) -> None:
        super().write(program, path)
        if isinstance(path, Path):
            path.with_name("log.txt").write_text("done")


class NeverReplaces(Good):
    def write(self, program: torch.jit.ScriptModule, path: Path | io.BytesIO | None) -> None:
        if not (isinstance(path, Path) and path.exists()):
            super().write(program, path)


class WritesFirst(Good):
    def export(self, module: nn.Module, args: object = None, path: object = None, **kwargs: object) -> object:
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        return super().export(module, args, path, **kwargs)


class ReturnsNothing(Good):
    def export(self, *args: object, **kwargs: object) -> object:
        super().export(*args, **kwargs)
        return None


TestNeverCompares = broken(NeverCompares, "test_an_artifact_that_computes_something_else_is_never_written")
TestLosesWeights = broken(
    LosesWeights,
    "test_the_artifact_computes_what_the_module_does",
    "test_an_open_batch_takes_other_sizes",
    "test_a_stream_gets_the_same_artifact",
    "test_a_new_artifact_replaces_the_old_one",
    "test_a_module_in_training_mode_is_exported_in_evaluation_mode",
    "test_the_module_is_left_as_it_was",
)
TestInTrainingMode = broken(
    InTrainingMode,
    "test_a_module_in_training_mode_is_exported_in_evaluation_mode",
    "test_an_artifact_that_computes_something_else_is_never_written",
)
TestStaysInEvaluation = broken(
    StaysInEvaluation,
    "test_the_module_is_left_as_it_was",
    "test_a_forward_that_fails_leaves_module_and_path_alone",
)
TestOneModeForAll = broken(OneModeForAll, "test_the_module_is_left_as_it_was")
TestSizesAreConstants = broken(SizesAreConstants, "test_an_open_batch_takes_other_sizes")
TestPathsOnly = broken(PathsOnly, "test_a_stream_gets_the_same_artifact")
TestDefaultName = broken(DefaultName, "test_without_a_path_nothing_is_written")
TestLeavesItsStaging = broken(LeavesItsStaging, "test_folders_are_made_and_nothing_else_stays_in_them")
TestNeverReplaces = broken(NeverReplaces, "test_a_new_artifact_replaces_the_old_one")
TestWritesFirst = broken(
    WritesFirst,
    "test_an_artifact_that_computes_something_else_is_never_written",
    "test_a_forward_that_fails_leaves_module_and_path_alone",
)
TestReturnsNothing = broken(
    ReturnsNothing, "test_the_artifact_computes_what_the_module_does", "test_without_a_path_nothing_is_written"
)

import pytest
import torch

from fulmen_conformance import PrecisionConformance
from fulmen_precision import DoublePrecision, FullPrecision, HalfPrecision, MixedPrecision, StochasticHalfPrecision
from fulmen_protocols import Precision


class TestFullPrecision(PrecisionConformance):
    @pytest.fixture
    def precision(self) -> Precision:
        return FullPrecision()


class TestDoublePrecision(PrecisionConformance):
    @pytest.fixture
    def precision(self) -> Precision:
        return DoublePrecision()


class TestHalfPrecision(PrecisionConformance):
    @pytest.fixture
    def precision(self) -> Precision:
        return HalfPrecision("16-true")


class TestBFloat16Precision(PrecisionConformance):
    @pytest.fixture
    def precision(self) -> Precision:
        return HalfPrecision("bf16-true")


class TestMixedPrecision(PrecisionConformance):
    @pytest.fixture
    def precision(self) -> Precision:
        return MixedPrecision("bf16-mixed", "cpu")


class TestScaledMixedPrecision(PrecisionConformance):
    @pytest.fixture
    def precision(self) -> Precision:
        return MixedPrecision("16-mixed", "cpu")


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@needs_cuda
class TestMixedPrecisionOnCuda(PrecisionConformance):
    @pytest.fixture
    def precision(self) -> Precision:
        return MixedPrecision("bf16-mixed", "cuda")

    @pytest.fixture
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


@pytest.mark.cuda
@needs_cuda
class TestScaledMixedPrecisionOnCuda(PrecisionConformance):
    @pytest.fixture
    def precision(self) -> Precision:
        return MixedPrecision("16-mixed", "cuda")

    @pytest.fixture
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


class TestStochasticHalfPrecision(PrecisionConformance):
    @pytest.fixture
    def precision(self) -> Precision:
        return StochasticHalfPrecision()

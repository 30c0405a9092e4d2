import pytest

from fulmen_accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator
from fulmen_conformance import AcceleratorConformance
from fulmen_protocols import Accelerator


class TestCPUAccelerator(AcceleratorConformance):
    @pytest.fixture
    def accelerator(self) -> Accelerator:
        return CPUAccelerator()


class TestCUDAAccelerator(AcceleratorConformance):
    @pytest.fixture
    def accelerator(self) -> Accelerator:
        return CUDAAccelerator()


class TestMPSAccelerator(AcceleratorConformance):
    @pytest.fixture
    def accelerator(self) -> Accelerator:
        return MPSAccelerator()

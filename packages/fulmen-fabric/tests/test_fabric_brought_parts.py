"""A strategy brings parts of its own kind, and an accelerator says which strategy drives its devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fulmen_fabric import assemble
from fulmen_protocols import MisconfigurationException


class Environment:
    """Of a runtime that counts its processes itself."""

    creates_processes_externally = False
    main_address, main_port = "10.0.0.1", 4321

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return 1

    def global_rank(self) -> int:
        return 0

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass


class Numbers:
    def __init__(self, name: str = "32-true") -> None:
        self.precision = name

    def plan(self) -> Any:
        dtype = torch.float32
        return {"parameter": dtype, "compute": dtype, "reduction": dtype, "output": dtype, "scaler": "none"}

    def convert_module(self, module: Any) -> Any:
        return module

    def init_context(self) -> Any:
        raise NotImplementedError


class Files:
    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        pass

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
        return {}

    def remove_checkpoint(self, path: Any) -> None:
        pass

    def teardown(self) -> None:
        pass


class Brings:
    """A vendor's strategy whose engine has an environment, numbers and files of its own."""

    root_device = torch.device("cpu")

    def setup_environment(self, topology: Any) -> None:
        pass

    def module_context(self, *, empty: bool) -> Any:
        raise NotImplementedError

    def place(self, module: Any) -> Any:
        return module

    def prepare_optimizers(self, module: Any, optimizers: Any) -> Any:
        return optimizers

    def teardown(self) -> None:
        pass

    def own_environment(self) -> Any:
        return Environment()

    def own_precision(self, name: str) -> Any:
        if name == "16-mixed":
            raise ValueError(f"precision={name!r}: the engine has none. Use '32-true'.")
        return None if name == "64-true" else Numbers(name)

    def own_checkpoint_io(self) -> Any:
        return Files()


class Devices:
    """A vendor's accelerator, whose devices one strategy drives."""

    def name(self) -> str:
        return "acme"

    def is_available(self) -> bool:
        return True

    def auto_device_count(self) -> int:
        return 1

    def parse_devices(self, devices: Any) -> list[int]:
        return [0]

    def get_parallel_devices(self, devices: Any) -> list[torch.device]:
        return [torch.device("cpu")]

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def choose_strategy(self, asked: str, num_processes: int) -> str:
        return "single_device" if asked in ("auto", "fsdp") else asked

    def check_strategy(self, strategy: object) -> None:
        if type(strategy).__name__ != "SingleDeviceStrategy":
            raise ValueError(f"{type(strategy).__name__} cannot drive 'acme'. Use 'single_device'.")


def test_what_the_user_leaves_open_is_the_strategy_s_own() -> None:
    assembly = assemble(accelerator="cpu", strategy=Brings(), precision="bf16-true")

    assert isinstance(assembly.environment, Environment)
    assert isinstance(assembly.precision, Numbers)
    assert assembly.precision_name == assembly.precision.precision == "bf16-true"
    assert isinstance(assembly.checkpoint_io, Files)
    assert assembly.sources["precision"] == "bf16-true of Brings"


def test_what_the_user_gives_is_taken() -> None:
    precision, files, environment = Numbers("own"), Files(), Environment()

    assembly = assemble(accelerator="cpu", strategy=Brings(), plugins=[precision, files, environment])

    assert assembly.precision is precision
    assert assembly.checkpoint_io is files
    assert assembly.environment is environment


def test_a_strategy_may_leave_a_precision_to_the_registered_one_or_refuse_it() -> None:
    assert (
        type(assemble(accelerator="cpu", strategy=Brings(), precision="64-true").precision).__name__
        == "DoublePrecision"
    )
    with pytest.raises(MisconfigurationException, match=r"precision='16-mixed': the engine has none\. Use '32-true'"):
        assemble(accelerator="cpu", strategy=Brings(), precision="16-mixed")


@pytest.mark.proves("4.1", "4.4")
def test_an_accelerator_chooses_among_strategies_and_refuses_what_cannot_drive_it() -> None:
    assembly = assemble(accelerator=Devices())

    assert assembly.strategy_name == "single_device"
    assert "strategy='auto' chose 'single_device' for one device." in assembly.chosen
    with pytest.warns(UserWarning, match="strategy='fsdp' on accelerator 'acme' means 'single_device'"):
        assert assemble(accelerator=Devices(), strategy="fsdp").strategy_name == "single_device"
    for strategy in ("ddp", Brings()):
        with pytest.raises(MisconfigurationException, match=r"cannot drive 'acme'\. Use 'single_device'"):
            assemble(accelerator=Devices(), strategy=strategy)  # type: ignore[arg-type]

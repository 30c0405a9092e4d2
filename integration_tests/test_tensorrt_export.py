"""``to_tensorrt`` on a CUDA device: with torch_tensorrt where it is installed, else with a stand-in of its two calls.

The stand-in compiles with ``torch.export`` in place of TensorRT; what is proved is everything around the compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import fulmen
from fulmen_protocols import ExportError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"),
]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the compiler was asked for; empty with the real one."""
    asked: list[dict[str, Any]] = []
    if importlib.util.find_spec("torch_tensorrt") is not None:
        return asked

    def compile_(module: nn.Module, ir: str, inputs: list[Tensor], **settings: Any) -> Any:
        training = any(part.training for part in module.modules())
        asked.append({"ir": ir, "devices": [x.device.type for x in inputs], "training": training, **settings})
        if ir == "ts":
            return torch.jit.trace(module, tuple(inputs))
        return torch.export.export(module, tuple(inputs)).module()

    def save(compiled: Any, path: str, *, inputs: list[Tensor], output_format: str, retrace: bool) -> None:
        asked.append({"output_format": output_format, "retrace": retrace})
        if output_format == "torchscript":
            torch.jit.save(torch.jit.trace(compiled, tuple(inputs)), path)
        else:
            torch.export.save(torch.export.export(compiled, tuple(inputs)), path)

    stand_in: Any = ModuleType("torch_tensorrt")
    stand_in.__spec__ = importlib.util.spec_from_loader("torch_tensorrt", None)
    stand_in.compile, stand_in.save = compile_, save
    monkeypatch.setitem(sys.modules, "torch_tensorrt", stand_in)
    return asked


class Net(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)
        self.example_input_array = torch.randn(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.first(x)))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=1e-2, atol=1e-2)


@pytest.mark.proves("7.3", "10.19")
@pytest.mark.parametrize("start", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("ir", "output_format"), [("default", "exported_program"), ("dynamo", "torchscript"), ("ts", "torchscript")]
)
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch.export.load reads from bytes
@torch.no_grad()
def test_a_module_is_compiled_on_cuda_and_goes_back_with_its_modes(
    start: str, ir: Any, output_format: Any, tmp_path: Path, library: list[dict[str, Any]]
) -> None:
    net = Net().to(start).train()
    net.second.eval()
    modes = [module.training for module in net.modules()]

    compiled = net.to_tensorrt(
        tmp_path / "deep" / "net.ep", ir=ir, output_format=output_format, retrace=True, min_block_size=1
    )

    assert net.device.type == start
    assert [module.training for module in net.modules()] == modes
    x = torch.randn(3, 4, device="cuda")
    expected = net.cuda().eval()(x)
    close(compiled(x), expected)
    file = str(tmp_path / "deep" / "net.ep")
    run = torch.jit.load(file) if output_format == "torchscript" else torch.export.load(file).module()
    close(run(x), expected)
    if library:
        assert library[0] == {"ir": ir, "devices": ["cuda"], "training": False, "min_block_size": 1}
        assert library[1:] == ([] if ir == "ts" else [{"output_format": output_format, "retrace": True}])


@pytest.mark.proves("7.3")
def test_a_compilation_that_fails_puts_the_module_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no engine for this")

    monkeypatch.setattr(importlib.import_module("torch_tensorrt"), "compile", fails)
    net = Net().train()

    with pytest.raises(ExportError, match=r"'tensorrt' cannot export Net.*no engine for this"):
        net.to_tensorrt(tmp_path / "net.ep")

    assert net.device.type == "cpu"
    assert net.training
    assert list(tmp_path.iterdir()) == []

"""Counted operations against formulas, and the peaks of devices."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fulmen_fabric import Throughput, get_available_flops, measure_flops
from fulmen_fabric._peak_flops import _PEAKS, _TPUS, gpu_peak, tpu_peak

if TYPE_CHECKING:
    from collections.abc import Callable

B, T, D, H, V = 4, 12, 32, 4, 50
"""Batch, tokens, width, heads, vocabulary."""


class Block(nn.Module):
    """A causal transformer block of the usual shape."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.norms = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(V, D), nn.Sequential(Block(), Block())
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(tokens)))


BLOCK = 24 * B * T * D * D + 4 * B * T * T * D
"""Per block: 24·B·T·D² in the projections and 4·B·T²·D in attention (Kaplan et al. 2020, section 2.1, not causal)."""


def mlp() -> tuple[nn.Module, torch.Tensor, int, int]:
    forward = 2 * B * (D * 64 + 64 * 10)
    # Backward: weights of both layers, inputs of the second only.
    return (
        nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, 10)),
        torch.randn(B, D),
        forward,
        2 * B * (D * 64 + 2 * 64 * 10),
    )


def convolutions() -> tuple[nn.Module, torch.Tensor, int, int]:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 5, groups=2))
    first = 2 * B * 8 * 16 * 16 * 3 * 9
    second = 2 * B * 16 * 12 * 12 * (8 // 2) * 25
    return net, torch.randn(B, 3, 32, 32), first + second, first + 2 * second


def attention() -> tuple[nn.Module, torch.Tensor, int, int]:
    net = nn.TransformerEncoderLayer(D, H, 4 * D, batch_first=True)
    # Backward: twice everything, but for the input of the first projection; x itself needs no gradient.
    return net, torch.randn(B, T, D), BLOCK, 2 * BLOCK - 2 * B * T * D * 3 * D


def recurrent() -> tuple[nn.Module, torch.Tensor, int, int]:
    net = nn.LSTM(D, 48, batch_first=True)
    own, recurrent = 2 * B * T * 4 * 48 * D, 2 * B * T * 4 * 48 * 48
    return net, torch.randn(B, T, D), own + recurrent, own + 2 * recurrent


def language() -> tuple[nn.Module, torch.Tensor, int, int]:
    forward = 2 * BLOCK + 2 * B * T * D * V
    return Language(), torch.randint(V, (B, T)), forward, 2 * forward


MODELS = [mlp, convolutions, attention, recurrent, language]


def total(output: Any) -> torch.Tensor:
    return (output[0] if isinstance(output, tuple) else output).sum()


@pytest.mark.proves("13.8")
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("make", MODELS)
def test_the_count_is_the_formulas_within_two_percent(
    make: Callable[[], tuple[nn.Module, torch.Tensor, int, int]], device: str
) -> None:
    with torch.device(device):
        net, x, forward, backward = make()
        assert measure_flops(net, lambda: net(x)) == pytest.approx(forward, rel=0.02)
        # Attention's backward pass computes the scores again where it is fused: half as much of them more.
        counted = measure_flops(net, lambda: net(x), total)
    recomputed = {"attention": 2 * B * T * T * D, "language": 2 * 2 * B * T * T * D}.get(make.__name__, 0)
    assert any(counted == pytest.approx(forward + backward + extra, rel=0.02) for extra in (0, recomputed))


@pytest.mark.proves("13.8")
def test_inference_of_a_fused_encoder_layer_is_counted_too() -> None:
    net = nn.TransformerEncoderLayer(D, H, 4 * D, batch_first=True).eval()
    x = torch.randn(B, T, D)
    with torch.no_grad():
        assert measure_flops(net, lambda: net(x)) == pytest.approx(BLOCK, rel=0.02)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.proves("13.8")
def test_counting_on_a_real_model_leaves_gradients_and_random_states_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    x = torch.randn(5, 3)
    net(x).sum().backward()
    grads = copy.deepcopy([parameter.grad for parameter in net.parameters()])
    torch.manual_seed(1)
    expected = torch.rand(3)

    torch.manual_seed(1)
    assert measure_flops(net, lambda: net(x), torch.Tensor.sum) == 2 * (2 * 5 * 3 * 2)
    assert torch.equal(torch.rand(3), expected)
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)


@pytest.mark.proves("13.8")
def test_mfu_is_counted_operations_over_time_and_peak() -> None:
    with torch.device("meta"):
        net, x, forward, backward = mlp()
        flops = measure_flops(net, lambda: net(x), torch.Tensor.sum)
    throughput = Throughput(available_flops=1e9, window_size=11)
    for index in range(1, 12):
        throughput.update(time=index * 1e-3, batches=index, samples=B * index, flops=flops)
    assert throughput.compute()["device/mfu"] == pytest.approx((forward + backward) / 1e-3 / 1e9, rel=0.02)


class NamedGpus:
    """Lets torch call its device as one likes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def __call__(self, name: str, dtype: Any) -> int | None:
        self._patch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return get_available_flops(torch.device("cuda"), dtype)


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> NamedGpus:
    return NamedGpus(monkeypatch)


@pytest.mark.proves("13.8")
@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 80GB HBM3", torch.float8_e4m3fn, 1978.9),
        ("NVIDIA H100 80GB HBM3", torch.int8, 1978.9),
        ("NVIDIA H100 PCIe", torch.float16, 756),
        ("NVIDIA H100 NVL", torch.float16, 835.5),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.float64, 19.5),
        ("A100-SXM4-40GB", torch.float32, 19.5),
        ("NVIDIA A10G", torch.bfloat16, 70),
        ("NVIDIA L4", torch.float16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GeForce RTX 4080 SUPER", torch.float32, 52.2),
        ("NVIDIA GeForce RTX 3090 Ti", torch.float16, 80),
        ("NVIDIA RTX A6000", torch.bfloat16, 154.8),
        ("Tesla T4", torch.float16, 65),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("Tesla V100-PCIE-16GB", torch.float32, 14),
        ("NVIDIA TITAN RTX", torch.float16, 130.5),
        ("AMD Instinct MI300X", torch.bfloat16, 1307.4),
    ],
)
def test_known_devices_have_their_makers_dense_figure(
    peak: NamedGpus, name: str, dtype: torch.dtype, teraflops: float
) -> None:
    assert peak(name, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.proves("13.8")
@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce GTX 1080",
        "NVIDIA B9000",
        "AMD Instinct MI999X",
    ],
)
def test_an_unknown_device_has_no_figure_and_no_default(peak: NamedGpus, name: str) -> None:
    with pytest.warns(UserWarning, match=f"the peak of '{name}' for torch.bfloat16 is not known.*available_flops="):
        assert peak(name, torch.bfloat16) is None


@pytest.mark.proves("13.8")
def test_a_data_type_that_a_device_lacks_has_no_figure(peak: NamedGpus) -> None:
    with pytest.warns(UserWarning, match=r"'Tesla T4' for torch.bfloat16"):
        assert peak("Tesla T4", torch.bfloat16) is None
    with pytest.warns(UserWarning, match=r"'NVIDIA H200' for torch.complex64"):
        assert peak("NVIDIA H200", torch.complex64) is None


@pytest.mark.proves("13.8")
def test_float32_is_tf32_where_torch_may_use_it_and_the_device_has_it(peak: NamedGpus) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert peak("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
        torch.set_float32_matmul_precision("high")
        assert peak("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
        assert peak("Tesla V100-SXM2-32GB", torch.float32) == 15.7e12
    finally:
        torch.set_float32_matmul_precision(before)
    assert peak("NVIDIA A100-SXM4-80GB", "tfloat32") == 156e12


@pytest.mark.proves("13.8")
@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [("v2-8", 22.5), ("V3", 61.5), ("v4-8", 275), ("v5litepod-16", 197), ("V5LITE_POD", 197), ("v5p-8", 459)],
)
def test_tpus_have_a_figure_for_what_torch_calls_a_device(kind: str, teraflops: float) -> None:
    assert tpu_peak(kind) == teraflops * 1e12


@pytest.mark.proves("13.8")
def test_neither_the_cpu_nor_an_unknown_tpu_has_a_figure() -> None:
    assert get_available_flops(torch.device("cpu"), torch.float32) is None
    assert tpu_peak("") is None
    assert tpu_peak("v99-8") is None
    with pytest.warns(UserWarning, match="this device"):  # no TPU here
        assert get_available_flops(torch.device("xla"), torch.bfloat16) is None


@pytest.mark.proves("13.8")
def test_every_figure_names_its_source_and_is_dense() -> None:
    for row in _PEAKS:
        assert len(row.source) > 10, row.names
        figures = [row.tf32, row.fp16, row.bf16, row.fp8, row.int8]
        known = [figure for figure in figures if figure is not None]
        assert known, row.names
        if row.bf16 is not None:
            assert row.bf16 == row.fp16, f"{row.names}: tensor cores do both at one rate"
        if row.tf32 is not None and row.bf16 is not None:
            assert 1.9 < row.bf16 / row.tf32 < 2.1, f"{row.names}: a sparse figure among dense ones would double"
        if row.fp32 is not None:
            assert all(figure >= row.fp32 for figure in known), row.names
    assert all(math.isfinite(figure) for figure in _TPUS.values())


def test_each_name_has_one_row() -> None:
    for name in ("h200", "h200 nvl", "l4", "l40", "l40s", "a10", "a100-pcie-40gb", "geforce rtx 4080 super"):
        assert gpu_peak(name, torch.float16) is not None
        assert len([row for row in _PEAKS if __import__("re").fullmatch(row.names, name)]) == 1, name

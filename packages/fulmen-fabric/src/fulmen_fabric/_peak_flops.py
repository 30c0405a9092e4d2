"""Peaks of devices in dense matrix products, as their makers publish them.

All figures are for dense operands: makers often print twice as much, which holds for 2:4 structured sparsity only.
16-bit figures are those with accumulation in float32, which is what torch asks for. float64 is that of the tensor cores
where there are some, since cuBLAS uses them. A device that is not in the table has no figure, and neither has a
laptop's, a partition's (MIG) or an export variant's, whose names differ.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

__all__ = ["gpu_peak", "tpu_peak"]


class _Peak(NamedTuple):
    """One kind of GPU: figures in 10^12 operations per second, None where it has no such unit or no figure is known."""

    names: str
    """Regular expression for the whole of torch's name for it, in lower case and without the maker's."""
    source: str
    fp64: float | None = None
    fp32: float | None = None
    tf32: float | None = None
    fp16: float | None = None
    bf16: float | None = None
    fp8: float | None = None
    int8: float | None = None


_BLACKWELL = "NVIDIA Blackwell datasheet, HGX B200 and GB200 per GPU"
_H200 = "NVIDIA H200 datasheet"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, table 2"
_H100_DATASHEET = "NVIDIA H100 datasheet"
_ADA = "NVIDIA Ada GPU Architecture whitepaper v2.1, appendix A"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper v2, appendix A"
_TURING = "NVIDIA Turing GPU Architecture whitepaper, appendix A"
_V100 = "NVIDIA V100 datasheet"
_MI300X = "AMD Instinct MI300X datasheet"

_PEAKS = (
    _Peak("b200", _BLACKWELL, 37, 75, 1125, 2250, 2250, 4500, 4500),
    _Peak("gb200", _BLACKWELL, 40, 80, 1250, 2500, 2500, 5000, 5000),
    _Peak("h200", _H200, 67, 67, 494.5, 989.5, 989.5, 1979, 1979),
    _Peak("h200 nvl", _H200, 60, 60, 417.5, 835.5, 835.5, 1670.5, 1670.5),
    _Peak("gh200( \\d+gb)?", "NVIDIA GH200 datasheet", 67, 67, 494, 990, 990, 1979, 1979),
    _Peak("h100 80gb hbm3", _H100, 66.9, 66.9, 494.7, 989.4, 989.4, 1978.9, 1978.9),
    _Peak("h100 pcie", _H100, 51.2, 51.2, 378, 756, 756, 1513, 1513),
    _Peak("h100 nvl", _H100_DATASHEET, 60, 60, 417.5, 835.5, 835.5, 1670.5, 1670.5),
    _Peak(
        "a100-sxm4-\\d+gb|a100-sxm-\\d+gb|a100-pcie-\\d+gb|a100 80gb pcie|a100 pcie",
        *("NVIDIA A100 datasheet", 19.5, 19.5, 156, 312, 312, None, 624),
    ),
    _Peak("a30", "NVIDIA A30 datasheet", 10.3, 10.3, 82, 165, 165, None, 330),
    _Peak("a40", "NVIDIA A40 datasheet", None, 37.4, 74.8, 149.7, 149.7, None, 299.3),
    _Peak("a10", "NVIDIA A10 datasheet", None, 31.2, 62.5, 125, 125, None, 250),
    _Peak("a10g", "NVIDIA A10G datasheet (for AWS)", None, 35, 35, 70, 70, None, 140),
    _Peak("rtx a6000", _GA102, None, 38.7, 77.4, 154.8, 154.8, None, 309.7),
    _Peak("l4", "NVIDIA L4 datasheet", None, 30.3, 60, 121, 121, 242.5, 242.5),
    _Peak("l40", "NVIDIA L40 datasheet", None, 90.5, 90.5, 181, 181, 362, 362),
    _Peak("l40s", "NVIDIA L40S datasheet", None, 91.6, 183, 362, 362, 733, 733),
    _Peak(
        "rtx 6000 ada generation",
        *("NVIDIA RTX 6000 Ada datasheet", None, 91.1, 182.1, 364.2, 364.2, 728.5, 728.5),
    ),
    _Peak("geforce rtx 5090", _RTX_BLACKWELL, None, 104.8, 104.8, 209.5, 209.5, 419, 838),
    _Peak("geforce rtx 5080", _RTX_BLACKWELL, None, 56.3, 56.3, 112.6, 112.6, 225.1, 450.2),
    _Peak("geforce rtx 4090", _ADA, None, 82.6, 82.6, 165.2, 165.2, 330.3, 660.6),
    _Peak("geforce rtx 4080", _ADA, None, 48.7, 48.7, 97.5, 97.5, 194.9, 389.9),
    _Peak("geforce rtx 4080 super", _ADA, None, 52.2, 52.2, 104.4, 104.4, 208.8, 417.6),
    _Peak("geforce rtx 3090 ti", _ADA, None, 40, 40, 80, 80, None, 320),
    _Peak("geforce rtx 3090", _GA102, None, 35.6, 35.6, 71, 71, None, 284),
    _Peak("geforce rtx 3080 ti", _ADA, None, 34.1, 34.1, 68.2, 68.2, None, 272.8),
    _Peak("geforce rtx 3080", _GA102, None, 29.8, 29.8, 59.5, 59.5, None, 238),
    _Peak("geforce rtx 3070", _GA102, None, 20.3, 20.3, 40.6, 40.6, None, 162.6),
    _Peak("t4", "NVIDIA T4 datasheet", None, 8.1, None, 65, None, None, 130),
    _Peak("quadro rtx 5000", "NVIDIA Quadro RTX 5000 datasheet", None, 11.2, None, 89.2, None, None, 178.4),
    _Peak("titan rtx", _TURING, None, 16.3, None, 130.5, None, None, 261),
    _Peak("geforce rtx 2080 ti", _TURING, None, 14.2, None, 56.9, None, None, 227.7),
    _Peak("geforce rtx 2080 super", _GA102, None, 11.2, None, 44.6, None, None, 178.4),
    _Peak("geforce rtx 2080", _TURING, None, 10.6, None, 42.4, None, None, 169.6),
    _Peak("geforce rtx 2070 super", _GA102, None, 9.1, None, 36.3, None, None, 145),
    _Peak("v100-sxm2-\\d+gb", _V100, 7.8, 15.7, None, 125),
    _Peak("v100-pcie-\\d+gb", _V100, 7, 14, None, 112),
    _Peak("v100s-pcie-\\d+gb", _V100, 8.2, 16.4, None, 130),
    _Peak("p100-sxm2-\\d+gb", "NVIDIA Tesla P100 datasheet", 5.3, 10.6, None, 21.2),
    _Peak("p100-pcie-\\d+gb", "NVIDIA Tesla P100 datasheet", 4.7, 9.3, None, 18.7),
    # torch sees each of an MI250X's two dies as a device.
    _Peak("instinct mi250x.*", "AMD Instinct MI250X datasheet", 47.9, 47.9, None, 191.5, 191.5, None, 191.5),
    _Peak("instinct mi300x", _MI300X, 163.4, 163.4, None, 1307.4, 1307.4, 2614.9, 2614.9),
    _Peak("instinct mi325x", "AMD Instinct MI325X datasheet", 163.4, 163.4, None, 1307.4, 1307.4, 2614.9, 2614.9),
)

_FIELDS: dict[torch.dtype | str, str] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    "tfloat32": "tf32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
    torch.float8_e4m3fnuz: "fp8",
    torch.float8_e5m2fnuz: "fp8",
    torch.int8: "int8",
}

# Of one device as torch_xla counts them, in 10^12 per second: a core of the first two, a chip of the others. Matrix
# products run in bfloat16 whatever the tensors hold. Source: cloud.google.com/tpu/docs, the page of each version, whose
# figures are per chip; for v2 Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural Networks", 2020.
_TPUS = {"v2": 22.5, "v3": 61.5, "v4": 275.0, "v5litepod": 197.0, "v5p": 459.0, "v6e": 918.0}


def gpu_peak(name: str, dtype: torch.dtype | str) -> float | None:
    """Operations per second of the GPU that torch calls ``name``; None if there is no figure."""
    field = _FIELDS.get(dtype)
    short = re.sub(r"^(nvidia |amd |tesla )+", "", name.strip().lower())
    row = next((each for each in _PEAKS if re.fullmatch(each.names, short)), None)
    figure: float | None = None if row is None or field is None else getattr(row, field)
    return None if figure is None else figure * 1e12


def tpu_peak(kind: str) -> float | None:
    """Operations per second of a TPU device of this ``kind``, such as ``"v4-8"`` or ``"V5LITE_POD"``; None: unknown."""
    figure = _TPUS.get(kind.strip().lower().partition("-")[0].replace("_", ""))
    return None if figure is None else figure * 1e12

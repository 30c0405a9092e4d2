"""Floating point operations: how many a model needs, and how many a device can do per second at best."""

from __future__ import annotations

import math
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from fulmen_fabric._peak_flops import gpu_peak, tpu_peak
from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_fabric.seed import isolate_rng

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from torch import Tensor, nn
    from torch.utils.flop_counter import FlopCounterMode

    Shape = Sequence[int]

__all__ = ["counting_flops", "get_available_flops", "measure_flops"]


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Any], loss_fn: Callable[[Any], Tensor] | None = None
) -> int:
    """Floating point operations of one call, a multiply-add counted as two.

    Matrix products, convolutions and attention are counted, as torch's own counter does it, from the operators that
    really run; additions, activations and normalisation are not. Make model and batch under ``torch.device("meta")``:
    then nothing is computed and no memory is used.

    Args:
        model: its gradients, and the random states, are afterwards what they were.
        forward_fn: calls ``model`` on a batch, and returns what ``loss_fn`` takes.
        loss_fn: makes a loss of that. Then the backward pass counts too, else the forward pass alone does.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with isolate_rng(), counting_flops() as counter:
            if loss_fn is None:
                forward_fn()
            else:
                for parameter, _ in gradients:
                    parameter.grad = None
                loss_fn(forward_fn()).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return counter.get_total_flops()


@contextmanager
def counting_flops() -> Generator[FlopCounterMode]:
    """Count the operations of what runs within the block, as ``measure_flops`` does; the counter knows each module's.

    Whole layers that are one operator, of which torch's counter knows nothing, run as the matrix products they consist
    of: ``nn.TransformerEncoderLayer`` in inference, ``nn.LSTM`` under oneDNN and cuDNN.
    """
    from torch.utils.flop_counter import FlopCounterMode

    backends: Any = torch.backends
    fused = backends.mha.get_fastpath_enabled(), backends.mkldnn.enabled, backends.cudnn.enabled
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    backends.mha.set_fastpath_enabled(False)
    backends.mkldnn.enabled = backends.cudnn.enabled = False
    try:
        with counter:
            yield counter
    finally:
        backends.mha.set_fastpath_enabled(fused[0])
        backends.mkldnn.enabled, backends.cudnn.enabled = fused[1:]


def _formulas() -> dict[Any, Any]:
    """Of operators that torch's counter leaves out or gets wrong; they are given shapes in the place of tensors."""
    count: Any = import_module("torch.utils.flop_counter")

    def attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
        return int(count.sdpa_flop_count(query, key, value))

    def attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
        return int(count.sdpa_backward_flop_count(grad, query, key, value))

    def convolution_backward(
        grad: Shape,
        images: Shape,
        weight: Shape,
        bias: object,
        stride: object,
        padding: object,
        dilation: object,
        transposed: bool,
        output_padding: object,
        groups: int,
        output_mask: Sequence[bool],
        **_: object,
    ) -> int:
        # Each of the gradients of input and weight costs what the forward pass costs. The counter's own formula takes
        # the weight's for that of one group: with groups it counts too much.
        places = images[2:] if transposed else grad[2:]
        forward = 2 * images[0] * math.prod(places) * math.prod(weight)
        return forward * sum(map(bool, output_mask[:2]))

    aten: Any = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        aten.convolution_backward: convolution_backward,
    }


def get_available_flops(device: torch.device, dtype: torch.dtype | str) -> int | None:
    """Operations per second that ``device`` could do at best in dense matrix products of ``dtype``.

    The figures are their makers'. A device or data type for which there is none gives None and, for a GPU or TPU, a
    warning: there is no figure to fall back to.

    Args:
        device: a CUDA device (NVIDIA, or AMD under ROCm) or a TPU; anything else gives None.
        dtype: of the matrix products, or ``"tfloat32"``. float32 stands for it where torch is set to use it.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = gpu_peak(name, "tfloat32") if dtype is torch.float32 and _uses_tfloat32() else None
        peak = gpu_peak(name, dtype) if peak is None else peak  # GPUs before Ampere have no TF32
    elif device.type == "xla":
        name = _tpu_type()
        peak = tpu_peak(name)
    else:
        return None
    if peak is None:
        rank_zero_warn(
            f"the peak of {name or 'this device'!r} for {dtype} is not known, so there is no MFU. If you know it, pass "
            "available_flops= (operations per second)."
        )
        return None
    return int(peak)


def _uses_tfloat32() -> bool:
    """Whether torch may compute float32 matrix products in TF32."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch refuses to tell once its newer per-backend setting was used
        return str(getattr(torch.backends.cuda.matmul, "fp32_precision", "")) == "tf32"


def _tpu_type() -> str:
    """``"v4"`` for example; empty where there is no TPU."""
    try:
        tpu: Any = import_module("torch_xla._internal.tpu")
        environment: dict[str, str] = tpu.get_tpu_env()
    except (ImportError, OSError, AttributeError, ValueError):  # no torch_xla, or no metadata server to ask
        return ""
    return str(environment.get("TYPE") or environment.get("ACCELERATOR_TYPE", ""))

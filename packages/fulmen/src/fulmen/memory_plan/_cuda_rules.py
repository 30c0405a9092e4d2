"""What a CUDA device keeps for the backward pass where a CPU keeps something else.

Fake tensors of a plan are on the CPU: torch built without CUDA cannot run autograd on others. These rules, applied
where user code calls torch, make up for it: which dtype autocast chooses, and what fused kernels save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["CudaRules"]

_HALVES = (torch.float16, torch.bfloat16)

# Functions that autocast runs in float32 on CUDA, by name (torch's "CUDA Ops that can autocast to float32"); the CPU's
# list is shorter.
_FLOAT32_NAMES = (
    "acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss cosine_similarity cross_entropy "
    "cross_entropy_loss cumprod cumsum dist erfinv exp expm1 group_norm hinge_embedding_loss huber_loss kl_div "
    "l1_loss layer_norm log log10 log1p log2 log_softmax logsumexp margin_ranking_loss mse_loss "
    "multi_margin_loss multilabel_margin_loss nll_loss norm pdist poisson_nll_loss pow prod reciprocal renorm "
    "rsqrt sinh smooth_l1_loss soft_margin_loss softmax softmin softplus sum tan triplet_margin_loss"
)
_IN_FLOAT32 = frozenset(_FLOAT32_NAMES.split(" "))


class CudaRules(TorchFunctionMode):
    """While it is on, torch's functions allocate and save on the CPU what they would on CUDA."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "").rstrip("_")
        rule = _RULES.get(name)
        if rule is not None and not any(isinstance(leaf, DTensor) for leaf in tree_leaves((args, given))):
            result = rule(*args, **given)
            if result is not NotImplemented:
                return result
        if name in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, given = tree_map(_widened, (tuple(args), given))
        return func(*args, **given)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """A mask of one byte an element is saved; the CPU saves one of the input's dtype."""
    if not training or inplace or not 0.0 < p < 1.0:
        return NotImplemented
    return torch.native_dropout(input, p, True)[0]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Flash or memory-efficient attention: no matrix of scores is kept."""
    if torch.is_autocast_enabled("cpu"):
        lower = torch.get_autocast_dtype("cpu")
        query, key, value = (each.to(lower) if each.is_floating_point() else each for each in (query, key, value))
    if query.dim() != 4 or query.dtype == torch.float64:
        return NotImplemented
    operators = torch.ops.aten
    if attn_mask is None and query.dtype in _HALVES and query.shape[-1] <= 256:
        return operators._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    saves = any(each.requires_grad for each in (query, key, value))
    return operators._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, saves, dropout_p, is_causal, scale=scale
    )[0]


class _FusedRMSNorm(torch.autograd.Function):
    """What CUDA's kernel allocates and saves. The CPU has none: there the operator is a composition of others."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, statistics: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(input, weight, torch.empty(statistics, dtype=torch.float32))
        return torch.empty_like(input, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        input, weight, _ = ctx.saved_tensors
        return torch.empty_like(input), None if weight is None else torch.empty_like(weight), None


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    """One fused kernel that saves its input and one number a row."""
    if not hasattr(torch.ops.aten, "_fused_rms_norm"):
        return NotImplemented
    if weight is not None and weight.dtype != input.dtype:
        return NotImplemented
    statistics = (*input.shape[: -len(normalized_shape)], *(1 for _ in normalized_shape))
    fused: Any = _FusedRMSNorm  # torch has no types for `apply`
    return fused.apply(input, weight, statistics)


_RULES: dict[str, Callable[..., Any]] = {
    F.dropout.__name__: _dropout,
    "scaled_dot_product_attention": _attention,
    "rms_norm": _rms_norm,
}

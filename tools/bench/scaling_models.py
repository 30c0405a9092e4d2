"""What the scaling measurement trains: models, how they are sharded, and how many operations a token costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tools.bench.gpu_workloads import GPT2
from tools.bench.transformer import Transformer, TransformerBlock, flops_per_token, parameter_count

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Workload:
    """One model under one strategy."""

    name: str
    size: str
    """``"gpt2"`` or a size of ``tools.bench.transformer``."""
    strategy: str
    """``"ddp"``, ``"fsdp"``, or ``"2d"``: FSDP2 over tensor parallelism of two ranks."""
    batch: int
    """Sequences of one rank, or of one tensor-parallel pair."""
    length: int
    warm_up: int
    measured: int
    least: int = 1
    """Fewest devices that it makes sense on."""
    saves: bool = True
    """Whether a checkpoint is written; 7B with optimizer state is 81 GB."""


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("gpt2-ddp", "gpt2", "ddp", 32, 1024, 8, 30),
        # With half of the batch the host is the limit, and turns of one loop differ by more than two loops do.
        Workload("1b-fsdp", "1b", "fsdp", 8, 2048, 6, 20),
        Workload("7b-fsdp", "7b", "fsdp", 4, 2048, 4, 12, least=2, saves=False),
        Workload("7b-2d", "7b", "2d", 4, 2048, 4, 12, least=4, saves=False),
    )
}


def tiny(workload: Workload) -> Workload:
    """``workload`` at a size that a CPU trains in seconds."""
    size = "gpt2" if workload.size == "gpt2" else "tiny"
    return replace(workload, size=size, batch=2, length=32, warm_up=2, measured=3)


def chosen(name: str, *, is_tiny: bool, batch: int | None) -> Workload:
    """The workload of that name, small for trying out, or with another number of sequences of a rank."""
    workload = tiny(WORKLOADS[name]) if is_tiny else WORKLOADS[name]
    return workload if batch is None else replace(workload, batch=batch)


def block_classes(workload: Workload) -> set[type[nn.Module]]:
    """What is sharded, compiled and recomputed as one."""
    return {TransformerBlock}


def build(workload: Workload, *, is_tiny: bool, fp8: bool = False) -> nn.Module:
    """The model, on the device of the context it is built in.

    Raises:
        ModuleNotFoundError: ``fp8`` needs torchao.
    """
    net: nn.Module
    if workload.size != "gpt2":
        net = Transformer(workload.size)
    elif is_tiny:
        net = GPT2(512, 64, 2, 4, 64)
    else:
        net = GPT2()
    if fp8:
        from torchao.float8 import convert_to_float8_training

        blocks = {id(layer) for block in blocks_of(net) for layer in block.modules() if isinstance(layer, nn.Linear)}
        convert_to_float8_training(net, module_filter_fn=lambda module, name: id(module) in blocks)
    return net


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks, in order."""
    return list(getattr(net, "blocks").children())  # noqa: B009  # both models have them


def compile_(net: nn.Module) -> None:
    """Compile in place: each block of a sharded model on its own (they share one graph), GPT-2 as a whole."""
    if isinstance(net, GPT2):
        net.compile()
        return
    for block in blocks_of(net):
        block.compile()


def tensor_parallel_size(workload: Workload, devices: int) -> int:
    """Ranks that share one batch."""
    return min(2, devices) if workload.strategy == "2d" else 1


def shard(net: nn.Module, mesh: Any, data: str, tensor: str | None, *, recompute: bool) -> None:
    """What a person writes for FSDP2 in bf16, over tensor parallelism where ``tensor`` is a dimension of the mesh."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # torch's own way to wrap in place
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if tensor is not None and mesh[tensor].size() > 1:
        wide = ["attention.q", "attention.k", "attention.v", "feed_forward.gate", "feed_forward.up"]
        plan: dict[str, Any] = {name: ColwiseParallel() for name in wide}
        plan |= {"attention.out": RowwiseParallel(), "feed_forward.down": RowwiseParallel()}
        for block in blocks_of(net):
            parallelize_module(block, mesh[tensor], plan)
    if recompute:
        apply_activation_checkpointing(
            net, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: isinstance(module, TransformerBlock)
        )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks_of(net):
        fully_shard(block, mesh=mesh[data], mp_policy=policy)
    fully_shard(net, mesh=mesh[data], mp_policy=policy)


def batch(workload: Workload, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and the tokens to predict, drawn with ``seed``."""
    vocabulary = 512 if workload.size == "tiny" or workload.length <= 64 else 32_000
    make = torch.Generator(device).manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (workload.batch, workload.length + 1), device=device, generator=make)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def operations_per_token(workload: Workload) -> int:
    """Floating-point operations of forward and backward: 6 a parameter in a product, and causal attention's.

    Source: Chowdhery et al. 2022, appendix B, as in ``transformer.flops_per_token``.
    """
    if workload.size != "gpt2":
        return flops_per_token(workload.size, workload.length)
    width, layers, vocabulary = 768, 12, 50_304
    return 6 * (12 * layers * width**2 + vocabulary * width) + 6 * layers * width * workload.length


def count(workload: Workload) -> int:
    """Parameters, for the report."""
    return 124_475_904 if workload.size == "gpt2" else parameter_count(workload.size)

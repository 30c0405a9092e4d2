"""A world in which one rank runs alone, with tensors that have no values."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fulmen_protocols import BackendUnavailable, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from fulmen_protocols import ReduceOp

T = TypeVar("T")

__all__ = ["FakeTensors", "OneRankOf", "RanksAlike", "fake_copy", "fake_ranks", "replaceable_parameters"]


class OneRankOf:
    """The cluster environment of rank 0, whose other ranks do not exist.

    Args:
        world_size: ranks of the run, at least 1.
    """

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size

    @staticmethod
    def detect() -> bool:
        """Never: it is asked for."""
        return False

    def world_size(self) -> int:
        """As given."""
        return self._world_size

    def global_rank(self) -> int:
        """0."""
        return 0

    def local_rank(self) -> int:
        """0."""
        return 0

    def node_rank(self) -> int:
        """0."""
        return 0

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """There is nothing to contradict."""


class RanksAlike:
    """Collectives among ranks that all hold what this one holds.

    Args:
        world_size: their number.
    """

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def barrier(self, name: str = "") -> None:
        """Nobody to wait for."""

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """``tensor`` itself."""
        return tensor

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """``value`` itself."""
        return value

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        """A copy, multiplied for ``"sum"``."""
        return tensor * self.world_size if op == "sum" else tensor.clone()

    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        """Shape ``(world_size, *tensor.shape)``."""
        return torch.stack([tensor if differentiable else tensor.detach()] * self.world_size)

    def all_gather_object(self, value: T) -> list[T]:
        """``value`` from each rank."""
        return [value] * self.world_size


class FakeTensors:
    """A context within which new tensors have no memory; it can be entered again.

    What is computed from real tensors alone stays real: a device mesh keeps the numbers of its ranks in a tensor.

    Raises:
        BackendUnavailable: this torch has no fake tensors.
    """

    def __init__(self) -> None:
        try:
            from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
        except ImportError as error:
            raise _unavailable("torch._subclasses.fake_tensor.FakeTensorMode") from error
        self._modes = (FakeTensorMode(allow_non_fake_inputs=True), _RealStaysReal(FakeTensor, unset_fake_temporarily))

    def __enter__(self) -> FakeTensors:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _RealStaysReal(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Runs an operator for real if it is given tensors and none of them is fake."""

    def __init__(self, fake: type[Tensor], unset: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # its owner has left it untyped
        self._fake, self._unset = fake, unset

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it will come again with the tensors of this rank
        given = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, self._fake) for tensor in tensors):
            with self._unset():
                return func(*args, **given)
        return func(*args, **given)


@contextlib.contextmanager
def fake_ranks(world_size: int) -> Generator[None]:
    """Within the block this process is rank 0 of ``world_size``; collectives of the others are made up.

    Raises:
        MisconfigurationException: this process belongs to a real group already.
        BackendUnavailable: this torch has no fake process group.
    """
    if world_size == 1:
        yield
        return
    if dist.is_initialized():
        raise MisconfigurationException(
            f"a plan for {world_size} ranks needs a process of its own, but this one is rank {dist.get_rank()} of a "
            f"process group of {dist.get_world_size()}. Plan before the run starts, or in another process."
        )
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise _unavailable("torch.testing._internal.distributed.fake_pg") from error
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_copy(fakes: FakeTensors, module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose parameters and buffers are fake; no memory is copied."""
    memo: dict[int, Any] = {}
    with fakes:
        for parameter in module.parameters():
            memo[id(parameter)] = nn.Parameter(_empty_like(parameter), requires_grad=parameter.requires_grad)
        for buffer in module.buffers():
            memo[id(buffer)] = _empty_like(buffer)
        return copy.deepcopy(module, memo)


def _empty_like(tensor: Tensor) -> Tensor:
    # Not empty_like: the tensor may be fake already, in a mode that has ended.
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="cpu")


@contextlib.contextmanager
def replaceable_parameters() -> Generator[None]:
    """Within the block ``module.to(...)`` works on fake parameters.

    Torch would swap the two tensors in place and cannot, since the fake mode itself refers to them. Here the new one
    takes the old one's place in the module, and in every other that shares it.
    """
    modules: Any = nn.Module
    original = modules._apply
    replaced: dict[int, tuple[Tensor, Tensor]] = {}

    def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in module.children():
                cast("Any", child)._apply(function)
        held = (module._parameters, module._buffers)  # pyright: ignore[reportPrivateUsage]
        places = cast("tuple[dict[str, Any], ...]", held)
        for tensors in places:
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in replaced:
                    with torch.no_grad():
                        new = function(old)
                    if new is old:
                        continue
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    replaced[id(old)] = (old, new)  # the old one stays alive, so that its id stays its own
                tensors[name] = replaced[id(old)][1]
        return module

    modules._apply = apply
    try:
        yield
    finally:
        modules._apply = original


def _unavailable(name: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"a memory plan needs {name}, which torch {torch.__version__} does not have. It is there in torch 2.9 to 2.13: "
        "plan with one of these."
    )

"""``self.log`` inside a graph: an operator of the graph hands the value over, so that the graph need not be broken.

A step that logs numbers or tensors is one graph, also with ``fullgraph=True``. The operator is given no objects: it
names the module by a number. It writes to a token of the module, so that no compiler leaves it out or reorders it.
"""

from __future__ import annotations

import sys
import weakref
from functools import cache
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Optional, cast

import torch
from torch import Tensor, nn
from torch.library import custom_op

from fulmen._dynamo import never_compiled_alone
from fulmen.module import LightningModule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["has_compiled_code", "let_log_in_graphs", "recording"]

_waiting: list[tuple[Any, str, Tensor, dict[str, Any]]] = []

_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def let_log_in_graphs(module: nn.Module) -> bool:
    """From now on compiled code of ``module`` logs without breaking its graph.

    Returns:
        Whether ``module`` has compiled code of its own: its steps, or another of its methods.
    """
    kind = cast("Any", type(module))
    if not has_compiled_code(module) or kind.log is not LightningModule.log:
        return False
    _define_operator()
    _modules[id(module)] = module
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    module.__dict__["_log_token"] = torch.zeros((), device=device)
    module.__dict__["log"] = MethodType(_log, module)
    module.__dict__["log_dict"] = MethodType(_log_dict, module)
    return True


def has_compiled_code(module: nn.Module) -> bool:
    """Whether ``module`` has a method that ``torch.compile`` made."""
    if "torch._dynamo" not in sys.modules:
        return False
    namespaces = (vars(module), *(vars(base) for base in type(module).__mro__))
    return any(
        isinstance(value, FunctionType) and "_torchdynamo_orig_callable" in vars(value)
        for namespace in namespaces
        for value in namespace.values()
    )


@cache
def _define_operator() -> None:
    """``torch.ops.fulmen.record``, defined in the processes that compile something."""
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # a captured graph would not run Python again
    custom_op(
        "fulmen::record",
        _record,
        mutates_args=("token",),
        tags=(unsafe,) if unsafe is not None else (),
    )


def _record(
    token: Tensor,
    module: int,
    name: str,
    value: Tensor,
    prog_bar: bool,
    logger: Optional[bool],  # noqa: UP045 -- torch reads the operator's schema from these annotations
    on_step: Optional[bool],  # noqa: UP045
    on_epoch: Optional[bool],  # noqa: UP045
    reduce_fx: str,
    sync_dist: bool,
    add_dataloader_idx: bool,
    batch_size: Optional[int],  # noqa: UP045
    rank_zero_only: bool,
) -> None:
    # `data` starts a version of its own: the record must not look like one that was changed in place.
    kept = value.clone().data
    options: dict[str, Any] = {
        "prog_bar": prog_bar,
        "logger": logger,
        "on_step": on_step,
        "on_epoch": on_epoch,
        "reduce_fx": reduce_fx,
        "sync_dist": sync_dist,
        "add_dataloader_idx": add_dataloader_idx,
        "batch_size": batch_size,
        "rank_zero_only": rank_zero_only,
    }
    _waiting.append((_modules[module], name, kept, options))


@never_compiled_alone
def _log(
    self: LightningModule,
    name: str,
    value: Any,
    prog_bar: bool = False,
    logger: bool | None = None,
    on_step: bool | None = None,
    on_epoch: bool | None = None,
    reduce_fx: str | Callable[..., Any] = "mean",
    enable_graph: bool = False,
    sync_dist: bool = False,
    sync_dist_group: Any = None,
    add_dataloader_idx: bool = True,
    batch_size: int | None = None,
    metric_attribute: str | None = None,
    rank_zero_only: bool = False,
) -> None:
    """``LightningModule.log`` of a module with compiled code."""
    fits = isinstance(value, (Tensor, int, float)) and sync_dist_group is None and metric_attribute is None
    if not torch.compiler.is_compiling() or not fits:
        LightningModule.log(
            self, name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist,
            sync_dist_group, add_dataloader_idx, batch_size, metric_attribute, rank_zero_only,
        )  # fmt: skip
        return
    torch.ops.fulmen.record(
        self.__dict__["_log_token"],
        id(self),
        name,
        value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.get_default_dtype()),
        prog_bar,
        logger,
        on_step,
        on_epoch,
        reduce_fx if isinstance(reduce_fx, str) else reduce_fx.__name__,
        sync_dist,
        add_dataloader_idx,
        batch_size,
        rank_zero_only,
    )


@never_compiled_alone
def _log_dict(self: LightningModule, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
    """``LightningModule.log_dict`` of a module with compiled code."""
    if torch.compiler.is_compiling() and isinstance(dictionary, dict):
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)
    else:
        LightningModule.log_dict(self, dictionary, *args, **kwargs)


def recording(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step``, after which what its graphs handed over is logged.

    Not in the operator itself, where tensors lack what tells that they were changed in place.
    """

    def run(*args: object) -> Any:
        output = step(*args)
        if _waiting:
            records = _waiting[:]
            _waiting.clear()
            for module, name, value, options in records:
                module.log(name, value, **options)
        return output

    return run

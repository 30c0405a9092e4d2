"""Making a DataLoader again with some arguments changed, without having watched it being made."""

from __future__ import annotations

import inspect
import re
from inspect import Parameter
from typing import TYPE_CHECKING, TypeVar, cast

from torch.utils.data import BatchSampler, DataLoader

from fulmen_protocols import MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["rebuild_loader"]

T = TypeVar("T")

_ALTERNATIVE = "or build the loader with the sampler it shall have and pass use_distributed_sampler=False."


def rebuild_loader(
    loader: DataLoader[T], *, sampler: object | None = None, batch_sampler: object | None = None
) -> DataLoader[T]:
    """Make a loader of the same class as ``loader`` with another sampler or batch sampler; exactly one is given.

    Every argument of the class's ``__init__`` is read from the attribute of that name (or that name after an
    underscore). Attributes set on ``loader`` later are carried over.

    Raises:
        TypeError: an argument cannot be read back, or the class does not take or does not use the sampler; the message
            names the argument.
    """
    kind = type(loader)
    overrides: dict[str, object] = {"shuffle": False}
    if batch_sampler is None:
        inner = cast("object", getattr(loader, "batch_sampler", None))
        if isinstance(inner, BatchSampler) and loader.batch_size is None:
            # The loader was given a batch sampler: keep its kind of argument.
            batch_sampler = BatchSampler(cast("Iterable[int]", sampler), inner.batch_size, inner.drop_last)
        else:
            overrides |= {"sampler": sampler, "batch_sampler": None}
    if batch_sampler is not None:
        overrides |= {"sampler": None, "batch_sampler": batch_sampler, "batch_size": 1, "drop_last": False}
    if loader.num_workers == 0:
        overrides |= {"prefetch_factor": None, "multiprocessing_context": None}

    arguments: dict[str, object] = {}
    parameters = _parameters(kind)
    for name, parameter in parameters.items():
        if name in overrides:
            arguments[name] = overrides[name]
        elif hasattr(loader, name):
            arguments[name] = getattr(loader, name)
        elif hasattr(loader, f"_{name}"):
            arguments[name] = getattr(loader, f"_{name}")
        else:
            must = "needs" if parameter.default is Parameter.empty else "may have been given"
            raise MisconfigurationTypeError(
                f"{kind.__qualname__} cannot be made again with another sampler: its __init__ {must} {name!r}, which "
                f"the loader has no attribute for. Store it as self.{name}, {_ALTERNATIVE}"
            )
    wanted = "sampler" if batch_sampler is None else "batch_sampler"
    if wanted not in arguments:
        raise MisconfigurationTypeError(
            f"{kind.__qualname__} cannot be made again with another sampler: its __init__ takes no {wanted!r}. "
            f"Add the argument (or **kwargs) and hand it to DataLoader, {_ALTERNATIVE}"
        )
    result = _call(cast("Callable[..., DataLoader[T]]", kind), arguments, wanted)
    used = cast("object", getattr(result, wanted))
    if used is not overrides[wanted]:
        raise MisconfigurationTypeError(
            f"{kind.__qualname__} was made again with {wanted}={overrides[wanted]!r} but uses {used!r}. "
            f"Hand the argument to DataLoader unchanged, {_ALTERNATIVE}"
        )
    for name, value in vars(loader).items():
        if name not in vars(result):
            setattr(result, name, value)
    return result


def _call(kind: Callable[..., T], arguments: dict[str, object], wanted: str) -> T:
    while True:
        try:
            return kind(**arguments)
        except TypeError as error:
            # The class passes **kwargs on but fixes this argument itself: leave it to the class.
            fixed = re.search(r"multiple values for (?:keyword )?argument '(\w+)'", str(error))
            if fixed is None or fixed[1] == wanted or fixed[1] not in arguments:
                error.add_note(
                    f"raised while {getattr(kind, '__qualname__', kind)} was made again with another {wanted}; "
                    f"make its __init__ take what DataLoader takes, {_ALTERNATIVE}"
                )
                raise
            del arguments[fixed[1]]


def _parameters(kind: type) -> dict[str, Parameter]:
    """Named parameters of ``kind.__init__``; where it passes ``**kwargs`` on, those of the next class too."""
    found: dict[str, Parameter] = {}
    for base in kind.__mro__:
        if "__init__" not in base.__dict__:
            continue
        parameters = list(inspect.signature(base.__dict__["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found

"""Taking a function to another process: by value, so that no two ranks share the memory of a tensor."""

from __future__ import annotations

import io
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ByValue"]

T = TypeVar("T")


class ByValue(Generic[T]):
    """Carries an object into a process that is being started; queues and locks in it go along as usual.

    torch would put every tensor into shared memory, so that all ranks would train one and the same set of weights.
    """

    def __init__(self, content: T) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Callable[..., object], tuple[bytes]]:
        stream = io.BytesIO()
        pickler = ForkingPickler(stream, pickle.HIGHEST_PROTOCOL)
        shared = cast("dict[type, Any]", pickler.dispatch_table)
        # torch's types have ways of their own, which copy.
        pickler.dispatch_table = {
            kind: reduce for kind, reduce in shared.items() if not kind.__module__.startswith("torch")
        }
        pickler.dump(self.content)
        return _unpacked, (stream.getvalue(),)


def _unpacked(content: bytes) -> ByValue[object]:
    return ByValue(pickle.loads(content))

"""ServableModule: how a module is asked over HTTP and how it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["ServableModule"]


class ServableModule(ABC, nn.Module):
    """A module that can be served. Derive from it and from ``LightningModule``.

    ``ServableModuleValidator`` tries it at the start of training: it sends ``configure_payload()`` to a real server and
    compares the answer with ``configure_response()``.
    """

    @abstractmethod
    def configure_payload(self) -> dict[str, Any]:
        """A request as JSON-ready data: ``{"body": {name: value, ...}}``."""

    @abstractmethod
    def configure_serialization(
        self,
    ) -> tuple[dict[str, Callable[[Any], Any]], dict[str, Callable[[Any], Any]]]:
        """How to read a request and write an answer.

        Returns:
            Deserializers, by the argument of ``serve_step`` that they make from the value of that name in the body; and
            serializers, by the output of ``serve_step`` that they make JSON-ready.
        """

    @abstractmethod
    def serve_step(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Answer one request, in evaluation mode and without gradients.

        Args:
            args: none; what a subclass names is passed by name.
            kwargs: the body's values, those with a deserializer after it.
        """

    @abstractmethod
    def configure_response(self) -> dict[str, Any]:
        """The expected answer to ``configure_payload()``, as JSON-ready data."""

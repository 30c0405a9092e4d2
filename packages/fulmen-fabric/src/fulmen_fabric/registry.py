"""Names that a program gives to strategies and accelerators of its own, for this process, before it asks for them.

An installed package needs none of this: its names come from its entry points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar, cast, overload

from fulmen_protocols import ACCELERATORS, STRATEGIES, BackendNotFound, MisconfigurationException, available, load

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen_protocols import Accelerator, Seam, Strategy

__all__ = ["ACCELERATOR_REGISTRY", "STRATEGY_REGISTRY", "Registry"]

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., object]")


class Registry(Generic[T]):
    """Backends of one kind by names that this program has chosen; its names go before those of installed packages.

    Args:
        seam: which kind.
    """

    def __init__(self, seam: Seam[T]) -> None:
        self._seam = seam
        self._own: dict[str, tuple[Callable[..., object], dict[str, object], str]] = {}

    @overload
    def register(
        self, name: str, factory: None = None, description: str | None = None, override: bool = False, **options: object
    ) -> Callable[[F], F]: ...

    @overload
    def register(
        self, name: str, factory: F, description: str | None = None, override: bool = False, **options: object
    ) -> F: ...

    def register(
        self,
        name: str,
        factory: Callable[..., object] | None = None,
        description: str | None = None,
        override: bool = False,
        **options: object,
    ) -> object:
        """Let ``name`` stand for ``factory(**options)``. Without ``factory`` it decorates a class or a function.

        Raises:
            MisconfigurationException: the name is taken, and ``override`` is False.
        """
        if not isinstance(cast("object", name), str) or not name:
            raise MisconfigurationException(f"{self._seam.noun} name={name!r} is not a name. Pass a text.")
        if name in self and not override:
            raise MisconfigurationException(
                f"a {self._seam.noun} named {name!r} is there already. Choose another name, or pass override=True."
            )

        def take(made: F) -> F:
            self._own[name] = (made, options, description or "")
            return made

        return take if factory is None else take(factory)

    def get(self, name: str, default: T | None = None) -> T:
        """A new backend of that name, this program's or an installed one; ``default`` where there is none.

        Raises:
            BackendNotFound: no backend has the name, and there is no default.
        """
        try:
            return cast("T", self.resolve(name)) if name in self._own else load(self._seam, name)
        except BackendNotFound:
            if default is None:
                raise
            return default

    def resolve(self, asked: object) -> object:
        """The backend that ``asked`` names, if this program has registered that name; else ``asked`` itself."""
        if not isinstance(asked, str) or asked not in self._own:
            return asked
        factory, options, _ = self._own[asked]
        return factory(**options)

    def remove(self, name: str) -> None:
        """Forget a name of this program.

        Raises:
            MisconfigurationException: it has registered none such.
        """
        if self._own.pop(name, None) is None:
            raise MisconfigurationException(
                f"this program has registered no {self._seam.noun} {name!r}, only {sorted(self._own)!r}. Names of "
                "installed packages stay."
            )

    def available(self) -> list[str]:
        """All names, sorted: this program's, and those of installed packages."""
        return sorted({*self._own, *available(self._seam)})

    available_strategies = available_accelerators = available

    def __contains__(self, name: object) -> bool:
        """Whether a backend has this name."""
        return name in self._own or name in available(self._seam)

    def __str__(self) -> str:
        """The names."""
        return f"{self._seam.noun}: {', '.join(self.available())}"


STRATEGY_REGISTRY: Registry[Strategy] = Registry(STRATEGIES)
ACCELERATOR_REGISTRY: Registry[Accelerator] = Registry(ACCELERATORS)

"""Which accelerator and devices a Trainer would take, without making one: what programs ask Lightning's class for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._lightning_views import AcceleratorConnectorView
from fulmen_fabric.assembly import assemble

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen_protocols import Accelerator, Strategy

__all__ = ["_AcceleratorConnector"]


class _AcceleratorConnector(AcceleratorConnectorView):
    """The backends that these arguments of a Trainer come to, checked against each other. Nothing is started.

    Args:
        devices, num_nodes, accelerator, strategy, plugins, precision: as a Trainer takes them.

    Raises:
        MisconfigurationException: with every conflict found.
    """

    def __init__(
        self,
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        plugins: object | Sequence[object] | None = None,
        precision: str | int | None = None,
    ) -> None:
        assembly = assemble(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            plugins=plugins,
            takes_layer_sync=True,
        )
        super().__init__(assembly, assembly.strategy)

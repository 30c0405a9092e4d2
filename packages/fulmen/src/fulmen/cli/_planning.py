"""A configuration of ``fulmen fit`` as what a plan needs: a Trainer, a model without memory, its data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulmen.cli.lightning_cli import LightningCLI
from fulmen.memory_plan._fake_world import FakeTensors, OneRankOf
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fulmen.cli.parser import ArgsType, LightningArgumentParser
    from fulmen.datamodule import LightningDataModule
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["from_config"]

# Whatever writes, shows or watches something is left out of a Trainer that only plans.
_SILENT = {
    "logger": False,
    "callbacks": None,
    "profiler": None,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def from_config(
    configs: Sequence[str], changed: Mapping[str, Any]
) -> tuple[Trainer, LightningModule, LightningDataModule | None]:
    """Build what the configuration files describe, the Trainer for a plan, with ``changed`` arguments.

    Raises:
        MisconfigurationException: the configuration does not say how many devices there will be.
    """

    class Plan(LightningCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            assert isinstance(args, list)
            self.config = parser.parse_args(args)

        def before_instantiate_classes(self) -> None:
            for key, value in _SILENT.items():
                self.config["trainer"][key] = value

        def _builders(self) -> list[Any]:
            return [
                (_without_memory(builder) if key == "model" else builder, cls, several)
                for key, (builder, cls, several) in zip(("model", "data"), super()._builders(), strict=True)
            ]

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            configured = self.config_init["trainer"]
            devices = changed.get("devices") or _count(configured.get("devices"))
            nodes = changed.get("num_nodes") or configured.get("num_nodes") or 1
            own = {
                "accelerator": "cpu",
                "devices": devices,
                "num_nodes": nodes,
                "plugins": [OneRankOf(devices * nodes)],
            }
            return super().instantiate_trainer(**{**kwargs, **changed, **own})

        def _seed(self) -> None:
            """Nothing is drawn."""

    Plan.__name__ = "fulmen plan"
    arguments = [word for config in configs for word in ("--config", config)]
    built = Plan(args=arguments, run=False, save_config_callback=None, parser_kwargs={"prog": "fulmen plan"})
    return built.trainer, built.model, built.datamodule


def _without_memory(builder: Callable[..., Any]) -> Callable[..., Any]:
    def build(*args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        with FakeTensors():
            return builder(*args, applied_instantiation_links=applied_instantiation_links, **kwargs)

    return build


def _count(devices: object) -> int:
    if isinstance(devices, list):
        return len(devices)  # pyright: ignore[reportUnknownArgumentType]  # of whatever
    if isinstance(devices, int) and devices > 0:
        return devices
    if isinstance(devices, str) and devices.isdecimal():
        return int(devices)
    raise MisconfigurationException(
        f"the configuration has trainer.devices={devices!r}, from which no number of devices follows here: "
        "give --devices, for example --devices 8."
    )

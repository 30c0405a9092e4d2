"""A module that knows its run: the Trainer or Fabric it was given to, its ranks, its loggers and its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.device_mesh import DeviceMesh

    from fulmen.trainer import Trainer
    from fulmen_fabric import Fabric

__all__ = ["AttachedModule"]

# What belongs to a run and not to the model: it is left behind when the module is pickled or copied.
_OF_THE_RUN = (
    "_trainer",
    "_fabric",
    "_metric_store",
    "_metric_stores_of_run",
    "_target_device",
    "_requires_grad_before",
    "_log_token",
    "log",  # the ones that compiled code calls
    "log_dict",
)


class AttachedModule(nn.Module):
    """Base of ``LightningModule``: what it can ask about the run it belongs to."""

    # Which properties TorchScript leaves alone: they speak of the run.
    __jit_unused_properties__: ClassVar[list[str]] = [
        "trainer",
        "fabric",
        "current_epoch",
        "global_step",
        "global_rank",
        "local_rank",
        "loggers",
        "logger",
        "device_mesh",
        "strict_loading",
        "device",
        "dtype",
        "on_gpu",
        "hparams",
        "hparams_initial",
        "_current_fx_name",
    ]
    # Set while a module is exported to TorchScript, which reads every property: then ``trainer`` may be None.
    _jit_is_scripting: ClassVar[bool] = False

    # Plain class attributes, so that they exist before nn.Module.__init__ has run.
    _trainer: Trainer | None = None
    _fabric: Fabric | None = None
    _strict_loading: bool | None = None
    _device_mesh: DeviceMesh | None = None
    # Of a module without any tensor, as the last ``.to`` left them.
    _device: torch.device | None = None
    _dtype: torch.dtype | None = None
    # Where the run is going to place the module, between setup and placement.
    _target_device: torch.device | None = None

    @property
    def trainer(self) -> Trainer:
        """The Trainer this module, or the module that contains it, was given to.

        Raises:
            RuntimeError: there is none.
        """
        trainer = self._trainer
        if trainer is not None:
            return trainer
        if self._fabric is not None:
            return cast("Trainer", _FabricAsTrainer(self._fabric))
        if self._jit_is_scripting:
            return cast("Trainer", None)
        raise RuntimeError(
            f"{type(self).__name__} is not attached to a Trainer. Give it to Trainer.fit or a sibling first."
        )

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self._attach("_trainer", trainer)

    @property
    def fabric(self) -> Fabric | None:
        """The Fabric that set this module up, or None."""
        return self._fabric

    @fabric.setter
    def fabric(self, fabric: Fabric | None) -> None:
        self._attach("_fabric", fabric)

    def _attach(self, name: str, value: object) -> None:
        # Past nn.Module.__setattr__, which would take a value that is a module for a child.
        for module in self.modules():
            if isinstance(module, AttachedModule):
                module.__dict__[name] = value

    @property
    def current_epoch(self) -> int:
        """Completed training epochs; 0 without a Trainer."""
        return self._trainer.current_epoch if self._trainer is not None else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps taken; 0 without a Trainer."""
        return self._trainer.global_step if self._trainer is not None else 0

    @property
    def global_rank(self) -> int:
        """Index of this process among all of the run."""
        owner = self._trainer if self._trainer is not None else self._fabric
        return owner.global_rank if owner is not None else 0

    @property
    def local_rank(self) -> int:
        """Index of this process among those of its node."""
        owner = self._trainer if self._trainer is not None else self._fabric
        return owner.local_rank if owner is not None else 0

    @property
    def loggers(self) -> list[Any]:
        """The loggers of the run; Any, since each has its own ``experiment``."""
        owner = self._trainer if self._trainer is not None else self._fabric
        return list(owner.loggers) if owner is not None else []

    @property
    def logger(self) -> Any:
        """The first logger of the run, or None."""
        loggers = self.loggers
        return loggers[0] if loggers else None

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """The mesh of a model-parallel strategy, for use in ``configure_model``; otherwise None."""
        return self._device_mesh

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must hold exactly this module's keys. True unless it was set."""
        return self._strict_loading is not False

    @strict_loading.setter
    def strict_loading(self, strict: bool | None) -> None:
        self._strict_loading = strict

    # -- where it lives -----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer, or the one that the run is about to place the module on."""
        if self._target_device is not None:
            return self._target_device
        tensor = _first_tensor(self)
        if tensor is not None:
            return tensor.device
        return self._device if self._device is not None else torch.get_default_device()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter or buffer."""
        tensor = _first_tensor(self, floating=True)
        if tensor is not None:
            return tensor.dtype
        return self._dtype if self._dtype is not None else torch.get_default_dtype()

    @property
    def on_gpu(self) -> bool:
        """Whether the module is on a CUDA device."""
        return self.device.type == "cuda"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # its owner has left it untyped
        if _first_tensor(self) is None:  # nothing that could tell later where it was moved
            result = cast("object", fn(torch.empty(0, device=self.device, dtype=self.dtype)))
            if isinstance(result, Tensor):
                self._device, self._dtype = result.device, result.dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OF_THE_RUN}


def _first_tensor(module: Any, floating: bool = False) -> Tensor | None:
    """The first parameter or buffer, own ones before children's; cheaper than ``next(module.parameters())``."""
    groups: tuple[dict[str, Tensor | None], ...] = (module._parameters, module._buffers)
    for tensors in groups:
        for tensor in tensors.values():
            if tensor is not None and not (floating and not tensor.is_floating_point()):
                return tensor
    for child in module._modules.values():
        if child is not None:
            tensor = _first_tensor(child, floating)
            if tensor is not None:
                return tensor
    return None


class _FabricAsTrainer:
    """What ``module.trainer`` is under a Fabric: the names that both have."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._fabric, name)
        except AttributeError:
            raise AttributeError(
                f"self.trainer.{name} was read, but this module runs under a Fabric, which has no {name!r}."
            ) from None

"""ModelPruning: set the least important weights to zero as training goes on."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fulmen.callbacks._pruning_methods import (
    PARAMETER_NAMES,
    ParameterList,
    check_parameters,
    pruning_method,
)
from fulmen.callbacks._requirements import require_whole_model
from fulmen.callbacks.callback import Callback
from fulmen.module import LightningModule
from fulmen_fabric import rank_zero_info
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch.utils.hooks import RemovableHandle

    from fulmen.callbacks.callback import Stage
    from fulmen.trainer import Trainer

__all__ = ["ModelPruning"]

_CONTAINERS = (LightningModule, nn.Sequential, nn.ModuleList, nn.ModuleDict)


class ModelPruning(Callback):
    """Prune with ``torch.nn.utils.prune`` at the end of epochs.

    Masks add up from epoch to epoch; a pruned weight stays zero. With ``make_pruning_permanent`` a checkpoint's
    ``state_dict`` is that of a model that was never pruned, with zeros in it, and so is the model when training has
    ended. What a resumed run needs, masks and the weights under them, is in the callback's own state.

    Args:
        pruning_fn: ``"l1_unstructured"``, ``"random_unstructured"``, ``"ln_structured"``, ``"random_structured"``, or a
            subclass of ``torch.nn.utils.prune.BasePruningMethod``.
        parameters_to_prune: pairs of a layer and the name of its parameter; by default all that
            ``parameter_names`` names.
        parameter_names: ``"weight"``, ``"bias"`` or both, the default.
        use_global_unstructured: whether weights of all layers are compared with each other, or layer by layer.
        amount: fraction (float) or number (int) of entries to prune each time, or a function of the epoch.
        apply_pruning: whether to prune, or a function of the epoch that says so.
        make_pruning_permanent: see above.
        use_lottery_ticket_hypothesis: whether to put the weights that are left back to their values before training,
            each time, or a function of the epoch that says so.
        resample_parameters: with the lottery ticket, initialise layers anew instead of using their first values.
        pruning_dim: dimension along which structured methods prune.
        pruning_norm: the n of ``"ln_structured"``.
        verbose: 1: say how sparse the model is each time; 2: each parameter as well.
        prune_on_train_epoch_end: whether to prune when the training part of an epoch ends, or when validation does.

    Raises:
        MisconfigurationException: arguments contradict each other or are out of range.
        MisconfigurationTypeError: an argument has the wrong type.

    Source: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis", section 1.
    """

    PARAMETER_NAMES = PARAMETER_NAMES

    def __init__(
        self,
        pruning_fn: Callable[..., Any] | str,
        parameters_to_prune: ParameterList = (),
        parameter_names: Sequence[str] | None = None,
        use_global_unstructured: bool = True,
        amount: int | float | Callable[[int], int | float] = 0.5,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = True,
        resample_parameters: bool = False,
        pruning_dim: int | None = None,
        pruning_norm: int | None = None,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:
        names = tuple(parameter_names or PARAMETER_NAMES)
        for name in names:
            if name not in PARAMETER_NAMES:
                raise MisconfigurationException(
                    f"ModelPruning(parameter_names={parameter_names!r}) holds {name!r}; use 'weight' and 'bias', and "
                    "parameters_to_prune for others."
                )
        if isinstance(amount, bool) or not (isinstance(amount, (int, float)) or callable(amount)):
            raise MisconfigurationTypeError(
                f"ModelPruning(amount={amount!r}): give a fraction, a number of entries, or a function of the epoch."
            )
        if not callable(amount) and (amount < 0 or (isinstance(amount, float) and amount > 1)):
            raise MisconfigurationException(
                f"ModelPruning(amount={amount!r}): give a fraction from 0.0 to 1.0, or an integer of at least 0."
            )
        if verbose not in (0, 1, 2):
            raise MisconfigurationException(f"ModelPruning(verbose={verbose!r}): use 0, 1 or 2.")
        self._method = pruning_method(pruning_fn, is_global=use_global_unstructured, dim=pruning_dim, norm=pruning_norm)
        self.pruning_fn = self._method.function
        self.amount = amount
        self._given = parameters_to_prune
        self._parameter_names = names
        self._apply_pruning = apply_pruning
        self._make_pruning_permanent = make_pruning_permanent
        self._use_lottery_ticket_hypothesis = use_lottery_ticket_hypothesis
        self._resample_parameters = resample_parameters
        self._verbose = verbose
        self._prune_on_train_epoch_end = prune_on_train_epoch_end
        self._parameters_to_prune: ParameterList = ()
        self._names: list[str] = []
        self._original_layers: dict[int, nn.Module] = {}
        self._trainer: Trainer | None = None
        self._load_hook: RemovableHandle | None = None

    # -- a run's beginning --------------------------------------------------------------------------------------------

    def filter_parameters_to_prune(self, parameters_to_prune: ParameterList = ()) -> ParameterList:
        """Choose among the pairs of layer and parameter's name. Override it; by default all."""
        return parameters_to_prune

    @staticmethod
    def sanitize_parameters_to_prune(
        pl_module: LightningModule, parameters_to_prune: ParameterList = (), parameter_names: Sequence[str] = ()
    ) -> ParameterList:
        """The given pairs if they are the module's, or all its parameters of these names if none is given.

        Raises:
            MisconfigurationException: a layer or a parameter is not there.
            MisconfigurationTypeError: it is no list of pairs.
        """
        return check_parameters(pl_module, parameters_to_prune, parameter_names or PARAMETER_NAMES, _CONTAINERS)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Refuse strategies that shard the model.

        Raises:
            MisconfigurationException: the strategy does.
        """
        if stage == "fit":
            require_whole_model(trainer, self)

    def after_configure_model(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what to prune, and remember its first values for the lottery ticket."""
        if trainer.state.fn != "fit":
            return
        self._trainer = trainer
        found = self.sanitize_parameters_to_prune(pl_module, self._given, self._parameter_names)
        self._parameters_to_prune = self.filter_parameters_to_prune(found)
        if not self._parameters_to_prune:
            raise MisconfigurationException(
                f"ModelPruning found nothing to prune in {type(pl_module).__name__} under the names "
                f"{self._parameter_names!r}. Give parameters_to_prune."
            )
        named = cast("Iterable[tuple[str, nn.Module]]", pl_module.named_modules())  # torch gives it no types
        paths = {id(module): path for path, module in named}
        self._names = [f"{paths[id(module)]}.{name}".lstrip(".") for module, name in self._parameters_to_prune]
        self._original_layers = {}
        if self._use_lottery_ticket_hypothesis:
            for module, _ in self._parameters_to_prune:
                if id(module) not in self._original_layers:
                    self._original_layers[id(module)] = deepcopy(module)
        if not self._make_pruning_permanent:
            untyped: Any = pl_module  # torch gives the method no types
            self._load_hook = untyped.register_load_state_dict_pre_hook(self._expect_masks)

    def _expect_masks(self, module: nn.Module, state_dict: dict[str, Any], *_: object) -> None:
        """A checkpoint that is not permanent holds masks: give the layers that they belong to a place for them."""
        for (layer, name), path in zip(self._parameters_to_prune, self._names, strict=True):
            if path + "_mask" in state_dict and not hasattr(layer, name + "_mask"):
                prune.identity(layer, name)  # type: ignore[no-untyped-call]  # its owner has left it untyped

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is loaded: whatever is loaded later has the model's own names."""
        if self._load_hook is not None:
            self._load_hook.remove()
            self._load_hook = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give a resumed fit its masks, the weights under them, and the first values of the lottery ticket."""
        states: dict[str, Any] = checkpoint.get("callbacks") or {}
        state: dict[str, Any] | None = states.get(self.state_key)
        if trainer.state.fn != "fit" or not state:
            return
        for (module, name), path in zip(self._parameters_to_prune, self._names, strict=True):
            if path in state["masks"]:
                if not hasattr(module, name + "_mask"):
                    prune.identity(module, name)  # type: ignore[no-untyped-call]  # its owner has left it untyped
                with torch.no_grad():
                    getattr(module, name + "_mask").copy_(state["masks"][path])
                    getattr(module, name + "_orig").copy_(state["pruned"][path])
                _refresh(module, name)
            if path in state["initial"]:
                getattr(self._original_layers[id(module)], name).data.copy_(state["initial"][path])

    # -- pruning ------------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, if this is the moment."""
        if self._prune_on_train_epoch_end:
            self._run_pruning(trainer.current_epoch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, if this is the moment."""
        if not self._prune_on_train_epoch_end and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._run_pruning(trainer.current_epoch)

    def _run_pruning(self, current_epoch: int) -> None:
        amount = self.amount(current_epoch) if callable(self.amount) else self.amount
        if not amount or not _asked(self._apply_pruning, current_epoch):
            return
        self.apply_pruning(amount)
        if _asked(self._use_lottery_ticket_hypothesis, current_epoch):
            self.apply_lottery_ticket_hypothesis()

    def apply_pruning(self, amount: int | float) -> None:
        """Prune ``amount`` of what there is to prune; all ranks get rank 0's masks."""
        before = self._pruned() if self._verbose else []
        self._method.apply(self._parameters_to_prune, amount)
        self._share(f"{name}_mask" for _, name in self._parameters_to_prune)
        for module, name in self._parameters_to_prune:
            _refresh(module, name)
        if self._verbose:
            self._say(before, self._pruned(), amount)

    def apply_lottery_ticket_hypothesis(self) -> None:
        """Put the weights that are left back to their first values, or, if asked, to newly drawn ones."""
        originals = self._original_layers
        if self._resample_parameters:
            originals = {key: _resampled(layer) for key, layer in originals.items()}
        for module, name in self._parameters_to_prune:
            if id(module) in originals:
                self._copy_param(module, originals[id(module)], name)
        if self._resample_parameters:
            self._share(_trained_name(module, name) for module, name in self._parameters_to_prune)

    def _share(self, names: Iterable[str]) -> None:
        """Give every rank rank 0's tensors of these names: ranks that drew differently would train different models."""
        if self._trainer is None or self._trainer.world_size == 1:
            return
        for (module, _), name in zip(self._parameters_to_prune, names, strict=True):
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor):
                self._trainer.world.collectives.broadcast(tensor.detach())

    @staticmethod
    def _copy_param(new: nn.Module, old: nn.Module, name: str) -> None:
        target, source = getattr(new, _trained_name(new, name), None), getattr(old, name, None)
        if isinstance(target, Tensor) and isinstance(source, Tensor):
            with torch.no_grad():
                target.copy_(source)

    def _pruned(self) -> list[tuple[int, int]]:
        """Zeros and entries of each mask; reads the device."""
        masks = [getattr(module, name + "_mask", None) for module, name in self._parameters_to_prune]
        return [(0, 1) if mask is None else (int((mask == 0).sum()), mask.numel()) for mask in masks]

    def _say(self, before: list[tuple[int, int]], after: list[tuple[int, int]], amount: float) -> None:
        total = sum(entries for _, entries in after)
        old, new = (sum(zeros for zeros, _ in counts) for counts in (before, after))
        name = self._method.name
        rank_zero_info(f"{name}: {new} of {total} entries are pruned ({new / total:.2%}), up from {old}")
        if self._verbose == 2:
            for path, (was, _), (zeros, entries) in zip(self._names, before, after, strict=True):
                rank_zero_info(
                    f"{name} on {path} with amount={amount}: {zeros} of {entries} entries are pruned "
                    f"({zeros / entries:.2%}), up from {was}"
                )

    # -- the end, and checkpoints -------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a model without masks, with zeros in their places."""
        if self._make_pruning_permanent:
            self.make_pruning_permanent(pl_module)

    def make_pruning_permanent(self, module: nn.Module) -> None:
        """Fold the masks of all layers in ``module`` into their weights."""
        for layer in module.modules():
            for orig in [name for name, _ in layer.named_parameters(recurse=False) if name.endswith("_orig")]:
                name = orig.removesuffix("_orig")
                if hasattr(layer, name + "_mask"):
                    prune.remove(layer, name)  # type: ignore[no-untyped-call]  # its owner has left it untyped

    def state_dict(self) -> dict[str, Any]:
        """By the parameter's name: masks, the weights under them, and the first values of the lottery ticket."""
        pairs = list(zip(self._names, self._parameters_to_prune, strict=True))
        masked = [(path, module, name) for path, (module, name) in pairs if hasattr(module, name + "_mask")]
        return {
            "masks": {path: getattr(module, name + "_mask") for path, module, name in masked},
            "pruned": {path: getattr(module, name + "_orig").detach() for path, module, name in masked},
            "initial": {
                path: getattr(self._original_layers[id(module)], name).detach()
                for path, (module, name) in pairs
                if id(module) in self._original_layers
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is left to do: ``on_load_checkpoint`` has given the layers their masks."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the pruned weights as a model without masks has them."""
        checkpoint["state_dict"] = self.weights_to_save(trainer, pl_module, checkpoint["state_dict"])

    def weights_to_save(
        self, trainer: Trainer, pl_module: LightningModule, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """``state_dict`` with the masks folded in, unless pruning is not to be permanent."""
        if not self._make_pruning_permanent:
            return state_dict
        clean: dict[str, Any] = {}
        for key, value in state_dict.items():
            name, mask = key.removesuffix("_orig"), state_dict.get(key.removesuffix("_orig") + "_mask")
            if key.endswith("_mask") and key.removesuffix("_mask") + "_orig" in state_dict:
                continue
            if key.endswith("_orig") and mask is not None:
                clean[name] = mask.to(value.dtype) * value
            else:
                clean[key] = value
        return clean


def _asked(answer: bool | Callable[[int], bool], epoch: int) -> bool:
    return answer(epoch) if callable(answer) else answer


def _refresh(module: nn.Module, name: str) -> None:
    """Let the layer's pruned tensor follow its mask; later its forward does that."""
    mask = getattr(module, name + "_mask", None)
    if mask is not None:
        setattr(module, name, getattr(module, name + "_orig") * mask)


def _trained_name(module: nn.Module, name: str) -> str:
    """The parameter's name while it is pruned, and when it is not."""
    return name + "_orig" if hasattr(module, name + "_orig") else name


def _resampled(layer: nn.Module) -> nn.Module:
    reset = getattr(layer, "reset_parameters", None)
    if not callable(reset):
        return layer
    drawn = deepcopy(layer)
    cast("Callable[[], None]", drawn.reset_parameters)()
    return drawn

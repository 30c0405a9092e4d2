"""BaseFinetuning and BackboneFinetuning: freeze a part of the model, and let it join the training later."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from torch.nn import Module, ModuleDict, Parameter

from fulmen.callbacks._requirements import BATCH_NORM, require_no_engine
from fulmen.callbacks.callback import Callback
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fulmen.callbacks.callback import Stage
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["BackboneFinetuning", "BaseFinetuning", "multiplicative"]

Modules: TypeAlias = Module | Iterable["Module | Iterable[Any]"]


def multiplicative(epoch: int) -> float:
    """Double the learning rate each epoch."""
    return 2.0


class BaseFinetuning(Callback):
    """Base of callbacks that freeze modules before training and unfreeze them at some epoch.

    Override ``freeze_before_training``, called when the model has all its layers and before ``configure_optimizers``,
    and ``finetune_function``, called at the start of each epoch for each optimizer. ``configure_optimizers`` should
    leave frozen parameters out (``filter(lambda p: p.requires_grad, self.parameters())``); unfreezing adds them as a
    parameter group. A resumed run gets its parameter groups back, and what was frozen is frozen.
    """

    def __init__(self) -> None:
        self._internal_optimizer_metadata: dict[int, list[dict[str, Any]]] = {}
        self._restarting = False
        self._frozen: dict[str, list[str]] | None = None

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze what shall not be trained yet. Override it."""
        raise NotImplementedError(f"{type(self).__name__} must define freeze_before_training(pl_module).")

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze what joins in ``epoch``, counted from 0, and add it to ``optimizer``. Override it."""
        raise NotImplementedError(f"{type(self).__name__} must define finetune_function(pl_module, epoch, optimizer).")

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Begin anew, and refuse engines that own the optimizer.

        Raises:
            MisconfigurationException: the strategy is such an engine.
        """
        if stage == "fit":
            require_no_engine(trainer, self)
            self._internal_optimizer_metadata = {}
            self._restarting, self._frozen = False, None

    def after_configure_model(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze: the layers exist, and neither wrapper nor optimizers do."""
        if trainer.state.fn == "fit":
            self.freeze_before_training(pl_module)
            self._note_frozen(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Freeze what was frozen in the resumed run, before the model is placed."""
        states: dict[str, Any] = checkpoint.get("callbacks") or {}
        state: dict[str, Any] = states.get(self.state_key) or {}
        if trainer.state.fn != "fit" or "frozen" not in state:
            return
        frozen: dict[str, list[str]] = state["frozen"]
        untrained, untracked = set(frozen["parameters"]), set(frozen["statistics"])
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad = name not in untrained
        for name, module in _named_modules(pl_module):
            if isinstance(module, BATCH_NORM) and module.running_mean is not None:
                module.track_running_stats = name not in untracked

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give a resumed run the parameter groups it had."""
        if not self._restarting:
            return
        self._restarting = False
        named = dict(pl_module.named_parameters())
        for index, optimizer in enumerate(trainer.optimizers):
            if index in self._internal_optimizer_metadata:
                stored = self._internal_optimizer_metadata[index]
                optimizer.param_groups = self._apply_mapping_to_param_groups(stored, named)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call ``finetune_function`` for each optimizer, and let the strategy know what is trained now."""
        trained = _trained(pl_module)
        for index, optimizer in enumerate(trainer.optimizers):
            known = len(optimizer.param_groups)
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
            self._store(pl_module, index, known, optimizer.param_groups)
        self._note_frozen(pl_module)
        if _trained(pl_module) != trained:
            trainer.place_model_again()

    def _note_frozen(self, pl_module: LightningModule) -> None:
        self._frozen = {
            "parameters": [name for name, each in pl_module.named_parameters() if not each.requires_grad],
            "statistics": [
                name
                for name, each in _named_modules(pl_module)
                if isinstance(each, BATCH_NORM) and each.running_mean is not None and not each.track_running_stats
            ],
        }

    def _store(
        self,
        pl_module: LightningModule,
        opt_idx: int,
        num_param_groups: int,
        current_param_groups: list[dict[str, Any]],
    ) -> None:
        """Note which parameters the groups of optimizer ``opt_idx`` hold, by name; the first so many are known."""
        names: dict[object, str] = {parameter: name for name, parameter in pl_module.named_parameters()}
        stored = self._internal_optimizer_metadata.get(opt_idx)
        if stored is None:
            stored = self._internal_optimizer_metadata[opt_idx] = []
            num_param_groups = 0
        stored.extend(self._apply_mapping_to_param_groups(current_param_groups[num_param_groups:], names))

    @staticmethod
    def _apply_mapping_to_param_groups(
        param_groups: list[dict[str, Any]], mapping: Mapping[Any, Any]
    ) -> list[dict[str, Any]]:
        return [{**group, "params": [mapping[each] for each in group["params"]]} for group in param_groups]

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The parameter groups by name, and what is frozen."""
        state: dict[str, Any] = {"internal_optimizer_metadata": self._internal_optimizer_metadata}
        if self._frozen is not None:
            state["frozen"] = self._frozen
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with those groups once the optimizers exist."""
        self._restarting = True
        self._internal_optimizer_metadata = state_dict["internal_optimizer_metadata"]
        self._frozen = state_dict.get("frozen")

    # -- for subclasses -----------------------------------------------------------------------------------------------

    @staticmethod
    def flatten_modules(modules: Modules) -> list[Module]:
        """The modules in ``modules`` that have no children, and those that have parameters of their own."""
        if isinstance(modules, ModuleDict):
            modules = modules.values()
        if isinstance(modules, Iterable):
            found = [module for each in modules for module in BaseFinetuning.flatten_modules(each)]
        else:
            found = list(modules.modules())
        return [m for m in found if not list(m.children()) or next(m.parameters(recurse=False), None) is not None]

    @staticmethod
    def filter_params(
        modules: Modules, train_bn: bool = True, requires_grad: bool = True
    ) -> Generator[Parameter, None, None]:
        """The parameters of ``modules`` that need a gradient, or with ``requires_grad=False`` those that do not.

        Args:
            modules: a module, or several in any nesting.
            train_bn: whether those of batch norm are among them.
            requires_grad: which parameters to give.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, BATCH_NORM) and not train_bn:
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad == requires_grad:
                    yield parameter

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Let all parameters need a gradient, and batch norm follow its statistics."""
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, BATCH_NORM):
                module.track_running_stats = True
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = True

    @staticmethod
    def freeze_module(module: Module) -> None:
        """Freeze the parameters of this very module, not of its children; batch norm's statistics stay as they are."""
        if isinstance(module, BATCH_NORM):
            module.track_running_stats = False
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freeze all parameters of ``modules``, except, with ``train_bn``, those of batch norm."""
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, BATCH_NORM) and train_bn:
                BaseFinetuning.make_trainable(module)
            else:
                BaseFinetuning.freeze_module(module)

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[Parameter]) -> list[Parameter]:
        """Those of ``params`` that ``optimizer`` does not have yet; warns if it has any."""
        known = _ids(optimizer)
        given = list(params)
        new = [each for each in given if id(each) not in known]
        if len(new) < len(given):
            rank_zero_warn(
                f"{len(given) - len(new)} of {len(given)} parameters to add are in a group of "
                f"{type(optimizer).__name__} already and stay there. Leave frozen parameters out in "
                "configure_optimizers: filter(lambda p: p.requires_grad, self.parameters())."
            )
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreeze ``modules`` and add their parameters to ``optimizer`` as a new group.

        Args:
            modules: a module, or several in any nesting.
            optimizer: gets the group.
            lr: the group's learning rate; None: that of the first group divided by ``initial_denom_lr``.
            initial_denom_lr: see ``lr``.
            train_bn: whether the parameters of batch norm are in the group.
        """
        frozen = {id(each) for each in BaseFinetuning.filter_params(modules, requires_grad=False)}
        BaseFinetuning.make_trainable(modules)
        rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
        # What was trained all along, batch norm, has its place in the optimizer, and that is no mistake.
        known = _ids(optimizer)
        joining = [
            each
            for each in BaseFinetuning.filter_params(modules, train_bn=train_bn)
            if id(each) in frozen or id(each) not in known
        ]
        params = BaseFinetuning.filter_on_optimizer(optimizer, joining)
        if params:
            optimizer.add_param_group({"params": params, "lr": rate})


class BackboneFinetuning(BaseFinetuning):
    """Train the head alone at first; from an epoch on train ``backbone`` too, at a learning rate that grows.

    The module has an attribute ``backbone``; it may come into being in ``configure_model``.

    Args:
        unfreeze_backbone_at_epoch: epoch, counted from 0, at which the backbone joins.
        lambda_func: the factor by which the backbone's learning rate grows, for an epoch counted from 1.
        backbone_initial_ratio_lr: the backbone's first learning rate, as a fraction of the first group's.
        backbone_initial_lr: the backbone's first learning rate itself.
        should_align: whether the backbone's learning rate stops at the first group's.
        initial_denom_lr: passed on to ``unfreeze_and_add_param_group``, for subclasses.
        train_bn: whether the backbone's batch norm is in the new parameter group.
        verbose: whether to say the learning rates at each epoch.
        rounding: decimal places in that line.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None

    def after_configure_model(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the backbone.

        Raises:
            MisconfigurationException: the module has none.
        """
        if trainer.state.fn == "fit":
            _backbone(pl_module)
        super().after_configure_model(trainer, pl_module)

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze the backbone, except its batch norm."""
        self.freeze(_backbone(pl_module))

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze the backbone at its epoch, and let its learning rate grow at later ones."""
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        rate = optimizer.param_groups[0]["lr"]
        if epoch == self.unfreeze_backbone_at_epoch:
            own = (
                rate * self.backbone_initial_ratio_lr if self.backbone_initial_lr is None else self.backbone_initial_lr
            )
            self.unfreeze_and_add_param_group(
                _backbone(pl_module), optimizer, own, initial_denom_lr=self.initial_denom_lr, train_bn=self.train_bn
            )
        else:
            if self.previous_backbone_lr is None:
                raise MisconfigurationException(
                    f"BackboneFinetuning(unfreeze_backbone_at_epoch={self.unfreeze_backbone_at_epoch}) meets epoch "
                    f"{epoch} with a backbone that never joined: the checkpoint was saved without this callback. Give "
                    "a later epoch."
                )
            own = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            own = rate if self.should_align and own > rate else own
            optimizer.param_groups[-1]["lr"] = own
        self.previous_backbone_lr = own
        if self.verbose:
            rank_zero_info(
                f"epoch {epoch}: learning rate {round(rate, self.rounding)}, "
                f"of the backbone {round(own, self.rounding)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The parameter groups, what is frozen, and the backbone's learning rate."""
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that learning rate, too."""
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
        super().load_state_dict(state_dict)


def _backbone(pl_module: LightningModule) -> Module:
    found = getattr(pl_module, "backbone", None)
    if not isinstance(found, Module):
        raise MisconfigurationException(
            f"BackboneFinetuning needs an nn.Module as {type(pl_module).__name__}.backbone, and found {found!r}. "
            "Assign it in __init__ or configure_model."
        )
    return found


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(each) for group in optimizer.param_groups for each in group["params"]}


def _trained(module: Module) -> list[bool]:
    return [parameter.requires_grad for parameter in module.parameters()]


def _named_modules(module: Module) -> Iterable[tuple[str, Module]]:
    return cast("Iterable[tuple[str, Module]]", module.named_modules())  # torch gives it no types

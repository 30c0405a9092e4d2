"""From a module as the user wrote it to one that can be run: data prepared, placed, with its optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from fulmen import _engine
from fulmen.optimizer import parse_optimizers
from fulmen.states import TrainerFn
from fulmen.utilities.parameter_tying import find_shared_parameters, set_shared_parameters
from fulmen_fabric import move_data_to_device, rank_zero_info
from fulmen_fabric.abilities import supports
from fulmen_protocols import (
    SupportsAdvice,
    SupportsInferencePlacement,
    SupportsLayerReplacement,
    SupportsOptimizerPreparation,
    SupportsPatientBarrier,
    SupportsPrecisionPlan,
    SupportsShardedState,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.optim import Optimizer

    from fulmen._session import Session

__all__ = [
    "bring_state",
    "configure_model",
    "convert",
    "give_back",
    "make_optimizers",
    "place",
    "prepare_data",
    "tell_place",
]


def prepare_data(session: Session) -> None:
    """Call ``prepare_data`` once per node, or once per run where its owner wants that; every rank waits for it."""
    world = session.world
    for owner in (session.datamodule, session.module):
        if owner is None:
            continue
        per_node = getattr(owner, "prepare_data_per_node", True)
        if world.local_rank == 0 if per_node else world.is_global_zero:
            session.scoped("prepare_data", owner.prepare_data, owner)()
    collectives = world.collectives
    if supports(collectives, SupportsPatientBarrier):  # one rank may be downloading for hours
        collectives.patient_barrier("prepare_data")
    else:
        collectives.barrier("prepare_data")


def tell_place(session: Session) -> None:
    """Let every LightningModule know its device and mesh: they are right in ``setup`` already."""
    for each in session.logging_modules():
        each.__dict__["_target_device"] = session.world.device
        each.__dict__["_device_mesh"] = session.world.device_mesh


def configure_model(session: Session) -> None:
    """Call ``configure_model``; what it makes has the precision's dtype, where the strategy wants it."""
    assembly = session.assembly
    with assembly.precision.init_context(), assembly.strategy.module_context(empty=False):
        session.scoped("configure_model", session.module.configure_model)()


def convert(session: Session, *, sync_batchnorm: bool) -> None:
    """Replace layers and convert to the precision, before weights are loaded: a checkpoint may hold them packed."""
    if sync_batchnorm and session.world.world_size > 1 and session.fn is TrainerFn.FITTING:
        session.batch_norms = synchronise_batch_norms(session.module)
    precision = session.assembly.precision
    if not supports(session.assembly.strategy, SupportsPrecisionPlan):
        precision.convert_module(session.module)
    elif supports(precision, SupportsLayerReplacement):
        precision.replace_layers(session.module)


def place(session: Session) -> None:
    """Let the strategy place the module: ``session.placed``."""
    strategy, module = session.assembly.strategy, session.module
    if session.fn is not TrainerFn.FITTING and supports(strategy, SupportsInferencePlacement):
        session.placed = strategy.place_for_inference(module)
    else:
        session.placed = strategy.place(module)
    for each in session.logging_modules():
        each.__dict__["_target_device"] = None


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Every layer of batch norm in ``module``, by name; the class they share is torch's own business."""
    base = cast("type[nn.Module]", nn.BatchNorm1d.__base__)
    layers = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
    return {name: layer for name, layer in layers if isinstance(layer, base)}


def synchronise_batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Let batch norm use the statistics of all ranks, in place.

    Returns:
        The layers that were replaced, by name; the new ones have the same parameters.
    """
    replaced = {name: layer for name, layer in batch_norms(module).items() if not isinstance(layer, nn.SyncBatchNorm)}
    nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]  # its owner has left it untyped
    return replaced


def give_back_batch_norms(module: nn.Module, replaced: Mapping[str, nn.Module]) -> None:
    """Undo ``synchronise_batch_norms``: the user's own layers, with what they have learned."""
    for name, layer in replaced.items():
        parent, _, attribute = name.rpartition(".")
        owner = module.get_submodule(parent)
        learned = getattr(owner, attribute)
        for tensor, value in (*learned.named_parameters(), *learned.named_buffers()):
            setattr(layer, tensor, value)
        layer.training = learned.training
        setattr(owner, attribute, layer)


def give_back(session: Session) -> None:
    """Undo what ``place`` did: the user's own layers, and the model and its optimizers' states off the device.

    A sharded model stays where it is: no rank has room for all of it.
    """
    give_back_batch_norms(session.module, session.batch_norms)
    session.batch_norms = {}
    _pass_on_advice(session)
    if session.world.device.type == "cpu" or supports(session.assembly.strategy, SupportsShardedState):
        return
    # On devices whose tensors are of another kind (XLA) a moved parameter is a new one, and sharing would be lost.
    shared = find_shared_parameters(session.module)
    session.module.cpu()
    set_shared_parameters(session.module, shared)
    cpu = torch.device("cpu")
    for optimizer in session.optimizers:
        for parameter, state in optimizer.state.items():
            optimizer.state[parameter] = move_data_to_device(state, cpu)


def make_optimizers(session: Session, *, steps_own_schedulers: bool) -> None:
    """Call ``configure_optimizers``: ``session.optimizers`` and ``session.schedulers``.

    Args:
        session: its module has been placed.
        steps_own_schedulers: whether the module has its own ``lr_scheduler_step``, and so may use any scheduler.
    """
    module = session.module
    if _engine.makes_optimizers(session.assembly.strategy):
        session.optimizers, session.schedulers = _engine.made_optimizers(session)
        return
    returned = session.scoped("configure_optimizers", module.configure_optimizers)()
    optimizers, session.schedulers = parse_optimizers(
        returned,
        automatic_optimization=module.automatic_optimization,
        steps_own_schedulers=steps_own_schedulers,
    )
    assert session.placed is not None
    session.optimizers = list(session.assembly.strategy.prepare_optimizers(session.placed, optimizers))
    session.schedulers += _engine.made_schedulers(session)
    for optimizer in session.optimizers:
        bring_state(optimizer)
    precision = session.assembly.precision
    if supports(precision, SupportsOptimizerPreparation):
        for optimizer in session.optimizers:
            precision.prepare_optimizer(optimizer)


def bring_state(optimizer: Optimizer) -> None:
    """Move what ``optimizer`` knows of its parameters to where they are: its user may have made, and used, it before.

    As with torch's ``load_state_dict``, a count of steps stays on the host unless the optimizer is capturable or fused.
    """
    for group in optimizer.param_groups:
        counts_on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            known = cast("dict[str, object]", optimizer.state.get(parameter, {}))
            for name, value in known.items():
                if name != "step" or counts_on_device:
                    known[name] = move_data_to_device(value, parameter.device)


def _pass_on_advice(session: Session) -> None:
    """Tell the user, once, what the strategy has learned about its settings while it trained."""
    strategy = session.assembly.strategy
    if session.fn is not TrainerFn.FITTING or session.placed is None or not supports(strategy, SupportsAdvice):
        return
    advice = strategy.advice(session.placed)
    if advice is not None and advice not in session.said:
        session.said.add(advice)
        rank_zero_info(advice)

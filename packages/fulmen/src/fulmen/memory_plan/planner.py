"""From a Trainer and a model to a MemoryPlan: one training step, taken by the run's own parts on fake tensors."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fulmen import _preparation
from fulmen._batch_steps import compose_batch_steps
from fulmen._loaders import LoaderSource
from fulmen._session import Session
from fulmen.datamodule import LightningDataModule
from fulmen.hooks import HookBinder
from fulmen.memory_plan._allocations import AllocationRecorder, storage_bytes
from fulmen.memory_plan._batch import described, fake_batch, parse_batch, resized
from fulmen.memory_plan._cuda_rules import CudaRules
from fulmen.memory_plan._description import groups_of, mesh_of, state_tensors, tensors_of, unique
from fulmen.memory_plan._fake_world import (
    FakeTensors,
    OneRankOf,
    RanksAlike,
    fake_copy,
    fake_ranks,
    replaceable_parameters,
)
from fulmen.memory_plan._refusals import explained, explained_place
from fulmen.memory_plan.report import MemoryPlan
from fulmen.module import LightningModule
from fulmen.progress import Progress
from fulmen.states import TrainerFn
from fulmen_fabric import Assembly, World, assemble
from fulmen_fabric.abilities import supports
from fulmen_protocols import (
    MisconfigurationException,
    SupportsForwardContext,
    SupportsMemoryPlan,
    SupportsPrecisionPlan,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

    from fulmen.trainer import Trainer
    from fulmen_protocols import Precision

__all__ = ["plan_memory"]

_CUDA_GRANULARITY = 512
"""Bytes to which torch's CUDA allocator rounds up every allocation."""

_ORDER = ("parameters", "buffers", "optimizer state", "gradients", "batch", "activations", "communication")


def plan_memory(
    trainer: Trainer,
    model: LightningModule | Callable[[], LightningModule],
    *,
    batch: object = None,
    batch_size: int | None = None,
    datamodule: LightningDataModule | None = None,
    device: str = "cuda",
) -> MemoryPlan:
    """See ``Trainer.plan``."""
    if device not in ("cuda", "cpu"):
        raise MisconfigurationException(f"device={device!r}: a plan is for 'cuda' or for 'cpu'.")
    if trainer.world.started and trainer.world.world_size > 1:
        raise MisconfigurationException(
            f"plan() was called on a Trainer whose {trainer.world.world_size} processes have met: plan before the run."
        )
    assembly = _one_rank(trainer.assembly)
    fakes = FakeTensors()
    notes: list[str] = []
    with fake_ranks(assembly.world_size), replaceable_parameters():
        world = World(assembly)
        world.start()
        # Strategies communicate through their own; here ranks agree on numbers and objects, which must have values.
        world._collectives = RanksAlike(world.world_size)  # pyright: ignore[reportPrivateUsage]
        try:
            module = _fake_module(fakes, model)
            module.trainer = trainer
            given, runs_forward = _batch(module, datamodule, batch, batch_size, notes)
            sources = {stage: LoaderSource(stage, None, datamodule, module) for stage in ("train", "val")}
            session = Session(TrainerFn.FITTING, module, datamodule, assembly, world, sources)
            with _asked_by_modules(trainer, session):
                return _Planned(trainer, session, fakes, device, notes).run(given, runs_forward)
        finally:
            world.close()


@contextlib.contextmanager
def _asked_by_modules(trainer: Trainer, session: Session) -> Generator[None]:
    """Let ``self.trainer.optimizers`` and the like in a module's hooks find those of the plan."""
    before = trainer._session  # pyright: ignore[reportPrivateUsage]  # part of the Trainer, in a module of its own
    trainer._session = session  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        trainer._session = before  # pyright: ignore[reportPrivateUsage]


def _one_rank(assembly: Assembly) -> Assembly:
    """The same parts on the CPU, in a world that needs no other process."""
    return assemble(
        accelerator="cpu",
        strategy=assembly.strategy,
        devices=len(assembly.devices),
        num_nodes=assembly.num_nodes,
        precision=cast("Any", assembly.precision_name),
        plugins=[OneRankOf(assembly.world_size)],
    )


def _fake_module(fakes: FakeTensors, model: object) -> LightningModule:
    if isinstance(model, LightningModule):
        return cast("LightningModule", fake_copy(fakes, model))
    if not callable(model):
        raise MisconfigurationException(
            f"plan() got {model!r:.80} as its model: give a LightningModule, its class, or a function that makes one."
        )
    with fakes:
        made: object = model()
    if not isinstance(made, LightningModule):
        raise MisconfigurationException(f"{model!r:.80} made {made!r:.80}, which is no LightningModule.")
    return made


def _batch(
    module: LightningModule,
    datamodule: LightningDataModule | None,
    batch: object,
    batch_size: int | None,
    notes: list[str],
) -> tuple[Any, bool]:
    """The batch, and whether ``forward`` takes it instead of ``training_step``."""
    forward = False
    if isinstance(batch, str):
        batch = parse_batch(batch)
    if batch is None:
        batch = _first_batch(datamodule if datamodule is not None else module)
    if batch is None:
        batch, forward = module.example_input_array, True
        if batch is not None:
            notes.append("forward() ran on example_input_array, with a sum as the loss; give a batch for training_step")
    if batch is None:
        name = type(module).__name__
        raise MisconfigurationException(
            f"batch=None, and {name} has neither a train_dataloader nor an example_input_array. "
            "Give the batch of one rank, for example batch='int64[16,1024]' (--batch int64[16,1024])."
        )
    return (batch if batch_size is None else resized(batch, batch_size)), forward


def _first_batch(owner: LightningModule | LightningDataModule) -> Any:
    """The first batch of the owner's training loader; None where it has none."""
    base = LightningDataModule if isinstance(owner, LightningDataModule) else LightningModule
    if type(owner).train_dataloader is getattr(base, "train_dataloader", None):
        return None
    if isinstance(owner, LightningDataModule):
        owner.prepare_data()
        owner.setup("fit")
    loader: Any = owner.train_dataloader()
    return next(iter(loader), None)


class _Phases:
    """The callback that tells the recorder where in the step it is."""

    def __init__(self, recorder: AllocationRecorder, parameters: Sequence[nn.Parameter]) -> None:
        self._recorder, self._parameters = recorder, parameters

    def on_before_backward(self, trainer: object, pl_module: object, loss: Tensor) -> None:
        self._recorder.enter_phase("backward")

    def on_after_backward(self, trainer: object, pl_module: object) -> None:
        self._recorder.assign((p.grad for p in self._parameters if p.grad is not None), "gradients")
        self._recorder.enter_phase("forward")  # manual optimization may go on with another loss

    def on_before_optimizer_step(self, trainer: object, pl_module: object, optimizer: Optimizer) -> None:
        self._recorder.assign((p.grad for p in self._parameters if p.grad is not None), "gradients")
        self._recorder.enter_phase("optimizer step")


class _NoMetrics:
    """Where ``self.log`` goes: a metric's few numbers are no matter."""

    scope = None

    def log(self, *args: object, **kwargs: object) -> None:
        """Nothing."""


class _Unscaled:
    """A precision without its gradient scaler, which reads values."""

    def __init__(self, precision: Precision) -> None:
        self.plan, self.convert_module, self.init_context = (
            precision.plan,
            precision.convert_module,
            precision.init_context,
        )
        self.forward_context: Callable[[], AbstractContextManager[object]] = (
            precision.forward_context if supports(precision, SupportsForwardContext) else contextlib.nullcontext
        )


class _Planned:
    """One session of a plan."""

    def __init__(self, trainer: Trainer, session: Session, fakes: FakeTensors, device: str, notes: list[str]) -> None:
        self.trainer, self.session, self.fakes, self.device, self.notes = trainer, session, fakes, device, notes
        self.extra: Mapping[str, int] = {}

    def run(self, batch: Any, runs_forward: bool) -> MemoryPlan:
        """Place the model, make its optimizers, take a step, and read off what it took."""
        session, module = self.session, self.session.module
        for each in session.logging_modules():
            each.__dict__["_metric_store"] = _NoMetrics()
            each.__dict__["_target_device"] = session.world.device
            each.__dict__["_device_mesh"] = session.world.device_mesh
        with self.fakes:
            session.scoped("setup", module.setup)("fit")
            _preparation.configure_model(session)
            self._place()
            _preparation.make_optimizers(session, steps_own_schedulers=True)
        parameters = unique(module.parameters())
        if runs_forward:
            module.__dict__["training_step"] = _forward_and_sum(module)
        recorder = AllocationRecorder(_CUDA_GRANULARITY if self.device == "cuda" else 1)
        with self.fakes, recorder, contextlib.ExitStack() as stack:
            if self.device == "cuda":
                stack.enter_context(CudaRules())
                self._choose_foreach()
            recorder.assign(parameters, "parameters")
            recorder.assign(module.buffers(), "buffers")
            module.train()
            self._make_states(recorder, parameters)
            fake = fake_batch(self.fakes, batch)
            recorder.assign(tensors_of(fake), "batch")
            fake = session.transfer()(fake, 0)
            recorder.assign(tensors_of(fake), "batch")
            extra = self._extra_tensors()
            recorder.assign(extra, "communication")
            step = self._step(recorder, parameters)
            start = recorder.position()
            recorder.enter_phase("forward")
            try:
                step(fake, 0)
            except Exception as error:
                raise explained(error, module, described(batch)) from error
            gradients = storage_bytes(p.grad for p in parameters if p.grad is not None)
            recorder.assign((p.grad for p in parameters if p.grad is not None), "gradients")
            return self._report(recorder, start, parameters, gradients, described(batch))

    def _place(self) -> None:
        session = self.session
        strategy = session.assembly.strategy
        if not supports(strategy, SupportsMemoryPlan):
            try:
                _preparation.convert(session, sync_batchnorm=False)
                _preparation.place(session)
            except Exception as error:
                raise explained_place(error, strategy) from error
            return
        if not supports(strategy, SupportsPrecisionPlan):
            session.assembly.precision.convert_module(session.module)
        session.placed, self.extra = strategy.place_for_plan(session.module, torch.device(self.device))

    def _extra_tensors(self) -> list[Tensor]:
        return [torch.empty(size, dtype=torch.uint8) for size in self.extra.values() if size]

    def _choose_foreach(self) -> None:
        """On CUDA torch's optimizers update all parameters at once, unless told otherwise."""
        for optimizer in self.session.optimizers:
            for group in optimizer.param_groups:
                if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                    group["foreach"] = True

    def _make_states(self, recorder: AllocationRecorder, parameters: Sequence[nn.Parameter]) -> None:
        """Step once with empty gradients: in the step that is planned the optimizers have their state."""
        recorder.enter_phase("optimizer step")
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        for optimizer in self.session.optimizers:
            try:
                optimizer.step()
            except Exception:  # noqa: BLE001  # LBFGS wants a closure: its state is then made in the step itself
                self.notes.append(f"{type(optimizer).__name__} did not step before the planned step")
            optimizer.zero_grad()
        for parameter in parameters:
            parameter.grad = None
        recorder.assign(state_tensors(self.session.optimizers), "optimizer state")

    def _step(self, recorder: AllocationRecorder, parameters: Sequence[nn.Parameter]) -> Callable[[Any, int], object]:
        session, settings = self.session, self.trainer.settings
        scaler = session.assembly.precision.plan()["scaler"]
        if scaler != "none":
            session.assembly = replace(session.assembly, precision=_Unscaled(session.assembly.precision))
        binder = HookBinder(self.trainer, session.module, [_Phases(recorder, parameters)], session.scoped)
        steps = compose_batch_steps(
            session,
            binder,
            Progress(),
            accumulate=1,
            clip_val=settings.gradient_clip_val,
            clip_algorithm=settings.gradient_clip_algorithm,
            keep_outputs=False,
        )
        return steps.step

    def _report(
        self,
        recorder: AllocationRecorder,
        start: int,
        parameters: Sequence[nn.Parameter],
        gradients: int,
        batch: str,
    ) -> MemoryPlan:
        session, module = self.session, self.session.module
        assembly = session.assembly
        peak, phase, content, most = recorder.peak(since=start)
        states = list(state_tensors(session.optimizers))
        persistent = [v for v in module.state_dict().values() if isinstance(v, Tensor)]
        saved = unique([*persistent, *states])
        return MemoryPlan(
            model=type(module).__name__,
            strategy=self.trainer.assembly.strategy_name,
            precision=self.trainer.assembly.precision_name,
            device=self.device,
            world_size=assembly.world_size,
            mesh=mesh_of(parameters),
            batch=batch,
            parameter_count=sum(p.numel() for p in parameters),
            trainable_count=sum(p.numel() for p in parameters if p.requires_grad),
            parameters=storage_bytes(parameters),
            buffers=storage_bytes(module.buffers()),
            gradients=gradients,
            optimizer=storage_bytes(states),
            activations=recorder.at_first("backward", since=start).get("activations", 0),
            communication=most.get("communication", 0),
            peak=peak,
            peak_during=phase,
            at_peak={name: content[name] for name in sorted(content, key=_place_in_order) if content[name]},
            groups=groups_of(module),
            checkpoint=sum(each.numel() * each.element_size() for each in saved),
            checkpoint_per_rank=storage_bytes(saved),
            notes=tuple(self.notes),
        )


def _place_in_order(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _forward_and_sum(module: LightningModule) -> Callable[..., Tensor]:
    def training_step(batch: Any, batch_idx: int = 0) -> Tensor:
        if isinstance(batch, dict):
            output = module(**cast("dict[str, Any]", batch))
        else:
            output = module(*batch) if isinstance(batch, tuple) else module(batch)
        total = [each.float().sum() for each in tensors_of(output) if each.is_floating_point() and each.requires_grad]
        if not total:
            raise MisconfigurationException(
                f"forward of {type(module).__name__} returned no floating tensor that needs a gradient: give a batch "
                "for training_step, for example batch='int64[16,1024]'."
            )
        return sum(total[1:], total[0])

    return training_step

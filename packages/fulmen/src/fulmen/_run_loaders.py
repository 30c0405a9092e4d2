"""The loaders of one call, made from their sources when they are first needed and kept in its session."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fulmen import _verify
from fulmen._data_waits import DataWaits
from fulmen._loader_advice import LoaderAdvice
from fulmen._loaders import EvalLoaders
from fulmen._raw_batches import fetches_itself
from fulmen._splitter import Splitter
from fulmen._train_loader import TrainLoader
from fulmen._uneven import rounds_for
from fulmen.states import TrainerFn
from fulmen_fabric.abilities import supports
from fulmen_protocols import SupportsBatchSize

if TYPE_CHECKING:
    from fulmen._session import Session
    from fulmen.settings import BatchLimit, Settings

__all__ = ["eval_loaders", "tell_batch_size", "train_loader"]


def train_loader(session: Session, settings: Settings) -> TrainLoader:
    """The training loader. The user is asked for it in its ``setup``, not here."""
    if session.train_loader is None:
        step = session.module.training_step
        session.data_waits = DataWaits(session.world.device)
        session.train_loader = TrainLoader(
            session.sources["train"],
            limit=settings.limit_train_batches,
            limit_name="limit_train_batches" if not settings.overfit_batches else "overfit_batches",
            splitter=_splitter(session, settings),
            waits=session.data_waits,
            process=session.process_loader(),
            reload_every_n_epochs=settings.reload_dataloaders_every_n_epochs,
            overfit=bool(settings.overfit_batches),
            advise=_advice(session, settings, "train"),
            raw=session.told_of_raw_batch if fetches_itself(step) else None,
            rounds=rounds_for(session.world.collectives, settings.accumulate_grad_batches),
            gather=session.world.collectives.all_gather_object,
        )
    return session.train_loader


def tell_batch_size(session: Session, settings: Settings, epoch: int) -> None:
    """Ask for the training loader now, where the engine wants to know how many samples a batch has."""
    strategy = session.assembly.strategy
    if not supports(strategy, SupportsBatchSize) or not strategy.wants_batch_size:
        return
    loader = train_loader(session, settings)
    loader.setup(epoch)
    samples = getattr(getattr(loader.user_loader, "batch_sampler", None), "batch_size", None)
    if isinstance(samples, int):
        strategy.set_batch_size(samples)


def eval_loaders(
    session: Session, settings: Settings, stage: str, *, epoch: int, track_indices: bool = False
) -> EvalLoaders:
    """The loaders of ``stage``, asked for now unless they are known and, in ``epoch``, still good."""
    loaders = session.eval_loaders.get(stage)
    if loaders is not None:
        loaders.setup(epoch)
        return loaders
    limits: dict[str, BatchLimit] = {
        "val": settings.limit_val_batches,
        "test": settings.limit_test_batches,
        "predict": settings.limit_predict_batches,
    }
    splitter = _splitter(session, settings)
    session.eval_loaders[stage] = loaders = EvalLoaders(
        session.sources[stage],
        limit=limits[stage],
        limit_name=f"limit_{stage}_batches",
        split=splitter.prediction if stage == "predict" else splitter.evaluation,
        process=session.process_loader(),
        reload_every_n_epochs=settings.reload_dataloaders_every_n_epochs if session.fn is TrainerFn.FITTING else 0,
        overfit=bool(settings.overfit_batches) and stage == "val",
        advise=_advice(session, settings, stage),
        track_indices=track_indices,
    )
    loaders.setup(epoch)
    if stage == "predict":
        _verify.predicts_one_after_the_other(loaders.user_loaders)
    _verify.step_takes_dataloader_idx(session.module, stage, several=loaders.several)
    return loaders


def _advice(session: Session, settings: Settings, stage: str) -> LoaderAdvice:
    owners = (session.module, session.datamodule)
    return LoaderAdvice(
        f"{stage}_dataloader",
        world=session.world,
        evaluates=stage != "train",
        allows_empty=any(
            getattr(owner, "allow_zero_length_dataloader_with_multiple_devices", False) for owner in owners
        ),
        reloads=settings.reload_dataloaders_every_n_epochs > 0,
        said=session.said,
    )


def _splitter(session: Session, settings: Settings) -> Splitter:
    return Splitter(
        rank=session.world.data_parallel_rank,
        world_size=session.world.data_parallel_size,
        seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
        enabled=settings.use_distributed_sampler,
        seeding=os.environ.get("PL_SEED_WORKERS", "0"),
        shared=session.world.data_parts is not None,
        overfit=bool(settings.overfit_batches),
    )

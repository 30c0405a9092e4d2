"""Metering: the metric stores of a run's stages, and the moments at which they are reduced and reported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._metric_agreement import ByHosts
from fulmen.metrics import MetricStore, scope_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen._metric_agreement import Agreement
    from fulmen._reporting import Reporter
    from fulmen._session import Session
    from fulmen.module import LightningModule
    from fulmen.progress import Progress
    from fulmen_fabric import World

__all__ = ["Metering"]

_STEP = {
    "train": "training_step",
    "validate": "validation_step",
    "sanity_check": "validation_step",
    "test": "test_step",
    "predict": "predict_step",
}

_TIME = {"validate": "validation", "sanity_check": "sanity check"}
"""What people call the stages."""


class Metering:
    """What the loops call at their declared points."""

    def __init__(
        self, session: Session, reporter: Reporter, progress: Progress, world: World, *, enabled: bool, stage: str
    ) -> None:
        self._session, self.reporter, self._progress, self._world = session, reporter, progress, world
        self._enabled = enabled
        self._modules: list[LightningModule] = session.logging_modules()
        self._stores: dict[str, MetricStore] = {}
        self._seen: dict[int, int] = {}
        reporter.reset()
        # Metric objects belong to the module, so what an earlier run left in them would go on in this one.
        for store in session.module.__dict__.pop("_metric_stores_of_run", ()):
            store.reset()
        session.module.__dict__["_metric_stores_of_run"] = self._stores.values()
        self.train = self.use(stage)

    def use(self, stage: str) -> MetricStore:
        """Let ``self.log`` feed the store of ``stage``."""
        store = self._stores.get(stage)
        if store is None:
            store = MetricStore(
                device=self._world.device,
                collectives=self._world.collectives,
                stage="test" if stage == "predict" else stage,
                data_parts=self._world.data_parts,
                data_group=self._world.data_parallel_group,
                agreement=self._agreement() if stage == "train" else None,
            )
            self._stores[stage] = store
        store.scope = scope_for(_STEP[stage])
        self._attach(store)
        return store

    def _agreement(self) -> Agreement | None:
        vote = self._world.host_vote()
        return None if vote is None else ByHosts(vote, self._world.stop_agreement())

    def _attach(self, store: MetricStore | None) -> None:
        left = self.reporter.store
        if left is not None and left is not store:
            self.reporter.leave(left)  # a validation within the epoch leaves the step values readable
        self._session.store = self.reporter.store = store
        for module in self._modules:
            module.__dict__["_metric_store"] = store if self._enabled else None

    # ------------------------------------------------------------------ training

    def log_train_step(self) -> None:
        """A row of step values."""
        self.reporter.report_step(self.train, batches_that_stepped=self._progress.log_step, epoch=self._progress.epoch)

    def reduce_train(self) -> None:
        """Compute the epoch's values, over ranks where asked for; the last step's values stay known beside them."""
        self.reporter.remember_steps(self.train)
        self.train.reduce_epoch()

    def log_train_epoch(self) -> None:
        """A row of epoch values."""
        self.train.reduce_epoch()
        self.reporter.report_train_epoch(
            self.train, batches_that_stepped=self._progress.log_step, epoch=self._progress.epoch
        )

    def close_train_epoch(self) -> None:
        """The next epoch starts from nothing."""
        self.train.reset()

    # ------------------------------------------------------------------ evaluation

    def begin_eval(self, stage: str) -> MetricStore:
        """Start an evaluation from nothing."""
        self.reporter.enter(_TIME.get(stage, stage))
        store = self.use(stage)
        for each in self._stores.values():  # the sanity check's and the validation's share their metric objects
            if each is not self.train:
                each.reset()
        return store

    def eval_end_batch(self, store: MetricStore, *, several: bool) -> Callable[[int], None]:
        """Reports what was logged with ``on_step=True`` after each batch of loader ``dataloader_idx``."""
        seen, reporter = self._seen, self.reporter

        def end_batch(dataloader_idx: int) -> None:
            if store.stage == "sanity_check" or not store.step_metrics().log:
                return
            count = seen.get(dataloader_idx, 0)
            reporter.report_eval_step(
                store,
                batches_seen=count,
                dataloader_idx=dataloader_idx if several else None,
            )
            seen[dataloader_idx] = count + 1

        return end_batch

    def log_eval_epoch(self, store: MetricStore) -> None:
        """A row of the evaluation's epoch values."""
        self.reporter.report_eval_epoch(store, batches_that_stepped=self._progress.log_step, epoch=self._progress.epoch)

    def end_eval_in_fit(self, *, sanity_check: bool) -> None:
        """Go back to the training store."""
        self._attach(self.train)
        if sanity_check:
            self.reporter.reset()
        self.reporter.enter("setup" if sanity_check else "training")

    def finish(self) -> None:
        """Take what is known off the device and let go of the module."""
        self.reporter.to_cpu()
        self._attach(None)
        for store in self._stores.values():
            store.let_go()

"""What is said about loaders: from their looks before a run, each piece once for a Trainer, and from its waits."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from fulmen_data import has_iterable_dataset, sized_len, suggested_max_num_workers
from fulmen_fabric import PossibleUserWarning, rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Sequence, Sized
    from multiprocessing.context import BaseContext

    from fulmen.data_wait import DataWait
    from fulmen_fabric import World

__all__ = ["LoaderAdvice", "data_wait", "data_wait_text", "log_interval"]

_WORTH_SAYING = 0.15
"""The share of training from which on waiting for data is mentioned."""

_WORTH_SAYING_S = 3.0
"""And its seconds."""

_said_of_waits = set[object]()
"""The loaders' settings of which this program has said that training waits: a second fit need not hear it again."""


class LoaderAdvice:
    """Looks at the loaders of one stage.

    Args:
        hook: what the user calls them, for example ``val_dataloader``.
        world: the ranks, which must all come here.
        evaluates: whether the stage evaluates or predicts.
        allows_empty: whether it is meant that a rank has no data while others have.
        reloads: whether loaders are made anew during the run.
        said: what was said before; added to.
    """

    def __init__(
        self, hook: str, *, world: World, evaluates: bool, allows_empty: bool, reloads: bool, said: set[str]
    ) -> None:
        self._hook, self._world, self._evaluates = hook, world, evaluates
        self._allows_empty, self._reloads, self._said = allows_empty, reloads, said

    def __call__(self, given: Sequence[object], split: Sequence[object], lengths: Sequence[float]) -> None:
        """Say what there is to say of the loaders as ``given``, as ``split`` over ranks, and their ``lengths`` here."""
        self._emptiness(lengths, [mine is not own for mine, own in zip(split, given, strict=True)])
        for loader in given:
            if _is_data_loader(loader):
                self._sampling(loader)
        for loader in split:
            if _is_data_loader(loader):
                self._workers(loader)

    def _say(self, text: str, category: type[Warning] = PossibleUserWarning) -> None:
        if text not in self._said:
            self._said.add(text)
            rank_zero_warn(text, category)

    def _emptiness(self, lengths: Sequence[float], is_split: Sequence[bool]) -> None:
        world = self._world
        everywhere: list[list[float]] = [list(lengths)]
        if world.world_size > 1:
            everywhere = world.collectives.all_gather_object(list(lengths))
        for index, of_ranks in enumerate(zip(*everywhere, strict=True)):
            which = self._hook if self._evaluates else f"{self._hook}: the training loader"
            which += "" if len(lengths) == 1 else f" {index}"
            empty = [rank for rank, length in enumerate(of_ranks) if length == 0]
            if len(empty) == len(of_ranks):
                does = "evaluated on it" if self._evaluates else "trained"
                self._say(f"{which} has no batch, so nothing will be {does}. Check its data set.", UserWarning)
            elif empty and not self._allows_empty and not (self._evaluates and is_split[index]):
                # Split without repeating there may be fewer samples than ranks.
                self._say(
                    f"{which} has no batch on rank(s) {', '.join(map(str, empty))}, but the other ranks have some. "
                    "fulmen waits for nobody because of that; collectives of your own in a step would. Give every rank "
                    "data, or set allow_zero_length_dataloader_with_multiple_devices = True in the module or "
                    "datamodule to silence this.",
                    UserWarning,
                )

    def _sampling(self, loader: DataLoader[Any]) -> None:
        if has_iterable_dataset(loader):
            if sized_len(loader.dataset) is not None and loader.num_workers > 1:
                self._say(
                    f"{self._hook}: the IterableDataset has a __len__, which is wrong if its num_workers="
                    f"{loader.num_workers} workers each give all of it. Let each worker give its part "
                    "(torch.utils.data.get_worker_info), or leave __len__ out."
                )
            return
        if not self._evaluates:
            return
        sampler = cast("object", loader.sampler)
        if isinstance(sampler, RandomSampler):
            self._say(f"{self._hook} is shuffled. Evaluate in a fixed order: DataLoader(..., shuffle=False).")
        elif isinstance(sampler, DistributedSampler) and not sampler.drop_last:
            samples = len(cast("Sized", sampler.dataset))
            surplus = -samples % sampler.num_replicas
            if surplus:
                self._say(
                    f"{self._hook} has a DistributedSampler, which gives {surplus} of {samples} samples twice so that "
                    f"its {sampler.num_replicas} parts are equal. Leave the sampler out: the Trainer splits the loader "
                    "so that each sample counts once."
                )

    def _workers(self, loader: DataLoader[Any]) -> None:
        context = cast("BaseContext | None", loader.multiprocessing_context)
        method = multiprocessing.get_start_method() if context is None else context.get_start_method()
        workers = _cores_for_workers(self._world)
        if loader.num_workers > 0 and method == "spawn" and not loader.persistent_workers:
            self._say(
                f"{self._hook} starts its num_workers={loader.num_workers} workers anew each epoch, which is slow with "
                "the start method 'spawn'. Set persistent_workers=True in the DataLoader.",
                UserWarning,
            )
        elif loader.num_workers < 2 <= workers:
            self._say(
                f"{self._hook} has num_workers={loader.num_workers}, so the model may have to wait for batches. Set "
                f"num_workers={workers} in the DataLoader if making them takes long."
            )
        if loader.persistent_workers and loader.pin_memory and self._reloads:
            self._say(
                f"{self._hook} has persistent_workers=True and pin_memory=True, with which torch may not free what "
                "reload_dataloaders_every_n_epochs replaces (pytorch/pytorch#91252). Set pin_memory=False."
            )


def log_interval(batches: float, log_every_n_steps: int, said: set[str]) -> None:
    """Say that a whole epoch gets no row of step values."""
    text = (
        f"log_every_n_steps={log_every_n_steps}, but an epoch has {batches:g} batches, so that step values of an epoch "
        "may never reach the loggers. Give a smaller log_every_n_steps."
    )
    if batches < log_every_n_steps and text not in said:
        said.add(text)
        rank_zero_warn(text, PossibleUserWarning)


def data_wait(wait: DataWait, loader: object, world: World) -> None:
    """Say on rank 0, in one line, that its training waited for data, and what helps; nothing where it was not long.

    A program hears it once for each setting of the loader.
    """
    if wait.share < _WORTH_SAYING or wait.waited_s < _WORTH_SAYING_S:
        return
    persistent = bool(getattr(loader, "persistent_workers", False))
    setting = (type(loader), wait.num_workers, persistent, wait.first_s > wait.waited_s / 2)
    if setting not in _said_of_waits:
        _said_of_waits.add(setting)
        text = data_wait_text(wait, persistent_workers=persistent, most_workers=_cores_for_workers(world))
        rank_zero_info("%s", text)


def data_wait_text(wait: DataWait, *, persistent_workers: bool, most_workers: int) -> str:
    """What training waited for, and what helps.

    Args:
        wait: the figures.
        persistent_workers: of the training loader.
        most_workers: for which there is a CPU.
    """
    text = f"training waited for data during {wait.share:.0%} of {wait.training_s:.0f} s"
    workers = wait.num_workers
    if wait.first_s > wait.waited_s / 2:
        epochs = "the only epoch" if wait.epochs == 1 else f"each of {wait.epochs} epochs"
        text += f", {wait.first_s:.2g} s of it before the first batch of {epochs}"
        if workers and not persistent_workers and wait.epochs > 1:
            return f"{text}: the loader starts num_workers={workers} workers anew. Set persistent_workers=True in it."
        return f"{text}. Let the data set do less before it gives its first sample."
    if workers is None:
        return f"{text}; a step takes {wait.step_s:.2g} s. Make batches faster, or ahead in a DataLoader with workers."
    needed = wait.workers_needed
    if needed is None:
        return f"{text}; the loader has num_workers={workers}, and epochs are too short to say how many would do."
    takes = f"(a batch takes {wait.batch_s:.2g} s to make, a step {wait.step_s:.2g} s)"
    text += f"; the loader has num_workers={workers}: with {needed} it would keep up {takes}"
    if needed <= most_workers:
        return f"{text}."
    have = f"this process has CPUs for {most_workers}"
    if most_workers > workers:
        return f"{text}, but {have}. Set num_workers={most_workers}, and make batches with less work."
    return f"{text}, but {have}. Make batches with less work."


def _cores_for_workers(world: World) -> int:
    return suggested_max_num_workers(len(world.topology.devices))


def _is_data_loader(loader: object) -> TypeGuard[DataLoader[Any]]:
    return isinstance(loader, DataLoader)

"""Going on within an epoch on another number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from torch.utils.data import DataLoader

from fulmen_data._replay import plain_batch_size, replayed_order, seekable_sampler
from fulmen_data._start import EpochStart
from fulmen_data.distribute import split_loader
from fulmen_data.rebuild import rebuild_loader
from fulmen_data.samplers import DistributedBatchSampler, DistributedSamplerWrapper
from fulmen_data.sizes import has_iterable_dataset, sized_len
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from torch.utils.data import Dataset

__all__ = ["batches_left", "elastic_loader", "needs_elastic_loader"]

T = TypeVar("T")


def needs_elastic_loader(loader: object, position: Mapping[str, object], *, saved_ranks: int, ranks: int) -> bool:
    """Whether ``position`` cannot be loaded into ``loader`` as it is: its order is that of another number of ranks.

    Args:
        loader: this rank's part, as ``distribute_loader`` gave it.
        position: from ``LoaderPosition.state_dict`` of any rank.
        saved_ranks: number of ranks of the run that saved it.
        ranks: number of ranks now.
    """
    order = position.get("order")
    if isinstance(order, Mapping):
        return "replayed" in order or seekable_sampler(loader) is None
    return saved_ranks != ranks


def elastic_loader(
    loader: T, position: Mapping[str, object], *, rank: int, ranks: int, saved_ranks: int
) -> tuple[T, dict[str, object]]:
    """A loader of the order that ``position`` was saved in, dealt to another number of ranks.

    Every sample of the epoch that was not read before is read once (and the first ones again, where ranks would get
    unequal numbers, as ever in training). It serves the rest of this epoch; the next one takes the usual loader.

    Args:
        loader: as the user gave it, not split over ranks.
        position: from ``LoaderPosition.state_dict`` of any rank of the earlier run.
        rank: this one, among those now.
        ranks: how many there are now.
        saved_ranks: how many there were.

    Returns:
        The loader, and the position to load into ``LoaderPosition(loader, replayed=position)``.

    Raises:
        ValueError: the order was each rank's own affair (an iterable, a loader with a state of its own, a sampler that
            splits by itself), so nobody knows which samples are left.
    """
    order = position.get("order")
    if not isinstance(loader, DataLoader) or has_iterable_dataset(cast("object", loader)):
        raise _refusal(cast("object", loader), saved_ranks, ranks)
    source = cast("DataLoader[object]", loader)
    if isinstance(order, Mapping) and "replayed" not in order:
        known = cast("Mapping[str, object]", order)
        seed, shuffle = cast("int", known["seed"]), cast("bool", known["shuffle"])
        split = split_loader(source, rank, ranks, shuffle=shuffle, training=True, seed=seed)
        if seekable_sampler(split) is None:
            raise _refusal(source, saved_ranks, ranks)
        return cast("T", split), dict(position)
    start = EpochStart.from_plain(cast("dict[str, object] | None", position["start"]))
    if start is None or (order is None and saved_ranks != 1):
        raise _refusal(source, saved_ranks, ranks)
    items = replayed_order(source, start)
    done, size = cast("int", position["batches"]), cast("int | None", position["batch_size"])
    samples = cast("int | None", position["samples"])
    if samples is None:
        samples = done * (size or 1)
    if size is None:
        dealt = DistributedBatchSampler(cast("list[Sequence[int]]", items), ranks, rank, pad=True)
        new = rebuild_loader(source, batch_sampler=dealt)
    else:
        indices = DistributedSamplerWrapper(cast("Iterable[int]", items), ranks, rank)
        new = rebuild_loader(source, sampler=indices)
    state = {**position, "samples": samples, "order": {"replayed": True, "seed": 0}}
    return cast("T", new), state


def batches_left(loader: object, position: Mapping[str, object]) -> int | None:
    """Batches of this rank's that come after ``position``, which counts samples over all ranks; None: it does not."""
    sampler, done = seekable_sampler(loader), cast("int | None", position.get("samples"))
    if sampler is None or done is None:
        return None
    total = sized_len(cast("Dataset[object]", sampler.dataset))
    assert total is not None
    left, ranks = max(total - done, 0), sampler.num_replicas
    mine = left // ranks if sampler.drop_last else -(-left // ranks)
    size = plain_batch_size(loader) or 1
    return mine // size if getattr(loader, "drop_last", False) else -(-mine // size)


def _refusal(loader: object, saved_ranks: int, ranks: int) -> MisconfigurationException:
    batches: object = getattr(loader, "batch_sampler", None)
    sampler: object = getattr(loader if batches is None else batches, "sampler", batches)
    what = type(getattr(loader, "dataset", loader) if has_iterable_dataset(loader) else sampler or loader).__name__
    return MisconfigurationException(
        f"this position was saved in the middle of an epoch by {saved_ranks} ranks and is loaded on {ranks}; {what} "
        "decides by itself what each rank reads, so the samples that are left are not known. Resume on "
        f"{saved_ranks} ranks, or from a checkpoint of an epoch's end; or let fulmen split the data: pass a "
        "loader with an ordinary sampler and use_distributed_sampler=True."
    )

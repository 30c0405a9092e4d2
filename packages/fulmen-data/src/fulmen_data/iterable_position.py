"""The place in an iterable data set that can say where it is, in the main process or in each worker."""

from __future__ import annotations

import copy
import pickle
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory  # pyright: ignore[reportUnknownVariableType]

from fulmen_data._random_state import RandomState
from fulmen_data._start import EpochStart
from fulmen_data.sizes import has_iterable_dataset
from fulmen_data.workers import end_workers
from fulmen_protocols import MisconfigurationException, Stateful

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["IterablePosition", "has_stateful_dataset"]

T = TypeVar("T")

_SKIP = "fulmen: no sample"
"""What a worker gives in place of a batch that it gave before the resume, so that each keeps its turn."""


def has_stateful_dataset(loader: object) -> bool:
    """Whether this is a ``DataLoader`` of an iterable data set with ``state_dict`` and ``load_state_dict``."""
    return (
        isinstance(loader, DataLoader)
        and has_iterable_dataset(cast("object", loader))
        and isinstance(cast("DataLoader[object]", loader).dataset, Stateful)
    )


class IterablePosition(Generic[T]):
    """A loader whose state is that of its data set: one in this process, or one in each worker.

    ``load_state_dict`` of the data set is called before its ``iter``, and the iteration after that one must be a whole
    one. With workers, each sends its state along with each batch, and the state of its random generators if it drew
    from them; a resume needs as many workers, which go on in turn where they were.

    Args:
        loader: for which ``has_stateful_dataset`` holds.
    """

    def __init__(self, loader: DataLoader[T]) -> None:
        self.loader = loader
        self._data = _Resumable(cast("IterableDataset[object]", loader.dataset))
        self._clone: DataLoader[T] | None = None
        self._start: EpochStart | None = None
        self._workers: dict[int, _WorkerState] = {}
        self._next_worker = 0
        self._resume: Mapping[str, object] | None = None

    def __iter__(self) -> Iterator[T]:
        """Begin an epoch, or go on with the one that ``load_state_dict`` named."""
        loader, resume = self.loader, self._resume
        clone = self._clone
        if clone is None:
            # A shallow copy shares all but the data set and, with workers, the collate function.
            self._clone = clone = copy.copy(loader)
            clone._iterator = None  # pyright: ignore[reportPrivateUsage]
            object.__setattr__(clone, "dataset", self._data)
            if loader.num_workers:
                clone.collate_fn = _Sending(cast("Callable[[Any], Any]", loader.collate_fn))
        now = RandomState.take()
        if resume is None:
            self._start, self._workers, self._next_worker = EpochStart.take(clone), {}, 0
        else:
            self._start = EpochStart.from_plain(cast("dict[str, object]", resume["start"]))
            saved = cast("dict[int, dict[str, object]]", resume["workers"])
            self._workers = {worker: _WorkerState.from_plain(state) for worker, state in saved.items()}
            self._next_worker = cast("int", resume["next_worker"])
        self._data.begin(self._workers, self._next_worker, loader.batch_size or 1)
        try:
            if resume is not None and self._start is not None:
                self._start.restore(loader)  # workers get the seeds that they had
            iterator = iter(clone)
        finally:
            if resume is not None:
                now.restore()
        self._resume = None
        if not loader.num_workers:
            return iterator
        self._data.begin({}, 0, 1)  # the workers have it; those of the next epoch begin afresh
        return self._received(cast("Iterator[_Sent[T]]", iterator))

    def _received(self, iterator: Iterator[_Sent[T]]) -> Iterator[T]:
        for sent in iterator:
            if sent.state is None:
                continue
            known = self._workers.get(sent.worker)
            random = sent.state.random if sent.state.random is not None or known is None else known.random
            self._workers[sent.worker] = sent.state._replace(random=random)
            self._next_worker = (sent.worker + 1) % self.loader.num_workers
            yield sent.batch

    def close(self) -> None:
        """End the worker processes that are kept between epochs."""
        end_workers(self._clone)

    def state_dict(self) -> dict[str, object]:
        """The data set's state, or that of each worker's, after the last batch that was handed out."""
        if self._resume is not None:
            return dict(self._resume)
        workers = self._workers
        if not self.loader.num_workers:
            workers = {0: self._data.state()}
        return {
            "num_workers": self.loader.num_workers,
            "workers": {worker: state.to_plain() for worker, state in workers.items()},
            "next_worker": self._next_worker,
            "start": None if self._start is None else self._start.to_plain(),
        }

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Let the next ``iter`` go on where ``state_dict`` was taken.

        Raises:
            ValueError: it was taken with another number of workers.
        """
        had, has = state_dict["num_workers"], self.loader.num_workers
        if had != has:
            raise MisconfigurationException(
                f"the position of {type(self._data.inner).__name__} was saved with num_workers={had}; this loader has "
                f"num_workers={has}, and each worker's part of an iterable data set is its own. Resume with {had}, or "
                "from a checkpoint of an epoch's end."
            )
        self._resume = dict(state_dict)


class _WorkerState(NamedTuple):
    """Where one worker's data set is; the generators only if they moved since the worker began."""

    dataset: object
    ended: bool
    random: bytes | None
    """A pickled ``RandomState``; it never comes from a file."""

    def to_plain(self) -> dict[str, object]:
        random = None if self.random is None else cast("RandomState", pickle.loads(self.random)).to_plain()
        return {"dataset": self.dataset, "ended": self.ended, "random": random}

    @classmethod
    def from_plain(cls, plain: Mapping[str, object]) -> _WorkerState:
        random = cast("dict[str, object] | None", plain["random"])
        state = None if random is None else pickle.dumps(RandomState.from_plain(random))
        return cls(plain["dataset"], bool(plain["ended"]), state)


class _Sent(Generic[T]):
    """A batch on its way from a worker, with the worker's state after it; None: no batch, only a turn."""

    def __init__(self, batch: T, worker: int, state: _WorkerState | None) -> None:
        self.batch, self.worker, self.state = batch, worker, state

    def pin_memory(self, device: str | None = None) -> _Sent[T]:
        """What torch calls with ``pin_memory=True``."""
        pinned: object = pin_memory(self.batch, device)  # type: ignore[no-untyped-call]  # torch's
        return _Sent(cast("T", pinned), self.worker, self.state)


class _Sending:
    """The user's ``collate_fn`` in a worker; the data set's state goes with the batch."""

    # Any: samples and batches are the user's.
    def __init__(self, inner: Callable[[Any], Any]) -> None:
        self._inner = inner

    def __call__(self, samples: Any) -> _Sent[Any]:
        worker = get_worker_info()
        assert worker is not None
        if samples is _SKIP or (isinstance(samples, list) and samples and samples[0] is _SKIP):
            return _Sent(None, worker.id, None)
        batch = self._inner(samples)
        return _Sent(batch, worker.id, cast("_Resumable", worker.dataset).state())


class _Resumable(IterableDataset[object]):
    """A data set that begins its next iteration where a state says. To others it looks like the one inside."""

    _own = frozenset({"inner", "_states", "_first", "_turn", "_ended", "_began"})

    def __init__(self, inner: IterableDataset[object]) -> None:
        self.inner = inner
        self._states: Mapping[int, _WorkerState] = {}
        self._first = 0
        self._turn = 1
        self._ended = False
        self._began: RandomState | None = None

    def begin(self, states: Mapping[int, _WorkerState], first: int, turn: int) -> None:
        """Let the next iteration begin in ``states``, with worker ``first``; ``turn`` samples make a batch."""
        self._states, self._first, self._turn = dict(states), first, turn

    def state(self) -> _WorkerState:
        """Where this iteration is now."""
        random = None
        if self._began is not None:
            now = RandomState.take()
            # Pickled here: a tensor on its way between processes takes a file descriptor, five kilobytes need none.
            random = None if now.equals(self._began) else pickle.dumps(now)
        # A copy: data sets give away the dict that they go on changing.
        return _WorkerState(copy.deepcopy(cast("Stateful", self.inner).state_dict()), self._ended, random)

    def __iter__(self) -> Iterator[object]:
        # No generator: the state must be there when somebody asks for it before the first sample.
        worker = get_worker_info()
        which = 0 if worker is None else worker.id
        states, self._states = self._states, {}
        saved = states.get(which)
        skipped = self._turn if worker is not None and which < self._first else 0
        self._first = 0
        self._began = None if worker is None else RandomState.take()
        self._ended = saved is not None and saved.ended
        if saved is not None:
            if saved.random is not None and worker is not None:
                cast("RandomState", pickle.loads(saved.random)).restore()
            if not saved.ended:
                cast("Stateful", self.inner).load_state_dict(cast("dict[str, Any]", saved.dataset))
        return chain(repeat(_SKIP, skipped), () if self._ended else self._samples())

    def _samples(self) -> Iterator[object]:
        yield from self.inner
        self._ended = True

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> object:
        if name in self._own or name.startswith("__"):  # copying and pickling ask before there is an inner
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: object) -> None:
        # A worker_init_fn sets its worker's part of the data this way.
        if name in self._own:
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

"""Runs resumed inside an epoch, by what their data come from: every sample once, in the order of the unbroken run."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

import fulmen
from fulmen.callbacks import Callback
from fulmen.utilities.combined_loader import CombinedLoader
from fulmen_data import FastForward, SeededDataset
from fulmen_fabric.rank_zero import PossibleUserWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Python 3.12 warns whenever a process with threads forks, as every DataLoader with workers does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)

SIZE = 22


class Samples(Dataset[Any]):
    """Numbers, each with a draw where asked for; counts what is read in memory that workers share."""

    def __init__(self, size: int = SIZE, *, draws: bool = False) -> None:
        self.size, self.draws = size, draws
        self.reads = torch.zeros(min(size, 100), dtype=torch.int64).share_memory_()
        self.count = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        if index < len(self.reads):
            self.reads[index] += 1
        noise = torch.rand(1).item() + random.random() + float(np.random.rand()) if self.draws else 0.0
        return torch.tensor([float(index), noise])


class UsersSampler(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        order = list(range(SIZE))
        random.shuffle(order)
        return iter([order[i] for i in np.random.permutation(SIZE)])

    def __len__(self) -> int:
        return SIZE


class UsersBatches(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SIZE).tolist()
        return iter([order[:3], order[3:8], order[8:10], order[10:17], order[17:]])

    def __len__(self) -> int:
        return 5


class Stream(IterableDataset[Any]):
    """An iterable that knows its place, of no known length; each worker reads its part."""

    def __init__(self) -> None:
        self.at = self.start = 0

    def __iter__(self) -> Iterator[Any]:
        self.at, self.start = self.start, 0
        return self.rest()

    def rest(self) -> Iterator[Any]:
        worker = get_worker_info()
        which, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        mine = [n for n in range(SIZE) if (n % 5) % parts == which]
        while self.at < len(mine):
            self.at += 1
            yield torch.tensor([float(mine[self.at - 1]), torch.rand(1).item()])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = self.at = state["at"]


class OwnState:
    """As torchdata's StatefulDataLoader: a loader that knows its own position."""

    def __init__(self, length: int | None = 6, first: int = 0) -> None:
        self.start = self.at = 0
        self.length, self.first = length, first
        if length is not None:
            self.__class__ = OwnStateOfKnownLength

    def __iter__(self) -> Iterator[Any]:
        self.at, self.start = self.start, 0
        return self.rest()

    def rest(self) -> Iterator[Any]:
        while self.at < 6:
            self.at += 1
            yield torch.tensor([[float(self.first + self.at), torch.rand(1).item()]])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = self.at = state["at"]


class OwnStateOfKnownLength(OwnState):
    def __len__(self) -> int:
        return 6


class Nameless(IterableDataset[Any]):
    """An iterable without a place."""

    def __iter__(self) -> Iterator[Any]:
        for n in range(SIZE):
            yield torch.tensor([float(n), 0.0])


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(_numbers(batch))
        rows = torch.cat([_rows(part) for part in (batch.values() if isinstance(batch, dict) else [batch])])
        return self.layer(rows).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.001)


def _rows(batch: Any) -> Any:
    return torch.zeros(0, 2) if batch is None else batch.reshape(-1, 2)


def _numbers(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: _numbers(value) for name, value in batch.items()}
    return None if batch is None else batch.reshape(-1, 2).tolist()


class Saves(Callback):
    """Saves after every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved = folder, list[Any]()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.saved.append(self.folder / f"{len(self.saved)}.ckpt")
        trainer.save_checkpoint(self.saved[-1])


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def fit(loader: Any, callbacks: Any = (), resume: Path | None = None, epochs: int = 2) -> Model:
    seed(3 if resume is None else 99)
    trainer = fulmen.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model()
    trainer.fit(model, loader, ckpt_path=resume)
    return model


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Samples(), 4, shuffle=True),
    "shuffled, drawing in this process": lambda: DataLoader(Samples(draws=True), 4, shuffle=True),
    "2 workers": lambda: DataLoader(Samples(), 4, shuffle=True, num_workers=2),
    "4 workers": lambda: DataLoader(Samples(), 4, shuffle=True, num_workers=4),
    "2 workers that are kept": lambda: DataLoader(Samples(), 4, shuffle=True, num_workers=2, persistent_workers=True),
    "2 workers, drawing by sample": lambda: DataLoader(
        SeededDataset(Samples(draws=True), 1), 4, shuffle=True, num_workers=2
    ),
    "user's sampler": lambda: DataLoader(Samples(), 4, sampler=UsersSampler()),
    "user's sampler, 2 workers": lambda: DataLoader(Samples(), 4, sampler=UsersSampler(), num_workers=2),
    "user's batch sampler": lambda: DataLoader(Samples(), batch_sampler=UsersBatches()),
    "loader with a state": OwnState,
    "loader with a state, of unknown length": lambda: OwnState(None),
    "iterable with a state": lambda: DataLoader(Stream(), 4),
    "iterable with a state, 2 workers": lambda: DataLoader(Stream(), 4, num_workers=2),
    "iterable read again": lambda: FastForward(DataLoader(Nameless(), 4)),
    "list of batches": lambda: [torch.full((1, 2), float(n)) for n in range(6)],
    "several": lambda: {
        "a": DataLoader(Samples(), 4, shuffle=True),
        "b": OwnState(),
        "c": DataLoader(Samples(9), 3, shuffle=True),
    },
    "several, as long as the shortest": lambda: CombinedLoader(
        {"a": DataLoader(Samples(), 4, shuffle=True), "b": DataLoader(Stream(), 4)}, "min_size"
    ),
}


@pytest.mark.proves("5.38")
@pytest.mark.parametrize("kind", LOADERS)
def test_a_resumed_run_goes_on_with_the_very_next_batch_whatever_the_loader(kind: str, tmp_path: Path) -> None:
    make = LOADERS[kind]
    saves = Saves(tmp_path)
    whole = fit(make(), [saves])
    assert len(whole.seen) == len(saves.saved) >= 10

    cheap = "workers" not in kind
    for done, path in list(enumerate(saves.saved, 1))[:: 1 if cheap else 3]:
        resumed = fit(make(), resume=path)
        assert resumed.seen == whole.seen[done:], path.name
        for got, want in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(got, want), path.name


@pytest.mark.proves("5.38")
def test_resuming_at_batch_one_million_reads_no_sample_that_was_skipped(tmp_path: Path) -> None:
    def loader() -> tuple[Samples, DataLoader[Any]]:
        data = Samples(4_000_100)
        return data, DataLoader(data, 4, shuffle=True)

    class Few(Callback):
        def __init__(self, count: int) -> None:
            self.left = count

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.left -= 1
            if not self.left:
                trainer.save_checkpoint(tmp_path / "now.ckpt")
                trainer.should_stop = True

    _, first = loader()
    fit(first, [Few(2)])
    # As if a million batches had been trained: the position says so, and the order is that of the saved start.
    found = torch.load(tmp_path / "now.ckpt", weights_only=True)
    found["fulmen"]["progress"]["batch"] = 1_000_000
    found["fulmen"]["ranks"][0]["loader"]["position"]["batches"] = 1_000_000
    torch.save(found, tmp_path / "million.ckpt")

    data, again = loader()
    resumed = fit(again, [Few(25)], tmp_path / "million.ckpt")

    assert len(resumed.seen) == 25
    assert int(data.count) == 25 * 4


@pytest.mark.proves("5.38")
def test_an_iterable_without_a_place_is_named_at_the_save_and_the_resumed_epoch_is_shorter(tmp_path: Path) -> None:
    class Sized(Nameless):
        pass

    saves = Saves(tmp_path)
    with pytest.warns(PossibleUserWarning, match=r"its place in Sized is not in it.*FastForward") as caught:
        whole = fit(DataLoader(Sized(), 4), [saves], epochs=1)
    assert len([each for each in caught if "Sized" in str(each.message)]) == 1, "once in a run"

    resumed = fit(DataLoader(Sized(), 4), resume=saves.saved[1], epochs=1)
    assert resumed.seen == whole.seen, "read from its beginning"
    # Behind the last batch nothing is left, and nothing is read again.
    last = fit(DataLoader(Sized(), 4), resume=saves.saved[-1], epochs=2)
    assert last.seen == whole.seen, "the next epoch alone"


def test_a_dataset_that_draws_in_workers_is_named_at_the_save(tmp_path: Path) -> None:
    with pytest.warns(
        PossibleUserWarning, match=r"Samples draws random numbers in loader workers.*SeededDataset"
    ) as info:
        fit(DataLoader(Samples(draws=True), 4, num_workers=2), [Saves(tmp_path)], epochs=1)
    assert any("seed_everything(..., workers='samples')" in str(each.message) for each in info)


def test_seed_everything_by_samples_makes_draws_in_workers_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")  # given back afterwards
    fulmen.seed_everything(7, workers="samples", verbose=False)

    def drawn(workers: int, resume: Path | None = None) -> list[Any]:
        saves = [] if resume is not None else [Saves(tmp_path)]
        loader = DataLoader(Samples(draws=True), 4, shuffle=True, num_workers=workers)
        return fit(loader, saves, resume).seen

    whole = drawn(2)
    assert len({row[1] for batch in whole for row in batch}) == 2 * SIZE, "other ones in each epoch"
    assert drawn(2, tmp_path / "2.ckpt") == whole[3:]
    assert drawn(0, tmp_path / "2.ckpt") == whole[3:], "whatever the number of workers"


def test_a_loader_of_another_kind_is_refused(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    fit(OwnState(), [saves], epochs=1)
    with pytest.raises(ValueError, match="of a loader that had a state of its own; DataLoader has none"):
        fit(DataLoader(Samples(), 4), resume=saves.saved[2], epochs=1)


@pytest.mark.proves("5.4", "5.38")
@pytest.mark.filterwarnings("ignore")
def test_lightning_and_fulmen_read_each_others_loader_states(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Theirs(lightning.LightningModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
            self.seen: list[Any] = []

        training_step, configure_optimizers = Model.training_step, Model.configure_optimizers

    class Saver(lightning.Callback):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "theirs.ckpt")

    def lightning_fit(loaders: Any, callbacks: Any = (), resume: Any = None) -> Any:
        seed(3)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module = Theirs()
        trainer.fit(module, loaders, ckpt_path=resume)
        return module

    def loaders() -> Any:
        return {"a": OwnState(6, 0), "b": OwnState(6, 100)}

    def indices(model: Any) -> list[Any]:
        return [{name: rows[0][0] for name, rows in batch.items()} for batch in model.seen]

    expected = indices(lightning_fit(loaders(), [Saver()]))
    saves = Saves(tmp_path)
    assert indices(fit(loaders(), [saves], epochs=1)) == expected
    ours = torch.load(saves.saved[2], weights_only=True)
    theirs = torch.load(tmp_path / "theirs.ckpt", weights_only=False)
    states = ours["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert states == theirs["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"at": 3}, {"at": 3}]
    assert indices(fit(loaders(), resume=tmp_path / "theirs.ckpt", epochs=1)) == expected[3:]
    assert indices(lightning_fit(loaders(), resume=saves.saved[2])) == expected[3:]

    with pytest.raises(RuntimeError, match=r"holds the states of 2 training loaders, and 1 of those now"):
        fit(OwnState(), resume=tmp_path / "theirs.ckpt", epochs=1)
    with pytest.raises(RuntimeError, match=r"of a CombinedLoader of 2 loaders.*this one has 3"):
        fit({**loaders(), "c": OwnState()}, resume=saves.saved[2], epochs=1)


@pytest.mark.filterwarnings("ignore:.*is damaged:UserWarning")
def test_a_checkpoint_of_lightning_inside_an_epoch_says_that_the_data_begin_again(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    fit(DataLoader(Samples(), 4), [saves], epochs=1)
    found = torch.load(saves.saved[2], weights_only=True)
    del found["fulmen"]
    torch.save(found, tmp_path / "foreign.ckpt")
    with pytest.warns(PossibleUserWarning, match=r"goes on at batch 3 with data read from their beginning"):
        resumed = fit(DataLoader(Samples(), 4), resume=tmp_path / "foreign.ckpt", epochs=1)
    assert len(resumed.seen) == 3, "the epoch is shorter, as Lightning's is"


@pytest.mark.proves("5.38")
@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "lightning's"])
def test_another_number_of_loaders_with_a_state_is_a_runtime_error_with_both_numbers(
    foreign: bool, tmp_path: Path
) -> None:
    def loaders(names: str) -> dict[str, Any]:
        return {name: OwnState(6, 100 * place) for place, name in enumerate(names)}

    saves = Saves(tmp_path)
    fit(loaders("ab"), [saves], epochs=1)
    found = torch.load(saves.saved[2], weights_only=True)
    if foreign:
        del found["fulmen"]
    torch.save(found, tmp_path / "two.ckpt")
    told = (
        r"the states of 2 training loaders, and 3 of those now have load_state_dict\. Pass the loaders that were saved"
        if foreign
        else r"a CombinedLoader of 2 loaders with mode='max_size_cycle'; this one has 3 .*Combine the same loaders"
    )
    with pytest.raises(RuntimeError, match=told):
        fit(loaders("abc"), resume=tmp_path / "two.ckpt", epochs=1)

"""The demo modules and data do what other projects' tests expect of them."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader

import fulmen
from fulmen.demos import (
    BoringDataModule,
    BoringModel,
    DemoModel,
    LightningLSTM,
    LightningTransformer,
    SequenceSampler,
    WikiText2,
    mnist_datamodule,
    text,
)
from fulmen.demos.boring_classes import (
    BoringDataModuleNoLen,
    IterableBoringDataModule,
    ManualOptimBoringModel,
    Net,
    RandomDataset,
    RandomDictDataset,
    RandomIterableDataset,
    RandomIterableDatasetWithLen,
)
from fulmen.demos.mnist_datamodule import MNIST, MNISTDataModule
from fulmen.demos.transformer import PositionalEncoding, Transformer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.proves("14.1")
SENTENCES = "the cat sat on the mat\nthe dog lay on the cat\n"


def trainer(**arguments: Any) -> fulmen.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return fulmen.Trainer(**{"max_epochs": 1, **quiet, **arguments})


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the modules look for their text: in ``data`` below the current folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "wikitext-2.txt").write_text(SENTENCES * 200, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which a real server hands out its files."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Keep the output clean."""

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("model", [BoringModel, ManualOptimBoringModel])
@pytest.mark.parametrize("data", [None, BoringDataModule, BoringDataModuleNoLen])
def test_a_boring_model_runs_in_every_stage(model: type[Any], data: type[Any] | None) -> None:
    module, datamodule = model(), None if data is None else data()
    runner = trainer()

    runner.fit(module, datamodule=datamodule)

    assert runner.global_step == 64
    assert runner.validate(module, datamodule=datamodule, verbose=False) == [{}]
    assert runner.test(module, datamodule=datamodule, verbose=False) == [{}]
    predictions = runner.predict(module, datamodule=datamodule)
    assert predictions is not None
    assert [tuple(each.shape) for each in predictions] == [(1, 2)] * 64


@pytest.mark.parametrize("model", [BoringModel, ManualOptimBoringModel])
def test_a_boring_model_steps_as_the_loop_by_hand(model: type[Any]) -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 32)
    ours = model()
    theirs = torch.nn.Linear(32, 2)
    theirs.load_state_dict(ours.layer.state_dict())

    trainer().fit(ours, DataLoader(rows, shuffle=False, sampler=range(4)))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for row in rows:
        optimizer.zero_grad()
        answer = theirs(row.unsqueeze(0))
        torch.nn.functional.mse_loss(answer, torch.ones_like(answer)).backward()
        optimizer.step()

    assert torch.equal(ours.layer.weight, theirs.weight)
    assert torch.equal(ours.layer.bias, theirs.bias)


def test_a_list_of_training_loaders_gives_a_batch_of_each() -> None:
    class Paired(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)
            self.shapes: list[tuple[int, ...]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.shapes.extend(tuple(each.shape) for each in batch)
            return self.step(batch[0])

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.step(batch)

    module = Paired()

    trainer().fit(module, datamodule=IterableBoringDataModule())

    assert module.shapes == [(2, 4)] * 16


def test_the_random_data_sets_have_the_sizes_they_were_given() -> None:
    assert len(RandomDataset(3, 7)) == 7
    assert tuple(RandomDataset(3, 7)[6].shape) == (3,)
    sample = RandomDictDataset(3, 7)[0]
    assert torch.equal(sample["b"], sample["a"] + 2)
    assert len(list(RandomIterableDataset(3, 5))) == 5
    assert not hasattr(RandomIterableDataset(3, 5), "__len__")
    assert len(RandomIterableDatasetWithLen(3, 5)) == len(list(RandomIterableDatasetWithLen(3, 5))) == 5


def test_a_demo_model_trains_with_the_rate_it_was_given() -> None:
    module = DemoModel(out_dim=3, learning_rate=0.5)

    trainer(limit_train_batches=2).fit(module, DataLoader(RandomDataset(32, 4)))

    assert module.l1.out_features == 3
    assert module.configure_optimizers().param_groups[0]["lr"] == 0.5


def test_the_mnist_network_answers_with_log_probabilities() -> None:
    with torch.no_grad():
        answers = Net()(torch.randn(2, 1, 28, 28))

    assert answers.shape == (2, 10)
    torch.testing.assert_close(answers.exp().sum(dim=1), torch.ones(2))


def test_a_loader_that_was_never_set_up_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"setup\(\) makes the data sets"):
        BoringDataModule().train_dataloader()


# ---------------------------------------------------------------------- words


def test_wikitext_gives_blocks_whose_targets_are_the_next_words(words: Path) -> None:
    data = WikiText2(words, block_size=5, download=False)

    assert data.vocab_size == 8, "the cat sat on mat dog lay, and the end of a sentence"
    inputs, target = data[1]
    read = [data.dictionary.idx2word[index] for index in (*inputs, target[-1])]
    assert read == ["mat", "<eos>", "the", "dog", "lay", "on"]
    assert torch.equal(inputs[1:], target[:-1])
    assert len(data) == (14 * 200) // 5 - 1


def test_wikitext_is_fetched_once_and_whole(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    (folder / "train.txt").write_text(SENTENCES, encoding="utf-8")
    monkeypatch.setattr(text, "_URL", address + "train.txt")

    first = WikiText2(tmp_path / "data", block_size=2)
    (folder / "train.txt").unlink()
    again = WikiText2(tmp_path / "data", block_size=2)

    assert torch.equal(first.data, again.data)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["wikitext-2.txt"]


def test_wikitext_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="download=True"):
        WikiText2(tmp_path, download=False)


@pytest.mark.parametrize("kind", [LightningTransformer, LightningLSTM])
def test_the_word_models_learn_a_short_text(kind: type[Any], words: Path) -> None:
    torch.manual_seed(0)
    data = WikiText2(words, block_size=14, download=False)
    module = kind(vocab_size=data.vocab_size)
    if kind is LightningLSTM:
        module.model = type(module.model)(data.vocab_size, ninp=16, nhid=32, nlayers=1, dropout=0.0)
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1.0)
    losses: list[float] = []

    class Watch(fulmen.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    sampler = SequenceSampler(data, batch_size=4)
    runner = trainer(max_epochs=3, callbacks=[Watch()], use_distributed_sampler=False)
    runner.fit(module, DataLoader(data, batch_sampler=sampler))

    assert losses[0] > 1.5, "eight words and no knowledge: about log(8)"
    assert losses[-1] < 0.9


def test_a_sequence_sampler_goes_on_in_every_row() -> None:
    batches = list(SequenceSampler(range(11), batch_size=3))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset

    assert batches == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_no_word_of_the_transformer_sees_what_follows_it() -> None:
    torch.manual_seed(0)
    model = Transformer(vocab_size=11, ninp=8, nhid=8, dropout=0.0).eval()
    words, target = torch.randint(0, 11, (2, 1, 6))
    changed = target.clone()
    changed[0, 4] = (target[0, 4] + 1) % 11

    with torch.no_grad():
        before, after = model(words, target), model(words, changed)

    torch.testing.assert_close(before[:4], after[:4])
    assert not torch.allclose(before[4:], after[4:])


def test_the_positional_encoding_is_the_papers() -> None:
    encoding = PositionalEncoding(6, dropout=0.0)(torch.zeros(1, 4, 6))[0]

    for position in range(4):
        for pair in range(3):
            angle = torch.tensor(position / 10000 ** (2 * pair / 6))
            expected = torch.stack([torch.sin(angle), torch.cos(angle)])
            torch.testing.assert_close(encoding[position, 2 * pair : 2 * pair + 2], expected)


# ---------------------------------------------------------------------- MNIST


def idx(array: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, array.dim()]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.numpy().tobytes(), mtime=0)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("t10k", 12)):
        pictures = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(pictures))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return tmp_path


def test_mnist_reads_its_original_files(digits: Path) -> None:
    plain = MNIST(digits, train=False, normalize=None, download=False)
    normalized = MNIST(digits, train=False, download=False)

    assert len(plain) == 12
    picture, digit = plain[3]
    assert picture.shape == (1, 28, 28)
    assert 0 <= picture.min() < picture.max() <= 1
    assert digit == 3
    torch.testing.assert_close(normalized[3][0] * 0.3081 + 0.1307, picture)


def test_mnist_is_fetched_and_its_digest_is_checked(
    digits: Path, served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    raw = digits / "MNIST" / "raw"
    for file in raw.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    known = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in raw.iterdir()}
    monkeypatch.setattr(mnist_datamodule, "_URL", address)
    monkeypatch.setattr(mnist_datamodule, "_MD5", known)

    fetched = MNIST(tmp_path / "fresh", train=True)
    assert len(fetched) == 40
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="was expected"):
        MNIST(tmp_path / "fresh", train=False)

    left = sorted(path.name for path in (tmp_path / "fresh" / "MNIST" / "raw").iterdir())
    assert left == ["t10k-images-idx3-ubyte.gz", "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]


def test_mnist_names_a_file_that_is_missing_or_broken(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="download=True"):
        MNIST(tmp_path / "nowhere", download=False)

    (digits / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\x00\x00\x08\x01\x00\x00"))
    with pytest.raises(ValueError, match="is no IDX file"):
        MNIST(digits, download=False)


def test_the_mnist_datamodule_splits_alike_each_time_and_feeds_every_stage(digits: Path) -> None:
    class Classifier(fulmen.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.nll_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("n", float(len(batch[1])), reduce_fx="sum")

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).argmax(1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = MNISTDataModule(digits, val_split=15, normalize=True, batch_size=5)
    module, runner = Classifier(), trainer()

    runner.fit(module, datamodule=data)
    [tested] = runner.test(module, datamodule=data, verbose=False)
    predicted = runner.predict(module, datamodule=data)

    assert runner.global_step == 5
    assert tested["n"] == 12
    assert predicted is not None
    assert sum(len(each) for each in predicted) == 12
    other = MNISTDataModule(digits, val_split=15, seed=42)
    other.setup("fit")
    assert data.dataset_val.indices == other.dataset_val.indices  # type: ignore[union-attr]  # known to be there
    assert data.num_classes == 10
    assert MNISTDataModule(digits).default_transforms is None
    with pytest.raises(ValueError, match="val_split=99"):
        MNISTDataModule(digits, val_split=99).setup("fit")

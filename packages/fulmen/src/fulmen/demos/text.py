"""WikiText-2 as blocks of word numbers."""

from __future__ import annotations

import shutil
import tempfile
import urllib.request
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Dictionary", "WikiText2", "tokenize"]

_URL = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/train.txt"
_END_OF_SENTENCE = "<eos>"


class Dictionary:
    """Numbers words in the order in which they are first seen."""

    def __init__(self) -> None:
        self.word2idx: dict[str, int] = {}
        self.idx2word: list[str] = []

    def add_word(self, word: str) -> int:
        """The number of ``word``; a new one if it was not seen before."""
        index = self.word2idx.setdefault(word, len(self.idx2word))
        if index == len(self.idx2word):
            self.idx2word.append(word)
        return index

    def __len__(self) -> int:
        return len(self.idx2word)


def tokenize(path: Path) -> tuple[Tensor, Dictionary]:
    """Read a text of words between spaces, one sentence a line.

    Returns:
        The number of every word, shape ``(words,)``, int64, each line ended by ``<eos>``; and their dictionary.
    """
    dictionary = Dictionary()
    with path.open(encoding="utf-8") as lines:
        numbers = [dictionary.add_word(word) for line in lines for word in (*line.split(), _END_OF_SENTENCE)]
    return torch.tensor(numbers, dtype=torch.int64), dictionary


class WikiText2(Dataset[tuple[Tensor, Tensor]]):
    """Blocks of the training text of WikiText-2; the targets are the inputs, one word on.

    Args:
        data_dir: where ``wikitext-2.txt`` lies, or will.
        block_size: words of a sample.
        download: fetch the text if it is not there.

    Raises:
        FileNotFoundError: the text is not there, and ``download`` is False.
    """

    def __init__(self, data_dir: Path = Path("./data"), block_size: int = 35, download: bool = True) -> None:
        super().__init__()
        self.path = Path(data_dir) / "wikitext-2.txt"
        if download:
            self.download(self.path)
        elif not self.path.exists():
            raise FileNotFoundError(f"WikiText2 found no {self.path}. Put the text there, or pass download=True.")
        self.data, self.dictionary = tokenize(self.path)
        self.block_size = block_size

    @property
    def vocab_size(self) -> int:
        """Different words, the end of a sentence included."""
        return len(self.dictionary)

    def __len__(self) -> int:
        return len(self.data) // self.block_size - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both of shape ``(block_size,)``, int64."""
        start = index * self.block_size
        end = start + self.block_size
        return self.data[start:end], self.data[start + 1 : end + 1]

    @staticmethod
    def download(destination: Path) -> None:
        """Fetch the text unless it is there; a broken transfer leaves nothing behind."""
        if destination.exists():
            return
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent) as staging:
            part = Path(staging) / destination.name
            with urllib.request.urlopen(_URL, timeout=60) as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            part.rename(destination)

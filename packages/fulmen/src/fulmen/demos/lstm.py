"""A word-level LSTM whose hidden state goes on from batch to batch (truncated backpropagation through time)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from fulmen.demos.text import WikiText2
from fulmen.module import LightningModule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

__all__ = ["LightningLSTM", "SequenceSampler", "SimpleLSTM"]


class SimpleLSTM(nn.Module):
    """Embedding, LSTM and a projection back to words."""

    def __init__(
        self, vocab_size: int = 33278, ninp: int = 512, nhid: int = 512, nlayers: int = 4, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.vocab_size, self.nhid, self.nlayers = vocab_size, nhid, nlayers
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocab_size, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout, batch_first=True)
        self.decoder = nn.Linear(nhid, vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Small uniform weights where words come in and go out."""
        for weight in (self.encoder.weight, self.decoder.weight):
            nn.init.uniform_(weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, input: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Log-probabilities of the next words, and where the LSTM stopped.

        Args:
            input: word numbers, shape ``(batch, words)``, int64.
            hidden: hidden and cell state, each of shape ``(nlayers, batch, nhid)``.

        Returns:
            Shape ``(batch * words, vocab_size)``, and the states after the last word.
        """
        output, hidden = self.rnn(self.drop(self.encoder(input)), hidden)
        words = self.decoder(self.drop(output)).view(-1, self.vocab_size)
        return F.log_softmax(words, dim=1), hidden

    def init_hidden(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Two states of zeros, on the model's device."""
        shape = (self.nlayers, batch_size, self.nhid)
        weight = self.decoder.weight
        return weight.new_zeros(shape), weight.new_zeros(shape)


class SequenceSampler(Sampler[list[int]]):
    """Batches whose rows go on where the same rows of the batch before stopped.

    The data set is cut into ``batch_size`` equal runs; batch ``i`` holds sample ``i`` of each.
    """

    def __init__(self, dataset: Sized, batch_size: int) -> None:
        super().__init__()
        self.dataset, self.batch_size = dataset, batch_size
        self.chunk_size = len(dataset) // batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for offset in range(self.chunk_size):
            yield [run * self.chunk_size + offset for run in range(self.batch_size)]

    def __len__(self) -> int:
        return self.chunk_size


class LightningLSTM(LightningModule):
    """Trains ``SimpleLSTM`` on WikiText-2, with the hidden state kept over the batches of an epoch."""

    def __init__(self, vocab_size: int = 33278) -> None:
        super().__init__()
        self.model = SimpleLSTM(vocab_size=vocab_size)
        self.hidden: tuple[Tensor, Tensor] | None = None

    def on_train_epoch_end(self) -> None:
        """The next epoch starts at the beginning of the text."""
        self.hidden = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        """Negative log-likelihood of the next words; gradients stop at the batch's first word."""
        words, target = batch
        if self.hidden is None:
            self.hidden = self.model.init_hidden(words.size(0))
        hidden, cell = self.hidden
        output, self.hidden = self.model(words, (hidden.detach(), cell.detach()))
        loss = F.nll_loss(output, target.view(-1))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def prepare_data(self) -> None:
        """Fetch the text once."""
        WikiText2(download=True)

    def train_dataloader(self) -> Any:
        """Batches of 20 blocks, in the text's order."""
        dataset = WikiText2()
        return DataLoader(dataset, batch_sampler=SequenceSampler(dataset, batch_size=20))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with a rate of 20, as is usual for this model."""
        return torch.optim.SGD(self.parameters(), lr=20.0)

"""A small encoder-decoder transformer over words, and a module that trains it on WikiText-2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fulmen.demos.text import Dictionary, WikiText2, tokenize
from fulmen.module import LightningModule

__all__ = ["Dictionary", "LightningTransformer", "PositionalEncoding", "Transformer", "WikiText2", "tokenize"]


class Transformer(nn.Module):
    """``torch.nn.Transformer`` between an embedding and a projection back to words.

    Args:
        vocab_size: different words.
        ninp: width of the embedding.
        nhead: attention heads.
        nhid: width of the feed-forward layers.
        nlayers: layers of encoder and decoder, each.
        dropout: probability.
    """

    def __init__(
        self,
        vocab_size: int = 33278,
        ninp: int = 200,
        nhead: int = 2,
        nhid: int = 200,
        nlayers: int = 2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.pos_encoder = PositionalEncoding(ninp, dropout)
        self.embedding = nn.Embedding(vocab_size, ninp)
        self.transformer = nn.Transformer(
            d_model=ninp,
            nhead=nhead,
            num_encoder_layers=nlayers,
            num_decoder_layers=nlayers,
            dim_feedforward=nhid,
            dropout=dropout,
            batch_first=True,
        )
        self.decoder = nn.Linear(ninp, vocab_size)
        self.ninp = ninp
        self.vocab_size = vocab_size

    def forward(self, inputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-probabilities of the next words.

        Args:
            inputs: word numbers, shape ``(batch, words)``, int64.
            target: the same, one word on.
            mask: added to the attention over ``target``, shape ``(words, words)``; None: nothing sees what follows it.

        Returns:
            Shape ``(batch * words, vocab_size)``.
        """
        if mask is None:
            mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], device=inputs.device)
        source = self.pos_encoder(self.embedding(inputs) * math.sqrt(self.ninp))
        wanted = self.pos_encoder(self.embedding(target) * math.sqrt(self.ninp))
        words = self.decoder(self.transformer(source, wanted, tgt_mask=mask))
        return F.log_softmax(words, dim=-1).view(-1, self.vocab_size)


class PositionalEncoding(nn.Module):
    """Adds sines and cosines of the position; then dropout.

    Source: Vaswani et al. 2017, section 3.5.
    """

    def __init__(self, dim: int, dropout: float = 0.1, max_len: int = 5000) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        position = torch.arange(max_len).unsqueeze(1)
        rate = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
        encoding = torch.zeros(max_len, dim)
        encoding[:, 0::2] = torch.sin(position * rate)
        encoding[:, 1::2] = torch.cos(position * rate)[:, : dim // 2]
        self.register_buffer("pe", encoding, persistent=False)
        self.pe: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, words, dim)``, unchanged."""
        out: Tensor = self.dropout(x + self.pe[: x.size(1)])
        return out


class LightningTransformer(LightningModule):
    """Trains ``Transformer`` on WikiText-2."""

    def __init__(self, vocab_size: int = 33278) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=vocab_size)

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        """See ``Transformer.forward``."""
        out: Tensor = self.model(inputs, target)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        """Negative log-likelihood of the next words."""
        inputs, target = batch
        return F.nll_loss(self(inputs, target), target.view(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with a rate of 0.1."""
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def prepare_data(self) -> None:
        """Fetch the text once."""
        WikiText2(download=True)

    def train_dataloader(self) -> Any:
        """One block a batch."""
        return DataLoader(WikiText2())

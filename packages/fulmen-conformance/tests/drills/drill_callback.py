"""A minimal correct callback, and broken ones that CallbackConformance must catch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
from fulmen_conformance import CallbackConformance

if TYPE_CHECKING:
    from fulmen_protocols import Callback


class Good:
    """Counts batches."""

    state_key = "Counter"

    def __init__(self) -> None:
        self.batches = 2

    def setup(self, trainer: object, pl_module: object, stage: str) -> None:
        self.stage = stage

    def on_train_batch_end(
        self, trainer: object, pl_module: object, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, object]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.batches = state_dict["batches"]


class TestGood(CallbackConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def callback(self) -> Callback:
        return Good()

"""No test leaves anything behind: variables, which ``seed_everything`` sets for ranks, or a process group."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Put the environment back to what it was before the test."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def no_process_group_afterwards() -> Iterator[None]:
    """Leave the process group that a run in this process has left open; a later test would take it for its own."""
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

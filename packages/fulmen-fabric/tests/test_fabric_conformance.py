"""The one backend of this package passes the kit of its seam."""

from __future__ import annotations

import pytest

from fulmen_conformance import CollectivesConformance
from fulmen_fabric import LocalCollectives


def local(topology):
    return LocalCollectives()


class TestLocalCollectives(CollectivesConformance):
    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:local"

    @pytest.fixture
    def num_processes(self) -> int:
        return 1

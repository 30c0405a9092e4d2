"""A minimal correct checkpoint IO, and broken ones that CheckpointIOConformance must catch."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from fulmen_conformance import CheckpointIOConformance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen_protocols import CheckpointIO


class Good:
    """A torch file after a line with its SHA-256."""

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.commit(Path(path), self.seal(buffer.getvalue()))

    def commit(self, target: Path, content: bytes) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(target.name + ".staging")
        staging.write_bytes(content)
        staging.replace(target)

    def seal(self, content: bytes) -> bytes:
        return hashlib.sha256(content).digest() + content

    def unseal(self, path: str | os.PathLike[str]) -> bytes:
        content = Path(path).read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError(f"{os.fspath(path)} is damaged: its digest differs")
        return content[32:]

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        content = io.BytesIO(self.unseal(path))
        try:
            return torch.load(content, map_location or "cpu", weights_only=weights_only is not False)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{os.fspath(path)} holds objects that only code could rebuild") from error

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        pass

    def verify_checkpoint(self, path: str | os.PathLike[str]) -> None:
        self.unseal(path)


class TestGood(CheckpointIOConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def checkpoint_io(self) -> CheckpointIO:
        return Good()

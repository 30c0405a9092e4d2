"""AsyncCheckpointIO beside Lightning's: where errors of a save come out, and use over several fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fulmen.plugins import AsyncCheckpointIO, TorchCheckpointIO

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

theirs = pytest.importorskip("lightning.pytorch.plugins.io")
pytestmark = pytest.mark.proves("5.13")


def _ours_settled(io: Any) -> None:
    io._courier.drain()


def _theirs_settled(io: Any) -> None:
    io._executor.submit(lambda: None).result()


KINDS = [
    pytest.param(lambda: AsyncCheckpointIO(TorchCheckpointIO()), _ours_settled, id="fulmen"),
    pytest.param(lambda: theirs.AsyncCheckpointIO(theirs.TorchCheckpointIO()), _theirs_settled, id="lightning"),
]


@pytest.mark.parametrize(("make", "settle"), KINDS)
def test_an_error_is_raised_at_the_next_save(
    tmp_path: Path, make: Callable[[], Any], settle: Callable[[Any], None]
) -> None:
    (tmp_path / "file").touch()
    io = make()
    # Lightning's first save may be slow enough to raise its own error.
    with pytest.raises(Exception, match="file"):  # noqa: PT012
        for name in ("file/bad.ckpt", "good.ckpt"):
            io.save_checkpoint({"a": 1}, tmp_path / name)
            settle(io)


@pytest.mark.parametrize(("make", "settle"), KINDS)
def test_an_error_is_raised_at_teardown(tmp_path: Path, make: Callable[[], Any], settle: Callable[[Any], None]) -> None:
    (tmp_path / "file").touch()
    io = make()
    with pytest.raises(Exception, match="file"):  # noqa: PT012
        io.save_checkpoint({"a": 1}, tmp_path / "file" / "bad.ckpt")
        io.teardown()


@pytest.mark.parametrize(("make", "settle"), KINDS)
def test_tensors_are_those_of_the_save_and_saving_goes_on_after_teardown(
    tmp_path: Path, make: Callable[[], Any], settle: Callable[[Any], None]
) -> None:
    io, weight = make(), torch.zeros(1000)
    for fit in range(3):
        weight.fill_(fit)
        io.save_checkpoint({"w": weight}, tmp_path / f"{fit}.ckpt")
        weight.fill_(-1)
        io.teardown()
        io.teardown()
    for fit in range(3):
        assert torch.equal(torch.load(tmp_path / f"{fit}.ckpt")["w"], torch.full((1000,), float(fit)))

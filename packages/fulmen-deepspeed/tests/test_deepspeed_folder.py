"""Folders as DeepSpeed lays them out: recognised, found whole or damaged, and never run."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch

from fulmen_deepspeed import DeepSpeedCheckpointIO, DeepSpeedStrategy
from fulmen_deepspeed import _folder as folders
from fulmen_deepspeed._checkpoint import EngineCheckpoints
from fulmen_deepspeed._process_group import ProcessGroup
from fulmen_protocols import (
    CHECKPOINT_IOS,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
    MisconfigurationException,
    Topology,
    load,
)

if TYPE_CHECKING:
    from pathlib import Path


class Foreign:
    """No plain data."""


def layout(root: Path, **rest: object) -> Path:
    """A folder with the names that the engine writes for one rank without ZeRO."""
    inner = root / "run.ckpt" / "checkpoint"
    inner.mkdir(parents=True)
    state = {"module": {"weight": torch.ones(2)}, "buffer_names": [], "dp_world_size": 1, **rest}
    torch.save(state, inner / "mp_rank_00_model_states.pt")
    (root / "run.ckpt" / "latest").write_text("checkpoint")
    return root / "run.ckpt"


@pytest.mark.proves("4.30")
def test_a_folder_is_recognised_by_its_entries() -> None:
    assert DeepSpeedCheckpointIO.recognises({"checkpoint", "latest", "zero_to_fp32.py"})
    assert not DeepSpeedCheckpointIO.recognises({"checkpoint"})
    assert not DeepSpeedCheckpointIO.recognises({"fulmen.manifest", "latest"})
    assert isinstance(load(CHECKPOINT_IOS, "deepspeed"), DeepSpeedCheckpointIO)


@pytest.mark.proves("4.30")
def test_parts_of_a_checkpoint_are_refused_with_the_folder_that_was_meant(tmp_path: Path) -> None:
    path = layout(tmp_path)
    checkpoints = EngineCheckpoints(ProcessGroup(), exclude_frozen=False, load_full_weights=False)

    assert checkpoints.owns(str(path))
    with pytest.raises(CheckpointNotFound, match=r"folder inside a checkpoint.*Give .*run.ckpt'"):
        checkpoints.owns(str(path / "checkpoint"))
    with pytest.raises(CheckpointNotFound, match=r"file inside a checkpoint.*Give .*run.ckpt'"):
        checkpoints.owns(str(path / "checkpoint" / "mp_rank_00_model_states.pt"))


@pytest.mark.proves("4.30")
def test_one_file_is_taken_only_where_load_full_weights_says_so(tmp_path: Path) -> None:
    file = tmp_path / "whole.ckpt"
    torch.save({}, file)

    with pytest.raises(MisconfigurationException, match=r"load_full_weights=True"):
        EngineCheckpoints(ProcessGroup(), exclude_frozen=False, load_full_weights=False).owns(str(file))
    assert not EngineCheckpoints(ProcessGroup(), exclude_frozen=False, load_full_weights=True).owns(str(file))


def test_a_file_that_is_missing_or_cut_short_is_named(tmp_path: Path) -> None:
    path = layout(tmp_path)
    folders.write_manifest(str(path))
    folders.check_whole(str(path))
    states = path / "checkpoint" / "mp_rank_00_model_states.pt"

    states.write_bytes(states.read_bytes()[:-7])
    with pytest.raises(CheckpointCorrupt, match=r"mp_rank_00_model_states.pt' has \d+ bytes"):
        DeepSpeedCheckpointIO().verify_checkpoint(path)
    states.unlink()
    with pytest.raises(CheckpointCorrupt, match=r"mp_rank_00_model_states.pt' is missing"):
        DeepSpeedCheckpointIO().verify_checkpoint(path)


@pytest.mark.proves("4.30")
def test_what_the_run_saved_comes_back_under_its_own_names_even_where_the_engine_uses_them(tmp_path: Path) -> None:
    rest = {"epoch": 3, "lr_scheduler": {"last": 1}, "optimizer": "mine"}

    path = layout(tmp_path, **folders.client_state(dict(rest)))

    assert folders.rest_of(str(path / "checkpoint"), None) == rest


def test_a_folder_of_lightning_s_gives_its_client_state(tmp_path: Path) -> None:
    path = layout(tmp_path, epoch=2, optimizer=None, lr_scheduler=None, ds_version="0.16", loops={"a": 1})

    assert folders.rest_of(str(path / "checkpoint"), None) == {"epoch": 2, "loops": {"a": 1}}


def test_code_in_a_file_is_not_run_unless_that_is_asked_for(tmp_path: Path) -> None:
    path = layout(tmp_path, thing=Foreign())

    with pytest.raises(CheckpointUnsafe, match=r"weights_only=False"):
        folders.rest_of(str(path / "checkpoint"), None)
    assert isinstance(folders.rest_of(str(path / "checkpoint"), False)["thing"], Foreign)


def test_nothing_loads_code_while_deepspeed_reads_even_where_it_asks_for_it(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"thing": Foreign()}, file)

    with folders.reading(None), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(file, weights_only=False)
    assert isinstance(torch.load(file, weights_only=False)["thing"], Foreign), "afterwards it is as before"


def test_only_the_engine_writes_such_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"only the engine writes such folders.*strategy='deepspeed'"):
        DeepSpeedCheckpointIO().save_checkpoint({}, tmp_path / "a")
    (tmp_path / "b").mkdir()
    DeepSpeedCheckpointIO().remove_checkpoint(tmp_path / "b")
    DeepSpeedCheckpointIO().remove_checkpoint(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_deepspeed_is_told_by_the_environment_is_gone_with_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    strategy = DeepSpeedStrategy()
    strategy.setup_environment(Topology((torch.device("cpu"),)))
    told = os.environ.get("LOCAL_RANK")
    strategy.teardown()
    assert (told, os.environ.get("LOCAL_RANK")) == ("0", None)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_a_launcher_has_told_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    strategy = DeepSpeedStrategy()
    strategy.setup_environment(Topology((torch.device("cpu"),)))
    strategy.teardown()
    assert os.environ["LOCAL_RANK"] == "0"

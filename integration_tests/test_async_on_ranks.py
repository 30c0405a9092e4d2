"""Asynchronous saves of two gloo ranks: what is in the files, going on from them, and the end of all when one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fulmen_checkpoint import TorchCheckpointIO

SCRIPT = Path(__file__).with_name("async_ranks_script.py")


def run(folder: Path, kind: str, resume: Path | str = "-") -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, what each rank reports, and what was printed."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), kind, str(resume)],
        capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    printed = done.stdout + done.stderr
    files = [folder / f"rank{rank}.json" for rank in range(2)]
    assert files[0].exists(), printed[-4000:]
    return done.returncode, [json.loads(file.read_text()) for file in files if file.exists()], printed


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.proves("5.13", "5.39")
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.slow
def test_two_ranks_leave_the_files_of_synchronous_saving_and_go_on_from_them_bit_for_bit(
    kind: str, tmp_path: Path
) -> None:
    code, whole, printed = run(tmp_path / "whole", kind)
    assert code == 0, printed[-4000:]
    code, saved, printed = run(tmp_path / "saved", f"asynchronous {kind}")
    assert code == 0, printed[-4000:]
    assert saved[0]["digest"] == saved[1]["digest"] == whole[0]["digest"]
    assert saved[0]["writer"] is saved[1]["writer"] is None, "the writing process outlives the fit"

    io = TorchCheckpointIO()
    names = sorted(path.name for path in (tmp_path / "whole" / "saves").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "saved" / "saves").iterdir())
    assert len(names) == 6
    for name in names:
        ours = io.load_checkpoint(tmp_path / "saved" / "saves" / name)
        theirs = io.load_checkpoint(tmp_path / "whole" / "saves" / name)
        for content in (ours, theirs):
            content["fulmen"]["progress"].pop("wall_time_s")  # type: ignore[index]  # known to be there
            del content["callbacks"]  # they name the folder
        assert same(ours, theirs), name

    code, resumed, printed = run(
        tmp_path / "resumed", f"asynchronous {kind}", tmp_path / "saved" / "saves" / "step=4.ckpt"
    )
    assert code == 0, printed[-4000:]
    assert resumed[0]["digest"] == resumed[1]["digest"] == whole[0]["digest"]


@pytest.mark.proves("5.13")
def test_a_failed_save_of_rank_zero_ends_both_ranks_with_its_error(tmp_path: Path) -> None:
    code, reports, printed = run(tmp_path / "broken", "asynchronous torch", "blocked")
    assert code != 0
    assert "saves/step=2.ckpt' cannot be written: NotADirectoryError" in reports[0]["error"]
    assert "check free space, permissions and the connection" in printed
    assert all("digest" not in report for report in reports)


@pytest.mark.proves("5.13", "5.39")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sharded_ranks_leave_the_folders_of_synchronous_saving_and_go_on_from_them_bit_for_bit(tmp_path: Path) -> None:
    code, whole, printed = run(tmp_path / "whole", "shards")
    assert code == 0, printed[-4000:]
    code, saved, printed = run(tmp_path / "saved", "asynchronous shards")
    assert code == 0, printed[-4000:]
    assert saved[0]["digest"] == saved[1]["digest"] == whole[0]["digest"]
    assert saved[0]["writer"] is saved[1]["writer"] is None, "a writing process outlives the fit"

    io = TorchCheckpointIO()
    names = sorted(path.name for path in (tmp_path / "whole" / "saves").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "saved" / "saves").iterdir())
    assert names == ["last.ckpt", "step=5.ckpt", "step=6.ckpt"], "others should have been removed"
    for name in names:
        paths = [tmp_path / run / "saves" / name for run in ("saved", "whole")]
        assert sum(file.suffix == ".distcp" for file in paths[0].iterdir()) == 2, "every rank writes its shard"
        for path in paths:
            io.verify_checkpoint(path)
        ours, theirs = (io.load_checkpoint(path) for path in paths)
        for content in (ours, theirs):
            content["fulmen"]["progress"].pop("wall_time_s")  # type: ignore[index]  # known to be there
            del content["callbacks"]  # they name the folder
        assert same(ours, theirs), name

    resumes = tmp_path / "saved" / "saves" / "step=5.ckpt"
    code, resumed, printed = run(tmp_path / "resumed", "asynchronous shards", resumes)
    assert code == 0, printed[-4000:]
    assert resumed[0]["digest"] == resumed[1]["digest"] == whole[0]["digest"]


@pytest.mark.slow
@pytest.mark.proves("5.13")
def test_a_failed_save_of_sharded_ranks_ends_the_run_with_its_error(tmp_path: Path) -> None:
    code, reports, printed = run(tmp_path / "broken", "asynchronous shards", "blocked")
    assert code != 0
    assert all("saves/step=2.ckpt' cannot be written" in report["error"] for report in reports if report)
    assert "check free space, permissions and the connection" in printed


@pytest.mark.slow
@pytest.mark.proves("5.13")
def test_a_loop_of_ones_own_saves_shards_asynchronously_and_its_end_waits_for_them(tmp_path: Path) -> None:
    code, reports, printed = run(tmp_path / "fabric", "asynchronous shards", "fabric")
    assert code == 0, printed[-4000:]
    assert len(reports) == 2
    for report in reports:
        # The checkpoint of number 2 holds two steps, which loading it has brought back.
        assert report == {"number": 2, "last": 7, "changed": [True] * 4}

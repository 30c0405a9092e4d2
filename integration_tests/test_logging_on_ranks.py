"""What logging, gathering and preparing data do on several ranks of a whole run, in real processes."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("logging_ranks_script.py")
Ranks = list[dict[str, Any]]


def read(folder: Path) -> Ranks:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Ranks]:
    """Two ranks of one node."""
    folder = tmp_path_factory.mktemp("one_node")
    command = [sys.executable, str(SCRIPT), str(folder), "1", "per_node"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder, done.stdout, read(folder)


@pytest.mark.proves("6.18")
def test_synced_values_are_those_of_all_ranks_and_others_each_ranks_own(run: tuple[Path, str, Ranks]) -> None:
    folder, _, ranks = run
    shared = {
        "synced": sum(10 * rank + batch for rank in (0, 1) for batch in range(3)) / 6,
        "synced_step": (2 + 12) / 2,
        "weighted": (0 * 1 + 1 * 3) / (1 + 3),
        "largest": 1.0,
        "only_0": 0.0,
        "only_1": 1.0,
        "late": 7.0,
    }
    for rank, seen in enumerate(ranks):
        found = seen["metrics"]
        assert {name: found[name] for name in shared} == pytest.approx(shared)
        assert (found["mine"], found["stepwise"]) == (rank, rank)
        assert ("zero" in found) == (rank == 0), "a rank_zero_only value cannot be monitored elsewhere"

    files = list(folder.rglob("metrics.csv"))
    assert len(files) == 1, "only rank 0 writes"
    lines = files[0].read_text().splitlines()
    rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]
    assert [row["synced_step"] for row in rows if "synced_step" in row] == [5.0, 6.0, 7.0], "reduced at each step"
    assert rows[-1]["mine"] == 0.0
    assert rows[-1]["weighted"] == 0.75


@pytest.mark.proves("6.18")
def test_an_epoch_value_that_stays_on_its_rank_is_warned_of_by_name(run: tuple[Path, str, Ranks]) -> None:
    rank_zero, other = run[2]
    assert len(rank_zero["warnings"]) == 1
    assert other["warnings"] == []
    assert "self.log('mine', ...) in training_step records an epoch value on 2 ranks" in rank_zero["warnings"][0]
    assert rank_zero["kinds"] == ["PossibleUserWarning"]


@pytest.mark.proves("6.7", "6.29", "10.19")
def test_what_belongs_to_rank_zero_happens_there_and_its_folder_is_known_everywhere(
    run: tuple[Path, str, Ranks],
) -> None:
    folder, printed, ranks = run
    assert [seen["uploads"] for seen in ranks] == [1, 0]
    where = str(folder / "lightning_logs" / "version_0")
    assert ranks[0]["log_dir"] == where, "asked on rank 0 alone, which hangs in Lightning"
    assert [seen["log_dir_everywhere"] for seen in ranks] == [where, where]
    assert printed.count("printed once") == 1


@pytest.mark.proves("10.19")
def test_gathering_stacks_over_ranks_in_any_collection_and_lets_gradients_back(run: tuple[Path, str, Ranks]) -> None:
    for rank, seen in enumerate(run[2]):
        assert seen["gathered"] == {"a": [[0.0, 1.0], [1.0, 1.0]], "b": [[0.0, 1.0], "text"]}
        # d/dw of the sum over both ranks of (w0 * 1 + w1 * 2).
        assert seen["gradient"] == pytest.approx(2 * (rank + 1))


@pytest.mark.proves("10.8")
def test_data_is_prepared_on_one_process_and_set_up_on_all(run: tuple[Path, str, Ranks]) -> None:
    assert [seen["prepared"] for seen in run[2]] == [["datamodule", "module"], []]
    assert [seen["state in setup"] for seen in run[2]] == ["prepared here", "untouched"]


@pytest.mark.proves("10.8")
@pytest.mark.parametrize("per_node", ["per_node", "per_run"])
@pytest.mark.slow
def test_data_is_prepared_once_a_node_or_once_a_run_as_each_owner_wants(per_node: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path), "2", per_node],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "NODE_RANK": str(node),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for node in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "".join(errors)[-4000:]

    # The module of the script wants the opposite of its data module.
    of_second_node = ["datamodule"] if per_node == "per_node" else ["module"]
    assert [seen["prepared"] for seen in read(tmp_path)] == [["datamodule", "module"], of_second_node]

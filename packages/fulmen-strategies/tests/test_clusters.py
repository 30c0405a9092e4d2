"""Every environment reads its starter's variables by one table, and reports all contradictions at once."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from fulmen_protocols import MisconfigurationException, MissingPackage
from fulmen_strategies import (
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from fulmen_strategies.environments import mpi
from fulmen_strategies.environments._table import TABLE, contradictions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOST = socket.gethostname()
PREFIXES = (
    "GROUP_", "JSM_", "KUBE", "LOCAL_", "LSB_", "MASTER_", "MV2_", "NODE_RANK", "OMPI_", "PMI", "RANK", "SLURM_",
    "STANDALONE_PORT", "TORCHELASTIC_", "WORLD_SIZE",
)  # fmt: skip


@pytest.fixture
def setenv(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets variables, and removes every other one that any starter sets."""

    def set_all(**variables: str) -> None:
        for name in [name for name in os.environ if name.startswith(PREFIXES) or name == "FULMEN_LAUNCHED"]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_all()
    return set_all


@pytest.fixture
def ranks(tmp_path: Path) -> str:
    """LSF's rank file: the launching node, then the hosts of the tasks."""
    (tmp_path / "ranks").write_text("\n".join(["launcher", "node-0", "node-0", HOST, HOST]) + "\n")
    return str(tmp_path / "ranks")


def place(environment: Any) -> tuple[object, ...]:
    return (
        environment.world_size(), environment.global_rank(), environment.local_rank(), environment.node_rank(),
        environment.main_address, environment.main_port,
    )  # fmt: skip


LSF = {
    "LSB_JOBID": "1234567",
    "LSB_DJOB_RANKFILE": "RANKS",
    "JSM_NAMESPACE_SIZE": "4",
    "JSM_NAMESPACE_RANK": "3",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
}
KUBEFLOW = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "3"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "n0", "MASTER_PORT": "29501", "WORLD_SIZE": "4", "RANK": "3",
    "LOCAL_RANK": "1", "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2",
}  # fmt: skip
SLURM = {
    "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NODELIST": "n[07-08]",
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2",
}  # fmt: skip
BARE = {
    "MASTER_ADDR": "n0", "MASTER_PORT": "29502", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "NODE_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}  # fmt: skip


@pytest.mark.proves("4.39", "4.40", "4.41", "4.42", "4.43")
@pytest.mark.parametrize(
    ("kind", "variables", "devices", "nodes", "expected"),
    [
        (TorchElasticEnvironment, TORCHRUN, 2, 2, (4, 3, 1, 1, "n0", 29501)),
        (SLURMEnvironment, SLURM, 2, 2, (4, 3, 1, 1, "n07", 19711)),
        (LSFEnvironment, LSF, 2, 2, (4, 3, 1, 1, "node-0", 10567)),
        (LSFEnvironment, {**LSF, "MASTER_PORT": "4000"}, 2, 2, (4, 3, 1, 1, "node-0", 4000)),
        (KubeflowEnvironment, KUBEFLOW, 1, 4, (4, 3, 0, 3, "job-master-0", 23456)),
        (LightningEnvironment, BARE, 2, 2, (4, 3, 1, 1, "n0", 29502)),
    ],
)
def test_the_variables_of_each_starter_are_a_place_among_the_processes(
    kind: Any,
    variables: dict[str, str],
    devices: int,
    nodes: int,
    expected: tuple[object, ...],
    setenv: Callable[..., None],
    ranks: str,
) -> None:
    setenv(**{name: value.replace("RANKS", ranks) for name, value in variables.items()})
    environment = kind()
    assert environment.creates_processes_externally is True
    assert place(environment) == expected
    environment.validate_settings(num_devices=devices, num_nodes=nodes)


@pytest.mark.proves("4.40", "4.41", "4.42", "4.43")
@pytest.mark.parametrize(
    ("kind", "variables", "devices", "nodes", "words"),
    [
        (
            TorchElasticEnvironment, {**TORCHRUN, "LOCAL_RANK": "3"}, 3, 1,
            ["5 contradictions", "devices=3", "LOCAL_WORLD_SIZE=2", "set devices=2", "--nproc-per-node 3",
             "num_nodes=1", "GROUP_WORLD_SIZE=2", "set num_nodes=2", "--nnodes 1", "make 3 processes", "WORLD_SIZE=4",
             "LOCAL_RANK=3", "GROUP_RANK=1"],
        ),
        (  # what devices="auto" comes to where num_nodes was left out
            TorchElasticEnvironment, TORCHRUN, 4, 1,
            ["2 contradictions", "LOCAL_WORLD_SIZE=2 processes on each of GROUP_WORLD_SIZE=2 nodes",
             "set num_nodes=2 and devices=2 (or 'auto')", "GROUP_RANK=1"],
        ),
        (
            SLURMEnvironment, SLURM, 4, 3,
            ["3 contradictions", "devices=4", "SLURM_NTASKS_PER_NODE=2", "set devices=2", "--ntasks-per-node=4",
             "num_nodes=3", "SLURM_NNODES=2", "set num_nodes=2", "--nodes=3", "make 12 processes", "SLURM_NTASKS=4",
             "plugins=LightningEnvironment()"],
        ),
        (
            LSFEnvironment, {**LSF, "JSM_NAMESPACE_LOCAL_SIZE": "2"}, 1, 2,
            ["3 contradictions", "devices=1", "JSM_NAMESPACE_LOCAL_SIZE=2", "start 1 tasks on each host",
             "make 2 processes", "JSM_NAMESPACE_SIZE=4", "JSM_NAMESPACE_LOCAL_RANK=1"],
        ),
        (
            KubeflowEnvironment, {"WORLD_SIZE": "4", "RANK": "5"}, 2, 2,
            ["4 contradictions", "lacks MASTER_ADDR, MASTER_PORT", "devices=2", "set devices=1", "num_nodes=2",
             "WORLD_SIZE=4", "set num_nodes=4", "RANK=5", "must be below WORLD_SIZE=4"],
        ),
        (
            LightningEnvironment, {**BARE, "LOCAL_RANK": "5"}, 3, 2,
            ["4 contradictions", "devices=3", "LOCAL_WORLD_SIZE=2", "make 6 processes", "WORLD_SIZE=4",
             "LOCAL_RANK=5", "RANK=7"],
        ),
        (LSFEnvironment, {"JSM_NAMESPACE_SIZE": "two"}, 1, 1, ["lacks LSB_JOBID", "JSM_NAMESPACE_SIZE", "'two'"]),
    ],
)  # fmt: skip
def test_all_contradictions_are_reported_at_once_with_both_values_and_the_fix(
    kind: Any, variables: dict[str, str], devices: int, nodes: int, words: list[str], setenv: Callable[..., None],
    ranks: str,
) -> None:  # fmt: skip
    setenv(**{name: value.replace("RANKS", ranks) for name, value in variables.items()})
    with pytest.raises(MisconfigurationException) as refused:
        kind().validate_settings(num_devices=devices, num_nodes=nodes)
    missing = [word for word in words if word not in str(refused.value)]
    assert not missing, f"{missing} not in {refused.value}"


def test_the_table_is_read_from_any_mapping_and_not_from_this_process() -> None:
    assert contradictions(TABLE["slurm"], SLURM, 2, 2) == []
    assert len(contradictions(TABLE["slurm"], SLURM, 2, 3)) == 2


@pytest.mark.proves("4.38", "4.42")
def test_lsf_is_recognised_by_what_jsrun_sets(setenv: Callable[..., None], ranks: str) -> None:
    assert not LSFEnvironment.detect()
    setenv(LSB_JOBID="1", LSB_DJOB_RANKFILE=ranks)
    assert not LSFEnvironment.detect(), "a job's script, which jsrun has not started"
    setenv(**{**LSF, "LSB_DJOB_RANKFILE": ranks})
    assert LSFEnvironment.detect()


@pytest.mark.proves("4.42")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["LSB_DJOB_RANKFILE", "cannot be read", "jsrun"]),
        ("launcher\n", ["LSB_DJOB_RANKFILE", "['launcher']", "launching node"]),
        ("launcher\nelsewhere\n", [HOST, "elsewhere", "jsrun inside the job"]),
    ],
)
def test_a_rank_file_of_no_use_is_named(
    content: str | None, words: list[str], setenv: Callable[..., None], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "file").write_text(content)
    setenv(**{**LSF, "LSB_DJOB_RANKFILE": str(tmp_path / "file")})
    with pytest.raises(MisconfigurationException) as refused:
        LSFEnvironment().node_rank()
    assert all(word in str(refused.value) for word in words), refused.value
    setenv()
    for read in (LSFEnvironment().world_size, LSFEnvironment().global_rank, LSFEnvironment().local_rank):
        with pytest.raises(MisconfigurationException, match=r"lacks JSM_NAMESPACE_.*: start the program with jsrun"):
            read()


@pytest.mark.proves("4.43")
def test_kubeflow_is_never_found_by_itself_and_names_what_is_missing(setenv: Callable[..., None]) -> None:
    setenv(**KUBEFLOW)
    assert not KubeflowEnvironment.detect()
    setenv()
    environment = KubeflowEnvironment()
    for read in (
        environment.world_size, environment.global_rank, environment.node_rank,
        lambda: environment.main_address, lambda: environment.main_port,
    ):  # fmt: skip
        with pytest.raises(MisconfigurationException, match=r"lacks [A-Z_]+, which a PyTorchJob sets"):
            read()


@pytest.mark.proves("4.43")
def test_mpis_processes_make_their_places_out_of_what_each_tells() -> None:
    told = [("a", None, 4001), ("b", None, 0), ("a", None, 0), ("b", None, 0)]
    found = [mpi._from(told, rank) for rank in range(4)]
    assert [(one.rank, one.local_rank, one.node_rank) for one in found] == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]
    assert {(one.world_size, one.local_size, one.num_nodes) for one in found} == {(4, 2, 2)}
    assert {(one.address, one.port) for one in found} == {("a", 4001)}
    assert mpi._from([("a", None, 1), ("a", None, 0)], 1).address == "127.0.0.1", "one host needs no name"
    assert mpi._from([("a", "ib0", 1), ("b", "x", 0)], 1).address == "ib0", "rank 0's word counts"


@pytest.mark.proves("4.43")
def test_what_mpi_has_started_is_compared_with_the_settings() -> None:
    here = mpi._from([("a", None, 1), ("a", None, 0), ("b", None, 0), ("b", None, 0)], 3)
    assert mpi._contradictions(here, 2, 2) == []
    wrong = "\n".join(mpi._contradictions(here, 4, 1))
    for words in ("devices=4", "2 processes on this host", "set devices=2", "num_nodes=1", "2 host(s)", "num_nodes=2"):
        assert words in wrong
    assert "make 3 processes, but MPI has started 4" in "\n".join(mpi._contradictions(here, 3, 1))


@pytest.mark.proves("4.38", "4.43")
@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "PMIX_SIZE"])
def test_without_mpi4py_a_process_of_mpirun_is_told_what_to_install(
    name: str, setenv: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpi, "find_spec", lambda _: None)
    assert not MPIEnvironment.detect()
    setenv(**{name: "1"})
    assert not MPIEnvironment.detect()
    setenv(**{name: "2"})
    with pytest.warns(
        UserWarning, match="MPI has started 2 processes, but mpi4py is not installed.*pip install mpi4py"
    ):
        assert not MPIEnvironment.detect()
    with pytest.raises(MissingPackage, match="pip install mpi4py"):
        MPIEnvironment()

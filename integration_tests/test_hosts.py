"""Runs over several hosts, each a network namespace with an address, a loopback and a name of its own.

What the starters promise there: the same weights as one process, one clear error where hosts do not fit together or
cannot reach each other, and an end on every host that is left when something happens to one of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from integration_tests import hosts_script
from tools.clusters.hosts import Hosts, why_not

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(why_not()), reason=f"hosts cannot be made here: {why_not()}"),
]

SCRIPT = Path(hosts_script.__file__)
FULMEN = [sys.executable, "-c", "import sys; from fulmen_protocols.cli import main; sys.exit(main())"]
STALL_S = 10
"""The strategy's timeout in runs that something happens to."""
PATIENCE_S = 90
"""For what takes seconds: this machine may be busy. What it took is printed."""


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LT_", "FULMEN_", "TORCH"))}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


class Run:
    """One run on all hosts.

    Args:
        hosts: where.
        folder: shared by them; what host number i prints is in ``out-i``.
    """

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def start(self, number: int, command: Sequence[str], *, own_folders: Sequence[str] = (), **more: str) -> None:
        with (self.folder / f"out-{number}").open("w") as file:
            self.processes[number] = self.hosts[number].start(
                command, env=environment(**more), stdout=file, own_folders=own_folders
            )

    def by(self, starter: str, number: int, *arguments: str, devices: int = 2, nodes: int = 2) -> None:
        """Start the script on that host as users do."""
        main = self.hosts[0].address
        script = [str(SCRIPT), str(self.folder), *arguments]
        if starter == "fulmen run":
            shape = [f"--num-nodes={nodes}", f"--node-rank={number}", f"--main-address={main}", f"--devices={devices}"]
            self.start(number, [*FULMEN, "run", "--accelerator=cpu", *shape, *script])
        elif starter == "torchrun":
            shape = [f"--nnodes={nodes}", f"--nproc-per-node={devices}", "--rdzv-backend=c10d", "--rdzv-id=hosts"]
            self.start(
                number,
                [sys.executable, "-m", "torch.distributed.run", *shape, f"--rdzv-endpoint={main}:29500", *script,
                 f"--num-nodes={nodes}"],
            )  # fmt: skip
        else:
            self.start(
                number,
                [sys.executable, *script, f"--devices={devices}", f"--num-nodes={nodes}"],
                MASTER_ADDR=main, MASTER_PORT="29500", NODE_RANK=str(number),
            )  # fmt: skip

    def ends(self, limit_s: float = PATIENCE_S) -> list[int]:
        """The exit statuses, when all have ended and no process is left on any host."""
        until = time.monotonic() + limit_s
        while any(process.poll() is None for process in self.processes.values()) and time.monotonic() < until:
            time.sleep(0.1)
        while self.hosts.running() and time.monotonic() < until:
            time.sleep(0.1)
        assert not self.hosts.running(), f"still there after {limit_s} s: {self.hosts.running()}\n{self.all_output()}"
        return [self.processes[number].returncode for number in sorted(self.processes)]

    def ends_well(self) -> list[Any]:
        """What each rank has found out, when all have ended with status 0."""
        assert set(self.ends(240)) == {0}, self.all_output()
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("trained-*.json"))]

    def output(self, number: int) -> str:
        return (self.folder / f"out-{number}").read_text()

    def all_output(self) -> str:
        return "\n".join(f"--- host {number}\n{self.output(number)}" for number in sorted(self.processes))

    def reaches(self, step: int, ranks: int) -> None:
        """Return when every rank has trained so many steps."""
        until = time.monotonic() + 200
        files = [self.folder / f"step-{rank}" for rank in range(ranks)]
        while not all(file.exists() and int(file.read_text()) >= step for file in files):
            assert time.monotonic() < until, f"training has not come to step {step}:\n{self.all_output()}"
            time.sleep(0.05)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Hosts(2) as hosts:
        yield Run(hosts, tmp_path)


def one_process(steps: int, batch: int) -> list[torch.Tensor]:
    """The same training in plain PyTorch, on all ranks' batches at once."""
    model = hosts_script.network(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = hosts_script.data().tensors
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(x)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("starter", "options"),
    [
        ("fulmen run", ["--strategy=ddp", "--logger", "--bar"]),
        ("torchrun", ["--strategy=fsdp"]),
        ("python", ["--strategy=ddp", "--logger"]),
        ("python", ["--strategy=fsdp", "--fabric"]),
    ],
)
def test_two_hosts_train_the_model_that_one_process_trains(run: Run, starter: str, options: list[str]) -> None:
    run.by(starter, 1, *options)
    time.sleep(5)  # the main host comes last
    run.by(starter, 0, *options)

    found = run.ends_well()

    assert [one["rank"] for one in found] == [0, 1, 2, 3]
    assert len({one["sha256"] for one in found}) == 1, "the ranks differ"
    for got, expected in zip(found[0]["weights"], one_process(12, 8), strict=True):
        torch.testing.assert_close(torch.tensor(got), expected)
    if "--fabric" not in options:
        by_host = {
            host: sorted(one["local_rank"] for one in found if one["host"] == host) for host in ("hosta", "hostb")
        }
        assert by_host == {"hosta": [0, 1], "hostb": [0, 1]}
        assert sorted((run.folder / "prepared").read_text().splitlines()) == ["hosta 0", "hostb 0"], "once on each host"
    if "--logger" in options:
        assert {one["log_dir"] for one in found} == {str(run.folder / "lightning_logs" / "version_0")}
    assert "GLOO_SOCKET_IFNAME" not in run.all_output(), "nothing had to be chosen"


def test_the_doctor_says_which_rank_is_on_which_host(run: Run) -> None:
    for number in (0, 1):
        run.start(
            number, [*FULMEN, "doctor", "--accelerator=cpu", "--devices=1", "--num-nodes=2", "--time-limit=90"],
            MASTER_ADDR=run.hosts[0].address, MASTER_PORT="29500", NODE_RANK=str(number),
        )  # fmt: skip

    assert run.ends(200) == [0, 0], run.all_output()

    said = run.output(0)
    assert "rank 0: node 0, local rank 0, cpu of hosta" in said
    assert "rank 1: node 1, local rank 0, cpu of hostb" in said
    assert "all is well" in said


@pytest.mark.parametrize("aliases", [["127.0.1.1 {name}"], []], ids=["as Debian installs it", "unknown"])
def test_hosts_whose_names_tell_no_address_meet_by_the_interface_between_them(run: Run, aliases: list[str]) -> None:
    for host in run.hosts:
        host.names(["127.0.0.1 localhost", *(line.format(name=host.name) for line in aliases)])
    for number in (0, 1):
        run.by("python", number, devices=1)

    assert len(run.ends_well()) == 2
    for number, name in enumerate(("hosta", "hostb")):
        assert f"GLOO_SOCKET_IFNAME=eth0 was set on {name}" in run.output(number)


FAULTS: dict[str, Callable[[Hosts], None] | None] = {
    "raise": None,
    "kill": None,
    "hang": None,
    "all processes of a host killed": lambda hosts: hosts[1].kill_all(),
    "power cut": lambda hosts: hosts[1].cut_power(),
    "interface down": lambda hosts: hosts[1].link("down"),
    "packets lost": lambda hosts: hosts.pass_packets(False),
}


@pytest.mark.parametrize("starter", ["fulmen run", "python"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_host_ends_the_run_on_all_and_is_told_on_the_main_one(
    run: Run, fault: str, starter: str
) -> None:
    happens = FAULTS[fault]
    options = ["--steps=1000000", "--pause=0.02", f"--timeout={STALL_S}"]
    devices = 2 if fault == "kill" else 1
    if happens is None:
        options.append(f"--fault={fault}:{devices}:30")  # the first rank of the second host
    for number in (0, 1):
        run.by(starter, number, *options, devices=devices)
    run.reaches(25, 2 * devices)
    if happens is not None:
        happens(run.hosts)
    else:
        while not (run.folder / "fault-at").exists():
            time.sleep(0.05)

    began = time.monotonic()
    statuses = run.ends()
    print(f"{fault} ({starter}): {time.monotonic() - began:.1f} s, exit statuses {statuses}")

    assert 0 not in statuses, run.all_output()
    said = run.output(0)[-6000:]
    assert "hostb (node 1)" in said, said
    if fault == "raise":
        assert "rank 1 of 2" in said
        assert "LookupError: sample 7 is missing" in said.splitlines()[-2]
        assert "optimizer step 30" in said.splitlines()[-1]
    elif fault == "kill":
        assert "rank 2 of 4" in said
        assert "step 30" in said
    elif fault == "hang":
        assert "rank 1 of 2 on hostb (node 1) kept the others waiting, at step 30" in said
        assert "time.sleep(1000)" in said
    else:
        assert "nothing is heard of hostb (node 1)" in said


@pytest.mark.parametrize("other", [{"devices": 2}, {"nodes": 3}], ids=["devices", "num_nodes"])
def test_hosts_that_were_started_differently_are_told_so_on_both(run: Run, other: dict[str, int]) -> None:
    run.by("python", 0, devices=1)
    run.by("python", 1, **{"devices": 1, **other})

    assert 0 not in run.ends(200)

    asked = {"num_nodes": other.get("nodes", 2), "devices": other.get("devices", 1)}
    for number in (0, 1):
        said = run.output(number)
        assert "start the same command on every host" in said
        assert "num_nodes=2 and devices=1" in said
        assert " and ".join(f"{name}={value}" for name, value in asked.items()) in said


def test_a_host_that_waits_says_for_what(run: Run) -> None:
    run.hosts.pass_packets(False)
    for number in (0, 1):
        run.by("python", number, devices=1)
    until = time.monotonic() + 200
    while not all("has waited for" in run.output(number) for number in (0, 1)):
        assert time.monotonic() < until, run.all_output()
        time.sleep(0.5)

    run.hosts.pass_packets(True)  # somebody has opened the firewall

    assert len(run.ends_well()) == 2
    assert "rank 0 of 2 on hosta (node 0) has waited for 3" in run.output(0)
    assert "rank 1 has not come to " in run.output(0)
    assert "does not answer: the host is down, the address is wrong, or a firewall is between" in run.output(1)


def test_a_host_that_was_lost_and_started_again_goes_on_from_the_last_checkpoint(run: Run, tmp_path: Path) -> None:
    options = ["--steps=60", "--save-every=5", "--ckpt=last", "--pause=0.1"]

    def start(number: int, folder: Path) -> None:
        shape = ["--num-nodes=2", f"--node-rank={number}", f"--main-address={run.hosts[0].address}", "--devices=1"]
        command = [*FULMEN, "run", "--accelerator=cpu", *shape, "--max-restarts=3", str(SCRIPT), str(folder), *options]
        run.start(number, command)

    start(0, tmp_path)
    start(1, tmp_path)
    run.reaches(23, 2)
    run.hosts[1].kill_all()
    run.processes.pop(1).wait()
    start(1, tmp_path)
    found = run.ends_well()

    assert "all processes start again (restart 1 of 3)" in run.output(0)
    (tmp_path / "whole").mkdir()
    whole = Run(run.hosts, tmp_path / "whole")
    for number in (0, 1):
        whole.by("python", number, "--steps=60", devices=1)
    expected = whole.ends_well()

    assert [one["step"] for one in found] == [60, 60]
    assert {one["sha256"] for one in found} == {one["sha256"] for one in expected}, "not one bit may differ"


def test_a_folder_that_hosts_do_not_share_holds_no_sharded_checkpoint(run: Run, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    options = ["--strategy=fsdp", "--sharded", "--save-every=4", f"--timeout={2 * STALL_S}"]
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--devices=1", "--num-nodes=2", *options]
    for number in (0, 1):
        run.start(
            number, command, own_folders=[str(tmp_path / "saved")] * number,
            MASTER_ADDR=run.hosts[0].address, MASTER_PORT="29500", NODE_RANK=str(number),
        )  # fmt: skip

    assert 0 not in run.ends(200), run.all_output()

    for number in (0, 1):
        assert "on rank 0's host (hosta) the part of rank 1 is not to be seen" in run.output(number)
    assert list((tmp_path / "saved").rglob("*")) == [], "half a checkpoint is none"


def test_a_rank_that_hangs_on_a_host_that_is_cut_off_does_not_stay(run: Run) -> None:
    for number in (0, 1):
        run.by("python", number, "--steps=1000000", f"--timeout={STALL_S}", "--fault=hang:1:30", devices=1)
    run.reaches(30, 2)
    run.hosts.pass_packets(False)

    assert 0 not in run.ends(), run.all_output()

    said = run.output(1)
    assert f"the host of rank 0, {run.hosts[0].address}, has not answered hostb (node 1) for " in said
    assert "time.sleep(1000)" in said

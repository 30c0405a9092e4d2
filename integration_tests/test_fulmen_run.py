"""``fulmen run`` and torchrun, really run: what the script finds, and what happens when a process is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import fulmen
from fulmen_fabric._agent import _Failed, endpoint, plan
from fulmen_fabric.run import command, parse
from fulmen_protocols import MisconfigurationException, Whereabouts
from fulmen_protocols.cli import main
from fulmen_strategies.launchers._failure import Failure, record_exception

SCRIPT = Path(__file__).with_name("run_script.py")
STEPS = 3 * 96 // 12  # epochs x samples over two ranks' batches of 6
FULMEN = [sys.executable, "-c", "import sys; from fulmen_protocols.cli import main; sys.exit(main())"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1"]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LT_", "FULMEN_", "TORCH"))}
    kept.pop("OMP_NUM_THREADS", None)
    return {**kept, **more}


def run(*arguments: object, seconds: float = 200, **more: str) -> subprocess.CompletedProcess[str]:
    command = [*FULMEN, "run", "--accelerator", "cpu", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, check=False, env=environment(**more)
    )


def results(folder: Path, task: str) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{task}-*.json"))]


@pytest.mark.proves("8.4", "8.21")
def test_a_fabric_finds_what_was_asked_for_and_the_script_its_own_arguments(tmp_path: Path) -> None:
    done = run(
        "--devices", 2, SCRIPT, "fabric", tmp_path, "--lr", "0.1", "--strategy=ddp", "--precision", "bf16-mixed", "--",
        "--devices", "9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = results(tmp_path, "fabric")
    assert [one["rank"] for one in found] == [0, 1]
    for one in found:
        assert (one["world_size"], one["total"], one["strategy"], one["precision"]) == (
            2,
            3,
            "DDPStrategy",
            "bf16-mixed",
        )
        assert one["argv"] == ["fabric", str(tmp_path), "--lr", "0.1", "--devices", "9"]
        env = one["env"]
        assert env["LT_CLI_USED"] == "1"
        names = ("ACCELERATOR", "STRATEGY", "DEVICES", "NUM_NODES", "PRECISION")
        assert {name: env[f"LT_{name}"] for name in names} == {
            "ACCELERATOR": "cpu", "STRATEGY": "ddp", "DEVICES": "2", "NUM_NODES": "1", "PRECISION": "bf16-mixed",
        }  # fmt: skip
        assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert found[0]["parent"] == found[1]["parent"]


@pytest.mark.proves("8.21")
@pytest.mark.slow
def test_a_module_is_run_as_python_runs_it(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "__init__.py").touch()
    (tmp_path / "project" / "train.py").write_text(SCRIPT.read_text())
    command = [*FULMEN, "run", "--accelerator=cpu", "--devices=2", "-m", "project.train", "fabric", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert [one["total"] for one in results(tmp_path, "fabric")] == [3, 3]
    assert results(tmp_path, "fabric")[0]["file"] == str(tmp_path / "project" / "train.py")


@pytest.mark.proves("8.21")
@pytest.mark.slow
def test_two_nodes_meet_at_the_address_and_port_that_were_named(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = ["--devices=1", "--num-nodes=2", "--main-address=127.0.0.1", f"--main-port={port}"]
    nodes = [
        subprocess.Popen(
            [*FULMEN, "run", "--accelerator=cpu", *shared, f"--node-rank={rank}", str(SCRIPT), "fabric", str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
        )
        for rank in (1, 0)  # the second may come first
    ]  # fmt: skip
    for node in nodes:
        output, _ = node.communicate(timeout=200)
        assert node.returncode == 0, output

    found = results(tmp_path, "fabric")
    places = [(one["rank"], one["local_rank"], one["node_rank"], one["world_size"], one["total"]) for one in found]
    assert places == [(0, 0, 0, 2, 3), (1, 0, 1, 2, 3)]
    assert [one["env"]["LT_NUM_NODES"] for one in found] == ["2", "2"]
    assert [one["env"]["MASTER_ADDR"] for one in found] == ["127.0.0.1", "127.0.0.1"]


@pytest.mark.proves("8.21")
def test_nodes_meet_where_lightnings_do_unless_told_otherwise() -> None:
    several = ["--num-nodes=2", "--main-address=10.0.0.1"]

    assert endpoint(parse([*several, str(SCRIPT)])) == "10.0.0.1:29400"
    assert endpoint(parse([*several, "--main-port=29555", str(SCRIPT)])) == "10.0.0.1:29555"
    assert endpoint(parse([str(SCRIPT)])) == "127.0.0.1:0", "on one node any port that is free"
    assert endpoint(parse(["--main-port=29555", str(SCRIPT)])) == "127.0.0.1:29555"


@pytest.mark.proves("8.21")
@pytest.mark.slow
def test_shards_that_a_fabric_saved_are_consolidated_by_the_command(tmp_path: Path) -> None:
    done = run("--devices", 2, "--strategy", "fsdp", SCRIPT, "shards", tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "shards"
    assert folder.is_dir()

    def consolidate(*more: str) -> subprocess.CompletedProcess[str]:
        command = [*FULMEN, "consolidate", str(folder), *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment())

    first, again, elsewhere = consolidate(), consolidate(), consolidate("--output_file", str(tmp_path / "one.ckpt"))

    assert (first.returncode, again.returncode, elsewhere.returncode) == (0, 1, 0), first.stderr + elsewhere.stderr
    assert "shards.consolidated" in again.stderr, "what is there is not replaced"
    content = torch.load(tmp_path / "shards.consolidated", weights_only=True)
    assert (tmp_path / "one.ckpt").read_bytes() == (tmp_path / "shards.consolidated").read_bytes()
    assert content["step"] == 2
    # The same two steps in plain PyTorch.
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(content["model"][name], value)
    fabric = fulmen.Fabric(accelerator="cpu", devices=1)
    model, fresh = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.5))
    fabric.load(tmp_path / "one.ckpt", {"model": model, "optimizer": fresh})
    assert fresh.param_groups[0]["lr"] == 0.1
    torch.testing.assert_close(fresh.state[net[0].weight]["exp_avg"], optimizer.state[net[0].weight]["exp_avg"])


@pytest.mark.slow
def test_the_exit_status_is_that_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    done = run("--devices", 2, SCRIPT, "exit", tmp_path)
    assert done.returncode == 7, done.stderr
    assert "rank 1 of 2" in done.stderr.splitlines()[-2]
    assert "ended with exit code 7" in done.stderr.splitlines()[-2]


def test_the_last_words_are_the_traceback_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    done = run("--devices", 2, SCRIPT, "raise", tmp_path, 2)
    assert done.returncode == 1
    lines = done.stderr.rstrip().splitlines()
    assert any(re.match(r"rank 1 of 2 \(process \d+\) failed first.*; the run was ended", line) for line in lines)
    assert "[rank1]: LookupError: sample 7 is missing in life 1" in lines
    assert lines[-1] == "[rank1]: fulmen: in fit, rank 1, epoch 0, batch 3, optimizer step 3"
    assert not results(tmp_path, "trained")


@pytest.mark.slow
@pytest.mark.proves("4.34")
def test_a_rank_that_hangs_while_another_fails_is_ended_within_seconds(tmp_path: Path) -> None:
    done = run("--devices", 2, SCRIPT, "hang", tmp_path)
    assert time.time() - float((tmp_path / "failed-at").read_text()) < 25, "and not the agent's 30 s"
    assert done.returncode == 1
    assert "rank 1 of 2" in done.stderr
    assert not Path(f"/proc/{(tmp_path / 'hangs-0').read_text()}").exists()


def check_lives(folder: Path, deaths: int, world_size: int = 2, epochs: int = 3) -> list[Any]:
    """Each life but the last was cut short; the last one went on where the newest checkpoint was, to the end."""
    found = results(folder, "trained")
    assert [one["world_size"] for one in found] == [world_size] * world_size
    assert len(list(folder.glob("life-*-1"))) == deaths + (1 if world_size > 1 else 0)
    for one in found:
        assert one["epoch"] == epochs
        assert one["weight"] == found[0]["weight"]
    first = found[0]["steps"][0]
    assert 3 * deaths <= first <= 3 * deaths + 1, "not from the start, and not beyond what was saved"
    return found


@pytest.mark.parametrize("kind", ["kill", pytest.param("raise", marks=pytest.mark.slow)])
def test_training_goes_on_from_the_last_checkpoint_when_a_process_is_lost(kind: str, tmp_path: Path) -> None:
    done = run("--devices", 2, "--max-restarts", 3, SCRIPT, kind, tmp_path, 3)
    assert done.returncode == 0, done.stderr
    found = check_lives(tmp_path, deaths=2)
    assert found[0]["life"] == 3
    assert found[0]["steps"][-1] == STEPS
    how = "was killed by signal 9" if kind == "kill" else "ended with exit code 1"
    # The agent looks ten times a second; on a busy machine it may see first how the other process ended in consequence.
    lines = [line for line in done.stderr.splitlines() if "; all processes start again (restart " in line]
    assert [f"(restart {number} of 3)." in line for number, line in enumerate(lines, start=1)] == [True, True]
    assert any(how in line for line in lines)
    for number, line in enumerate(lines, start=1):
        assert f", at step {3 * number}, in training, epoch 0, batch {3 * number}) " in line


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_every_kill_is_recovered_from(attempt: int, tmp_path: Path) -> None:
    done = run("--devices", 2, "--max-restarts", 3, SCRIPT, "kill", tmp_path, 2)
    assert done.returncode == 0, done.stderr
    check_lives(tmp_path, deaths=1)


@pytest.mark.slow
def test_one_run_survives_ten_kills(tmp_path: Path) -> None:
    done = run("--devices", 2, "--max-restarts", 10, SCRIPT, "kill", tmp_path, 11, seconds=280)
    assert done.returncode == 0, done.stderr
    check_lives(tmp_path, deaths=10, epochs=6)


@pytest.mark.slow
def test_it_ends_when_no_restart_is_left(tmp_path: Path) -> None:
    done = run("--devices", 2, "--max-restarts", 1, SCRIPT, "kill", tmp_path, 9)
    assert done.returncode == 128 + signal.SIGKILL
    head, last = done.stderr.splitlines()[-2:]
    assert head.startswith("rank 1 of 2 (process ")
    assert "was killed by SIGKILL first, at step 6, in training, epoch 0, batch 6; the run was ended." in head
    assert last.startswith("[rank1]: was killed by SIGKILL")
    assert not results(tmp_path, "trained")


@pytest.mark.slow
def test_with_min_devices_it_goes_on_without_the_process_that_failed(tmp_path: Path) -> None:
    done = run("--devices", 3, "--min-devices", 1, "--max-restarts", 2, SCRIPT, "kill", tmp_path, 3)
    assert done.returncode == 0, done.stderr
    found = check_lives(tmp_path, deaths=2, world_size=1)
    assert found[0]["life"] == 3
    assert "2 processes go on without it (1 restarts are left)" in done.stderr
    assert "1 processes go on without it (0 restarts are left)" in done.stderr


@pytest.mark.slow
def test_fewer_than_min_devices_are_an_end(tmp_path: Path) -> None:
    done = run("--devices", 2, "--min-devices", 2, "--max-restarts", 2, SCRIPT, "kill", tmp_path, 3)
    assert done.returncode == 128 + signal.SIGKILL
    assert len(list(tmp_path.glob("life-*-1"))) == 1


@pytest.mark.proves("4.34")
@pytest.mark.parametrize("ends_first", [0, 2])
def test_it_goes_on_without_the_one_that_hung_and_not_the_one_that_waited_for_it(
    ends_first: int, tmp_path: Path
) -> None:
    attempt = tmp_path / "run" / "attempt_0"
    files = {rank: attempt / str(rank) / "error.json" for rank in (0, 1, 2)}
    for file in files.values():
        file.parent.mkdir(parents=True)
    Whereabouts(str(attempt / "at.2"))  # of this process
    own = RuntimeError("gloo: timed out waiting for 8000ms")
    hung = Failure(
        rank=2, world_size=4, pid=77, exit_code=None, trace="line 1\nline 2", time_s=0.0, is_consequence=False,
        kept_waiting="it had begun 3 collectives, and the others 4",
    )  # fmt: skip
    record_exception(str(files[0]), own, hung)
    record_exception(str(files[1]), own)  # which does not know for whom it has waited
    seen = {
        rank: ProcessFailure(local_rank=rank, pid=os.getpid(), exitcode=1, error_file=str(files[rank]))
        for rank in {1, ends_first}
    }

    failed = _Failed(ChildFailedError("script", seen), 4, str(tmp_path))

    assert (failed.local_rank, failed.exit_status) == (2, 1)
    assert failed.report("3 processes go on without it (1 restarts are left)").splitlines() == [
        "rank 2 of 4 (process 77) kept the others waiting: it had begun 3 collectives, and the others 4; "
        "3 processes go on without it (1 restarts are left). There it stood:",
        "[rank2]: line 1",
        "[rank2]: line 2",
    ]


def test_one_that_was_on_its_way_out_when_the_agent_ended_all_keeps_its_exit_code(tmp_path: Path) -> None:
    for rank, error in enumerate((RuntimeError("gloo: connection closed by peer"), SystemExit(3))):
        record_exception(str(tmp_path / str(rank)), error)
    seen = {
        rank: ProcessFailure(local_rank=rank, pid=os.getpid(), exitcode=code, error_file=str(tmp_path / str(rank)))
        for rank, code in ((0, 1), (1, -signal.SIGTERM))
    }

    failed = _Failed(ChildFailedError("script", seen), 2, str(tmp_path))

    assert (failed.local_rank, failed.exit_status) == (1, 3)
    assert failed.report("the run was ended").splitlines() == [
        f"rank 1 of 2 (process {os.getpid()}) failed first; the run was ended. Its own report:",
        "[rank1]: SystemExit: 3",
    ]


@pytest.mark.slow
def test_torchrun_recovers_too(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "3", str(SCRIPT), "kill", str(tmp_path), "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert check_lives(tmp_path, deaths=2)[0]["steps"][-1] == STEPS


def wait_for(condition: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_its_processes_end_with_it(number: signal.Signals, tmp_path: Path) -> None:
    command = [*FULMEN, "run", "--accelerator=cpu", "--devices=2", str(SCRIPT), "wait", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    files = [tmp_path / "waits-0", tmp_path / "waits-1"]
    try:
        wait_for(lambda: all(file.exists() and file.read_text() for file in files), 200)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    pids = [int(file.read_text()) for file in files]
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert errors.splitlines()[-1] == "fulmen run got SIGTERM; its processes got it too."
    else:
        assert f"process {process.pid}, which had started the ranks, has ended; they end too." in errors


@pytest.mark.proves("8.21")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--strategy=ddp_spawn"], "--strategy='ddp_spawn' starts its processes by itself.*use its counterpart"),
        (["--strategy=ddp_fork"], "--strategy='ddp_fork' starts its processes by itself"),
        (["--strategy=ddp_notebook"], "--strategy='ddp_notebook' starts its processes by itself"),
        (["--strategy=xla_fsdp"], "--strategy='xla_fsdp' starts its processes by itself"),
        (["--strategy=ddpp"], "--strategy='ddpp' is not installed.*Did you mean 'ddp'"),
        (["--accelerator=tpu"], "--accelerator='tpu': torch's agent starts no TPU processes"),
        (["--accelerator=cpuu"], "cpuu"),
        (["--accelerator=cpu", "--devices=0"], "devices=0"),
        (["--accelerator=cpu", "--precision=17"], "17"),
        (["--accelerator=cpu", "--min-devices=3", "--max-restarts=1", "--devices=2"], "min-devices=3 is more than"),
    ],
)  # fmt: skip
def test_what_cannot_be_started_is_refused_before_it_is(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        plan(parse([*words, str(SCRIPT)]))
    assert command([*words, str(SCRIPT)]) == 2
    assert capsys.readouterr().err.startswith("fulmen run: ")


def test_the_script_of_fulmen_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "run" in [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]

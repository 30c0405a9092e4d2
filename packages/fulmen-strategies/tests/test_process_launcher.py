"""Processes made for one function, by fork, spawn and fork server, really made.

This file is also a script: ``python test_process_launcher.py METHOD FOLDER [unguarded]``.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from fulmen_protocols import LaunchesApart, MisconfigurationException, RankFailure, Topology
from fulmen_strategies import DDPStrategy, LightningEnvironment, ProcessLauncher

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.processes


def launch(function: Callable[[], Any], method: str = "fork", processes: int = 2, launcher: Any = None) -> Any:
    environment = LightningEnvironment()
    return (launcher or ProcessLauncher(method)).launch(  # type: ignore[arg-type]
        function, num_processes=processes, num_nodes=1, node_rank=0, main_address="127.0.0.1",
        main_port=environment.main_port,
    )  # fmt: skip


class Work:
    """What every rank does: meet the others, add up, and look at what it has been given."""

    def __init__(self) -> None:
        self.weights = torch.nn.Linear(2, 1)
        torch.nn.init.zeros_(self.weights.weight)
        self.queue: Any = None

    def __call__(self) -> dict[str, Any]:
        environment = LightningEnvironment()
        rank = environment.global_rank()
        strategy = DDPStrategy()
        strategy.setup_environment(
            Topology(
                devices=(torch.device("cpu"),) * 2, rank=rank, local_rank=environment.local_rank(), world_size=2,
                main_address=environment.main_address, main_port=environment.main_port,
            )
        )  # fmt: skip
        with torch.no_grad():
            self.weights.weight.add_(rank + 1)  # in shared memory every rank would see the sum
        strategy.collectives.barrier()
        if self.queue is not None:
            self.queue.put(rank)
        seen = strategy.collectives.all_gather_object(
            {
                "pid": os.getpid(), "weight": self.weights.weight[0, 0].item(), "random": random.random(),
                "torch": torch.rand(1).item(), "benchmark": torch.backends.cudnn.benchmark,
                "deterministic": torch.are_deterministic_algorithms_enabled(), "threads": torch.get_num_threads(),
                "shared": self.weights.weight.is_shared(),
            }
        )  # fmt: skip
        total = strategy.collectives.all_reduce(torch.tensor(rank + 1.0), "sum")
        nested = launch(lambda: "in place")
        strategy.teardown()
        return {"rank": rank, "total": total, "seen": seen, "nested": nested}


def script(method: str, folder: Path) -> None:
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = True
    random.seed(11)
    torch.manual_seed(12)
    before = (random.getstate(), torch.get_rng_state())
    work = Work()
    work.queue = multiprocessing.get_context(method).Queue()
    result = launch(work, method)
    random.setstate(before[0])
    torch.set_rng_state(before[1])
    Work()  # as above: it draws its weights
    result["expected"] = [random.random(), torch.rand(1).item()]
    result["total"] = result["total"].item()
    result["own weight"] = work.weights.weight[0, 0].item()
    result["queue"] = sorted(work.queue.get(timeout=20) for _ in range(2))
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__" or "unguarded" in sys.argv:
    script(sys.argv[1], Path(sys.argv[2]))
    sys.exit()

# ---------------------------------------------------------------------------------------------------- the judges


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE", "RANK")}
    command = [sys.executable, __file__, *arguments]
    env.pop("OMP_NUM_THREADS", None)
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=env)


@pytest.mark.proves("4.35", "4.37")
@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_new_interpreters_get_the_function_the_random_state_and_the_switches(method: str, tmp_path: Path) -> None:
    done = run(method, str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["rank"], result["total"], result["nested"], result["queue"]) == (0, 3.0, "in place", [0, 1])
    first, second = result["seen"]
    assert first["pid"] != second["pid"]
    assert (first["weight"], second["weight"], result["own weight"]) == (1.0, 2.0, 0.0), "each has memory of its own"
    for one in (first, second):
        assert [one["random"], one["torch"]] == result["expected"]
        assert (one["deterministic"], one["benchmark"], one["shared"]) == (True, True, False)
        assert one["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


@pytest.mark.proves("4.35")
@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told(tmp_path: Path) -> None:
    done = run("spawn", str(tmp_path), "unguarded")
    assert done.returncode == 1
    assert 'if __name__ == "__main__":' in done.stderr
    assert "launches processes while it is imported" in done.stderr


@pytest.mark.proves("4.35", "4.36")
def test_a_fork_runs_the_function_where_it_stands_and_only_the_value_comes_back() -> None:
    work = Work()
    result = launch(work)
    assert isinstance(result["total"], torch.Tensor)
    assert (result["rank"], result["total"].item(), result["nested"]) == (0, 3.0, "in place")
    assert os.getpid() not in {one["pid"] for one in result["seen"]}
    assert work.weights.weight[0, 0].item() == 0.0
    assert "LOCAL_RANK" not in os.environ
    again = launch(work)
    assert {one["pid"] for one in again["seen"]}.isdisjoint({one["pid"] for one in result["seen"]})


def meet_and(fail: Callable[[], None]) -> Callable[[], None]:
    def function() -> None:
        if os.environ["RANK"] == "1":
            fail()
        time.sleep(60)

    return function


def raise_lookup() -> None:
    raise LookupError("sample 7 is missing")


@pytest.mark.proves("4.34", "4.35")
@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (raise_lookup, r"(?s)rank 1 of 2 \(process \d+\) failed first.*\[rank1\]: LookupError: sample 7 is missing"),
        (lambda: os._exit(3), "rank 1 of 2 .* ended with exit code 3 first"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"rank 1 of 2 .* was killed by SIGKILL \(signal 9\) first"),
    ],
    ids=["raise", "exit", "kill"],
)
def test_the_error_is_that_of_the_rank_that_failed_and_nobody_is_left(fail: Callable[[], None], said: str) -> None:
    with pytest.raises(RankFailure, match=said) as failed:
        launch(meet_and(fail))
    if fail is raise_lookup:
        assert isinstance(failed.value.__cause__, LookupError)
    assert multiprocessing.active_children() == []


@pytest.mark.proves("4.35")
def test_a_fork_never_collects_what_its_parent_has_left_behind() -> None:
    """The destructor of a process group joins threads; in a fork they do not exist, and it would wait for ever."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{LightningEnvironment().main_port}", rank=0, world_size=1
    )
    dist.all_reduce(torch.ones(2))
    garbage: list[object] = [dist.group.WORLD]
    garbage.append(garbage)
    gc.collect()
    gc.disable()
    try:
        dist.destroy_process_group()
        del garbage
        assert launch(lambda: gc.collect() >= 0 and gc.isenabled())
    finally:
        gc.enable()
        gc.collect()


def test_a_system_exit_of_the_function_is_one_here() -> None:
    with pytest.raises(SystemExit) as ended:
        launch(lambda: sys.exit(143))
    assert ended.value.code == 143


def test_sigterm_reaches_the_ranks() -> None:
    def function() -> str:
        received: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
        Path(marker).touch()
        while not received:
            time.sleep(0.02)
        return "all ranks were asked to stop"

    marker = f"/tmp/fulmen-test-{os.getpid()}"

    def ask() -> None:
        while not os.path.exists(marker):
            time.sleep(0.02)
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert launch(function) == "all ranks were asked to stop"
    finally:
        thread.join()
        Path(marker).unlink()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_value_that_cannot_be_brought_back_says_so() -> None:
    with pytest.raises(RankFailure, match=r"a function, cannot be brought back.*Return numbers, tensors, or nothing"):
        launch(lambda: lambda: 1)


@pytest.mark.proves("4.35")
def test_a_function_that_cannot_be_pickled_is_refused_for_a_new_interpreter() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"start_method='spawn' takes the function.*by pickle.*strategy='ddp'"
    ):
        launch(lambda: 1, "spawn")
    assert multiprocessing.active_children() == []


@pytest.mark.proves("4.35")
def test_a_fork_after_cuda_has_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # torch's, which needs a GPU to say so
    with pytest.raises(MisconfigurationException, match="start_method='fork' copies this process, but CUDA is in use"):
        launch(lambda: 1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_fork_after_cuda_has_really_started_is_refused() -> None:
    torch.ones(1, device="cuda")
    with pytest.raises(MisconfigurationException, match="CUDA is in use"):
        launch(lambda: 1)


@pytest.mark.proves("4.4")
def test_a_start_method_that_the_system_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])  # as on Windows
    with pytest.raises(MisconfigurationException, match=r"start_method='fork', but on .* by spawn: use 'ddp_spawn'"):
        ProcessLauncher("fork")


@pytest.mark.proves("4.8")
def test_the_start_method_of_ddp_names_its_launcher() -> None:
    names = {method: DDPStrategy(start_method=method).launcher for method in ("popen", "spawn", "fork", "forkserver")}  # type: ignore[arg-type]
    assert names == {"popen": "local", "spawn": "spawn", "fork": "fork", "forkserver": "forkserver"}
    with pytest.raises(MisconfigurationException, match=r"start_method='forks'.*Did you mean 'fork'.*'popen', 'spawn'"):
        DDPStrategy(start_method="forks")  # type: ignore[arg-type]


def test_one_process_needs_no_other() -> None:
    assert launch(os.getpid, processes=1) == os.getpid()
    launcher = ProcessLauncher("fork")
    assert isinstance(launcher, LaunchesApart)
    assert [ProcessLauncher(one).is_interactive_compatible for one in ("fork", "spawn", "forkserver")] == [
        True,
        False,
        False,
    ]  # type: ignore[arg-type]

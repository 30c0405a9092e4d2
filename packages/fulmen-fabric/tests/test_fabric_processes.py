"""Two real processes over gloo: started by the plain script, and by torchrun. Raw DDP is the yardstick."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = pytest.mark.processes

COMMON = """
    import sys
    import torch
    from torch import nn

    torch.set_num_threads(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 8)
            self.b = nn.Linear(8, 2)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

        def training_step(self, x):
            return self(x).square().mean()

        def helper(self, x):
            return self.b(self.a(x))

    def data(rank):
        generator = torch.Generator().manual_seed(10 + rank)
        return [torch.randn(8, 4, generator=generator) for _ in range(6)]

    def optimizer(model):
        return torch.optim.Adam(model.parameters(), lr=0.01)
"""

RAW = """
    import os
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    out = {}
    for name, accumulate in (("plain", 1), ("accumulated", 3)):
        torch.manual_seed(0)
        net = Net()
        model = DistributedDataParallel(net)
        opt = optimizer(model)
        for number, x in enumerate(data(rank), 1):
            stepping = number % accumulate == 0
            model.require_backward_grad_sync = stepping
            (model(x).square().mean() / accumulate).backward()
            if stepping:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                opt.step()
                opt.zero_grad()
        out[name] = net.state_dict()
    torch.save(out, f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()
    import time; time.sleep(0.1)  # gloo's threads need the GIL to drop what they hold
"""

OURS = """
    import os
    from torch.utils.data import DataLoader
    from fulmen_fabric import Fabric, StopSignal, rank_zero_only
    from fulmen_protocols import MisconfigurationException

    fabric = Fabric(accelerator="cpu", devices=2)
    early = fabric.world_size
    torch.rand(int(os.environ.get("LOCAL_RANK", "0")) + 1)  # ranks have drawn differently before they meet
    fabric.launch()
    draw = torch.rand(3)
    rank = fabric.global_rank
    out = {"early": early, "draw": draw, "rank": rank, "zero": fabric.is_global_zero}
    out["rank_zero_only"] = rank_zero_only.rank

    def train(accumulate, call):
        torch.manual_seed(0 if rank == 0 else 99)  # rank 0's weights must win
        net = Net()
        model, opt = fabric.setup(net, optimizer(net))
        for number, x in enumerate(data(rank), 1):
            stepping = number % accumulate == 0
            with fabric.no_backward_sync(model, enabled=not stepping):
                loss = model.training_step(x) if call == "step" else model(x).square().mean()
                fabric.backward(loss / accumulate)
            if stepping:
                fabric.clip_gradients(model, opt, max_norm=0.05)
                opt.step()
                opt.zero_grad()
        return model, opt

    for name, accumulate, call in (("plain", 1, "call"), ("accumulated", 3, "call"), ("through_step", 1, "step")):
        model, opt = train(accumulate, call)
        out[name] = model.state_dict()

    class Manual(Net):
        automatic_optimization = False

        def training_step(self, x):
            loss = self(x).square().mean()
            fabric.backward(loss)
            return loss

    torch.manual_seed(0)
    net = Manual()
    manual, manual_opt = fabric.setup(net, optimizer(net))
    for x in data(rank):
        manual.training_step(x)
        fabric.clip_gradients(manual, manual_opt, max_norm=0.05)
        manual_opt.step()
        manual_opt.zero_grad()
    out["manual"] = manual.state_dict()

    try:
        model.helper(data(0)[0])
        out["helper"] = "ran"
    except RuntimeError as error:
        out["helper"] = str(error)
    model.mark_forward_method("helper")
    out["marked"] = list(model.helper(data(0)[0]).shape)
    model.eval()
    out["modes"] = [model.training, model.placed.training, model.module.a.training]
    model.train()

    out["gathered"] = fabric.all_gather({"r": rank, "t": torch.full((2,), float(rank))})
    ops = ("mean", "avg", "sum", "min", "max")
    out["reduced"] = {op: fabric.all_reduce(float(rank + 1), reduce_op=op) for op in ops}
    out["broadcast"] = fabric.broadcast({"from": rank, "t": torch.tensor(rank)}, src=1)
    own = torch.tensor(float(rank + 1), requires_grad=True)
    gathered = fabric.all_gather(own, sync_grads=True)
    (gathered * torch.tensor([1.0, 10.0])).sum().backward()
    out["gather_grad"] = own.grad

    path = f"{sys.argv[1]}/order.txt"
    with fabric.rank_zero_first():
        if rank == 0:
            import time
            time.sleep(0.5)
        with open(path, "a") as file:
            file.write(str(rank))
    fabric.barrier("after")
    out["order"] = open(path).read()

    loader = fabric.setup_dataloaders(DataLoader(list(range(10)), batch_size=2, shuffle=True))
    out["epochs"] = [[int(v) for batch in loader for v in batch] for _ in range(2)]

    target = f"{sys.argv[1]}/shared.ckpt" if rank == 0 else "/nowhere/else.ckpt"
    fabric.save(target, {"model": model, "opt": opt, "n": 5})
    net = Net()
    fresh, fresh_opt = fabric.setup(net, optimizer(net))
    state = {"model": fresh, "opt": fresh_opt, "n": 0}
    fabric.load(f"{sys.argv[1]}/shared.ckpt", state)
    out["loaded"], out["n"] = fresh.state_dict(), state["n"]

    try:
        Fabric(accelerator="cpu", devices=3).launch()
    except Exception as error:
        out["second"] = f"{type(error).__name__}: {error}"

    agreement = fabric._world.stop_agreement()
    signal = StopSignal()
    for point in range(1, 100):
        if point == 4 and rank == 1:
            signal.reason = "tired"
        fabric.barrier()  # a step of training; without it a fast rank could be done before the other asks
        if agreement.point(signal.poll()):
            break
    out["stopped"] = (point, agreement.reason)

    class Runs(Fabric):
        def run(self, value):
            return self.all_reduce(value * (self.global_rank + 1), reduce_op="sum").item()

    out["run"] = Runs(accelerator="cpu", devices=2).run(5)
    out["function"] = fabric.launch(lambda one, x: x + one.global_rank, 7)
    torch.save(out, f"{sys.argv[1]}/{rank}.pt")
"""


def _environment(**extra):
    ours = {"PYTHONWARNINGS": "error::UserWarning", "PL_GLOBAL_SEED": "3"}
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_SEED_WORKERS")
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, **ours, **extra}


def _script(folder, body):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(COMMON) + textwrap.dedent(body))
    return [str(path), str(folder)]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(command, **extra):
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=_environment(**extra))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _results(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    script = _script(folder, RAW)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *script], env=_environment(RANK=str(rank), **place), stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for one in ranks:
        _, errors = one.communicate(timeout=240)
        assert one.returncode == 0, errors
    return _results(folder)


@pytest.fixture(scope="module", params=["plain script", pytest.param("torchrun", marks=pytest.mark.slow)])
def ours(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    script = _script(folder, OURS)
    starter = (
        [sys.executable]
        if request.param == "plain script"
        else [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}"]
    )
    # Of torchrun's own warnings none is ours.
    _run([*starter, *script], **({} if request.param == "plain script" else {"PYTHONWARNINGS": ""}))
    return _results(folder)


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.proves("4.11")
@pytest.mark.parametrize("loop", ["plain", "accumulated"])
def test_two_processes_have_the_bits_of_raw_ddp(ours, raw, loop):
    for rank in range(2):
        assert equal(ours[rank][loop], raw[rank][loop])


@pytest.mark.proves("4.11", "8.18")
def test_a_step_method_goes_through_the_wrapper_like_forward(ours):
    assert equal(ours[0]["through_step"], ours[0]["plain"])
    assert equal(ours[1]["through_step"], ours[0]["plain"])


@pytest.mark.proves("4.11")
def test_backward_inside_a_step_of_manual_optimization_is_averaged_too(ours):
    assert equal(ours[0]["manual"], ours[0]["plain"])
    assert equal(ours[1]["manual"], ours[0]["plain"])


@pytest.mark.proves("8.3")
def test_each_process_knows_who_it_is(ours):
    assert [one["early"] for one in ours] == [2, 2]
    assert [one["rank"] for one in ours] == [0, 1]
    assert [one["zero"] for one in ours] == [True, False]
    assert [one["rank_zero_only"] for one in ours] == [0, 1]


@pytest.mark.proves("4.15")
def test_a_global_seed_makes_every_rank_start_equal(ours):
    torch.manual_seed(3)
    expected = torch.rand(3)
    assert all(torch.equal(one["draw"], expected) for one in ours)


@pytest.mark.proves("8.18")
def test_a_method_that_would_bypass_the_wrapper_is_refused_until_it_is_marked(ours):
    for one in ours:
        assert "mark_forward_method('helper')" in one["helper"]
        assert one["marked"] == [8, 2]


def test_evaluation_mode_reaches_the_wrapper_and_the_module(ours):
    assert [one["modes"] for one in ours] == [[False] * 3] * 2


@pytest.mark.proves("4.16", "8.11")
def test_collectives_combine_all_ranks(ours):
    for one in ours:
        assert one["gathered"]["r"].tolist() == [0, 1]
        assert one["gathered"]["t"].tolist() == [[0, 0], [1, 1]]
        assert {op: value.item() for op, value in one["reduced"].items()} == {
            "mean": 1.5,
            "avg": 1.5,
            "sum": 3,
            "min": 1,
            "max": 2,
        }
        assert one["broadcast"]["from"] == 1
        assert one["broadcast"]["t"].item() == 1
    # d(sum over both ranks' losses)/d(own): each rank weighs row r by 1 or 10
    assert [one["gather_grad"].item() for one in ours] == [2.0, 20.0]


@pytest.mark.proves("8.12")
def test_rank_zero_goes_first(ours):
    assert [one["order"] for one in ours] == ["01", "01"]


@pytest.mark.proves("8.8")
def test_every_sample_is_read_once_an_epoch_in_a_new_order(ours):
    for epoch in range(2):
        assert sorted(ours[0]["epochs"][epoch] + ours[1]["epochs"][epoch]) == list(range(10))
    assert ours[0]["epochs"][0] != ours[0]["epochs"][1]


@pytest.mark.proves("5.40", "8.14")
def test_a_checkpoint_is_written_once_to_rank_zeros_path_and_read_by_all(ours):
    for one in ours:
        assert equal(one["loaded"], ours[0]["through_step"])
        assert one["n"] == 5


def test_another_number_of_processes_in_the_same_program_is_refused(ours):
    for one in ours:
        assert "Misconfiguration" in one["second"]
        assert "3" in one["second"]


def test_ranks_stop_together_for_the_reason_of_the_one_that_asked(ours):
    assert ours[0]["stopped"] == ours[1]["stopped"]
    point, reason = ours[0]["stopped"]
    assert 4 < point < 99
    assert reason == "rank 1: tired"


@pytest.mark.proves("8.4", "8.17")
def test_run_and_launched_functions_run_in_every_process(ours):
    assert [one["run"] for one in ours] == [15, 15]
    assert [one["function"] for one in ours] == [7, 8]


@pytest.mark.proves("4.34")
def test_an_error_on_another_rank_ends_the_run_with_its_traceback_last(tmp_path):
    body = """
        from fulmen_fabric import Fabric
        fabric = Fabric(accelerator="cpu", devices=2)
        fabric.launch()
        if fabric.global_rank == 1:
            raise KeyError("the reason of rank 1")
        fabric.barrier()
    """
    done = subprocess.run(
        [sys.executable, *_script(tmp_path, body)], capture_output=True, text=True, timeout=120, env=_environment()
    )
    assert done.returncode != 0
    assert "the reason of rank 1" in done.stderr[-800:]

"""Starting the processes of a Fabric: by ``launch``, in new processes for a function, or by a command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fulmen_fabric import Fabric
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError


def run(folder, body, *command, **variables):
    """Run ``body`` as a script and return what each process has written to FOLDER/N.json."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(body))
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    kept = {name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("LT_")}
    done = subprocess.run(
        [*(command or [sys.executable]), str(script), str(folder)],
        capture_output=True, text=True, timeout=240, check=False, env={**kept, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def calls_that_need_the_processes(fabric):
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1)
    return {
        "setup": lambda: fabric.setup(net, optimizer),
        "setup_module": lambda: fabric.setup_module(net),
        "setup_optimizers": lambda: fabric.setup_optimizers(optimizer),
        "setup_dataloaders": lambda: fabric.setup_dataloaders(DataLoader([1])),
        "barrier": lambda: fabric.barrier(),
        "broadcast": lambda: fabric.broadcast(1),
        "all_gather": lambda: fabric.all_gather(1),
        "all_reduce": lambda: fabric.all_reduce(1),
        "rank_zero_first": lambda: fabric.rank_zero_first(),
        "init_module": lambda: fabric.init_module().__enter__(),
        "init_tensor": lambda: fabric.init_tensor().__enter__(),
        "to_device": lambda: fabric.to_device(torch.ones(1)),
        "save": lambda: fabric.save("x.ckpt", {}),
        "load": lambda: fabric.load("x.ckpt"),
        "load_raw": lambda: fabric.load_raw("x.ckpt", net),
    }


@pytest.mark.proves("8.5")
@pytest.mark.parametrize("name", list(calls_that_need_the_processes(None)))
def test_what_several_processes_do_together_is_refused_before_they_are_launched(name):
    act = calls_that_need_the_processes(Fabric(accelerator="cpu", devices=2))[name]

    says = rf"fabric\.{name}\(\) was called, but the 2 processes .* not been launched\. Call fabric\.launch\(\) first"
    with pytest.raises(RuntimeError, match=says):
        act()


class SeveralDevices:
    """Drives all devices of its machine from one process, as ``dp`` does; no base class of ours."""

    root_device = torch.device("cpu")

    def take_devices(self, devices):
        self.devices = devices

    def setup_environment(self, topology):
        pass

    def module_context(self, *, empty):
        return self.root_device

    def place(self, module):
        return module

    def prepare_optimizers(self, module, optimizers):
        return optimizers

    def teardown(self):
        pass


@pytest.mark.proves("8.5")
@pytest.mark.parametrize("arguments", [{"devices": 1}, {"devices": 3, "strategy": "several"}])
def test_one_process_needs_no_launch_however_many_devices_it_drives(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strategy = SeveralDevices()
    if "strategy" in arguments:
        arguments = {**arguments, "strategy": strategy}
    fabric = Fabric(accelerator="cpu", **arguments)

    for name, act in calls_that_need_the_processes(fabric).items():
        if name == "load_raw":
            torch.save(nn.Linear(1, 1).state_dict(), "x.ckpt")
        act()

    assert fabric.world_size == 1
    if "strategy" in arguments and arguments["strategy"] is strategy:
        assert len(strategy.devices) == 3


@pytest.mark.proves("8.4")
def test_launch_passes_the_fabric_first_and_then_what_it_was_given():
    fabric = Fabric(accelerator="cpu", devices=1)

    assert fabric.launch(lambda *args, **kwargs: (args, kwargs), 1, "a", b=2) == ((fabric, 1, "a"), {"b": 2})
    assert fabric.launch(function=lambda one: one.world_size) == 1
    assert fabric.launch() is None


@pytest.mark.proves("8.4")
def test_what_is_no_function_of_a_fabric_is_refused():
    fabric = Fabric(accelerator="cpu", devices=1)

    with pytest.raises(MisconfigurationTypeError, match=r"launch got 3, which cannot be called. Pass a function, or"):
        fabric.launch(3)

    def main():
        raise AssertionError("must not run")

    with pytest.raises(MisconfigurationTypeError, match=r"launch got main\(\), which takes no argument. Its first one"):
        fabric.launch(main)


@pytest.mark.proves("8.4")
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_make_new_processes_require_a_function(strategy):
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)

    says = rf"launch\(\) got no function, and strategy '{strategy}' runs one in new processes.*launch\(main\)"
    with pytest.raises(MisconfigurationException, match=says):
        fabric.launch()


@pytest.mark.processes
@pytest.mark.proves("8.4")
@pytest.mark.slow
def test_a_function_in_spawned_processes_gives_back_what_rank_0_returned(tmp_path):
    body = """
        import json, sys
        from fulmen_fabric import Fabric

        def work(fabric, start, *, add):
            total = fabric.all_reduce(start + add + fabric.global_rank, reduce_op="sum").item()
            return {"total": total, "rank": fabric.global_rank}

        if __name__ == "__main__":
            fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
            found = fabric.launch(work, 10, add=0.5)
            json.dump(found, open(f"{sys.argv[1]}/0.json", "w"))
    """
    assert run(tmp_path, body) == [{"total": 22.0, "rank": 0}]


RANKS = """
    import json, sys, time
    from datetime import timedelta
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.distributed_c10d import _set_pg_timeout
    from fulmen_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2)
    fabric.launch()
    rank, out = fabric.global_rank, {}
    short, long = timedelta(seconds=2), timedelta(minutes=5)

    # Nobody's clock may run out: rank 0 takes longer than the group waits for anything else.
    order = f"{sys.argv[1]}/order.txt"
    for local in (False, True):
        fabric.barrier()
        _set_pg_timeout(short)
        with fabric.rank_zero_first(local=local):
            if rank == 0:
                time.sleep(4)
            with open(order, "a") as file:
                file.write(str(rank))
        _set_pg_timeout(long)
    fabric.barrier()
    out["order"] = open(order).read()

    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    for name, compiled in (("plain", False), ("compiled", True)):
        model = fabric.setup(net)
        if compiled:
            model = torch.compile(model, backend="eager")
        grads = []
        for enabled in (True, False):
            with fabric.no_backward_sync(model, enabled=enabled):
                fabric.backward(model(torch.full((1, 1), float(1 + 2 * rank))).sum())
            grads.append(net.weight.grad.item())
        net.weight.grad = None
        out[name] = grads

    # That such a clock does run out, elsewhere.
    group = dist.new_group()
    dist.barrier(group)
    _set_pg_timeout(short, group)
    if rank == 0:
        time.sleep(4)
    try:
        dist.barrier(group)
    except RuntimeError:
        out["control"] = "ran out"
    json.dump(out, open(f"{sys.argv[1]}/{rank}.json", "w"))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.processes
@pytest.mark.proves("8.12")
@pytest.mark.slow
def test_the_others_wait_for_rank_0_longer_than_their_group_waits_for_anything(ranks):
    assert [one["order"] for one in ranks] == ["0101", "0101"]
    assert ranks[1]["control"] == "ran out"


@pytest.mark.processes
@pytest.mark.proves("8.12")
@pytest.mark.parametrize("name", ["plain", "compiled"])
def test_gradients_stay_local_within_no_backward_sync_and_are_averaged_after(ranks, name):
    # Rank r's gradient of one pass is 1 + 2r. Held back: its own. Then the mean over ranks of both passes.
    assert [one[name] for one in ranks] == [[1.0, 4.0], [3.0, 4.0]]


@pytest.mark.processes
@pytest.mark.proves("8.4")
def test_under_a_command_line_launch_joins_the_processes_and_may_be_left_out(tmp_path):
    body = """
        import json, sys
        import torch
        from fulmen_fabric import Fabric

        fabric = Fabric()
        fabric.seed_everything(5, verbose=False)
        out = {"joined": torch.distributed.is_initialized()}
        out["draw"] = torch.rand(1).item()  # joining must not seed anew
        out["total"] = fabric.all_reduce(fabric.global_rank + 1, reduce_op="sum").item()
        out["function"] = fabric.launch(lambda one, x: x + one.global_rank, 7)
        json.dump(out, open(f"{sys.argv[1]}/{fabric.global_rank}.json", "w"))
    """
    fulmen = [sys.executable, "-c", "import sys; from fulmen_protocols.cli import main; sys.exit(main())"]
    found = run(tmp_path, body, *fulmen, "run", "--accelerator=cpu", "--devices=2")

    expected = torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    assert [one["joined"] for one in found] == [True, True]
    assert [one["draw"] for one in found] == [expected, expected]
    assert [one["total"] for one in found] == [3, 3]
    assert [one["function"] for one in found] == [7, 8]


@pytest.mark.processes
@pytest.mark.proves("8.4")
@pytest.mark.parametrize("order", [[0, 1], pytest.param([0, 3, 1, 2], marks=pytest.mark.slow)])
def test_ranks_that_never_communicate_may_end_in_any_order(tmp_path, order):
    ranks = len(order)
    script = f"""
        import json, sys, time
        from fulmen_fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices={ranks}, strategy="ddp")
        fabric.launch()
        time.sleep(0.3 * {order}.index(fabric.global_rank))
        with open(f"{{sys.argv[1]}}/{{fabric.global_rank}}.json", "w") as file:
            json.dump(time.time(), file)
    """
    ended = run(tmp_path, script)

    assert sorted(range(ranks), key=ended.__getitem__) == order

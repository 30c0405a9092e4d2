"""The same claims on CUDA: bits of plain PyTorch, no hidden waiting for the device, two GPUs over NCCL."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from fulmen_fabric import Fabric

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def make(device):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8)).to(device)
    return module, torch.optim.Adam(module.parameters(), lr=0.01)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 64, generator=generator) for _ in range(6)]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_loop_on_the_gpu_has_the_bits_of_plain_pytorch(precision):
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    raw, raw_optimizer = make("cuda:0")
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "16-mixed")
    for x in batches():
        raw_optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            output = raw(x.to("cuda:0"))
        scaler.scale(output.float().square().mean()).backward()
        scaler.step(raw_optimizer)
        scaler.update()
    fabric = Fabric(accelerator="cuda", devices=1, precision=precision)
    model, optimizer = fabric.setup(*make("cpu"))
    for (x,) in fabric.setup_dataloaders(torch.utils.data.DataLoader([(x,) for x in batches()], batch_size=None)):
        assert x.is_cuda
        optimizer.zero_grad()
        fabric.backward(model(x).square().mean())
        optimizer.step()
    assert same(model, raw)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_never_waits_for_the_device():
    fabric = Fabric(accelerator="cuda", devices=1, precision="bf16-mixed")
    model, optimizer = fabric.setup(*make("cpu"))
    pinned = [x.pin_memory() for x in batches()]
    move = fabric.to_device
    move(pinned[0])

    def step(x):
        optimizer.zero_grad()
        fabric.backward(model(move([x])[0]).square().mean())
        fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()

    step(pinned[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in pinned[1:]:
            step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_have_the_bits_of_raw_ddp(tmp_path):
    body = """
        import sys
        import torch
        import torch.distributed as dist
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel
        from fulmen_fabric import Fabric

        def make():
            torch.manual_seed(0)
            module = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8))
            return module

        def optimizer(module):
            return torch.optim.Adam(module.parameters(), lr=0.01)

        fabric = Fabric(accelerator="cuda", devices=2)
        fabric.launch()
        assert dist.get_backend() == "nccl"
        rank = fabric.global_rank
        generator = torch.Generator().manual_seed(rank)
        data = [torch.randn(32, 64, generator=generator) for _ in range(6)]

        net = make().to(fabric.device)
        raw = DistributedDataParallel(net, device_ids=[fabric.local_rank])
        opt = optimizer(net)
        for x in data:
            opt.zero_grad()
            raw(x.to(fabric.device)).square().mean().backward()
            opt.step()

        own = make()
        model, opt = fabric.setup(own, optimizer(own))
        for x in data:
            opt.zero_grad()
            fabric.backward(model(fabric.to_device(x)).square().mean())
            opt.step()
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), own.parameters(), strict=True))
        assert fabric.all_gather(rank).tolist() == [0, 1]
        assert fabric.all_gather(rank).device == fabric.device
        got = fabric.broadcast({"t": torch.ones(1, device=fabric.device) * rank}, src=1)["t"]
        assert got.device == fabric.device and got.item() == 1
        fabric.save(f"{sys.argv[1]}/a.ckpt", {"model": model, "opt": opt})
        fabric.load(f"{sys.argv[1]}/a.ckpt", {"model": model, "opt": opt})
        fabric.backward(model(fabric.to_device(data[0])).sum())
        opt.step()
        open(f"{sys.argv[1]}/{rank}.ok", "w").close()
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(body))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.ok")) == ["0.ok", "1.ok"]

"""Loops of one's own under Lightning's Fabric and under ours: only the import differs. Prints what came out, as JSON.

``python fabric_scenarios.py LIBRARY FOLDER RANKS`` runs the scenarios of one process (RANKS 1) or of two.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY, FOLDER, RANKS = sys.argv[1], sys.argv[2], int(sys.argv[3])
if LIBRARY == "lightning":
    from lightning.fabric import Fabric
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: F401 - it must be there
    from lightning.pytorch import LightningModule
else:
    from fulmen import LightningModule
    from fulmen_fabric import Fabric

ALONE: dict[str, Callable[[], object]] = {}
TOGETHER: dict[str, Callable[[Any], object]] = {}


def alone(function: Callable[[], object]) -> Callable[[], object]:
    ALONE[function.__name__] = function
    return function


def together(function: Callable[[Any], object]) -> Callable[[Any], object]:
    TOGETHER[function.__name__] = function
    return function


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer_1 = nn.Linear(6, 8)
        self.layer_2 = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.layer_2(torch.tanh(self.layer_1(x)))

    def training_step(self, batch: Any) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def features(self, x: Any) -> Any:
        return self.layer_1(x)


def data(samples: int = 22) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


def plain(value: Any) -> Any:
    """As JSON has it: tensors become lists of rounded numbers, mappings have names for keys."""
    if isinstance(value, torch.Tensor):
        return plain(value.detach().double().tolist())
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, torch.dtype):
        return str(value)
    return round(value, 6) if isinstance(value, float) else value


def train(
    fabric: Any, *, optimizer: Any = torch.optim.SGD, accumulate: int = 1, clip: Any = None, epochs: int = 2
) -> Any:
    net = Net()
    model, opt = fabric.setup(net, optimizer(net.parameters(), lr=0.05))
    fabric.seed_everything(7, verbose=False)
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=4, shuffle=True))
    losses, norms, dtypes = [], [], set()
    for _ in range(epochs):
        for number, (x, y) in enumerate(loader, 1):
            stepping = number % accumulate == 0
            with fabric.no_backward_sync(model, enabled=not stepping):
                output = model(x)
                dtypes.add(output.dtype)
                loss = F.cross_entropy(output, y) / accumulate
                fabric.backward(loss)
            losses.append(loss)
            if stepping:
                if clip is not None:
                    norms.append(fabric.clip_gradients(model, opt, **clip))
                opt.step()
                opt.zero_grad()
    return {
        "losses": losses,
        "norms": norms,
        "weights": dict(model.state_dict()),
        "dtypes": sorted(map(str, dtypes)),
        "held": str(next(model.parameters()).dtype),
    }


def cpu(**arguments: Any) -> Any:
    return Fabric(accelerator="cpu", devices=1, **arguments)


@alone
def a_plain_loop() -> Any:
    return train(cpu())


@alone
def adam() -> Any:
    return train(cpu(), optimizer=torch.optim.Adam)


@alone
def accumulation() -> Any:
    return train(cpu(), accumulate=3)


@alone
def clipping_by_norm() -> Any:
    return train(cpu(), clip={"max_norm": 0.05})


@alone
def clipping_by_another_norm() -> Any:
    return train(cpu(), clip={"max_norm": 0.05, "norm_type": 1.0})


@alone
def clipping_by_value() -> Any:
    return train(cpu(), clip={"clip_val": 0.01})


@alone
def double_precision() -> Any:
    return train(cpu(precision="64-true"))


@alone
def bf16_mixed() -> Any:
    return train(cpu(precision="bf16-mixed"))


@alone
def bf16_true() -> Any:
    return train(cpu(precision="bf16-true"))


@alone
def lbfgs() -> Any:
    fabric, net = cpu(), Net()
    model, opt = fabric.setup(net, torch.optim.LBFGS(net.parameters(), lr=0.5))
    x, y = data()[:]
    results = []
    for _ in range(2):

        def closure() -> Any:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            fabric.backward(loss)
            return loss

        results.append(opt.step(closure))
    return {"losses": results, "weights": dict(model.state_dict())}


@alone
def two_models_and_two_optimizers() -> Any:
    fabric = cpu()
    generator, critic = Net(), nn.Linear(3, 1)
    nn.init.constant_(critic.weight, 0.3), nn.init.zeros_(critic.bias)
    first, one = fabric.setup(generator, torch.optim.Adam(generator.parameters(), lr=0.01))
    second, two, three = fabric.setup(
        critic, torch.optim.SGD([critic.weight], lr=0.1), torch.optim.SGD([critic.bias], lr=0.2)
    )
    for start in range(0, 20, 5):
        x = data()[start : start + 5][0]
        two.zero_grad(), three.zero_grad()
        fabric.backward(second(first(x).detach()).mean())
        two.step(), three.step()
        one.zero_grad()
        fabric.backward(-second(first(x)).mean())
        one.step()
    return {"first": dict(first.state_dict()), "second": dict(second.state_dict())}


@alone
def the_module_first_and_its_optimizer_after() -> Any:
    fabric = cpu()
    model = fabric.setup_module(Net())
    opt = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), lr=0.01))
    pair = fabric.setup_optimizers(
        torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(model.parameters(), lr=1)
    )
    for x, y in DataLoader(data(), batch_size=6):
        opt.zero_grad()
        fabric.backward(F.cross_entropy(model(x), y))
        opt.step()
    return {"weights": dict(model.state_dict()), "pair": len(pair), "state": opt.state_dict()}


@alone
def a_scheduler_passes_through() -> Any:
    fabric, net = cpu(), Net()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, 0.5)
    model, opt, same = fabric.setup(net, inner, scheduler=scheduler)
    fabric.backward(model(torch.ones(1, 6)).sum())
    opt.step()
    same.step()
    return {"same": same is scheduler, "lr": opt.param_groups[0]["lr"], "module": model.module is net}


class Counter:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


def objects(fabric: Any) -> dict[str, Any]:
    net = Net()
    model, opt = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.01))
    return {"model": model, "optimizer": opt, "counter": Counter(5), "step": 3, "notes": {"a": [1, 2]}}


@alone
def saving_and_loading() -> Any:
    fabric, path = cpu(), os.path.join(FOLDER, "deep", "all.ckpt")
    state = objects(fabric)
    fabric.backward(state["model"](torch.ones(2, 6)).sum())
    state["optimizer"].step()
    fabric.save(path, {**state, "extra": "more"})
    content = torch.load(path, weights_only=True)
    fresh = {**objects(fabric), "counter": Counter(), "step": 0, "notes": None}
    given = fresh["model"]
    rest = fabric.load(path, fresh)
    whole = fabric.load(path)
    return {
        "content": content,
        "rest": rest,
        "whole": sorted(whole),
        "same_object": fresh["model"] is given,
        "counter": fresh["counter"].value,
        "step": fresh["step"],
        "notes": fresh["notes"],
        "weights": dict(fresh["model"].state_dict()),
        "moments": fresh["optimizer"].state_dict(),
    }


@alone
def saving_through_filters() -> Any:
    fabric, path = cpu(), os.path.join(FOLDER, "filtered.ckpt")
    keep = {"model": lambda key, value: key.endswith("bias") and value.numel() == 3, "notes": lambda key, _: key != "a"}
    fabric.save(path, {**objects(fabric), "notes": {"a": 1, "b": 2}}, filter=keep)
    content = torch.load(path, weights_only=True)
    return {"model": content["model"], "notes": content["notes"], "keys": sorted(content)}


@alone
def strictness() -> Any:
    fabric, path = cpu(), os.path.join(FOLDER, "partial.ckpt")
    state = objects(fabric)
    fabric.save(path, {"model": state["model"], "step": 9}, filter={"model": lambda key, _: "layer_1" in key})
    results: dict[str, Any] = {}
    for name, asked in {"unknown": {"nothing": 1}, "weights": {"model": state["model"]}}.items():
        try:
            fabric.load(path, dict(asked))
        except Exception as error:  # noqa: BLE001 - which one is the result
            results[name] = builtin(error)
    loose = {"model": state["model"], "step": 0, "nothing": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rest = fabric.load(path, loose, strict=False)
    return {**results, "step": loose["step"], "nothing": loose["nothing"], "rest": rest}


@alone
def raw_files() -> Any:
    fabric = cpu()
    state = objects(fabric)
    source = Net()
    torch.save({name: value + 1 for name, value in source.state_dict().items()}, os.path.join(FOLDER, "weights.pt"))
    torch.save(torch.optim.Adam(source.parameters(), lr=0.5).state_dict(), os.path.join(FOLDER, "optimizer.pt"))
    fabric.load_raw(os.path.join(FOLDER, "weights.pt"), state["model"])
    fabric.load_raw(os.path.join(FOLDER, "optimizer.pt"), state["optimizer"])
    return {"weights": dict(state["model"].state_dict()), "lr": state["optimizer"].param_groups[0]["lr"]}


class Recorder:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        self.heard.append(["setup", type(module.module).__name__])

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        self.heard.append(["step", type(optimizer).__name__])

    def on_epoch(self, number: int, loss: float = 0.0) -> str:
        self.heard.append(["epoch", number, loss])
        return "dropped"

    attribute = 3


@alone
def callbacks() -> Any:
    recorder, net = Recorder(), Net()
    fabric = cpu(callbacks=[recorder, object()])
    model, opt = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(1, 6)).sum())
    opt.step()
    returned = [fabric.call("on_epoch", 1, loss=0.5), fabric.call("on_epoch", 2, unknown=9), fabric.call("nothing")]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fabric.call("attribute")
    return {"heard": recorder.heard, "returned": returned, "warned": len(seen)}


class Memory:
    name, version, save_dir, root_dir, log_dir, group_separator = "memory", 0, ".", ".", ".", "/"
    experiment = None

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.rows.append([dict(metrics), step, sorted(type(value).__name__ for value in metrics.values())])

    def log_hyperparams(self, params: Any) -> None: ...
    def log_graph(self, model: Any, input_array: Any = None) -> None: ...
    def save(self) -> None: ...
    def finalize(self, status: str) -> None: ...


@alone
def logging() -> Any:
    first, second = Memory(), Memory()
    fabric = cpu(loggers=[first, second])
    fabric.log("loss", torch.tensor(1.5, requires_grad=True), step=3)
    fabric.log_dict({"a": 1, "b": torch.tensor([2]), "c": 2.5})
    try:
        none = cpu().logger
    except Exception as error:  # noqa: BLE001
        none = builtin(error)
    return {
        "rows": [first.rows, second.rows],
        "first": fabric.logger is first,
        "loggers": len(fabric.loggers),
        "none": none,
    }


class Backwards(Sampler[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Any:
        return iter(reversed(range(self.length)))

    def __len__(self) -> int:
        return self.length


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(7))


def read(fabric: Any, loader: Any, **options: Any) -> Any:
    ready = fabric.setup_dataloaders(loader, **options)
    return [[batch.tolist() for batch in ready] for _ in range(2)]


def loaders() -> dict[str, tuple[Any, dict[str, Any]]]:
    numbers = list(range(11))
    return {
        "shuffled": (DataLoader(numbers, batch_size=2, shuffle=True), {}),
        "in_order": (DataLoader(numbers, batch_size=3), {}),
        "drop_last": (DataLoader(numbers, batch_size=2, drop_last=True), {}),
        "own_sampler": (DataLoader(numbers, batch_size=2, sampler=Backwards(11)), {}),
        "own_batch_sampler": (DataLoader(numbers, batch_sampler=BatchSampler(Backwards(11), 4, False)), {}),
        "iterable": (DataLoader(Stream(), batch_size=2), {}),
        "unsplit": (DataLoader(numbers, batch_size=4), {"use_distributed_sampler": False}),
        "unmoved": (DataLoader(numbers, batch_size=4), {"move_to_device": False}),
    }


@alone
def dataloaders() -> Any:
    fabric = cpu()
    fabric.seed_everything(3, verbose=False)
    results = {name: read(fabric, loader, **options) for name, (loader, options) in loaders().items()}
    several = fabric.setup_dataloaders(DataLoader([1, 2]), DataLoader([3]))
    worker = fabric.setup_dataloaders(DataLoader([1]))
    return {**results, "several": [len(one) for one in several], "seeded": worker.worker_init_fn is not None}


def builtin(error: Any) -> dict[str, list[str]]:
    """The builtin classes of an error, most special first: as what it can be caught."""
    return {"caught as": [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]}


def misuses(fabric: Any) -> dict[str, Callable[[], object]]:
    net = Net()
    model, opt = fabric.setup(Net(), torch.optim.SGD(Net().parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader([1]))
    meta = torch.optim.SGD(nn.Linear(1, 1, device="meta").parameters(), lr=1)
    return {
        "setup a module twice": lambda: fabric.setup(model),
        "setup_module twice": lambda: fabric.setup_module(model),
        "setup an optimizer twice": lambda: fabric.setup(net, opt),
        "setup_optimizers twice": lambda: fabric.setup_optimizers(opt),
        "setup_optimizers of nothing": lambda: fabric.setup_optimizers(),
        "setup_optimizers on meta": lambda: fabric.setup_optimizers(meta),
        "setup_dataloaders of nothing": lambda: fabric.setup_dataloaders(),
        "setup_dataloaders twice": lambda: fabric.setup_dataloaders(loader),
        "setup_dataloaders of a list": lambda: fabric.setup_dataloaders([1, 2]),
        "clip both": lambda: fabric.clip_gradients(model, opt, clip_val=1.0, max_norm=1.0),
        "clip neither": lambda: fabric.clip_gradients(model, opt),
        "no_backward_sync of a bare module": lambda: fabric.no_backward_sync(net),
        "launch a number": lambda: fabric.launch(3),
        "launch without a parameter": lambda: fabric.launch(lambda: None),
        "filter of an unknown name": lambda: fabric.save("x", {"a": 1}, filter={"b": lambda *_: True}),
        "filter that is no function": lambda: fabric.save("x", {"a": 1}, filter={"a": 3}),
        "mark forward": lambda: model.mark_forward_method("forward"),
        "mark what is not there": lambda: model.mark_forward_method("nothing"),
        "load what is not there": lambda: fabric.load("nowhere.ckpt", {}),
        "an unknown attribute": lambda: model.nothing,
        "positional argument": lambda: Fabric("cpu"),  # type: ignore[misc]  # wrong on purpose
        "two processes, not launched": lambda: Fabric(accelerator="cpu", devices=2).setup(Net()),
        "an unknown precision": lambda: cpu(precision="17-true"),
        "an unknown strategy": lambda: cpu(strategy="nothing"),
        "no device": lambda: Fabric(accelerator="cpu", devices=0),
    }


@alone
def errors() -> Any:
    found: dict[str, Any] = {}
    for name, act in misuses(cpu()).items():
        try:
            act()
            found[name] = None
        except Exception as error:  # noqa: BLE001 - which one is the result
            found[name] = builtin(error)
    return found


class Lit(LightningModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.heard: list[Any] = []

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        return loss

    def manual(self, batch: Any) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        self.clip_gradients(opt, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        opt.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_epoch_end(self) -> None:
        self.heard.append("epoch end")


@alone
def a_lightning_module() -> Any:
    memory, lit = Memory(), Lit()
    fabric = cpu(loggers=memory)
    model, opt = fabric.setup(lit, lit.configure_optimizers())
    for number, batch in enumerate(DataLoader(data(), batch_size=6)):
        opt.zero_grad()
        fabric.backward(model.training_step(batch, number))
        opt.step()
    lit.manual(data()[:6])
    fabric.call("on_train_epoch_end")
    return {
        "weights": dict(model.state_dict()),
        "rows": memory.rows,
        "heard": lit.heard,
        "fabric": lit.fabric is fabric,
        "trainer": [lit.trainer.world_size, lit.trainer.global_rank, lit.trainer.is_global_zero],
        "gathered": lit.all_gather(torch.ones(2)),
        "logger": lit.logger is memory,
        "device": str(lit.device),
    }


@alone
def wrapped_modules_and_optimizers() -> Any:
    fabric, net = cpu(), Net()
    model, opt = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.1))
    model.fresh = 3
    model.mark_forward_method("features")
    loss = model.training_step(data()[:6])
    return {
        "names": list(model.state_dict()),
        "prefixed": list(model.state_dict(prefix="p.")),
        "fresh": net.fresh,
        "features": model.features(torch.ones(1, 6)),
        "loss": loss,
        "kinds": [isinstance(opt, torch.optim.AdamW), isinstance(model, nn.Module)],
        "training": [model.training, model.eval().training, net.layer_1.training],
        "inner": type(opt.optimizer).__name__,
        "groups": opt.state_dict()["param_groups"][0]["lr"],
    }


@alone
def a_compiled_module() -> Any:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    fabric = cpu()
    model, opt = fabric.setup(torch.compile(net := Net(), backend=backend), torch.optim.SGD(net.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(2, 6)).sum())
    opt.step()
    found = {"compiled": bool(compiled), "names": list(model.state_dict()), "weights": dict(model.state_dict())}
    compiled.clear()
    torch._dynamo.reset()  # else what was compiled for the first serves the second
    inside = fabric.setup(torch.compile(Net(), backend=backend), _reapply_compile=False)
    found["inside"] = [inside(torch.ones(2, 6)), bool(compiled)]
    after = torch.compile(fabric.setup(net2 := Net()), backend=backend)
    with fabric.no_backward_sync(after):
        fabric.backward(after(torch.ones(2, 6)).sum())
    return {**found, "gradient": net2.layer_1.weight.grad}


@alone
def run_and_launch() -> Any:
    class Mine(Fabric):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def run(self, start: int, *, more: int = 0) -> Any:
            return [start + more, self.world_size, self.is_global_zero]

    fabric = cpu()
    return {
        "run": Mine(accelerator="cpu", devices=1).run(5, more=2),
        "function": fabric.launch(lambda one, x, y=0: [one is fabric, x + y], 1, y=4),
        "nothing": fabric.launch(),
    }


@alone
def precisions_of_what_is_made() -> Any:
    found = {}
    for precision in ("32-true", "64-true", "bf16-true", "bf16-mixed"):
        fabric = cpu(precision=precision)
        with fabric.init_tensor():
            tensor = torch.ones(1)
        with fabric.init_module():
            module = nn.Linear(2, 2)
        with fabric.init_module(empty_init=True):
            empty = nn.Linear(2, 2)
        with fabric.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        found[precision] = [tensor.dtype, module.weight.dtype, empty.weight.shape, product.dtype]
    return found


@alone
def collectives_of_one() -> Any:
    fabric = cpu()
    nested = {"a": torch.ones(2), "b": [1.5, 2], "c": "text"}
    with fabric.rank_zero_first(local=True):
        pass
    fabric.barrier("here")
    return {
        "gathered": fabric.all_gather(nested),
        "reduced": [fabric.all_reduce(nested["b"], reduce_op=op) for op in ("mean", "sum")],
        "broadcast": fabric.broadcast(nested),
        "moved": fabric.to_device(nested)["a"].device.type,
        "ranks": [fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size, fabric.is_global_zero],
    }


@alone
def the_environment_overrides() -> Any:
    os.environ |= {"LT_PRECISION": "64-true", "LT_DEVICES": "1", "LT_ACCELERATOR": "cpu", "LT_STRATEGY": "auto"}
    try:
        model = Fabric(accelerator="cuda", devices=3, precision="bf16-mixed").setup(Net())
        agreeing = {"dtype": next(model.parameters()).dtype}
        os.environ["LT_CLI_USED"] = "1"
        results = {}
        for name, act in {
            "conflict": lambda: Fabric(precision="bf16-mixed"),
            "same": lambda: str(Fabric(precision="64-true").world_size),
        }.items():
            try:
                results[name] = act()
            except Exception as error:  # noqa: BLE001
                results[name] = builtin(error)
        return {**agreeing, **results}
    finally:
        for name in ("LT_PRECISION", "LT_DEVICES", "LT_ACCELERATOR", "LT_STRATEGY", "LT_CLI_USED"):
            os.environ.pop(name, None)


# ---------------------------------------------------------------------- two processes


@together
def ddp_plain(fabric: Any) -> Any:
    return train(fabric)


@together
def ddp_accumulation_and_clipping(fabric: Any) -> Any:
    return train(fabric, accumulate=2, clip={"max_norm": 0.05}, optimizer=torch.optim.Adam)


@together
def ddp_parts_of_the_data(fabric: Any) -> Any:
    fabric.seed_everything(3, verbose=False)
    # Lightning fails on a batch sampler of one's own in two processes.
    shared = {name: given for name, given in loaders().items() if name != "own_batch_sampler"}
    return {name: read(fabric, loader, **options) for name, (loader, options) in shared.items()}


@together
def ddp_collectives(fabric: Any) -> Any:
    rank = fabric.global_rank
    own = torch.tensor(float(rank + 1), requires_grad=True)
    (fabric.all_gather(own, sync_grads=True) * torch.tensor([1.0, 10.0])).sum().backward()
    return {
        "gathered": fabric.all_gather({"r": rank, "t": [torch.full((2,), float(rank))], "s": "text"}),
        "mean": fabric.all_reduce({"a": rank + 1.0}, reduce_op="mean"),
        "sum": fabric.all_reduce(torch.tensor(rank + 1), reduce_op="sum"),
        "default": fabric.all_reduce(torch.tensor([rank + 1.0])),
        "from_0": fabric.broadcast({"rank": rank}),
        "from_1": fabric.broadcast([rank, torch.tensor(rank)], src=1),
        "gradient": own.grad,
    }


@together
def ddp_printed_ranks(fabric: Any) -> Any:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fabric.print("rank", fabric.global_rank, end="!")
    return {"printed": printed.getvalue(), "zero": fabric.is_global_zero, "local": fabric.local_rank}


@together
def ddp_rank_zero_first(fabric: Any) -> Any:
    path = os.path.join(FOLDER, "order.txt")
    for local in (False, True):
        with fabric.rank_zero_first(local=local), open(path, "a") as file:
            file.write(str(fabric.global_rank))
        fabric.barrier()
    return open(path).read()


@together
def ddp_saving_and_loading(fabric: Any) -> Any:
    path = os.path.join(FOLDER, "ranks.ckpt")
    state = objects(fabric)
    fabric.backward(state["model"](torch.ones(2, 6)).sum())
    state["optimizer"].step()
    fabric.save(path, state)
    content = torch.load(path, weights_only=True)
    fresh = {**objects(fabric), "counter": Counter(), "step": 0, "notes": None}
    rest = fabric.load(path, fresh)
    return {
        "content": content,
        "rest": rest,
        "weights": dict(fresh["model"].state_dict()),
        "step": fresh["step"],
        "counter": fresh["counter"].value,
    }


@together
def ddp_a_method_that_bypasses_the_wrapper(fabric: Any) -> Any:
    model = fabric.setup_module(Net())
    try:
        model.features(torch.ones(1, 6))
        refused = None
    except Exception as error:  # noqa: BLE001
        refused = builtin(error)
    model.mark_forward_method("features")
    return {"refused": refused, "marked": model.features(torch.ones(1, 6)), "names": list(model.state_dict())}


@together
def ddp_a_lightning_module(fabric: Any) -> Any:
    lit = Lit()
    model, opt = fabric.setup(lit, lit.configure_optimizers())
    for number, batch in enumerate(fabric.setup_dataloaders(DataLoader(data(), batch_size=3))):
        opt.zero_grad()
        fabric.backward(model.training_step(batch, number))
        opt.step()
    # Its global_rank is 0 on every rank under Lightning's Fabric.
    return {"weights": dict(model.state_dict()), "gathered": lit.all_gather(fabric.global_rank)}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if RANKS == 1:
        found = {name: plain(scenario()) for name, scenario in ALONE.items()}
        print("RESULT" + json.dumps(found))
        return
    fabric = Fabric(accelerator="cpu", devices=RANKS, strategy="ddp")
    fabric.launch()
    found = {}
    for name, function in TOGETHER.items():
        found[name] = plain(function(fabric))
        fabric.barrier()
    with open(os.path.join(FOLDER, f"rank{fabric.global_rank}.json"), "w") as file:
        json.dump(found, file)
    fabric.barrier()


if __name__ == "__main__":
    main()

"""A strategy whose engine accumulates, clips, steps schedulers and makes optimizers, as Fabric and the step use it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from fulmen_fabric import Fabric
from fulmen_fabric.steps import Gradients, StepHooks, automatic_step
from fulmen_precision import FullPrecision
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

    from fulmen_protocols import Topology


class Engine:
    """Divides losses itself, and steps where it is told that a window ends."""

    def __init__(self) -> None:
        self.root_device = torch.device("cpu")
        self.batches, self.at_end = 1, True
        self.said: list[Any] = []

    def setup_environment(self, topology: Topology) -> None: ...

    def teardown(self) -> None: ...

    def module_context(self, *, empty: bool) -> Any:
        return nullcontext()

    def place(self, module: nn.Module) -> nn.Module:
        self.module = module
        return module

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        return list(optimizers) or [torch.optim.SGD(module.parameters(), lr=0.1)]

    def set_accumulation(self, batches: int) -> None:
        self.batches = batches

    def set_window_end(self, module: nn.Module | None, is_end: bool) -> None:
        self.at_end = is_end

    def set_clipping(self, value: float | None, algorithm: str = "norm") -> None: ...

    def take_scheduler(self, module: nn.Module, scheduler: Any) -> None:
        self.said.append(scheduler)

    def release_schedulers(self, module: nn.Module) -> list[object]:
        return []

    def backward(self, loss: Tensor, module: nn.Module | None, **kwargs: object) -> None:
        (loss / self.batches).backward()  # type: ignore[no-untyped-call]

    def optimizer_step(self, optimizer: Optimizer, module: nn.Module | None, closure: Any = None) -> object:
        if closure is not None:
            closure()
        self.said.append(self.at_end)
        if self.at_end:
            optimizer.step()
        return None


@pytest.mark.proves("4.29")
def test_an_engine_counts_every_batch_and_steps_where_the_run_ends_a_window() -> None:
    engine, net, plain = Engine(), nn.Linear(2, 1), nn.Linear(2, 1)
    plain.load_state_dict(net.state_dict())
    engine.set_accumulation(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    hooked: list[str] = []
    step, accumulate = automatic_step(
        training_step=lambda batch, _: net(batch).square().mean(),
        optimizer=optimizer,
        gradients=Gradients(engine, FullPrecision(), net),
        strategy=engine,
        hooks=StepHooks(on_before_optimizer_step=(lambda _: hooked.append("step"),)),
        accumulate=2,
    )
    data = [torch.randn(4, 2) for _ in range(3)]

    for index, (run, batch) in enumerate(zip((accumulate, step, step), data, strict=True)):  # the last window is short
        run(batch, index)

    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for window in (data[:2], data[2:]):
        for batch in window:
            (plain(batch).square().mean() / 2).backward()
        reference.step()
        reference.zero_grad()
    assert engine.said == [False, True, True]
    assert hooked == ["step", "step"]
    torch.testing.assert_close(net.weight, plain.weight)


def test_an_engine_needs_a_loss_for_every_batch() -> None:
    engine, net = Engine(), nn.Linear(2, 1)
    step, _ = automatic_step(
        training_step=lambda *_: None,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        gradients=Gradients(engine, FullPrecision(), net),
        strategy=engine,
        hooks=StepHooks(),
    )

    with pytest.raises(MisconfigurationException, match=r"returned None for batch 4.*0.0 \* output.sum\(\)"):
        step(torch.ones(1, 2), 4)


def test_fabric_hands_schedulers_to_the_engine_returns_its_optimizer_and_refuses_to_clip() -> None:
    engine = Engine()
    fabric = Fabric(accelerator="cpu", devices=1, strategy=engine)

    model, optimizer = fabric.setup(nn.Linear(2, 1))
    assert isinstance(optimizer, torch.optim.SGD)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    own = torch.optim.Adam(nn.Linear(2, 1).parameters())
    *_, returned = fabric.setup(nn.Linear(2, 1), own, scheduler=schedule)

    assert returned is schedule
    assert engine.said == [schedule]
    with pytest.raises(MisconfigurationException, match=r"clip_gradients\(max_norm=1.0\).*inside its step"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)

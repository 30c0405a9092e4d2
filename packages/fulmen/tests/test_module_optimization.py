"""What a module does with optimizers: manual steps, toggling, clipping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from fulmen.module import LightningModule
from fulmen.optimizer import LightningOptimizer
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable


class Gan(LightningModule):
    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(2, 2)
        self.discriminator = nn.Linear(2, 1)
        self.shared = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)


class Steps:
    """What the Trainer offers while it trains manually."""

    def __init__(self, optimizers: list[Any]) -> None:
        self.optimizers = optimizers
        self.backwards: list[dict[str, Any]] = []

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.backwards.append(kwargs)
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]  # its owner has left it untyped


def attach(module: LightningModule, optimizers: list[Any], **more: Any) -> Any:
    wrapped = [LightningOptimizer(optimizer, optimizer.step) for optimizer in optimizers]
    trainer = SimpleNamespace(
        optimizers=optimizers,
        _manual=Steps(wrapped),
        lr_scheduler_configs=[],
        gradient_clip_val=None,
        gradient_clip_algorithm="norm",
        **more,
    )
    module.trainer = trainer
    return trainer


def gan() -> tuple[Gan, SGD, SGD]:
    module = Gan()
    first = SGD([*module.generator.parameters(), *module.shared.parameters(), module.frozen], lr=0.1)
    second = SGD([*module.discriminator.parameters(), *module.shared.parameters()], lr=0.1)
    attach(module, [first, second])
    return module, first, second


def needs(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.proves("10.13")
def test_one_optimizer_is_given_alone_and_several_as_a_list() -> None:
    module, first, second = gan()

    wrapped = module.optimizers()
    assert [optimizer.optimizer for optimizer in wrapped] == [first, second]
    assert module.optimizers(use_pl_optimizer=False) == [first, second]
    attach(module, [first])
    assert module.optimizers().optimizer is first
    assert module.optimizers(use_pl_optimizer=False) is first


def test_outside_of_manual_steps_the_optimizers_are_the_users() -> None:
    module, first, _ = gan()
    attach(module, [first])._manual = None

    assert module.optimizers() is first


@pytest.mark.proves("10.13")
def test_schedulers_are_given_like_optimizers() -> None:
    module, first, _ = gan()
    trainer = attach(module, [first])
    assert module.lr_schedulers() is None
    one, two = StepLR(first, 1), StepLR(first, 2)
    trainer.lr_scheduler_configs = [SimpleNamespace(scheduler=one)]
    assert module.lr_schedulers() is one
    trainer.lr_scheduler_configs.append(SimpleNamespace(scheduler=two))
    assert module.lr_schedulers() == [one, two]


@pytest.mark.proves("10.13")
def test_manual_backward_goes_through_the_trainer() -> None:
    module, _, _ = gan()
    module.manual_backward(module.generator(torch.ones(1, 2)).sum(), retain_graph=True)

    assert module.trainer._manual.backwards == [{"retain_graph": True}]
    assert module.generator.weight.grad is not None


@pytest.mark.proves("10.13")
def test_manual_backward_needs_manual_optimization_and_a_step() -> None:
    module, first, _ = gan()
    module.automatic_optimization = True
    with pytest.raises(MisconfigurationException, match="automatic_optimization is True"):
        module.manual_backward(torch.ones(1))
    module.automatic_optimization = False
    attach(module, [first])._manual = None
    with pytest.raises(MisconfigurationException, match="outside of training"):
        module.manual_backward(torch.ones(1))


@pytest.mark.proves("10.13", "10.14")
@pytest.mark.parametrize("wrapped", [False, True])
def test_toggling_leaves_only_one_optimizers_parameters_needing_gradients(wrapped: bool) -> None:
    module, _, _ = gan()
    before = needs(module)
    optimizers = module.optimizers(use_pl_optimizer=wrapped)

    module.toggle_optimizer(optimizers[0])
    assert needs(module) == {"generator.weight", "generator.bias", "shared.weight", "shared.bias"}
    module.untoggle_optimizer(optimizers[0])
    assert needs(module) == before

    with module.toggled_optimizer(optimizers[1]):
        assert needs(module) == {"discriminator.weight", "discriminator.bias", "shared.weight", "shared.bias"}
    assert needs(module) == before


@pytest.mark.proves("10.13", "10.14")
def test_toggling_from_one_to_the_next_forgets_nothing() -> None:
    module, first, second = gan()
    before = needs(module)

    module.toggle_optimizer(first)
    module.toggle_optimizer(second)
    assert needs(module) == {"discriminator.weight", "discriminator.bias", "shared.weight", "shared.bias"}
    module.untoggle_optimizer(second)

    assert needs(module) == before


def test_what_happens_to_the_toggled_parameters_meanwhile_stays() -> None:
    module, first, _ = gan()
    with module.toggled_optimizer(first):
        module.generator.bias.requires_grad = False

    assert "generator.bias" not in needs(module)


@pytest.mark.proves("10.13", "10.14")
def test_an_error_within_the_block_untoggles() -> None:
    module, first, _ = gan()
    before = needs(module)
    with pytest.raises(KeyError), module.toggled_optimizer(first):
        raise KeyError

    assert needs(module) == before


@pytest.mark.proves("10.13")
@pytest.mark.parametrize(
    ("trainers", "given", "clipped"),
    [
        ((None, "norm"), (None, None), None),
        ((0.5, "norm"), (None, None), (0.5, "norm")),
        ((0.5, "value"), (None, None), (0.5, "value")),
        ((None, "norm"), (2.0, "value"), (2.0, "value")),
        ((None, "norm"), (2.0, None), (2.0, "norm")),
        ((0.5, "value"), (0.5, "value"), (0.5, "value")),
    ],
)
def test_clipping_uses_what_the_module_or_the_trainer_says(trainers: Any, given: Any, clipped: Any) -> None:
    module, first, _ = gan()
    calls: list[Any] = []
    trainer = attach(module, [first], strategy=SimpleNamespace(clip_gradients=lambda *args: calls.append(args)))
    trainer.gradient_clip_val, trainer.gradient_clip_algorithm = trainers

    module.configure_gradient_clipping(module.optimizers(), *given)

    assert calls == ([] if clipped is None else [(first, *clipped)])


@pytest.mark.proves("10.6", "10.13")
def test_clipping_twice_with_other_values_is_refused() -> None:
    module, first, _ = gan()
    trainer = attach(module, [first])
    trainer.gradient_clip_val = 0.5
    with pytest.raises(
        MisconfigurationException, match=r"gradient_clip_val=1\.0, and the Trainer has gradient_clip_val=0\.5"
    ):
        module.clip_gradients(first, 1.0)
    with pytest.raises(MisconfigurationException, match="gradient_clip_algorithm='value'"):
        module.clip_gradients(first, gradient_clip_algorithm="value")
    trainer.gradient_clip_val = None
    with pytest.raises(MisconfigurationException, match="'norm' or 'value'"):
        module.clip_gradients(first, 1.0, "values")


def test_the_default_steps_do_the_obvious() -> None:
    module = LightningModule()
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=0.5)
    seen: list[Any] = []

    def closure() -> Tensor:
        module.optimizer_zero_grad(0, 0, optimizer)
        loss = weight.sum()
        module.backward(loss)
        return loss

    module.optimizer_step(0, 0, optimizer, closure)
    assert weight.item() == 0.5

    scheduler = SimpleNamespace(step=lambda *metric: seen.append(metric))
    module.lr_scheduler_step(scheduler, None)
    module.lr_scheduler_step(scheduler, 0.3)
    assert seen == [(), (0.3,)]


@pytest.mark.proves("10.19")
def test_gathering_keeps_the_structure() -> None:
    module = LightningModule()
    stack: Callable[..., Tensor] = lambda tensor, group, sync_grads: torch.stack([tensor, tensor + 1])  # noqa: E731
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(all_gather=stack))  # type: ignore[assignment]  # a stand-in

    gathered = module.all_gather({"a": torch.zeros(2), "b": [1.5, "text"]})

    assert torch.equal(gathered["a"], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert torch.equal(gathered["b"][0], torch.tensor([1.5, 2.5]))
    assert gathered["b"][1] == "text"

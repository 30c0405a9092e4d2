"""What configure_optimizers may return."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from fulmen.optimizer import LRSchedulerConfig, NoOptimizer, parse_optimizers
from fulmen_protocols import MisconfigurationException


def an_optimizer() -> SGD:
    return SGD(nn.Linear(1, 1).parameters(), lr=0.1)


@pytest.mark.proves("10.10")
def test_one_optimizer() -> None:
    optimizer = an_optimizer()

    assert parse_optimizers(optimizer) == ([optimizer], [])


@pytest.mark.proves("10.10")
def test_lists_and_tuples_of_optimizers_with_manual_optimization() -> None:
    optimizers = [an_optimizer(), an_optimizer()]

    assert parse_optimizers(optimizers, automatic_optimization=False) == (optimizers, [])
    assert parse_optimizers(tuple(optimizers), automatic_optimization=False) == (optimizers, [])


@pytest.mark.proves("10.10")
@pytest.mark.parametrize("as_list", [True, False])
def test_two_lists(as_list: bool) -> None:
    optimizer = an_optimizer()
    scheduler = StepLR(optimizer, 1)

    optimizers, configs = parse_optimizers(([optimizer], [scheduler] if as_list else scheduler))

    assert optimizers == [optimizer]
    assert configs == [LRSchedulerConfig(scheduler)]
    assert (configs[0].interval, configs[0].frequency, configs[0].monitor) == ("epoch", 1, None)
    assert configs[0].strict is True


def test_two_lists_without_schedulers() -> None:
    optimizer = an_optimizer()

    assert parse_optimizers(([optimizer], [])) == ([optimizer], [])


@pytest.mark.proves("10.10")
def test_a_dict_with_a_scheduler_and_a_monitor_beside_it() -> None:
    optimizer = an_optimizer()
    scheduler = ReduceLROnPlateau(optimizer)

    _, [config] = parse_optimizers({"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"})

    assert config == LRSchedulerConfig(scheduler, reduce_on_plateau=True, monitor="val_loss")


@pytest.mark.proves("10.11")
def test_a_scheduler_dict_says_when_to_step() -> None:
    optimizer = an_optimizer()
    given = {
        "scheduler": StepLR(optimizer, 1),
        "name": "warm",
        "interval": "step",
        "frequency": 3,
        "monitor": "x",
        "strict": False,
    }

    _, [config] = parse_optimizers({"optimizer": optimizer, "lr_scheduler": given})

    assert vars(config) == {**given, "reduce_on_plateau": False}


@pytest.mark.proves("10.10")
def test_a_list_of_dicts_gives_each_scheduler_its_own_monitor() -> None:
    first, second = an_optimizer(), an_optimizer()
    returned = [
        {"optimizer": first, "lr_scheduler": {"scheduler": StepLR(first, 1), "interval": "step"}},
        {"optimizer": second},
    ]

    optimizers, configs = parse_optimizers(returned, automatic_optimization=False)

    assert optimizers == [first, second]
    assert [config.interval for config in configs] == ["step"]
    plateau = {"optimizer": first, "lr_scheduler": ReduceLROnPlateau(first), "monitor": "a"}
    assert parse_optimizers([plateau])[1][0].monitor == "a"


def test_what_was_returned_is_left_as_it_is() -> None:
    optimizer = an_optimizer()
    scheduler = {"scheduler": ReduceLROnPlateau(optimizer), "unknown": 1}
    returned = {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "m"}
    before = copy.copy(scheduler), copy.copy(returned)

    with pytest.warns(UserWarning, match="'unknown'"):
        parse_optimizers(returned)

    assert (scheduler, returned) == before


@pytest.mark.proves("10.10")
def test_none_trains_nothing_and_says_so() -> None:
    with pytest.warns(UserWarning, match="no optimizer"):
        [optimizer], configs = parse_optimizers(None)

    calls: list[int] = []
    optimizer.step(lambda: calls.append(1))  # type: ignore[arg-type, return-value]  # wrong on purpose
    optimizer.zero_grad()

    assert isinstance(optimizer, NoOptimizer)
    assert (calls, configs, optimizer.state_dict()) == ([1], [], {})


def test_any_object_that_is_an_optimizer_by_its_methods_is_one() -> None:
    class Mine:
        param_groups: list[dict[str, Any]] = []  # noqa: RUF012
        defaults: dict[str, Any] = {}  # noqa: RUF012
        state: dict[str, Any] = {}  # noqa: RUF012

        def step(self, closure: Any = None) -> None: ...

        def zero_grad(self, set_to_none: bool = True) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    mine = Mine()
    assert parse_optimizers(mine)[0] == [mine]


@pytest.mark.proves("10.10")
@pytest.mark.parametrize(
    "returned",
    [
        5,
        "adam",
        SGD,
        [],
        [1],
        {"lr_scheduler": None},
        {"optimizer": "adam"},
        ([1], []),
        [{"optimizer": None}],
        {},
        iter([1]),
        nn.Linear(1, 1),
    ],
)
def test_anything_else_is_refused_with_the_forms_that_are_allowed(returned: object) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"configure_optimizers returned[\s\S]*Allowed are: one optimizer"
    ):
        parse_optimizers(returned)


@pytest.mark.proves("10.12")
def test_several_optimizers_need_manual_optimization() -> None:
    with pytest.raises(MisconfigurationException, match=r"self\.automatic_optimization = False"):
        parse_optimizers([an_optimizer(), an_optimizer()])


@pytest.mark.proves("10.11")
def test_a_scheduler_of_an_optimizer_that_is_not_returned_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="StepLR of a Adam that it did not return"):
        parse_optimizers(([an_optimizer()], [StepLR(Adam([torch.ones(1)]), 1)]))


def test_a_chain_of_schedulers_of_the_returned_optimizer_is_fine() -> None:
    optimizer = an_optimizer()
    chain = SequentialLR(optimizer, [StepLR(optimizer, 1), StepLR(optimizer, 2)], milestones=[2])

    assert parse_optimizers(([optimizer], [chain]))[1][0].scheduler is chain


@pytest.mark.proves("10.11")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"interval": "batch"}, "'interval' is 'batch'"),
        ({"frequency": 0}, "'frequency' is 0"),
        ({"frequency": 1.5}, "'frequency' is 1.5"),
        ({"reduce_on_plateau": True}, "no 'monitor'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    optimizer = an_optimizer()
    with pytest.raises(MisconfigurationException, match=words):
        parse_optimizers({"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1), **settings}})


@pytest.mark.proves("10.11")
def test_a_plateau_scheduler_needs_a_monitor() -> None:
    optimizer = an_optimizer()
    with pytest.raises(MisconfigurationException, match="ReduceLROnPlateau and no 'monitor'"):
        parse_optimizers(([optimizer], [ReduceLROnPlateau(optimizer)]))


@pytest.mark.proves("10.11")
def test_a_scheduler_dict_without_scheduler_and_a_list_are_refused() -> None:
    optimizer = an_optimizer()
    with pytest.raises(MisconfigurationException, match="no 'scheduler'"):
        parse_optimizers({"optimizer": optimizer, "lr_scheduler": {"interval": "step"}})
    with pytest.raises(MisconfigurationException, match="return two lists"):
        parse_optimizers({"optimizer": optimizer, "lr_scheduler": [StepLR(optimizer, 1)]})


@pytest.mark.proves("10.10")
@pytest.mark.proves("10.11")
def test_unknown_keys_are_warned_of_with_the_nearest() -> None:
    optimizer = an_optimizer()
    with pytest.warns(UserWarning, match="Did you mean 'lr_scheduler'"):
        assert parse_optimizers({"optimizer": optimizer, "lr_schedular": None}) == ([optimizer], [])
    with pytest.warns(UserWarning, match="Did you mean 'interval'"):
        parse_optimizers({"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1), "intervall": 1}})


@pytest.mark.proves("10.11")
def test_one_cycle_per_epoch_is_warned_of_and_per_step_is_not() -> None:
    optimizer = an_optimizer()
    scheduler = OneCycleLR(optimizer, 0.1, 10)
    with pytest.warns(UserWarning, match="OneCycleLR counts steps"):
        parse_optimizers(([optimizer], [scheduler]))
    parse_optimizers({"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}})


class OwnScheduler:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@pytest.mark.proves("10.11")
def test_a_scheduler_that_is_not_torchs_needs_a_step_of_its_own() -> None:
    optimizer = an_optimizer()
    with pytest.raises(MisconfigurationException, match="Override lr_scheduler_step"):
        parse_optimizers(([optimizer], [OwnScheduler()]))
    assert parse_optimizers(([optimizer], [OwnScheduler()]), steps_own_schedulers=True)[1]
    assert parse_optimizers(([optimizer], [OwnScheduler()]), automatic_optimization=False)[1]


@pytest.mark.proves("10.11")
def test_a_scheduler_that_cannot_be_saved_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="lacks state_dict"):
        parse_optimizers(([an_optimizer()], [object()]), steps_own_schedulers=True)


@pytest.mark.proves("10.11")
def test_manual_optimization_ignores_what_steps_schedulers_and_says_so() -> None:
    optimizer = an_optimizer()
    given = {"scheduler": StepLR(optimizer, 1), "monitor": "x", "strict": True, "name": "n"}

    with pytest.warns(UserWarning, match=r"\['monitor', 'strict'\] do nothing"):
        _, [config] = parse_optimizers({"optimizer": optimizer, "lr_scheduler": given}, automatic_optimization=False)

    assert (config.name, config.monitor) == ("n", None)
    plateau = ReduceLROnPlateau(optimizer)
    assert parse_optimizers(([optimizer], [plateau]), automatic_optimization=False)[1][0].reduce_on_plateau is False

"""MetricStore on one rank, against numpy and formulas."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fulmen._metric_entry import FOLD_EVERY
from fulmen.metrics import MetricStore, scope_for
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable


class Alone:
    """The collectives of a run of one process: nothing may be asked of them."""

    rank = 0
    world_size = 1

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} communicates")


DEFAULTS: dict[str, Any] = {
    "prog_bar": False,
    "logger": None,
    "on_step": None,
    "on_epoch": None,
    "reduce_fx": "mean",
    "sync_dist": False,
    "sync_dist_group": None,
    "add_dataloader_idx": True,
    "batch_size": None,
    "metric_attribute": None,
    "rank_zero_only": False,
    "module": None,
}


def make_store(stage: str = "train", hook: str = "training_step") -> MetricStore:
    store = MetricStore(device=torch.device("cpu"), collectives=Alone(), stage=stage)
    store.scope = scope_for(hook)
    store.start_batch(torch.zeros(1, 2), 0, None)
    return store


def log(store: MetricStore, name: str, value: object, **options: Any) -> None:
    store.log(name, value, **{**DEFAULTS, **options})


def step_values(store: MetricStore) -> dict[str, float]:
    return {name: float(value) for name, value in store.step_metrics().log.items()}


def epoch_values(store: MetricStore) -> dict[str, float]:
    store.reduce_epoch()
    return {name: float(value) for name, value in store.epoch_metrics().log.items()}


finite = st.floats(-1e3, 1e3, width=32)


@pytest.mark.proves("6.17")
@settings(deadline=None, max_examples=60)
@given(
    batches=st.lists(st.tuples(finite, st.integers(1, 50)), min_size=1, max_size=3 * FOLD_EVERY),
    as_number=st.lists(st.booleans(), min_size=3 * FOLD_EVERY, max_size=3 * FOLD_EVERY),
    stated=st.booleans(),
)
def test_the_epoch_mean_is_the_mean_weighted_by_batch_size(
    batches: list[tuple[float, int]], as_number: list[bool], stated: bool
) -> None:
    store = make_store()

    for (value, size), number in zip(batches, as_number, strict=False):
        store.start_batch(torch.zeros(size, 2), 0, None)
        log(store, "x", value if number else torch.tensor(value), on_epoch=True, batch_size=size if stated else None)

    values, sizes = np.array(batches, dtype=np.float64).T
    expected = np.average(values, weights=sizes)
    assert epoch_values(store)["x_epoch"] == pytest.approx(expected, rel=1e-6, abs=1e-4)


@pytest.mark.proves("6.16")
@pytest.mark.parametrize(("name", "expected"), [("sum", np.sum), ("min", np.min), ("max", np.max)])
@settings(deadline=None, max_examples=30)
@given(values=st.lists(finite, min_size=1, max_size=2 * FOLD_EVERY + 5), split=st.integers(0, 200))
def test_sums_minima_and_maxima_ignore_the_batch_size(
    name: str, expected: Callable[[Any], float], values: list[float], split: int
) -> None:
    store = make_store()

    for index, value in enumerate(values):
        store.start_batch(torch.zeros(1 + index % 7, 2), index, None)
        log(store, "x", value if index < split else torch.tensor(value), on_step=False, on_epoch=True, reduce_fx=name)

    wanted = expected(np.array(values, dtype=np.float64))
    assert epoch_values(store)["x"] == pytest.approx(wanted, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("reduce_fx", ["mean", "sum", "min", "max"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_nan_anywhere_in_the_epoch_is_not_hidden(reduce_fx: str, as_tensor: bool) -> None:
    store = make_store()

    for value in (1.0, math.nan, 2.0):
        log(store, "x", torch.tensor(value) if as_tensor else value, on_step=False, on_epoch=True, reduce_fx=reduce_fx)

    assert math.isnan(epoch_values(store)["x"])


@pytest.mark.proves("6.20")
def test_half_precision_values_add_up_without_losing_the_small_ones() -> None:
    store = make_store()

    for _ in range(1000):
        log(store, "x", torch.tensor(0.1, dtype=torch.bfloat16), on_step=False, on_epoch=True, reduce_fx="sum")

    exact = 1000 * float(torch.tensor(0.1, dtype=torch.bfloat16))
    assert epoch_values(store)["x"] == pytest.approx(exact, rel=1e-6)


def test_values_of_two_dtypes_keep_the_wider_ones_precision() -> None:
    store = make_store()

    log(store, "x", torch.tensor(1.0, dtype=torch.float16), on_step=False, on_epoch=True)
    log(store, "x", torch.tensor(math.pi, dtype=torch.float64), on_step=False, on_epoch=True)

    assert epoch_values(store)["x"] == pytest.approx((1 + math.pi) / 2, rel=1e-15)


# Values that the user changes afterwards ---------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_a_running_total_that_is_updated_in_place_is_recorded_as_it_was_each_step(grad: bool) -> None:
    store = make_store()
    total = torch.zeros(())
    seen = []

    with torch.set_grad_enabled(grad):
        for step in range(20):
            log(store, "total", total, on_epoch=True, reduce_fx="sum")
            seen.append(float(total))
            total += step
            assert step_values(store)["total_step"] == seen[-1]

    assert epoch_values(store)["total_epoch"] == sum(seen)


def test_a_loss_that_grows_in_place_after_it_was_logged_is_recorded_as_it_was() -> None:
    store = make_store()
    weight = torch.ones((), requires_grad=True)
    recorded = []

    for step in range(20):
        loss = weight * step
        log(store, "part", loss, on_epoch=True, reduce_fx="sum")
        recorded.append(loss.item())
        loss += 100.0

    assert epoch_values(store)["part_epoch"] == sum(recorded)


def test_a_parameter_that_an_optimizer_changes_is_recorded_as_it_was() -> None:
    store = make_store()
    scale = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([scale], lr=0.5)
    seen = []

    for _ in range(10):
        optimizer.zero_grad()
        (scale * 2).backward()
        log(store, "scale", scale, on_epoch=True, reduce_fx="sum")
        seen.append(scale.item())
        optimizer.step()

    assert epoch_values(store)["scale_epoch"] == sum(seen)


def test_an_element_of_a_reused_buffer_is_recorded_as_it_was() -> None:
    store = make_store()
    buffer = torch.zeros(4)

    for step in range(12):
        buffer[1] = step
        log(store, "x", buffer[1], on_epoch=True, reduce_fx="sum")

    assert epoch_values(store)["x_epoch"] == sum(range(12))


def test_an_element_of_a_buffer_that_is_written_to_only_later_is_recorded_as_it_was() -> None:
    store = make_store()
    buffer = torch.ones(4)

    for step in range(12):
        if step >= 6:
            buffer[1] = step
        log(store, "x", buffer[1], on_epoch=True, reduce_fx="sum")

    assert epoch_values(store)["x_epoch"] == 6 * 1 + sum(range(6, 12))


def test_values_that_were_built_in_place_count_like_others() -> None:
    store = make_store()

    for step in range(12):
        value = torch.zeros(())
        value += step
        log(store, "x", value, on_epoch=True, reduce_fx="sum")

    assert epoch_values(store)["x_epoch"] == sum(range(12))


def test_a_value_changed_in_inference_mode_is_recorded_as_it_was() -> None:
    store = make_store("validate", "validation_step")

    with torch.inference_mode():
        for step in range(12):
            value = torch.tensor(float(step))
            log(store, "x", value, reduce_fx="sum")
            value += 1000

    assert epoch_values(store)["x"] == sum(range(12))


def test_a_value_changed_for_the_first_time_after_many_steps_is_left_out_and_said_so() -> None:
    store = make_store()
    values = [torch.tensor(float(step)) for step in range(10)]

    for value in values:
        log(store, "x", value, on_epoch=True, reduce_fx="sum")
    values[8] += 1000

    with pytest.warns(UserWarning, match="'x' was changed in place"):
        assert epoch_values(store)["x_epoch"] == sum(range(10)) - 8


def test_logging_keeps_no_graph_alive() -> None:
    store = make_store()
    weight = torch.ones(3, requires_grad=True)

    for _ in range(10):
        log(store, "x", (weight * 2).sum(), on_epoch=True)

    assert not any(value.requires_grad for value in store.step_metrics().log.values() if isinstance(value, Tensor))
    assert not epoch_tensor(store).requires_grad


def epoch_tensor(store: MetricStore) -> Tensor:
    store.reduce_epoch()
    return store.callback_metrics["x"]


def test_epoch_values_of_inference_mode_can_be_used_in_training() -> None:
    store = make_store("validate", "validation_step")

    with torch.inference_mode():
        for _ in range(5):
            log(store, "x", torch.tensor(2.0))
        value = epoch_tensor(store)

    weight = torch.ones((), requires_grad=True)
    (weight * value).backward()
    assert weight.grad is not None
    assert weight.grad.item() == 2.0


def test_no_logged_value_is_read_by_the_host_before_a_declared_point() -> None:
    # A meta tensor has no value: whatever reads one fails.
    store = MetricStore(device=torch.device("meta"), collectives=Alone(), stage="train")
    store.scope = scope_for("training_step")
    store.start_batch(torch.zeros(4, 2), 0, None)

    for step in range(2 * FOLD_EVERY + 1):
        store.start_batch(torch.zeros(1 + step % 3, 2), step, None)
        for reduce_fx in ("mean", "sum", "min", "max"):
            log(store, reduce_fx, torch.ones((), device="meta"), on_epoch=True, prog_bar=True, reduce_fx=reduce_fx)
    store.reduce_epoch()

    assert set(store.callback_metrics) == {
        f"{op}{end}" for op in ("mean", "sum", "min", "max") for end in ("", "_epoch")
    }
    with pytest.raises(RuntimeError):
        float(store.callback_metrics["mean"])


# Names -------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("6.13")
def test_a_metric_of_step_and_epoch_is_forked_for_loggers_and_known_to_callbacks_by_all_names() -> None:
    store = make_store()
    log(store, "loss", 1.0, on_step=True, on_epoch=True, prog_bar=True)
    log(store, "loss", 3.0, on_step=True, on_epoch=True, prog_bar=True)

    assert store.logged_metrics == {"loss_step": 3.0}
    assert store.progress_bar_metrics == {"loss_step": 3.0}
    assert store.callback_metrics == {"loss": 3.0, "loss_step": 3.0}

    store.reduce_epoch()

    assert store.logged_metrics == {"loss_epoch": 2.0}
    assert store.callback_metrics == {"loss": 2.0, "loss_epoch": 2.0}


@pytest.mark.proves("6.13")
def test_a_metric_of_one_kind_keeps_its_name() -> None:
    store = make_store()
    log(store, "step_only", 1.0)
    log(store, "epoch_only", 2.0, on_step=False, on_epoch=True)

    assert store.callback_metrics == {"step_only": 1.0}
    store.reduce_epoch()
    assert store.callback_metrics == {"epoch_only": 2.0}


@pytest.mark.proves("6.10")
def test_logger_false_hides_a_metric_from_loggers_alone() -> None:
    store = make_store()
    log(store, "x", 1.0, logger=False, prog_bar=True)

    view = store.step_metrics()

    assert (view.log, view.bar, view.callback) == ({}, {"x": 1.0}, {"x": 1.0})


@pytest.mark.proves("6.14")
def test_callbacks_see_no_step_values_of_evaluation() -> None:
    store = make_store("validate", "validation_step")
    log(store, "x", 1.0, on_step=True, on_epoch=True)

    assert store.logged_metrics == {"x_step": 1.0}
    assert store.callback_metrics == {}
    store.reduce_epoch()
    assert store.callback_metrics == {"x": 1.0, "x_epoch": 1.0}


@pytest.mark.proves("6.24")
def test_each_dataloader_has_metrics_of_its_own() -> None:
    store = make_store("validate", "validation_step")
    for loader in (0, 1):
        store.start_batch(torch.zeros(2, 2), 0, loader)
        log(store, "x", float(loader), on_step=True, on_epoch=True)
        log(store, f"own{loader}", 5.0, add_dataloader_idx=False)
    store.scope = scope_for("on_validation_epoch_end")
    log(store, "end", 7.0)
    store.reduce_epoch()

    assert store.epoch_metrics().log == {
        "x_epoch/dataloader_idx_0": 0.0,
        "own0": 5.0,
        "x_epoch/dataloader_idx_1": 1.0,
        "own1": 5.0,
        "end": 7.0,
    }
    assert "x_epoch/dataloader_idx_0" not in store.epoch_metrics(1).log
    assert "end" in store.epoch_metrics(1).log


@pytest.mark.proves("6.15")
def test_the_same_name_in_two_hooks_is_two_metrics() -> None:
    store = make_store()
    log(store, "x", 1.0, on_step=False, on_epoch=True)
    store.scope = scope_for("on_train_batch_end")
    log(store, "x", 5.0, on_step=False, on_epoch=True)

    assert epoch_values(store)["x"] == 5.0, "the later hook's value wins"


def test_reset_starts_the_epoch_anew() -> None:
    store = make_store()
    log(store, "x", 1.0, on_epoch=True)
    store.reduce_epoch()

    store.reset()
    assert store.callback_metrics == {}
    store.start_batch(torch.zeros(1, 1), 0, None)
    log(store, "x", 4.0, on_epoch=True)

    assert epoch_values(store)["x_epoch"] == 4.0


def test_values_logged_after_the_first_reduction_count() -> None:
    store = make_store()
    log(store, "x", 1.0, on_epoch=True)
    store.reduce_epoch()
    store.scope = scope_for("on_train_epoch_end")
    log(store, "late", 9.0)

    assert float(store.callback_metrics["late"]) == 9.0
    assert epoch_values(store) == {"x_epoch": 1.0, "late": 9.0}


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.proves("6.12")
@pytest.mark.parametrize("hook", ["predict_step", "on_fit_start", "setup", "configure_optimizers", "on_train_end"])
def test_a_hook_that_cannot_log_says_its_name_and_what_to_do(hook: str) -> None:
    store = make_store()
    store.scope = scope_for(hook)

    with pytest.raises(MisconfigurationException, match=rf"cannot be called in {hook}: .+"):
        log(store, "x", 1.0)


@pytest.mark.proves("6.12")
@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        ("training_step", (True, False)),
        ("on_train_batch_start", (True, False)),
        ("optimizer_step", (True, False)),
        ("validation_step", (False, True)),
        ("on_test_batch_end", (False, True)),
        ("on_train_epoch_end", (False, True)),
        ("on_validation_start", (False, True)),
    ],
)
def test_each_hook_has_its_own_defaults(hook: str, expected: tuple[bool, bool]) -> None:
    store = make_store("train", hook)
    log(store, "x", 1.0)
    on_step = "x" in store.step_metrics().log
    assert (on_step, "x" in epoch_values(store)) == expected


@pytest.mark.proves("6.12")
def test_step_values_in_an_epoch_hook_are_refused() -> None:
    store = make_store("train", "on_train_epoch_end")
    with pytest.raises(MisconfigurationException, match="once an epoch"):
        log(store, "x", 1.0, on_step=True)


@pytest.mark.proves("6.12")
def test_logging_outside_of_hooks_is_refused() -> None:
    store = make_store()
    store.scope = None
    with pytest.raises(MisconfigurationException, match="no hook of the Trainer"):
        log(store, "x", 1.0)


def test_a_misspelt_hook_is_named_with_the_nearest_one() -> None:
    with pytest.raises(MisconfigurationException, match="Did you mean 'training_step'"):
        scope_for("trainig_step")


@pytest.mark.proves("6.15")
def test_the_same_name_with_other_options_in_one_hook_is_refused() -> None:
    store = make_store()
    log(store, "x", 1.0)
    with pytest.raises(MisconfigurationException, match="prog_bar was False, now True"):
        log(store, "x", 1.0, prog_bar=True)


@pytest.mark.proves("6.16")
def test_an_unknown_reduction_points_to_torchmetrics() -> None:
    with pytest.raises(MisconfigurationException, match="torchmetrics"):
        log(make_store(), "x", 1.0, reduce_fx="median")
    with pytest.raises(MisconfigurationException, match="torchmetrics"):
        log(make_store(), "x", 1.0, reduce_fx=torch.std)


@pytest.mark.proves("6.16")
@pytest.mark.parametrize("reduce_fx", ["avg", "MEAN", torch.mean])
def test_means_are_known_by_all_their_names(reduce_fx: Any) -> None:
    store = make_store()
    log(store, "x", 1.0, on_epoch=True, reduce_fx=reduce_fx)
    log(store, "x", 3.0, on_epoch=True, reduce_fx=reduce_fx)
    assert epoch_values(store)["x_epoch"] == 2.0


@pytest.mark.proves("6.24")
def test_a_name_with_the_dataloader_ending_is_refused_unless_it_is_not_added() -> None:
    store = make_store("validate", "validation_step")
    with pytest.raises(MisconfigurationException, match="leave it out"):
        log(store, "x/dataloader_idx_0", 1.0)
    log(store, "x/dataloader_idx_0", 1.0, add_dataloader_idx=False)


@pytest.mark.proves("6.11")
@pytest.mark.parametrize("value", ["text", {"a": 1.0}, None, [1.0]])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="log a number"):
        log(make_store(), "x", value)


@pytest.mark.proves("6.11")
def test_a_tensor_of_several_elements_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"\(3,\)"):
        log(make_store(), "x", torch.ones(3))


@pytest.mark.proves("6.11")
@pytest.mark.parametrize("value", [3, True, np.float32(3), np.int64(3), torch.tensor([[3.0]]), torch.tensor([3.0])])
def test_numbers_and_one_element_tensors_of_any_shape_are_logged(value: Any) -> None:
    store = make_store()
    for _ in range(FOLD_EVERY + 1):
        log(store, "x", value, on_epoch=True)
    assert step_values(store)["x_step"] == float(value)
    assert epoch_values(store)["x_epoch"] == float(value)


@pytest.mark.proves("6.20")
def test_integer_tensors_are_converted_with_one_warning() -> None:
    store = make_store()
    with pytest.warns(UserWarning, match="int64"):
        log(store, "x", torch.tensor(3), on_epoch=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log(store, "x", torch.tensor(5), on_epoch=True)
    assert epoch_values(store)["x_epoch"] == 4.0


# Batch size --------------------------------------------------------------------------------------------------------


@pytest.mark.proves("6.17")
@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 2), 3),
        (torch.zeros(()), 1),
        ([torch.zeros(4), torch.zeros(4, 2)], 4),
        ({"a": {"b": torch.zeros(5, 1)}}, 5),
        (["some", "text", "here"], 3),
        ({"text": ["a", "b"], "more": None}, 2),
    ],
)
def test_the_batch_size_is_the_first_tensors_leading_size(batch: object, size: int) -> None:
    store = make_store()
    store.start_batch(batch, 0, None)
    log(store, "x", 1.0, on_epoch=True)
    log(store, "x", 7.0, on_epoch=True, batch_size=1)
    assert epoch_values(store)["x_epoch"] == pytest.approx((size * 1.0 + 7.0) / (size + 1))


@pytest.mark.proves("6.17")
def test_a_batch_whose_tensors_differ_in_size_warns_once() -> None:
    store = make_store()
    store.start_batch((torch.zeros(3), torch.zeros(4)), 0, None)
    with pytest.warns(UserWarning, match="batch_size="):
        log(store, "x", 1.0, on_epoch=True)
    store.start_batch((torch.zeros(3), torch.zeros(4)), 1, None)
    log(store, "x", 1.0, on_epoch=True)


@pytest.mark.proves("6.17")
def test_a_batch_without_a_size_asks_for_one_only_when_a_mean_needs_it() -> None:
    store = make_store()
    store.start_batch(iter([1]), 0, None)
    log(store, "step", 1.0)
    log(store, "sum", 1.0, on_epoch=True, reduce_fx="sum")
    log(store, "told", 1.0, on_epoch=True, batch_size=4)

    with pytest.raises(MisconfigurationException, match="pass batch_size"):
        log(store, "mean", 1.0, on_epoch=True)


def test_values_of_epoch_hooks_weigh_one() -> None:
    store = make_store()
    store.start_batch(torch.zeros(50, 2), 0, None)
    store.scope = scope_for("on_train_epoch_end")
    log(store, "x", 1.0)
    log(store, "x", 2.0, batch_size=3)
    assert epoch_values(store)["x"] == 1.75


# Resuming ----------------------------------------------------------------------------------------------------------


def test_a_run_that_resumes_in_mid_epoch_ends_it_with_the_same_values(tmp_path: Any) -> None:
    straight, first, second = make_store(), make_store(), make_store()
    batches = [(torch.randn(()), size) for size in range(1, 90)]

    def feed(store: MetricStore, part: list[tuple[Tensor, int]]) -> None:
        for value, size in part:
            store.start_batch(torch.zeros(size, 2), 0, None)
            for op in ("mean", "sum", "min", "max"):
                log(store, op, value, on_epoch=True, reduce_fx=op)
            log(store, "number", float(value), on_step=False, on_epoch=True)

    feed(straight, batches)
    feed(first, batches[:50])
    torch.save(first.state_dict(), tmp_path / "metrics.pt")
    second.load_state_dict(torch.load(tmp_path / "metrics.pt", weights_only=True))
    feed(second, batches[50:])

    assert epoch_values(second) == pytest.approx(epoch_values(straight), rel=1e-6)


def test_a_restored_metric_logged_with_new_options_starts_anew() -> None:
    first, second = make_store(), make_store()
    log(first, "x", 1.0, on_epoch=True)
    second.load_state_dict(first.state_dict())
    log(second, "x", 5.0, on_epoch=True, reduce_fx="sum")
    assert epoch_values(second)["x_epoch"] == 5.0


def test_copying_everything_can_be_asked_for() -> None:
    store = make_store()
    store.clone_values = True
    static = [torch.tensor(float(step)) for step in range(10)]
    for value in static:
        log(store, "x", value, on_epoch=True, reduce_fx="sum")
    for value in static:
        value.untyped_storage().fill_(0)  # as a graph replay overwrites memory, unseen by autograd

    assert epoch_values(store)["x_epoch"] == sum(range(10))

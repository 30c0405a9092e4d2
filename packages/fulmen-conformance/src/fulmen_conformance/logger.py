"""The kit for loggers."""

from __future__ import annotations

import copy
import math
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pytest
import torch

from fulmen_conformance._kit import Kit, need, whole_or_absent
from fulmen_conformance._reference import batches, equal_bits, tiny_net
from fulmen_protocols import Logger, SupportsGraph, SupportsLogDir, missing_members

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fulmen_protocols import LoggerStatus

    Metrics = Mapping[str, Sequence[tuple[int, float]]]

__all__ = ["LoggerConformance"]


class LoggerConformance(Kit):
    """Proves a ``Logger``.

    Give the fixtures ``logger`` and ``read_metrics`` (a raw reader of what the logger wrote), and, where it can be
    read, ``read_hyperparams``. All of one test see the same run.
    """

    @pytest.fixture
    def logger(self) -> Logger:
        """The logger under test: a new run for each test."""
        raise NotImplementedError("define a fixture `logger` that returns the logger under test")

    @pytest.fixture
    def read_metrics(self) -> Callable[[], Metrics]:
        """A raw reader that does not use the logger: each metric's ``(step, value)`` pairs in order of writing."""
        raise NotImplementedError("define a fixture `read_metrics` that reads what the logger wrote")

    @pytest.fixture
    def read_hyperparams(self) -> Callable[[], Mapping[str, object]] | None:
        """A raw reader of the hyperparameters of the run, flat or nested; None: they cannot be read."""
        return None

    def test_it_has_every_member_of_the_protocol(self, logger: Logger) -> None:
        """``Logger`` has no optional member. On failure look at the names listed as missing."""
        assert missing_members(Logger, logger) == []

    def test_each_ability_is_whole_or_absent(self, logger: Logger) -> None:
        """Half an ability is never used. On failure add the members listed, or remove their siblings."""
        assert whole_or_absent(logger, (SupportsLogDir,)) == []

    def test_its_name_and_version_stay_the_same(self, logger: Logger) -> None:
        """Checkpoints are filed under them. On failure look at properties that count up each time they are read."""
        name, version = logger.name, logger.version

        assert name is None or isinstance(name, str)
        assert version is None or isinstance(version, (int, str))
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.save()
        assert (logger.name, logger.version) == (name, version)
        logger.finalize("success")

    def test_saved_metrics_are_there_with_their_steps(
        self, logger: Logger, read_metrics: Callable[[], Metrics]
    ) -> None:
        """On failure look at ``log_metrics`` and ``save``: is a buffer left unwritten, a step renumbered?"""
        logger.log_metrics({"loss": 0.5, "train/acc": 0.25}, step=3)
        logger.log_metrics({"loss": 0.125, "train/acc": 0.75}, step=10)

        logger.save()

        assert _pairs(read_metrics(), "loss") == [(3, 0.5), (10, 0.125)]
        assert _pairs(read_metrics(), "train/acc") == [(3, 0.25), (10, 0.75)]
        logger.finalize("success")

    @pytest.mark.parametrize("status", ["success", "failed", "finished"])
    def test_finalize_writes_everything_whatever_the_status(
        self, logger: Logger, read_metrics: Callable[[], Metrics], status: LoggerStatus
    ) -> None:
        """A failed run needs its last rows most. On failure look at ``finalize`` for each status."""
        logger.log_metrics({"loss": 0.5}, step=0)

        logger.finalize(status)

        assert _pairs(read_metrics(), "loss") == [(0, 0.5)]

    def test_metrics_that_appear_later_do_not_lose_earlier_ones(
        self, logger: Logger, read_metrics: Callable[[], Metrics]
    ) -> None:
        """Validation metrics come late. On failure look at headers and columns fixed by the first row."""
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.save()
        logger.log_metrics({"val_loss": 2.0}, step=1)
        logger.save()
        logger.log_metrics({"loss": 3.0, "val_loss": 4.0, "lr": 5.0}, step=2)

        logger.finalize("success")

        assert _pairs(read_metrics(), "loss") == [(0, 1.0), (2, 3.0)]
        assert _pairs(read_metrics(), "val_loss") == [(1, 2.0), (2, 4.0)]
        assert _pairs(read_metrics(), "lr") == [(2, 5.0)]

    def test_two_calls_at_one_step_are_both_kept(self, logger: Logger, read_metrics: Callable[[], Metrics]) -> None:
        """Callbacks and the module log apart. On failure look at rows that are keyed by step alone."""
        logger.log_metrics({"loss": 1.0}, step=5)
        logger.log_metrics({"lr": 0.5}, step=5)

        logger.finalize("success")

        assert _pairs(read_metrics(), "loss") == [(5, 1.0)]
        assert _pairs(read_metrics(), "lr") == [(5, 0.5)]

    def test_metrics_without_a_step_are_kept_in_order(
        self, logger: Logger, read_metrics: Callable[[], Metrics]
    ) -> None:
        """``step`` may be None. On failure look at what the logger puts in its place: steps may not go down."""
        for value in (1.0, 2.0, 3.0):
            logger.log_metrics({"loss": value})

        logger.finalize("success")

        pairs = _pairs(read_metrics(), "loss")
        assert [value for _, value in pairs] == [1.0, 2.0, 3.0]
        assert [step for step, _ in pairs] == sorted(step for step, _ in pairs)

    def test_values_are_kept_to_float32_and_so_are_nan_and_infinity(
        self, logger: Logger, read_metrics: Callable[[], Metrics]
    ) -> None:
        """A diverged loss must be seen. On failure look for rounding to few digits, and for NaN dropped or zeroed."""
        values = [math.pi, 1e-12, -1e30, 7, math.nan, math.inf, -math.inf]

        for step, value in enumerate(values):
            logger.log_metrics({"loss": value}, step=step)
        logger.finalize("success")

        pairs = _pairs(read_metrics(), "loss")
        assert [step for step, _ in pairs] == list(range(len(values)))
        assert [value for _, value in pairs] == pytest.approx(values, rel=1e-6, abs=0.0, nan_ok=True)

    def test_many_rows_are_all_kept(self, logger: Logger, read_metrics: Callable[[], Metrics]) -> None:
        """More than any buffer holds. On failure look at what happens when the buffer is full."""
        for step in range(1500):
            logger.log_metrics({"loss": float(step)}, step=step)

        logger.finalize("success")

        assert _pairs(read_metrics(), "loss") == [(step, float(step)) for step in range(1500)]

    def test_logging_after_finalize_reopens_the_run(self, logger: Logger, read_metrics: Callable[[], Metrics]) -> None:
        """Fit, then test. On failure look at files opened anew with mode "w", and at closed writers."""
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.finalize("success")

        logger.log_metrics({"loss": 2.0, "test_loss": 3.0}, step=1)
        logger.finalize("success")

        assert _pairs(read_metrics(), "loss") == [(0, 1.0), (1, 2.0)]
        assert _pairs(read_metrics(), "test_loss") == [(1, 3.0)]

    def test_nothing_logged_is_nothing_to_fail_on(self, logger: Logger) -> None:
        """A run may log nothing. On failure look at ``save`` and ``finalize`` before the first row, or called twice."""
        logger.save()
        logger.finalize("success")
        logger.finalize("success")

    def test_what_it_is_given_is_left_alone(self, logger: Logger) -> None:
        """Several loggers get one dict. On failure look for ``pop`` and added keys in ``log_metrics``."""
        metrics, params = {"loss": 1.0, "epoch": 0.0}, {"lr": 0.1, "net": {"width": 3}}
        before = copy.deepcopy((metrics, params))

        logger.log_metrics(metrics, step=0)
        logger.log_hyperparams(params)
        logger.finalize("success")

        assert (metrics, params) == before

    def test_what_it_was_given_may_change_later(self, logger: Logger, read_metrics: Callable[[], Metrics]) -> None:
        """Callers reuse their dict. On failure look for a reference kept where a copy is needed."""
        metrics = {"loss": 1.0}
        logger.log_metrics(metrics, step=0)
        metrics["loss"] = 2.0
        logger.log_metrics(metrics, step=1)

        logger.finalize("success")

        assert _pairs(read_metrics(), "loss") == [(0, 1.0), (1, 2.0)]

    def test_hyperparameters_of_any_kind_are_taken(self, logger: Logger) -> None:
        """Users pass what they have. On failure look at values that cannot be written as such: write their text."""
        logger.log_hyperparams(
            {
                "lr": 0.1,
                "layers": [1, 2],
                "net": {"width": 3, "act": torch.nn.ReLU},
                "none": None,
                "path": PurePosixPath("a/b"),
                "tensor": torch.ones(2),
                "function": math.sqrt,
            }
        )
        logger.log_hyperparams({"more": "text"})

        logger.finalize("success")

    def test_hyperparameters_are_there_and_later_ones_add_to_them(
        self, logger: Logger, read_hyperparams: Callable[[], Mapping[str, object]] | None
    ) -> None:
        """On failure look at ``log_hyperparams``: does the second call replace what the first one wrote?"""
        if read_hyperparams is None:
            pytest.skip("no fixture read_hyperparams")

        logger.log_hyperparams({"lr": 0.5, "name": "tiny"})
        logger.log_hyperparams({"width": 8})
        logger.save()
        logger.finalize("success")

        found = read_hyperparams()
        assert float(str(found["lr"])) == 0.5
        assert str(found["name"]) == "tiny"
        assert int(str(found["width"])) == 8

    def test_its_log_dir_lies_below_its_save_dir(self, logger: Logger) -> None:
        """Checkpoints follow the logger. On failure look at ``save_dir`` and ``log_dir``: both text, stable."""
        need(logger, SupportsLogDir)
        assert isinstance(logger, SupportsLogDir)

        save_dir, log_dir = logger.save_dir, logger.log_dir

        if save_dir is not None and log_dir is not None:
            assert isinstance(save_dir, str)
            assert isinstance(log_dir, str)
            assert log_dir.startswith(save_dir)
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.save()
        assert (logger.save_dir, logger.log_dir) == (save_dir, log_dir)
        logger.finalize("success")

    def test_drawing_a_graph_leaves_the_model_as_it_was(self, logger: Logger) -> None:
        """On failure look at ``log_graph``: modes, gradients, weights and random state belong to the run."""
        need(logger, SupportsGraph)
        assert isinstance(logger, SupportsGraph)
        model, untouched = tiny_net().train(), tiny_net()
        random_state = torch.get_rng_state()

        logger.log_graph(model, batches(1)[0][0])
        logger.finalize("success")

        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        for name, value in untouched.state_dict().items():
            assert equal_bits(model.state_dict()[name], value), name
        assert torch.equal(torch.get_rng_state(), random_state)


def _pairs(metrics: Metrics, name: str) -> list[tuple[int, float]]:
    assert name in metrics, f"nothing was written for {name!r}; found: {sorted(metrics)}"
    return [(int(step), float(value)) for step, value in metrics[name]]

"""The kit for exporters."""

from __future__ import annotations

import io
import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from fulmen_conformance._kit import Kit
from fulmen_conformance._reference import equal_bits
from fulmen_protocols import Exporter, FulmenError, missing_members

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[[Path, Tensor], Tensor]

__all__ = ["ExporterConformance"]


class ExporterConformance(Kit):
    """Proves an ``Exporter``.

    Give the fixtures ``exporter`` and ``run``: a raw runner that does not use the exporter and gives the output of an
    artifact (its file) for one input.
    """

    @pytest.fixture
    def exporter(self) -> Exporter:
        """The exporter under test."""
        raise NotImplementedError("define a fixture `exporter` that returns the exporter under test")

    @pytest.fixture
    def run(self) -> Run:
        """Run the artifact in a file on one input; what it returns."""
        raise NotImplementedError("define a fixture `run` that runs an artifact on one input")

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        """Options for every export of the kit; none by default."""
        return {}

    def test_it_has_every_member_of_the_protocol(self, exporter: Exporter) -> None:
        """``Exporter`` has no optional member. On failure look at the names listed as missing."""
        assert missing_members(Exporter, exporter) == []

    def test_the_artifact_computes_what_the_module_does(
        self, exporter: Exporter, run: Run, options: dict[str, Any], tmp_path: Path
    ) -> None:
        """On failure look at weights and buffers that were left out, and at the order of outputs."""
        net, x, path = _net(), _sample(3), tmp_path / "artifact"

        program = exporter.export(net, (x,), path, **options)

        assert program is not None
        torch.testing.assert_close(run(path, x), _net()(x).detach(), rtol=1e-5, atol=1e-5)

    def test_a_module_in_training_mode_is_exported_in_evaluation_mode(
        self, exporter: Exporter, run: Run, options: dict[str, Any], tmp_path: Path
    ) -> None:
        """On failure look whether dropout is still drawn, or normalisation still follows the batch."""
        net, x, path = _DropsOut(), _sample(3), tmp_path / "artifact"
        expected = net.eval()(x).detach()

        exporter.export(net.train(), (x,), path, **options)

        torch.testing.assert_close(run(path, x), expected, rtol=1e-5, atol=1e-5)

    def test_the_module_is_left_as_it_was(self, exporter: Exporter, options: dict[str, Any], tmp_path: Path) -> None:
        """A run goes on after an export. On failure look at modes, gradients, weights, buffers and random state."""
        net = nn.Sequential(_DropsOut().train(), nn.BatchNorm1d(2).eval())  # each with a mode of its own
        for parameter in net[1].parameters():
            parameter.requires_grad = False
        modes = [module.training for module in net.modules()]
        before = {name: value.clone() for name, value in net.state_dict().items()}
        random_state = torch.get_rng_state()

        exporter.export(net, (_sample(3),), tmp_path / "artifact", **options)

        assert [module.training for module in net.modules()] == modes
        for name, value in net.state_dict().items():
            assert equal_bits(value, before[name]), name
        assert [p.requires_grad for p in net.parameters()] == [True] * 4 + [False] * 2
        assert all(parameter.grad is None for parameter in net.parameters())
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_an_open_batch_takes_other_sizes(
        self, exporter: Exporter, run: Run, options: dict[str, Any], tmp_path: Path
    ) -> None:
        """``dynamic_shapes="batch"``. On failure look at sizes of the sample that became constants, 1 above all."""
        net = _net()
        for size in (1, 3):
            path = tmp_path / f"sample-of-{size}"
            exporter.export(net, (_sample(size),), path, dynamic_shapes="batch", **options)

            for other in (2, 7):
                x = _sample(other)
                torch.testing.assert_close(run(path, x), _net()(x).detach(), rtol=1e-5, atol=1e-5)

    def test_a_stream_gets_the_same_artifact(
        self, exporter: Exporter, run: Run, options: dict[str, Any], tmp_path: Path
    ) -> None:
        """On failure look at paths that are assumed where a stream may be given."""
        net, x, stream, path = _net(), _sample(3), io.BytesIO(), tmp_path / "artifact"

        exporter.export(net, (x,), stream, **options)
        path.write_bytes(stream.getvalue())

        torch.testing.assert_close(run(path, x), _net()(x).detach(), rtol=1e-5, atol=1e-5)

    def test_without_a_path_nothing_is_written(
        self, exporter: Exporter, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only the program is wanted. On failure look at default names of files."""
        monkeypatch.chdir(tmp_path)

        program = exporter.export(_net(), (_sample(3),), **options)

        assert program is not None
        assert list(tmp_path.iterdir()) == []

    def test_folders_are_made_and_nothing_else_stays_in_them(
        self, exporter: Exporter, options: dict[str, Any], tmp_path: Path
    ) -> None:
        """On failure look at temporary files beside the artifact."""
        path = tmp_path / "deep" / "er" / "artifact"

        exporter.export(_net(), (_sample(3),), path, **options)

        assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == [path]

    def test_a_new_artifact_replaces_the_old_one(
        self, exporter: Exporter, run: Run, options: dict[str, Any], tmp_path: Path
    ) -> None:
        """On failure look at files that are opened to append, or that are left alone when they exist."""
        x, path = _sample(3), tmp_path / "artifact"
        exporter.export(_net(seed=1), (x,), path, **options)

        exporter.export(_net(seed=2), (x,), path, **options)

        torch.testing.assert_close(run(path, x), _net(seed=2)(x).detach(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("existing", [False, True], ids=["nothing there", "an artifact there"])
    def test_an_artifact_that_computes_something_else_is_never_written(
        self, exporter: Exporter, options: dict[str, Any], tmp_path: Path, existing: bool
    ) -> None:
        """A capture may bake a Python value in. On failure look whether outputs are compared, and when."""
        path = tmp_path / "artifact"
        if existing:
            path.write_bytes(b"of yesterday")

        with pytest.raises(FulmenError):
            exporter.export(_Drifts(), (_sample(3),), path, **options)

        assert [entry.name for entry in tmp_path.iterdir()] == (["artifact"] if existing else [])
        assert not existing or path.read_bytes() == b"of yesterday"

    def test_a_forward_that_fails_leaves_module_and_path_alone(
        self, exporter: Exporter, options: dict[str, Any], tmp_path: Path
    ) -> None:
        """On failure look at what is restored in ``finally``, and at files that are made before they are filled."""
        net = _net().train()

        with pytest.raises(Exception):  # noqa: B017  # whichever forward raised, or the exporter makes of it
            exporter.export(net, (torch.zeros(3, 5),), tmp_path / "artifact", **options)

        assert list(tmp_path.iterdir()) == []
        assert all(module.training for module in net.modules())


def _sample(size: int) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(size))


def _net(seed: int = 0) -> nn.Module:
    """4 -> 8 -> 2, a function of ``seed``. Without annotations of its own, which TorchScript would read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


class _DropsOut(nn.Module):
    """4 -> 30 -> 2 with dropout of 30 units: that all of them survive a draw does not happen."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(4, 30)
            self.second = nn.Linear(30, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 4)`` to ``(n, 2)``."""
        out: Tensor = self.second(self.dropout(self.first(x)))
        return out


_calls = itertools.count(1)


class _Drifts(nn.Module):
    """Each call returns something else, out of Python state that no capture sees change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 4)`` to ``(n, 4)``."""
        return x * self.weight + float(next(_calls))

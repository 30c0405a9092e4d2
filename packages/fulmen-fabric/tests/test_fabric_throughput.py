"""Throughput against rates worked out by hand, and Fabric's monitor on one and on two processes."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from fulmen_fabric import Fabric, Throughput, ThroughputMonitor
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Rows:
    name = "rows"
    version = 0

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Mapping[str, object]) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...


def fed(throughput: Any, updates: int, *, seconds: float = 0.5, **more: Any) -> Any:
    """``updates`` batches of 4 samples, each of 3 items."""
    for index in range(1, updates + 1):
        throughput.update(time=index * seconds, batches=index, samples=4 * index, lengths=12 * index, **more)
    return throughput


@pytest.mark.proves("13.7")
def test_there_are_totals_at_once_and_rates_once_the_window_is_full() -> None:
    throughput = Throughput(window_size=3)
    assert throughput.compute() == {}
    assert fed(throughput, 2).compute() == {"time": 1.0, "batches": 2, "samples": 8, "lengths": 24}
    throughput.update(time=3.0, batches=3, samples=20, lengths=30)
    assert throughput.compute() == {
        "time": 3.0,
        "batches": 3,
        "samples": 20,
        "lengths": 30,
        "device/batches_per_sec": (3 - 1) / (3.0 - 0.5),
        "device/samples_per_sec": (20 - 4) / (3.0 - 0.5),
        "device/items_per_sec": (30 - 12) / (3.0 - 0.5),
    }


@pytest.mark.proves("13.7")
def test_the_window_slides() -> None:
    throughput = fed(Throughput(window_size=3), 5)
    throughput.update(time=12.5, batches=6, samples=24, lengths=72)
    assert throughput.compute()["device/batches_per_sec"] == pytest.approx(2 / (12.5 - 2.0))


@pytest.mark.proves("13.7")
def test_operations_are_those_since_the_update_before_and_mfu_is_their_share_of_the_peak() -> None:
    throughput = Throughput(available_flops=1000.0, window_size=3)
    for index, flops in enumerate((100, 300, 200), start=1):
        throughput.update(time=float(index), batches=index, samples=index, flops=flops)
    computed = throughput.compute()
    assert computed["device/flops_per_sec"] == (300 + 200) / 2
    assert computed["device/mfu"] == 0.25


@pytest.mark.proves("13.7")
def test_with_several_devices_their_rates_together_are_there_too() -> None:
    computed = fed(Throughput(available_flops=100.0, world_size=8, window_size=2), 2, flops=10).compute()
    for name, rate in (("batches", 2.0), ("samples", 8.0), ("items", 24.0), ("flops", 20.0)):
        assert computed[f"device/{name}_per_sec"] == rate
        assert computed[f"{name}_per_sec"] == 8 * rate
    assert computed["device/mfu"] == 0.2
    assert "mfu" not in computed


@pytest.mark.proves("13.7")
def test_the_separator_stands_behind_device() -> None:
    computed = fed(Throughput(available_flops=100.0, window_size=2, separator="|"), 2, flops=1).compute()
    assert {"device|batches_per_sec", "device|mfu"} <= set(computed)


@pytest.mark.proves("13.7", "13.8")
def test_without_a_known_peak_there_is_no_mfu() -> None:
    computed = fed(Throughput(window_size=2), 2, flops=10).compute()
    assert "device/flops_per_sec" in computed
    assert not any("mfu" in name for name in computed)


@pytest.mark.proves("13.8")
def test_a_share_of_the_peak_above_one_is_not_reported_but_warned_about_once() -> None:
    throughput = fed(Throughput(available_flops=5.0, window_size=2), 2, flops=10)
    with pytest.warns(UserWarning, match=r"400% of available_flops=5 .* flops counts too many"):
        assert not any("mfu" in name for name in throughput.compute())
    throughput.compute()  # warnings are errors here


@pytest.mark.proves("13.7")
def test_sparse_matrix_products_have_a_higher_peak() -> None:
    assert Throughput(100.0, using_sparse_model=True).available_flops == 200
    assert Throughput(100.0, using_sparse_model=True, sparse_cuda_acceleration_factor=3).available_flops == 300
    assert Throughput(100.0, using_sparse_model=False).available_flops == 100
    assert Throughput(100.0).available_flops == 100
    assert Throughput(None, using_sparse_model=True).available_flops is None


@pytest.mark.proves("13.7")
@pytest.mark.parametrize("name", ["time", "batches", "samples", "lengths"])
def test_a_total_that_does_not_grow_is_refused_and_nothing_is_recorded(name: str) -> None:
    throughput = fed(Throughput(window_size=2), 2)
    before = throughput.compute()
    again = {"time": 9.0, "batches": 3, "samples": 12, "lengths": 99, name: before[name]}
    with pytest.raises(MisconfigurationException, match=rf"update\({name}={again[name]}\).*must grow.*reset\(\)"):
        throughput.update(**again)
    assert throughput.compute() == before


@pytest.mark.proves("13.7")
def test_counts_that_cannot_be_are_refused() -> None:
    throughput = Throughput()
    with pytest.raises(ValueError, match=r"samples=1, batches=2\).*totals so far"):
        throughput.update(time=1.0, batches=2, samples=1)
    with pytest.raises(ValueError, match=r"lengths=3, samples=4\).*total number of items"):
        throughput.update(time=1.0, batches=2, samples=4, lengths=3)
    throughput.update(time=1.0, batches=1, samples=1)
    with pytest.raises(ValueError, match=r"lengths=5\) follows lengths=None: give lengths in every"):
        throughput.update(time=2.0, batches=2, samples=2, lengths=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 0}, r"world_size=0\).*1 up"),
        ({"window_size": 1}, r"window_size=1\).*2 updates or more"),
        ({"available_flops": 0}, r"available_flops=0\).*None if it is not known"),
        (
            {"available_flops": 1.0, "using_sparse_model": True, "sparse_cuda_acceleration_factor": 0.5},
            r"sparse_cuda_acceleration_factor=0.5\).*1 or more",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Throughput(**arguments)


@pytest.mark.proves("13.7")
def test_reset_starts_anew() -> None:
    throughput = fed(Throughput(window_size=2), 2)
    throughput.reset()
    assert throughput.compute() == {}
    assert fed(throughput, 1).compute()["batches"] == 1


@pytest.mark.proves("13.7")
def test_fabrics_monitor_logs_where_it_is_told_or_one_step_further() -> None:
    rows = Rows()
    monitor = ThroughputMonitor(Fabric(accelerator="cpu", loggers=rows), window_size=2, available_flops=100.0)
    assert monitor.compute_and_log() == {}
    fed(monitor, 2, flops=10)
    computed = monitor.compute_and_log()
    monitor.compute_and_log(step=7)
    monitor.compute_and_log()

    assert computed["device/mfu"] == 0.2
    assert "batches_per_sec" not in computed, "one device"
    assert [step for step, _ in rows.rows] == [0, 1, 7, 8]
    assert rows.rows[1][1] == computed == monitor.compute()
    assert (monitor.step, monitor.world_size) == (8, 1)
    monitor.reset()
    assert monitor.compute() == {}


@pytest.mark.proves("13.8")
def test_the_cpu_has_no_known_peak() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ThroughputMonitor(Fabric(accelerator="cpu")).available_flops is None


SCRIPT = """
import json, sys
from fulmen_fabric import Fabric, ThroughputMonitor

class Rows:
    name, version, rows = "rows", 0, []
    def log_metrics(self, metrics, step=None): self.rows.append((step, dict(metrics)))
    def log_hyperparams(self, params): ...
    def save(self): ...
    def finalize(self, status): ...

if __name__ == "__main__":
    rows = Rows()
    fabric = Fabric(accelerator="cpu", devices=2, loggers=rows)
    fabric.launch()
    monitor = ThroughputMonitor(fabric, window_size=2)
    for index in (1, 2):
        monitor.update(time=index * 0.5, batches=index, samples=4 * index)
    returned = monitor.compute_and_log()
    with open(f"{sys.argv[1]}/rank{fabric.global_rank}.json", "w") as file:
        json.dump([rows.rows, returned, monitor.compute()], file)
    fabric.close()
"""


@pytest.mark.proves("13.7")
@pytest.mark.slow
def test_on_two_processes_rank_zero_logs_the_rates_of_both(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr

    (rows, returned, computed), other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert returned == computed == rows[0][1]
    assert returned["device/batches_per_sec"] == 2
    assert returned["batches_per_sec"] == 4
    assert returned["samples_per_sec"] == 16
    assert other == [[], {}, {}]

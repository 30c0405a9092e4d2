"""Throughput: batches, samples, items and floating point operations per second, over a sliding window."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from fulmen_fabric.flops import get_available_flops
from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from fulmen_fabric.fabric import Fabric

__all__ = ["Throughput", "ThroughputMonitor"]


class _Totals(NamedTuple):
    """What one ``update`` said: totals so far, and the operations since the update before."""

    time: float
    batches: int
    samples: int
    lengths: int | None
    flops: float | None


class Throughput:
    """Rates of this device, and of all devices if there are several, over the last ``window_size`` updates.

    All counts are numbers on the host: nothing here waits for a device, and nothing communicates. On an accelerator
    wait for the device before you take the time, or take times that the device itself recorded; a loop that only
    enqueues work looks faster than it is.

    Args:
        available_flops: operations per second that one device could do at best, as ``get_available_flops`` tells.
            None: unknown, then there is no ``mfu``.
        world_size: devices that do the same work at the same time; their rates are this device's times as many.
        window_size: updates over which rates are taken, at least 2. There are no rates before there are as many.
        separator: stands between ``device`` and the name of a rate.
        using_sparse_model: whether the matrix products use weights with 2:4 structured sparsity, for which a GPU's peak
            is higher. None is False.
        sparse_cuda_acceleration_factor: by how much.

    Raises:
        MisconfigurationException: a size or a factor is too small.
    """

    def __init__(
        self,
        available_flops: float | None = None,
        world_size: int = 1,
        window_size: int = 100,
        separator: str = "/",
        using_sparse_model: bool | None = None,
        sparse_cuda_acceleration_factor: float = 2.0,
    ) -> None:
        if world_size < 1:
            raise MisconfigurationException(f"Throughput(world_size={world_size!r}): use the number of devices, 1 up.")
        if window_size < 2:
            raise MisconfigurationException(
                f"Throughput(window_size={window_size!r}): a rate needs 2 updates or more in its window."
            )
        if available_flops is not None and available_flops <= 0:
            raise MisconfigurationException(
                f"Throughput(available_flops={available_flops!r}): give the device's peak in operations per second, "
                "or None if it is not known."
            )
        if using_sparse_model and sparse_cuda_acceleration_factor < 1:
            raise MisconfigurationException(
                f"Throughput(sparse_cuda_acceleration_factor={sparse_cuda_acceleration_factor!r}): sparsity makes a "
                "peak no lower. Use 1 or more; NVIDIA's figure is 2."
            )
        if available_flops is not None and using_sparse_model:
            available_flops *= sparse_cuda_acceleration_factor
        self.available_flops = available_flops
        self.separator = separator
        self.world_size = world_size
        self.window_size = window_size
        self._window: deque[_Totals] = deque(maxlen=window_size)
        self._has_warned = False

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: float | None = None
    ) -> None:
        """Say how far this device has come. All but ``flops`` are totals, which grow with every call.

        Args:
            time: seconds since the start.
            batches: batches done on this device.
            samples: samples done on this device; no fewer than batches.
            lengths: items (tokens, say) in those samples; no fewer than samples. In every call or in none.
            flops: floating point operations of this device since the call before; of one batch, if this is called after
                each. See ``measure_flops``.

        Raises:
            MisconfigurationException: a total does not grow, or is smaller than it can be; nothing is recorded then.
        """
        new = _Totals(time, batches, samples, lengths, flops)
        if samples < batches:
            raise MisconfigurationException(
                f"Throughput.update(samples={samples!r}, batches={batches!r}): samples are fewer than batches. Give "
                "the totals so far, not those of the last batch."
            )
        if lengths is not None and lengths < samples:
            raise MisconfigurationException(
                f"Throughput.update(lengths={lengths!r}, samples={samples!r}): lengths are fewer than samples. Give "
                "the total number of items in all samples so far."
            )
        if self._window:
            self._require_growth(self._window[-1], new)
        self._window.append(new)

    def _require_growth(self, last: _Totals, new: _Totals) -> None:
        if (last.lengths is None) != (new.lengths is None):
            raise MisconfigurationException(
                f"Throughput.update(lengths={new.lengths!r}) follows lengths={last.lengths!r}: give lengths in every "
                "update or in none."
            )
        for name in ("time", "batches", "samples", "lengths"):
            before, now = getattr(last, name), getattr(new, name)
            if now is not None and now <= before:
                raise MisconfigurationException(
                    f"Throughput.update({name}={now!r}) follows {name}={before!r}: totals must grow with every update. "
                    "Call reset() to start anew."
                )

    def compute(self) -> dict[str, int | float]:
        """Totals, and, once the window is full, rates.

        Returns:
            ``time`` (seconds), ``batches``, ``samples``, ``lengths``; then ``device/batches_per_sec``,
            ``device/samples_per_sec``, ``device/items_per_sec``, ``device/flops_per_sec`` and ``device/mfu``, the share
            of ``available_flops`` that was used; with several devices also ``batches_per_sec`` and so on for all of
            them together. What was not given in every update of the window is left out, as is a share above 1, which
            cannot be true; that is warned about. Empty before the first update.
        """
        window = self._window
        if not window:
            return {}
        first, last = window[0], window[-1]
        totals: dict[str, int | float] = {"time": last.time, "batches": last.batches, "samples": last.samples}
        if last.lengths is not None:
            totals["lengths"] = last.lengths
        if len(window) < self.window_size:
            return totals
        elapsed_s = last.time - first.time
        rates = {
            "batches_per_sec": (last.batches - first.batches) / elapsed_s,
            "samples_per_sec": (last.samples - first.samples) / elapsed_s,
        }
        if first.lengths is not None and last.lengths is not None:
            rates["items_per_sec"] = (last.lengths - first.lengths) / elapsed_s
        # The first update's operations were done before the window begins.
        flops = [each.flops for each in window if each.flops is not None]
        if len(flops) == len(window):
            rates["flops_per_sec"] = sum(flops[1:]) / elapsed_s
        device = {f"device{self.separator}{name}": rate for name, rate in rates.items()}
        if self.available_flops is not None and "flops_per_sec" in rates:
            share = rates["flops_per_sec"] / self.available_flops
            if share <= 1:
                device[f"device{self.separator}mfu"] = share
            else:
                self._warn_of(share)
        together = {name: rate * self.world_size for name, rate in rates.items()} if self.world_size > 1 else {}
        return {**totals, **device, **together}

    def _warn_of(self, share: float) -> None:
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"Throughput: {share:.0%} of available_flops={self.available_flops:g} operations per second cannot be "
                "used, so mfu is left out. Either flops counts too many operations per update, the time does not wait "
                "for the device, or available_flops belongs to another device or data type."
            )

    def reset(self) -> None:
        """Forget all updates."""
        self._window.clear()


class ThroughputMonitor:
    """A ``Throughput`` for Fabric: it knows the device and the number of processes, works on rank 0 and can log.

    Args:
        fabric: where it runs and what it logs to.
        kwargs: arguments of ``Throughput``. ``available_flops`` is looked up for the device and the precision's compute
            dtype if it is not given.
    """

    def __init__(
        self,
        fabric: Fabric,
        *,
        available_flops: float | None = None,
        window_size: int = 100,
        separator: str = "/",
        using_sparse_model: bool | None = None,
        sparse_cuda_acceleration_factor: float = 2.0,
    ) -> None:
        if available_flops is None:
            available_flops = get_available_flops(fabric.device, fabric.precision.plan()["compute"])
        self._fabric = fabric
        self._throughput = Throughput(
            available_flops,
            fabric.world_size,
            window_size,
            separator,
            using_sparse_model,
            sparse_cuda_acceleration_factor,
        )
        self.step = -1
        """Where the last row was logged."""

    @property
    def available_flops(self) -> float | None:
        """Operations per second that a device could do at best; None: unknown."""
        return self._throughput.available_flops

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self._throughput.world_size

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: float | None = None
    ) -> None:
        """``Throughput.update`` on rank 0; nothing on the others."""
        if self._fabric.is_global_zero:
            self._throughput.update(time=time, batches=batches, samples=samples, lengths=lengths, flops=flops)

    def compute(self) -> dict[str, int | float]:
        """``Throughput.compute`` on rank 0; empty on the others."""
        return self._throughput.compute() if self._fabric.is_global_zero else {}

    def compute_and_log(self, step: int | None = None) -> dict[str, int | float]:
        """Log what ``compute`` gives at ``step``, or one after the last row, and return it. Empty off rank 0."""
        if not self._fabric.is_global_zero:
            return {}
        self.step = self.step + 1 if step is None else step
        metrics = self.compute()
        self._fabric.log_dict(metrics, step=self.step)
        return metrics

    def reset(self) -> None:
        """Forget all updates."""
        self._throughput.reset()

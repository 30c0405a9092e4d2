"""What logging costs: the training thread for a row to CSV and TensorBoard, and a table of a million rows."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from statistics import median

import torch

from fulmen.runlog._delivery import Delivery
from fulmen.runlog._settings import LogDelivery
from fulmen_loggers import CSVLogger, TensorBoardLogger

__all__ = ["main"]

_ROW_GOAL_US = 30.0
_COLUMNS_EVERY = 100_000
_BLOCK = 500
_BURST, _BURSTS = 40, 150


def main() -> int:
    """Print the figures; 1 when a row costs the training thread more than its goal in the quietest block of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--step-us", type=float, default=1000.0, help="work of the step itself, in microseconds")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu", help="where the step's work is done")
    arguments = parser.parse_args()
    cpu, wall, drained = handing_over(arguments.steps, arguments.step_us, arguments.accelerator)
    print(f"a row of 20 floats to CSV and TensorBoard, {arguments.steps} steps of {arguments.step_us:.0f} us each;")
    print(f"means of blocks of {_BLOCK} steps: the least one, their median")
    print(f"  CPU time of the training thread  {min(cpu):6.1f} us {median(cpu):6.1f} us   (goal {_ROW_GOAL_US:.0f})")
    print(f"  wall time in the call            {min(wall):6.1f} us {median(wall):6.1f} us")
    print(f"  both loggers had everything {drained * 1000:.0f} ms after the last step")
    burst_cpu, burst_wall = in_bursts()
    print(f"the same in {_BURSTS} bursts of {_BURST} rows, between which both loggers catch up: least burst, median")
    print(f"  CPU time of the training thread  {min(burst_cpu):6.1f} us {median(burst_cpu):6.1f} us")
    print(f"  wall time in the call            {min(burst_wall):6.1f} us {median(burst_wall):6.1f} us")
    print(f"CSV, a new column every {_COLUMNS_EVERY} rows:")
    print("       rows   columns   wall s    CPU s   us a row")
    blocks = table(arguments.rows)
    for number, (wall_s, cpu_s) in enumerate(blocks):
        first, columns = number * _COLUMNS_EVERY, 3 + number
        count = min(_COLUMNS_EVERY, arguments.rows - first)
        print(f"  {first + count:>9} {columns:>9} {wall_s:8.2f} {cpu_s:8.2f} {cpu_s / count * 1e6:10.2f}")
    return int(min(*cpu, *burst_cpu) > _ROW_GOAL_US)


def handing_over(steps: int, step_us: float, device: str = "cpu") -> tuple[list[float], list[float], float]:
    """CPU and wall time of a row in microseconds, means of blocks; seconds until all was delivered."""
    weights = torch.randn(64, 64, device=device)
    with tempfile.TemporaryDirectory() as folder:
        loggers = [CSVLogger(folder), TensorBoardLogger(folder)]
        delivery = Delivery(LogDelivery(), lambda _: False)
        position = [0]
        delivery.begin(os.path.join(folder, "run.jsonl"), loggers, {"fn": "fit"}, lambda: position[0], dict)
        delivery.goes_on()
        metrics = {f"metric_{n}": 0.1234567 * (n + 1) for n in range(20)}
        walls: list[float] = []
        cpus: list[float] = []
        for step in range(steps):
            until = time.perf_counter() + step_us * 1e-6
            while time.perf_counter() < until:
                weights @ weights
            position[0] = step
            row = {name: value + step for name, value in metrics.items()}
            cpu_before, before = time.thread_time(), time.perf_counter()
            delivery.row(row, step, loggers, "step")
            walls.append(time.perf_counter() - before)
            cpus.append(time.thread_time() - cpu_before)
        ended = time.perf_counter()
        delivery.end("success", loggers)
        drained = time.perf_counter() - ended
    return _blocks(cpus), _blocks(walls), drained


def in_bursts() -> tuple[list[float], list[float]]:
    """CPU and wall time of a row in microseconds, in bursts so short that neighbours leave most of them alone."""
    walls: list[float] = []
    cpus: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        loggers = [CSVLogger(folder), TensorBoardLogger(folder)]
        delivery = Delivery(LogDelivery(), lambda _: False)
        position = [0]
        delivery.begin(os.path.join(folder, "run.jsonl"), loggers, {"fn": "fit"}, lambda: position[0], dict)
        delivery.goes_on()
        for burst in range(_BURSTS):
            rows = [{f"metric_{n}": 0.1234567 * (burst + step * n) for n in range(20)} for step in range(_BURST)]
            cpu_before, before = time.thread_time(), time.perf_counter()
            for row in rows:
                delivery.row(row, position[0], loggers, "step")
                position[0] += 1
            walls.append((time.perf_counter() - before) / _BURST * 1e6)
            cpus.append((time.thread_time() - cpu_before) / _BURST * 1e6)
            time.sleep(0.06)
        delivery.end("success", loggers)
    return cpus, walls


def _blocks(seconds: list[float]) -> list[float]:
    return [sum(seconds[n : n + _BLOCK]) / _BLOCK * 1e6 for n in range(0, len(seconds) - _BLOCK + 1, _BLOCK)]


def table(rows: int) -> list[tuple[float, float]]:
    """Seconds, of the clock and of the processor, for each ``_COLUMNS_EVERY`` rows of a table that widens with each."""
    found: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder)
        started, cpu = time.perf_counter(), time.process_time()
        for step in range(rows):
            row = {"loss": step * 0.5, "accuracy": step * 0.25}
            row.update({f"late_{n}": 1.0 for n in range(step // _COLUMNS_EVERY)})
            logger.log_metrics(row, step)
            if (step + 1) % _COLUMNS_EVERY == 0 or step + 1 == rows:
                logger.save()
                found.append((time.perf_counter() - started, time.process_time() - cpu))
                started, cpu = time.perf_counter(), time.process_time()
        with open(os.path.join(logger.log_dir, "metrics.csv"), "rb") as stream:
            assert sum(1 for _ in stream) == rows + 1, "a row is missing"
    return found


if __name__ == "__main__":
    raise SystemExit(main())

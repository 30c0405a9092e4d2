"""How training scales over the GPUs of one host: tokens/s per GPU, MFU, efficiency, memory against the plan, saves.

GPT-2 124M under DDP, 1B and 7B Llama-shaped transformers under FSDP2, the 7B one under FSDP2 x tensor parallel too, in
bf16, compiled; logging, progress bar and asynchronous checkpoints on for fulmen. In each launch fulmen, raw torch and
Lightning take turns in the same processes. A sharded checkpoint of the largest run is resumed on fewer GPUs, and the
losses are compared.

Launches follow one another in order of what they tell: for each workload first all GPUs, then the smaller numbers,
beside each other on GPUs of their own (``--apart``: one by one). One that might not end within ``--budget`` is not
started, and said to be not run. Every result is appended to ``--out``/results.jsonl at once; ``--report FOLDER`` prints
the table of an earlier run.

    python -m tools.bench scaling --devices 1,2,4,8 --budget 480 --out scaling
    python -m tools.bench scaling --tiny --accelerator cpu --devices 1,2,4 --no-compile --out /tmp/scaling
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tools.bench.child import print_table
from tools.workspace import ROOT

CONTESTANTS = ["raw", "fulmen", "lightning"]
WORKLOADS = ["gpt2-ddp", "1b-fsdp", "7b-fsdp", "7b-2d"]
LEAST = {"gpt2-ddp": 1, "1b-fsdp": 1, "7b-fsdp": 2, "7b-2d": 4}
"""Fewest devices for each, as in ``scaling_models``, which imports torch."""
FIRST_GUESS_S = 60.0
"""How long a launch may take before one has been seen."""


@dataclass
class Launch:
    """One start of ``scaling_rank``."""

    action: str
    workload: str
    devices: int
    first_device: int = 0
    process: subprocess.Popen[str] | None = None
    folder: Path = field(default_factory=Path)
    started: float = 0.0

    def record(self, **more: Any) -> dict[str, Any]:
        """What is written about it."""
        return {"action": self.action, "workload": self.workload, "devices": self.devices, **more}


class Runner:
    """Starts launches while there is time, and writes down what they report.

    Args:
        asked: the arguments.
        folder: for results, logs and the losses' checkpoint.
    """

    def __init__(self, asked: argparse.Namespace, folder: Path) -> None:
        self.asked, self.folder = asked, folder
        self.ends = time.monotonic() + asked.budget
        self.longest_s = FIRST_GUESS_S
        self.results = folder / "results.jsonl"
        self.plans: list[Launch] = []

    def wave(self, launches: list[Launch]) -> None:
        """Run launches beside each other, each on devices of its own."""
        left = self.ends - time.monotonic()
        if left < self.longest_s:
            for launch in launches:
                self.write(
                    launch.record(not_run=f"{left:.0f} s of the budget left, and it may need {self.longest_s:.0f}")
                )
            return
        begun = time.monotonic()
        for launch in launches:
            self.start(launch)
        for launch in launches:
            self.finish(launch, self.ends)
        self.longest_s = max(time.monotonic() - begun, 0.5 * self.longest_s)

    def start(self, launch: Launch) -> None:
        """Start its processes."""
        asked = self.asked
        launch.folder = Path(tempfile.mkdtemp(prefix="scaling-"))
        launch.started = time.monotonic()
        words = [launch.action, launch.workload, "--devices", str(launch.devices), "--accelerator", asked.accelerator]
        words += ["--report", str(launch.folder / "report.json"), "--checkpoints", str(self.checkpoints)]
        words += ["--rounds", str(asked.rounds), "--contestants", *asked.contestants]
        words += ["--batch", str(asked.batch)] if asked.batch else []
        words += [f"--{name}" for name in ("tiny", "fp8", "recompute", "compile") if getattr(asked, name)]
        ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={launch.devices}"]
        command = [
            sys.executable,
            *([] if launch.action == "plan" else ranks),
            "-m",
            "tools.bench.scaling_rank",
            *words,
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
        if asked.accelerator == "cpu" or launch.action == "plan":
            env["CUDA_VISIBLE_DEVICES"] = ""
        else:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(max(asked.devices))))
            chosen = visible.split(",")[launch.first_device : launch.first_device + launch.devices]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        with (launch.folder / "log").open("w", encoding="utf-8") as log:
            launch.process = subprocess.Popen(
                command, env=env, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )

    def finish(self, launch: Launch, ends: float) -> None:
        """Wait for it until ``ends``, and write down every row that it has reported by then."""
        process = launch.process
        assert process is not None
        why = ""
        try:
            code = process.wait(timeout=max(ends - time.monotonic(), 0.1))
            why = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            why = "the budget ended"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: torchrun and all ranks
            process.wait()
        seconds = time.monotonic() - launch.started
        report = launch.folder / "report.json"
        rows: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8")) if report.exists() else []
        for row in rows:
            self.write(launch.record(wall_s=seconds, **row))
        if why:
            tail = (launch.folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
            self.write(launch.record(not_run=why, wall_s=seconds, log=tail))

    def write(self, row: dict[str, Any]) -> None:
        """Append one result and show it."""
        with self.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        shown = {key: value for key, value in row.items() if key not in ("log", "at_peak")}
        print(json.dumps(shown), flush=True)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoint that fewer devices resume from is written."""
        return self.folder / "checkpoint"

    def start_plans(self) -> None:
        """Plan the memory of every launch on the CPU, meanwhile."""
        for workload in self.asked.workloads:
            for devices in self.asked.devices:
                if devices >= LEAST[workload]:
                    plan = Launch("plan", workload, devices)
                    self.start(plan)
                    self.plans.append(plan)

    def finish_plans(self) -> None:
        """Write down the plans that have been made by now."""
        for plan in self.plans:
            self.finish(plan, self.ends + 60.0)


def waves(asked: argparse.Namespace) -> list[list[Launch]]:
    """What is launched, in order: what tells most first."""
    most, *fewer = sorted(set(asked.devices), reverse=True)
    found: list[list[Launch]] = []
    later: list[list[Launch]] = []
    for workload in asked.workloads if asked.measure else []:
        if most >= LEAST[workload]:
            found.append([Launch("measure", workload, most)])
        others = [Launch("measure", workload, devices) for devices in fewer if devices >= LEAST[workload]]
        together = _beside(others, most, apart=asked.apart or asked.accelerator == "cpu")
        (found if workload in ("gpt2-ddp", "1b-fsdp") else later).extend(together)
    if asked.eager:
        eager = [
            Launch("eager", workload, devices)
            for workload in asked.workloads
            for devices in sorted(asked.devices, reverse=True)
            if devices >= LEAST[workload]
        ]
        found.extend(_beside(eager, most, apart=asked.apart or asked.accelerator == "cpu"))
    if asked.resume and fewer and "1b-fsdp" in asked.workloads:
        found.append([Launch("save", "1b-fsdp", most)])
        again = [Launch("resume", "1b-fsdp", devices) for devices in (most // 2, most // 4) if devices]
        found.extend(_beside(again, most, apart=asked.apart or asked.accelerator == "cpu"))
    return found + later


def _beside(launches: list[Launch], devices: int, *, apart: bool) -> list[list[Launch]]:
    """Launches in waves that need no more than ``devices`` in all."""
    found: list[list[Launch]] = []
    used = devices
    for launch in launches:
        if apart or used + launch.devices > devices:
            found.append([])
            used = 0
        launch.first_device = used
        used += launch.devices
        found[-1].append(launch)
    return found


def table(
    rows: list[dict[str, Any]],
    peak_flops: dict[str, float | None],
    *,
    markdown: bool,
    tiny: bool,
    batch: int | None = None,
) -> None:
    """Print what was measured; what was not, with the reason."""
    from tools.bench import scaling_models as models

    figures: dict[tuple[str, int, str], dict[str, float]] = {}
    plans = {(row["workload"], row["devices"]): row["peak_bytes"] for row in rows if "at_peak" in row}
    eager = {(row["workload"], row["devices"]): row["eager_peak_bytes"] for row in rows if "eager_peak_bytes" in row}
    device = next((row["device"] for row in rows if "device" in row), "cpu")
    for key in {(row["workload"], row["devices"], row["contestant"]) for row in rows if "step_s" in row}:
        mine = [
            row for row in rows if (row["workload"], row["devices"], row.get("contestant")) == key and "step_s" in row
        ]
        names = ("step_s", "peak_bytes", "stall_s", "next_stall_s")
        figures[key] = {name: median([row[name] for row in mine if name in row]) for name in names if name in mine[0]}
    head = [
        "workload",
        "GPUs",
        "by",
        "ms a step",
        "tokens/s a GPU",
        "of raw",
        "MFU",
        "of linear",
        "peak GiB",
        "peak, eager",
        "plan, eager",
        "stall s, first save",
        "next",
    ]
    lines: list[list[str]] = []
    for (name, devices, by), found in sorted(
        figures.items(), key=lambda each: (WORKLOADS.index(each[0][0]), *each[0][1:])
    ):
        workload = models.chosen(name, is_tiny=tiny, batch=batch)
        share = models.tensor_parallel_size(workload, devices)
        speed = workload.batch * workload.length / found["step_s"] / share
        base = figures.get((name, devices, "raw"))
        peak = peak_flops.get(device)
        fewest = min(count for each, count, who in figures if (each, who) == (name, by))
        one = figures[(name, fewest, by)]["step_s"]
        plan = plans.get((name, devices))
        is_known = found["peak_bytes"] > 0
        lines.append(
            [
                name,
                str(devices),
                by,
                f"{1e3 * found['step_s']:.1f}",
                f"{speed:,.0f}",
                f"{base['step_s'] / found['step_s']:.3f}" if base else "",
                f"{100 * speed * models.operations_per_token(workload) / peak:.1f} %" if peak else "",
                f"{one / found['step_s']:.3f} (from {fewest})" if devices > fewest else "",
                f"{found['peak_bytes'] / 2**30:.2f}" if is_known else "",
                *_eager_columns(plan, eager.get((name, devices)), by),
                *(f"{found[name]:.2f}" if name in found else "" for name in ("stall_s", "next_stall_s")),
            ]
        )
    print(f"\n{device}; speeds are medians over rounds; the plan is of eager execution")
    print_table(head, lines, markdown=markdown)
    for (name, devices), peak_bytes in eager.items():
        if (name, devices, "fulmen") not in figures:
            measured, planned = _eager_columns(plans.get((name, devices)), peak_bytes, "fulmen")
            print(f"{name} on {devices}, eager: peak {measured} GiB, plan {planned}")
    for row in rows:
        if row["action"] in ("save", "resume") and "losses" in row:
            print(f"{row['action']} on {row['devices']}: losses {', '.join(f'{loss:.4f}' for loss in row['losses'])}")
    for row in rows:
        if "not_run" in row:
            by = f" by {row['contestant']}" if "contestant" in row else ""
            print(f"not run: {row['action']} {row['workload']} on {row['devices']}{by}: {row['not_run']}")


def _eager_columns(plan: float | None, measured: float | None, by: str) -> tuple[str, str]:
    """The peak without compiling, and the plan of it with its share of that."""
    if by != "fulmen" or plan is None:
        return "", ""
    planned = f"{plan / 2**30:.2f}"
    return (f"{measured / 2**30:.2f}", f"{planned} ({plan / measured:.2f}x)") if measured else ("", planned)


def resumed_losses_agree(rows: list[dict[str, Any]], tolerance: float = 0.01) -> bool | None:
    """Whether every resumed run had the losses of the one that saved; None where there is nothing to compare."""
    saved = next((row["losses"] for row in rows if row["action"] == "save" and "losses" in row), None)
    resumed = [row["losses"] for row in rows if row["action"] == "resume" and "losses" in row]
    if saved is None or not resumed:
        return None
    return all(
        len(losses) == len(saved) and all(abs(a - b) <= tolerance * abs(b) for a, b in zip(losses, saved, strict=True))
        for losses in resumed
    )


def main() -> int:
    """Measure, or print an earlier measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--devices", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4, 8])
    add("--accelerator", choices=["cuda", "cpu"], default="cuda", help="cpu is for trying the script out, with --tiny")
    add("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    add("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    add("--rounds", type=int, default=1, help="turns of the contestants in each launch")
    add("--budget", type=float, default=480.0, metavar="SECONDS", help="nothing is started that may end later")
    add("--out", type=Path, required=True, help="folder for results.jsonl, which is appended to")
    add("--batch", type=int, metavar="SEQUENCES", help="of a rank and step, in place of each workload's own number")
    add("--tiny", action="store_true", help="small models")
    add("--fp8", action="store_true", help="float8 products by torchao")
    add("--recompute", action="store_true", help="activation checkpointing of each block")
    add("--no-compile", dest="compile", action="store_false")
    add("--no-measure", dest="measure", action="store_false", help="leave out the timed runs")
    add("--eager", action="store_true", help="measure the peak without compiling too, which the plan is of")
    add("--no-resume", dest="resume", action="store_false", help="leave out the checkpoint over numbers of GPUs")
    add("--apart", action="store_true", help="never two launches at a time")
    add("--report", action="store_true", help="only print the table of what --out holds")
    add("--markdown", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(asked, asked.out.resolve())
    if not asked.report:
        runner.start_plans()
        for launches in waves(asked):
            runner.wave(launches)
        runner.finish_plans()
    rows = [json.loads(line) for line in runner.results.read_text(encoding="utf-8").splitlines()]
    table(rows, _peak_flops(rows), markdown=asked.markdown, tiny=asked.tiny, batch=asked.batch)
    agree = resumed_losses_agree(rows)
    if agree is not None:
        print(
            f"losses after resuming on fewer devices {'equal' if agree else 'DIFFER FROM'} those of the run that saved"
        )
    return int(agree is False or not any("step_s" in row or "eager_peak_bytes" in row for row in rows))


def _peak_flops(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The makers' figures for dense bf16 products, by name of device."""
    import torch

    from fulmen_fabric._peak_flops import gpu_peak

    names = {row["device"] for row in rows if "device" in row}
    return {name: gpu_peak(name, torch.bfloat16) for name in names}


if __name__ == "__main__":
    raise SystemExit(main())

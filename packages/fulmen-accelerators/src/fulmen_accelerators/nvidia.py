"""Counters of an NVIDIA GPU that torch does not have, read through ``nvidia-smi``."""

from __future__ import annotations

import shutil
import subprocess

import torch

from fulmen_protocols import BackendUnavailable

__all__ = ["get_nvidia_gpu_stats"]

# Name in the result: name of the query.
_QUERIES = {
    "utilization.gpu (%)": "utilization.gpu",
    "memory.used (MB)": "memory.used",
    "memory.free (MB)": "memory.free",
    "utilization.memory (%)": "utilization.memory",
    "fan.speed (%)": "fan.speed",
    "temperature.gpu (°C)": "temperature.gpu",
    "temperature.memory (°C)": "temperature.memory",
}


def get_nvidia_gpu_stats(device: torch.device) -> dict[str, float]:
    """Use, memory, fan and temperatures of ``device``; what this GPU does not report is left out.

    Starts a process that takes tens of milliseconds.

    Raises:
        RuntimeError: there is no ``nvidia-smi``, or it failed; the message has its output.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        raise BackendUnavailable(f"stats of {device} need nvidia-smi, which is not on PATH; it comes with the driver.")
    # By UUID: nvidia-smi numbers GPUs by bus, CUDA by speed and by CUDA_VISIBLE_DEVICES.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = f"--query-gpu={','.join(_QUERIES.values())}"
    command = [program, query, "--format=csv,nounits,noheader", f"--id={uuid}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if result.returncode != 0:
        raise BackendUnavailable(f"nvidia-smi failed for {device} ({uuid}): {result.stdout}{result.stderr}".strip())
    return _numbers(result.stdout)


def _numbers(line: str) -> dict[str, float]:
    stats: dict[str, float] = {}
    for name, text in zip(_QUERIES, line.strip().split(", "), strict=True):
        try:
            stats[name] = float(text)
        except ValueError:  # "[N/A]", "[Not Supported]"
            continue
    return stats

"""Throughput and floating point operations, under the name that people look for; they live in ``fulmen_fabric``."""

from fulmen_fabric import Throughput, ThroughputMonitor, get_available_flops, measure_flops

__all__ = ["Throughput", "ThroughputMonitor", "get_available_flops", "measure_flops"]

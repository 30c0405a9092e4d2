"""What ``SpikeDetection`` raises, under the name that people look for; it lives in ``fulmen_fabric``."""

from fulmen_fabric import SpikeDetection, TrainingSpikeException

__all__ = ["SpikeDetection", "TrainingSpikeException"]

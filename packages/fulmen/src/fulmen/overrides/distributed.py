"""``UnrepeatedDistributedSampler`` and ``UnrepeatedDistributedSamplerWrapper``, where Lightning has them."""

from fulmen_data import UnrepeatedDistributedSampler, UnrepeatedDistributedSamplerWrapper

__all__ = ["UnrepeatedDistributedSampler", "UnrepeatedDistributedSamplerWrapper"]

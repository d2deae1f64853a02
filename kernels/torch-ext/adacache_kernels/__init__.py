"""The memory-bound operations of adaptive caching: one pass over memory each, in Triton and in plain PyTorch.

`residual_stats` takes the distance and motion sums from which the caching rate follows; `reuse` adds a kept
residual to the hidden state in place of the blocks. `reference` holds both in plain PyTorch: the golden, and
what runs on a CPU. They know nothing of schedules and models, and they have no backward.
"""

from . import reference
from .residual_stats import residual_stats
from .reuse import reuse

__all__ = ["reference", "residual_stats", "reuse"]

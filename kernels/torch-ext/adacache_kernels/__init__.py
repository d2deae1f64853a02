"""The memory-bound operations of adaptive caching: one pass over memory each, in Triton and in plain PyTorch.

`residual_stats` takes the distance and motion sums from which the caching rate follows; `reuse` adds a kept
residual to the hidden state in place of the blocks. `reference` holds both in plain PyTorch: the golden, and
what runs on a CPU. They know nothing of schedules and models, and they have no backward.
"""

from . import layers, reference
from ._checks import METRICS
from .decide import Motion, Rule, decide, initial_state
from .gated_residual import gated_residual
from .keep import keep
from .metrics import distance, motion, relative_distance
from .residual_stats import as_frames, residual_stats
from .reuse import reuse

__all__ = [
    "METRICS",
    "Motion",
    "Rule",
    "as_frames",
    "decide",
    "distance",
    "gated_residual",
    "initial_state",
    "keep",
    "layers",
    "motion",
    "reference",
    "relative_distance",
    "residual_stats",
    "reuse",
]

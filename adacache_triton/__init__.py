"""Adaptive caching for video diffusion transformers, with Triton kernels::

from adacache_triton import AdaCacheConfig, apply_adacache
handle = apply_adacache(pipe, AdaCacheConfig.official("open-sora-100"))
"""

from ._version import __version__
from .apply import AdaCacheHandle, apply_adacache
from .config import AdaCacheConfig, Codebook, DenseEarly, FixedSchedule, MotionRegularization
from .report import Report
from .schedule import Schedule, Step
from .session import AdaCacheSession
from .stack import BlockStack

__all__ = [
    "AdaCacheConfig",
    "AdaCacheHandle",
    "AdaCacheSession",
    "BlockStack",
    "Codebook",
    "DenseEarly",
    "FixedSchedule",
    "MotionRegularization",
    "Report",
    "Schedule",
    "Step",
    "__version__",
    "apply_adacache",
]

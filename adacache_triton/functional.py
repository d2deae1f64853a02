"""The arithmetic of AdaCache as functions, for wrappers that exist: swap the expressions, keep the wrapper.

Wrappers in plain PyTorch compute the distance and the motion score in a dozen passes over the residual. These
functions take the same arguments and one pass each: Triton where the tensors are on a GPU, PyTorch on a CPU, or as the
environment variable ADACACHE_BACKEND (`torch` or `triton`) or the argument `backend` say::

    from adacache_triton.functional import cache_rate, motion_score, residual_distance

    distance = residual_distance(cached, new, prev_rate)
    score = motion_score(new, tokens_per_frame, strides=(1,))
    rate = cache_rate(distance, {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.0: 3})

Formulas are those of Kahatapitiya et al., "Adaptive Caching for Faster Video Generation with Diffusion Transformers",
arXiv 2411.02397, as its released code (AdaCache-DiT/AdaCache) runs them. Nothing but `cache_rate` reads from the
device. Sums are taken in float32, where the released code rounds them to the dtype of the residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .config import Codebook, MotionRegularization, _number, _tuple
from .kernels import as_frames, motion, relative_distance, residual_stats
from .kernels._checks import check_alike, check_tensor


def residual_distance(
    cached: Tensor,
    new: Tensor,
    prev_rate: float | Tensor = 1,
    *,
    metric: str = "l1",
    backend: str | None = None,
) -> Tensor:
    """The change of a residual for each step since it was kept: sum|cached - new| / sum|cached| / prev_rate.

    Over all dimensions, both guidance halves together, as in `norm(cached - new, p=1) / norm(cached, p=1) / prev_rate`.

    Args:
        cached: the residual of the last computed step. Any rank from 1 on, any strides, float32, bfloat16 or float16.
        new: that of this step, of the same shape.
        prev_rate: the rate chosen at the last computed step, 1 or more; a number or a 0-d tensor.
        metric: "l1", or of the paper's ablation "l2", sqrt(sum (cached - new)^2 / sum cached^2), or "cosine",
            1 - sum cached new / sqrt(sum cached^2 sum new^2).
        backend: "torch", "triton" or None.

    Returns:
        float32, 0-d, on the device. Infinity where either tensor is not finite or `cached` is 0.

    Bytes moved: both tensors read once (see `kernels.relative_distance`).
    """
    op = "residual_distance"
    for name, tensor in (("cached", cached), ("new", new)):
        check_tensor(op, name, tensor)
    check_alike(op, "new", new, "cached", cached)
    _check_rate("prev_rate", prev_rate)
    return relative_distance(new, cached, metric=metric, backend=backend) / prev_rate


def motion_score(
    residual: Tensor,
    tokens_per_frame: int,
    strides: Sequence[int] = (1,),
    *,
    backend: str | None = None,
) -> Tensor:
    """How much a residual changes from frame to frame: the score m of motion regularisation.

    For each stride s, in frames of S = `tokens_per_frame` tokens, and then their mean::

        m_s = sum|r[:, s*S:] - r[:, :-s*S]| / (sum|r[:, s*S:]| + sum|r[:, :-s*S]|)

    The normalisation is the released code's; the paper has none.

    Args:
        residual: [B, T * S, C], frame after frame; the stride of C is 1. float32, bfloat16 or float16.
        tokens_per_frame: S.
        strides: distances in frames; those of T or more have no pair of frames and are left out.
        backend: "torch", "triton" or None.

    Returns:
        float32, 0-d, on the device. Infinity where the residual is not finite, NaN where no stride has a pair of
        frames or the residual is 0.

    Bytes moved: the residual read once; strides beyond 1 find it in cache.
    """
    op = "motion_score"
    check_tensor(op, "residual", residual)
    tokens = _number("tokens_per_frame", tokens_per_frame, 1, integer=True)
    if residual.dim() != 3 or residual.shape[1] % tokens:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, expected [B, T * {tokens}, C]")
    if residual.shape[2] > 1 and residual.stride(2) != 1:
        raise ValueError(f"{op}: residual has strides {residual.stride()}, expected 1 for the last (channels)")
    strides = tuple(_number("strides", stride, 1, integer=True) for stride in _tuple("strides", strides))
    if not strides:
        raise ValueError("strides: expected at least one, got ()")
    frames = as_frames(residual, residual.shape[1] // tokens)
    return motion(residual_stats(frames, frame_strides=strides, backend=backend).sum(0))


def motion_scale(score: float | Tensor, scale: float = 0.385, power: float = 8, divisor: float = 1) -> float | Tensor:
    """M = (score / scale) ** power / divisor, by which a livelier video's distance is raised; 1 outside the window.

    The paper has no power; the released configuration wrote a divisor of 1.2 in such a way that 1 ran.
    """
    # The window is the caller's.
    return MotionRegularization((1, 1), scale=scale, power=power, divisor=divisor).scale_of(score)


def motion_gradient(
    motion_scale: float | Tensor,
    previous_scale: float | Tensor,
    previous_rate: float | Tensor,
    weight: float = 10,
) -> float | Tensor:
    """G = weight * (M - M_prev) / k_prev: how fast the motion scale changes. M_prev is 1 at first."""
    _check_rate("previous_rate", previous_rate)
    return weight * (motion_scale - previous_scale) / previous_rate


def regularize(distance: float | Tensor, scale: float | Tensor, gradient: float | Tensor) -> float | Tensor:
    """distance * (M + |G|), which the codebook sees. The absolute value is the released code's."""
    return distance * (scale + abs(gradient))


def cache_rate(distance: float | Tensor, codebook: Codebook | Mapping[float, int]) -> int:
    """The rate k for a distance: the next computed step is k steps on.

    That of the first threshold with distance < threshold, else the last rate. NaN and infinity give 1: the next step
    is computed.

    Args:
        distance: a number or a tensor of one element. From a GPU it is read here, so ask as late as you can: the rate
            is needed when the next step begins.
        codebook: a `Codebook`, or thresholds and their rates in ascending order as released wrappers write them,
            `{0.03: 12, 0.05: 10, 1.0: 3}`: the last rate is that of every larger distance, whatever its threshold.
    """
    if isinstance(distance, Tensor) and distance.numel() != 1:
        raise ValueError(f"distance: expected a number or a tensor of one element, got {tuple(distance.shape)}")
    if isinstance(codebook, Mapping):
        codebook = Codebook(tuple(codebook)[:-1], tuple(codebook.values()))
    if not isinstance(codebook, Codebook):
        raise TypeError(f"codebook: expected a Codebook or a mapping of thresholds to rates, got {codebook!r}")
    return codebook.rate(float(distance))


def _check_rate(name: str, rate) -> None:
    """A tensor is taken as it is: looking at it would wait for the device."""
    if not isinstance(rate, Tensor):
        _number(name, rate, 1)

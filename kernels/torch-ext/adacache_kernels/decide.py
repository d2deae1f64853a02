"""The caching decision on the device: from sums to the next computed step, with nothing read by the host."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch

from . import reference
from ._checks import METRICS, check_metric, check_tensor, traced
from ._ops import add_op_namespace_prefix
from ._triton import WARP, cdiv, jit, pick_backend, tl
from ._walk import no_sums

FLOAT32_MAX = torch.finfo(torch.float32).max


@jit
def _ratio(numerator, denominator):
    """Infinity unless both are finite and the ratio exists: what cannot be compared never reads as near."""
    ratio = tl.div_rn(numerator, denominator) + (numerator - numerator) + (denominator - denominator)
    return tl.where(tl.abs(ratio) < float("inf"), ratio, float("inf"))


@jit
def _power(x, POWER: tl.constexpr):
    """x ** POWER for x >= 0: the whole part by squaring, which rounds alike on every chip, the rest by logarithm."""
    WHOLE: tl.constexpr = int(POWER)
    power = tl.full(x.shape, 1.0, tl.float32)
    square = x
    for bit in tl.static_range(WHOLE.bit_length()):
        if (WHOLE >> bit) % 2 == 1:
            power *= square
        square *= square
    if POWER > WHOLE:
        power *= tl.exp2((POWER - WHOLE) * tl.log2(x))
    return power


# Divisions and roots are rounded to the nearest (`_rn`) and no product is fused with a sum, so that every chip takes
# the same decision. What differs from run to run is no constant: steps, window, budget.
@jit(do_not_specialize=["sums_row", "sums_column", "videos", "branches", "num_steps", "first", "last"])
def _decide_kernel(
    sums_ptr, state_ptr,  # [branches * videos, columns], [videos, 4]
    sums_row, sums_column, videos, branches,  # two strides in elements, two counts
    num_steps, first, last,  # steps of the run, the window of motion regularisation
    scale, divisor, weight, budget, max_rate,  # numbers of the rule; budget is None where there is a codebook
    METRIC: tl.constexpr, MEASURES: tl.constexpr,  # the distance and how many sums it is made of
    STRIDES: tl.constexpr,  # frame strides, 0 without motion regularisation
    POWER: tl.constexpr, THRESHOLDS: tl.constexpr, RATES: tl.constexpr,
    VIDEOS: tl.constexpr,  # of a program
):  # fmt: skip
    video = tl.program_id(0) * VIDEOS + tl.arange(0, VIDEOS)
    inside = video < videos
    sums_ptr += video.to(tl.int64) * sums_row
    state_ptr += video * 4
    step = tl.load(state_ptr, mask=inside, other=1.0)
    previous_rate = tl.load(state_ptr + 1, mask=inside, other=1.0)
    previous_scale = tl.load(state_ptr + 2, mask=inside, other=1.0)

    sums = no_sums(MEASURES + 2 * STRIDES, VIDEOS)
    for _ in range(branches):
        sums_so_far = sums
        sums = ()
        for i in tl.static_range(MEASURES + 2 * STRIDES):
            sums += (sums_so_far[i] + tl.load(sums_ptr + i * sums_column, mask=inside, other=0.0),)
        sums_ptr += videos * sums_row

    if METRIC == "cosine":
        norms = tl.sqrt_rn(sums[1]) * tl.sqrt_rn(sums[2])
        distance = tl.maximum(_ratio(norms - sums[0], norms), 0.0)
    else:
        distance = _ratio(sums[0], sums[1])
        if METRIC == "l2":
            distance = tl.sqrt_rn(distance)
    distance = tl.div_rn(distance, previous_rate)

    motion_scale = previous_scale
    if STRIDES > 0:
        score = tl.zeros([VIDEOS], tl.float32)
        pairs = tl.zeros([VIDEOS], tl.float32)  # strides that have a pair of frames
        for i in tl.static_range(STRIDES):
            size = sums[MEASURES + 2 * i + 1]
            score += tl.where(size != 0, _ratio(sums[MEASURES + 2 * i], size), 0.0)
            pairs += tl.where(size != 0, 1.0, 0.0)
        motion_scale = tl.div_rn(_power(tl.div_rn(tl.div_rn(score, pairs), scale), POWER), divisor)
        motion_scale = tl.where(pairs > 0, motion_scale, 1.0)
        motion_scale = tl.where(step >= first, motion_scale, 1.0)
        motion_scale = tl.where(step <= last, motion_scale, 1.0)
        gradient = tl.div_rn(weight * (motion_scale - previous_scale), previous_rate)
        distance *= motion_scale + tl.abs(gradient)

    compared = step > 1
    distance = tl.where(compared, distance, float("nan"))
    if budget is None:
        rate = tl.full([VIDEOS], RATES[len(THRESHOLDS)], tl.float32)
        for i in tl.static_range(len(THRESHOLDS) - 1, -1, -1):  # downwards: the lowest threshold has the last word
            rate = tl.where(distance < THRESHOLDS[i], RATES[i], rate)
    else:
        rate = tl.maximum(tl.minimum(tl.floor(tl.div_rn(budget, distance)), max_rate), 1.0)  # of infinity at 0
    rate = tl.where(tl.abs(distance) < float("inf"), rate, 1.0)

    tl.store(state_ptr, tl.minimum(step + rate, tl.maximum(num_steps - 1, step + 1)), mask=inside)
    tl.store(state_ptr + 1, rate, mask=inside)
    tl.store(state_ptr + 2, tl.where(compared, motion_scale, previous_scale), mask=inside)
    tl.store(state_ptr + 3, distance, mask=inside)


@dataclass(frozen=True)
class Motion:
    """Motion regularisation: a livelier video gets a larger distance and so more computed steps.

    With m the mean of the motion scores over the frame strides (Kahatapitiya et al., arXiv 2411.02397, with the
    power and the absolute value of the released code)::

        M = (m / scale) ** power / divisor  inside the window, else 1
        G = gradient_weight * (M - M_prev) / k_prev
        distance <- distance * (M + |G|)

    Args:
        window: first and last step, counted from 1, both included, where M is measured.
        scale: motion that leaves the distance as it is; above 0.
        power: 0 or more. Whole ones are taken by squaring: within 1e-6 of M at 8. Others within 1e-5.
        divisor: above 0.
        gradient_weight: 0 or more.

    Raises:
        TypeError, ValueError: naming the field, what came and what was expected.
    """

    window: tuple[int, int]
    scale: float = 0.385
    power: float = 8
    divisor: float = 1
    gradient_weight: float = 10

    def __post_init__(self):
        window = _tuple("Motion: window", self.window)
        window = tuple(_number("Motion: window", step, 1, integer=True) for step in window)
        if len(window) != 2 or window[0] > window[1]:
            raise ValueError(f"Motion: window is {self.window!r}, expected two steps (first, last) in order")
        object.__setattr__(self, "window", window)
        for name, strict in (("scale", True), ("power", False), ("divisor", True), ("gradient_weight", False)):
            object.__setattr__(self, name, _number(f"Motion: {name}", getattr(self, name), 0, strict=strict))


@dataclass(frozen=True)
class Rule:
    """From the distance d to the rate k: the next computed step is k steps on.

    Either a codebook, where k is the rate of the first threshold with d < threshold, else the last rate; or an error
    budget, where k = floor(budget / d), at least 1 and at most `max_rate`.

    Args:
        num_steps: denoising steps of the run, 3 or more. Steps 1, N - 1 and N are always computed.
        thresholds: of the codebook, ascending, above 0.
        rates: one for each threshold and one for every larger distance; 1 or more.
        budget: distance that may add up until the next computed step, above 0.
        max_rate: of the budget.
        metric: "l1", "l2" or "cosine": what the first columns of the sums are (see `residual_stats`).
        motion: motion regularisation, or None.

    Raises:
        TypeError, ValueError: naming the field, what came and what was expected.
    """

    num_steps: int
    thresholds: tuple[float, ...] = ()
    rates: tuple[int, ...] = ()
    budget: float | None = None
    max_rate: int = 12
    metric: str = "l1"
    motion: Motion | None = None

    def __post_init__(self):
        thresholds, rates = _tuple("Rule: thresholds", self.thresholds), _tuple("Rule: rates", self.rates)
        thresholds = tuple(_number("Rule: thresholds", value, 0, strict=True) for value in thresholds)
        for low, high in zip(thresholds, thresholds[1:]):
            if low >= high:
                raise ValueError(f"Rule: thresholds holds {high!r} after {low!r}, expected ascending values")
        rates = tuple(_number("Rule: rates", value, 1, integer=True) for value in rates)
        if self.budget is None and len(rates) != len(thresholds) + 1:
            expected = f"{len(thresholds) + 1} (one a threshold, one for larger distances)"
            raise ValueError(f"Rule: rates has {len(rates)} values, expected {expected}, or a budget instead")
        if self.budget is not None:
            if rates or thresholds:
                raise ValueError(f"Rule: budget is {self.budget!r} beside a codebook, expected one of the two")
            object.__setattr__(self, "budget", _number("Rule: budget", self.budget, 0, strict=True))
        object.__setattr__(self, "num_steps", _number("Rule: num_steps", self.num_steps, 3, integer=True))
        object.__setattr__(self, "max_rate", _number("Rule: max_rate", self.max_rate, 1, integer=True))
        object.__setattr__(self, "thresholds", thresholds)
        object.__setattr__(self, "rates", rates)
        check_metric("Rule", self.metric)
        if self.motion is not None and not isinstance(self.motion, Motion):
            raise TypeError(f"Rule: motion is {self.motion!r}, expected a Motion or None")


def _number(field: str, value, minimum: int, *, strict: bool = False, integer: bool = False):
    """`value` as a plain number if it is over the minimum and finite in float32, else an error that names it."""
    expected = f"{'an integer' if integer else 'a finite number'} {'>' if strict else '>='} {minimum}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if integer else numbers.Real):
        raise TypeError(f"{field} is {value!r}, expected {expected}")
    if not minimum <= value <= FLOAT32_MAX or (strict and value == minimum):
        raise ValueError(f"{field} is {value!r}, expected {expected}")
    return int(value) if integer else float(value)


def _tuple(field: str, values) -> tuple:
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{field} is {values!r}, expected a tuple")
    return tuple(values)


def initial_state(videos: int = 1, device: torch.device | str | None = None) -> torch.Tensor:
    """The state of `decide` at the first step of a run, for a number of videos that decide apart.

    Returns:
        float32 [videos, 4]: step 1, rate 1, motion scale 1, distance NaN. Copied into the state of a captured graph,
        it starts the next run there.
    """
    state = torch.ones(_number("initial_state: videos", videos, 1, integer=True), 4, device=device)
    state[:, 3].fill_(math.nan)
    return state


_NO_MOTION = Motion((1, 1))  # numbers that the kernel takes and does not look at


def _launch(sums: torch.Tensor, state: torch.Tensor, rule: Rule) -> None:
    videos, measures = len(state), METRICS[rule.metric]
    motion = rule.motion or _NO_MOTION
    with torch.cuda.device_of(sums):
        # A video a thread, and a warp a program: one program unless more than 32 videos decide.
        _decide_kernel[(cdiv(videos, WARP),)](
            sums, state,
            *sums.stride(), videos, len(sums) // videos,
            rule.num_steps, *motion.window,
            motion.scale, motion.divisor, motion.gradient_weight, rule.budget, float(rule.max_rate),
            METRIC=rule.metric, MEASURES=measures,
            STRIDES=(sums.shape[1] - measures) // 2 if rule.motion else 0,
            POWER=motion.power, THRESHOLDS=rule.thresholds, RATES=rule.rates,
            VIDEOS=WARP, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def decide(sums: torch.Tensor, state: torch.Tensor, rule: Rule, *, backend: str | None = None) -> None:
    """Decide, after a computed step, which step is computed next. All of it happens on the device, in one launch.

    With the sums of a video added over its branches, d the distance over the rate k_prev chosen last (also where the
    end of the run cut it short), and M, G of motion regularisation (see `Motion`)::

        l1        d = sum|o - n| / sum|o| / k_prev
        l2        d = sqrt(sum (o - n)^2 / sum o^2) / k_prev
        cosine    d = (1 - sum o n / sqrt(sum o^2 sum n^2)) / k_prev
        d         <- d (M + |G|), which the rule turns into the rate k
        next      = min(step + k, N - 1), or N after step N - 1

    At step 1 nothing has been compared: the sums are not looked at, k is 1, M stays. Where d is not finite, because a
    sum is not (inside the window the motion sums too) or there was nothing to divide by, k is 1: the next step is
    computed. A frame stride without pairs of frames is left out of the motion score; with none left M is 1.

    Kahatapitiya et al., arXiv 2411.02397, as the released code decides (AdaCache-DiT/AdaCache).

    Args:
        sums: float32 [B, M + 2 K], of `residual_stats` or `gated_residual` with the rule's metric (M is 2, for cosine
            3) and K frame strides, at least one with motion regularisation. Any strides.
        state: float32 [V, 4], contiguous, apart from `sums`; overwritten. Made by `initial_state`. Column by column:

            step          in: the computed step that the sums are of; out: the next computed one, N + 1 after N
            rate          k chosen last
            motion scale  M of the last comparison
            distance      that the rule saw; NaN at step 1, not finite where the sums did not give one

            V is the number of decisions: 1, all samples together, as in the paper; B, each sample for itself; or B / V
            branches a video: sample b belongs to video b % V, so that guidance halves [cond.., uncond..] decide as one.
        rule: codebook or budget, steps, metric, motion. Another codebook, metric or power is compiled anew; another
            number of steps, window or budget is not.
        backend: "triton", "torch" (`reference`), or None: Triton on CUDA and ROCm devices, PyTorch elsewhere.

    Bytes moved: the sums read once, the state read and written once; a few hundred bytes, so the time is a launch's.
    Nothing is read by the host and nothing allocated: a CUDA graph can capture it.

    Deterministic: float32 in a fixed order, every operation rounded as IEEE 754 says. With "l1" and a whole power
    PyTorch on a CPU gives the same bits; its roots and other powers may differ in the last bit.

    `torch.compile` sees one operator, which mutates `state`.
    """
    _check(sums, state, rule)
    if traced(sums):
        m = rule.motion
        window, motion = (m.window, [m.scale, m.power, m.divisor, m.gradient_weight]) if m else ((), ())
        return _op(
            sums, state, rule.num_steps, rule.thresholds, rule.rates, rule.budget, rule.max_rate, rule.metric,
            window, motion, backend,
        )  # fmt: skip
    if pick_backend("decide", backend, sums, _decide_kernel) == "torch":
        return reference.decide(sums, state, rule)
    return _launch(sums, state, rule)


def _check(sums: torch.Tensor, state: torch.Tensor, rule: Rule) -> None:
    op = "decide"
    if not isinstance(rule, Rule):
        raise TypeError(f"{op}: rule is of type {type(rule).__name__}, expected Rule")
    for name, tensor in (("sums", sums), ("state", state)):
        check_tensor(op, name, tensor)
        if tensor.dtype != torch.float32:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected float32")
        if tensor.dim() != 2:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected two dimensions")
    measures, least = METRICS[rule.metric], 1 if rule.motion else 0
    if sums.shape[1] < measures + 2 * least or (sums.shape[1] - measures) % 2:
        expected = f"{measures} for {rule.metric!r} and 2 for each frame stride, of which at least {least}"
        raise ValueError(f"{op}: sums has {sums.shape[1]} columns, expected {expected}")
    if state.shape[1] != 4 or len(sums) % len(state):
        shape = tuple(state.shape)
        raise ValueError(f"{op}: state has shape {shape}, expected (V, 4) with V a divisor of {len(sums)} samples")
    if state.device != sums.device:
        raise ValueError(f"{op}: state is on {state.device}, sums is on {sums.device}; they must be equal")
    if not state.is_contiguous():
        raise ValueError(f"{op}: state has strides {state.stride()}, expected (4, 1)")


@torch.library.custom_op(
    add_op_namespace_prefix("decide"),
    mutates_args=("state",),
    schema=(
        "(Tensor sums, Tensor(a!) state, int num_steps, float[] thresholds, int[] rates, float? budget, int max_rate, "
        "str metric, int[] window, float[] motion, str? backend) -> ()"
    ),
)
def _op(sums, state, num_steps, thresholds, rates, budget, max_rate, metric, window, motion, backend):
    decide(sums, state, _rule(num_steps, thresholds, rates, budget, max_rate, metric, window, motion), backend=backend)


@_op.register_fake
def _(sums, state, num_steps, thresholds, rates, budget, max_rate, metric, window, motion, backend):
    _check(sums, state, _rule(num_steps, thresholds, rates, budget, max_rate, metric, window, motion))


def _rule(num_steps, thresholds, rates, budget, max_rate, metric, window, motion) -> Rule:
    return Rule(
        num_steps, thresholds, rates, budget, max_rate, metric, Motion(tuple(window), *motion) if window else None
    )

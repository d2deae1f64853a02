"""The decision rule: which denoising steps are computed. Pure arithmetic on a few numbers, no tensors.

Kahatapitiya et al., "Adaptive Caching for Faster Video Generation with Diffusion Transformers", arXiv
2411.02397, as its released code (AdaCache-DiT/AdaCache) decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from .config import METRICS, AdaCacheConfig, DenseEarly


@dataclass
class Step:
    """What happened at one denoising step.

    Attributes:
        step: counted from 1.
        reason: why it was computed, or `reused`: `first` of the run, `rate` expired, one of the two at the `tail`,
            `listed` in a schedule, `warm-up` at the dense beginning of one,
            or `restart`: planned as reused, but what was kept could not serve.
        cause: of a restart: `not finite`, `changed` (nothing kept is of this shape, type, conditions, weights or age),
            or `doubt` (the calls of a step could not be told apart).
        previous_rate: k of the computed step before, None where nothing was compared.
        distance: relative L1 change of the probed residual a step, before motion regularisation.
        motion: the motion score m, None outside the window or without MoReg.
        motion_scale: M, 1 outside the window, None without MoReg.
        motion_gradient: G.
        regularized: the distance that the codebook saw.
        rate: k chosen here; None at a reused step.
        seconds: that the transformer's calls took, on the device that they ran on, each video's share of those that
            several took part in; None where it was not measured. Two records are equal whatever it is.
    """

    step: int
    reason: str
    previous_rate: int | None = None
    distance: float | None = None
    motion: float | None = None
    motion_scale: float | None = None
    motion_gradient: float | None = None
    regularized: float | None = None
    rate: int | None = None
    cause: str | None = None
    seconds: float | None = field(default=None, compare=False)

    @property
    def computed(self) -> bool:
        return self.reason != "reused"

    def to_dict(self) -> dict:
        """Plain values; a number that is not finite is written as its name, JSON has none."""
        items = asdict(self).items()
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in items}


class Schedule:
    """The state of one run of `num_steps` denoising steps.

    Call `begin(step)` for each step in order; after a computed step, `decide(sums)` before the next begins. Where
    another transformer has done `earlier` steps of a run of `total`, a schedule that is a list counts them.
    """

    def __init__(self, config: AdaCacheConfig, num_steps: int, earlier: int = 0, total: int | None = None):
        if num_steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
        self.config, self.num_steps = config, num_steps
        self._listed = None
        if config.schedule is not None:
            listed = config.schedule.for_run(num_steps if total is None else total)
            self._listed = {step - earlier for step in listed}
            self._warm_up = 0
            while isinstance(config.schedule, DenseEarly) and self._warm_up + 1 in listed:
                self._warm_up += 1
        self.steps: list[Step] = []
        self.computed = 0  # the last computed step
        self._rate = 1  # k, chosen there
        self._motion_scale = 1.0  # M of the last comparison

    def begin(self, step: int) -> Step:
        """Plan a step: the returned record says whether and why it is computed.

        Steps may be left out (a guidance interval, a second transformer), never repeated.
        """
        last = self.steps[-1] if self.steps else None
        if last and step <= last.step:
            raise ValueError(f"step: expected one after {last.step}, got {step}")
        if last and last.computed and last.rate is None and self.config.schedule is None:
            self.decide(None)
        if not self.steps:
            reason = "first"
        elif self._listed is not None:
            reason = "reused" if step not in self._listed else "warm-up" if step <= self._warm_up else "listed"
        elif step >= self.computed + self._rate:
            reason = "rate"
        elif step >= self.num_steps - 1:
            reason = "tail"
        else:
            reason = "reused"
        self.steps.append(Step(step, reason))
        if reason != "reused":
            self.computed = step
        return self.steps[-1]

    def restart(self, cause: str) -> None:
        """Compute the step begun last although it was planned as reused: what was kept cannot serve it."""
        self.steps[-1].reason, self.steps[-1].cause = "restart", cause
        self.computed = self.steps[-1].step

    def decide(self, sums: Sequence[float] | None) -> None:
        """Choose the rate at the computed step begun last.

        Args:
            sums: those of the distance, then for each frame stride of MoReg the sum of the frame differences and
                that of the frames that enter them, as `residual_stats` makes them for `config.metric`, summed over
                all that is decided together. Then the distance sums of further streams; the stream that changed
                most decides. None where there was nothing to compare: the rate is 1.
        """
        record, motion = self.steps[-1], self.config.motion
        if not record.computed:
            raise ValueError(f"decide: expected a computed step, but step {record.step} was reused")
        if sums is None:
            record.rate = self._rate = 1
            return
        record.previous_rate = self._rate
        columns = METRICS[self.config.metric]
        moving = columns + 2 * len(motion.frame_strides) if motion else columns
        streams = [sums[:columns], *(sums[i : i + columns] for i in range(moving, len(sums), columns))]
        distances = [_distance(self.config.metric, each) for each in streams]
        most = math.nan if any(map(math.isnan, distances)) else max(distances)
        record.distance = record.regularized = most / self._rate
        if motion is not None:
            scale = 1.0
            if motion.window[0] <= record.step <= motion.window[1]:
                record.motion = _motion_score(sums[columns:moving])
                scale = 1.0 if record.motion is None else motion.scale_of(record.motion)
            record.motion_scale = scale
            record.motion_gradient = motion.gradient_weight * (scale - self._motion_scale) / self._rate
            record.regularized *= scale + abs(record.motion_gradient)
            self._motion_scale = scale
        record.rate = self._rate = self.config.codebook.rate(record.regularized)


def _distance(metric: str, sums: Sequence[float]) -> float:
    if metric == "l2":
        return math.sqrt(_ratio(sums[0], sums[1]))
    if metric == "cosine":
        return 1 - _ratio(sums[0], math.sqrt(sums[1]) * math.sqrt(sums[2]))
    return _ratio(sums[0], sums[1])


def _ratio(numerator: float, denominator: float) -> float:
    """NaN unless both are finite and the ratio exists: then the next step is computed."""
    finite = math.isfinite(numerator) and math.isfinite(denominator)
    return numerator / denominator if finite and denominator else math.nan


def _motion_score(sums: Sequence[float]) -> float | None:
    """Mean of the normalised frame differences over the strides that have a pair of frames; None if none has."""
    scores = [_ratio(d, n) for d, n in zip(sums[::2], sums[1::2]) if n != 0]
    return sum(scores) / len(scores) if scores else None

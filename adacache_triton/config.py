"""What a user sets: codebook or fixed schedule, motion regularisation, and the configuration that holds them.

All are immutable, checked when they are made, and go to JSON and back.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .kernels import METRICS

if TYPE_CHECKING:
    from .calibrate import Calibration


def _number(name: str, value, minimum: float, *, strict: bool = False, integer: bool = False):
    """`value` as a plain number if it is finite and over the minimum, else an error that names it."""
    kind = "an integer" if integer else "a finite number"
    bound = f"{kind} {'>' if strict else '>='} {minimum:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if integer else numbers.Real):
        raise TypeError(f"{name}: expected {bound}, got {value!r}")
    number = int(value) if integer else _float(value)
    if not math.isfinite(number) or number < minimum or (strict and number == minimum):
        raise ValueError(f"{name}: expected {bound}, got {value!r}")
    return number


def _float(value) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _tuple(name: str, values) -> tuple:
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{name}: expected a list, got {values!r}")
    return tuple(values)


class _Json:
    """JSON of a frozen dataclass, with unknown fields refused by name."""

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping):
        if not isinstance(data, Mapping):
            raise TypeError(f"{cls.__name__}: expected an object with named fields, got {data!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in data:
            if name not in known:
                raise ValueError(f"{cls.__name__}: unknown field {name!r}; expected some of {', '.join(known)}")
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        for name in required:
            if name not in data:
                raise ValueError(f"{cls.__name__}: field {name!r} is missing")
        return cls(**data)

    @classmethod
    def from_json(cls, text: str):
        try:
            data = json.loads(text)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{cls.__name__}: not valid JSON: {error}") from None
        return cls.from_dict(data)


@dataclass(frozen=True)
class Codebook(_Json):
    """Which rate follows from which distance.

    The rate k is that of the first threshold with distance < threshold, else the last rate; the next computed
    step is then k steps on.

    Args:
        thresholds: ascending, finite, above zero. Higher ones reuse more: faster, less faithful.
        rates: one for each threshold and one for every larger distance; integers >= 1.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    thresholds: tuple[float, ...]
    rates: tuple[int, ...]

    def __post_init__(self):
        thresholds, rates = _tuple("thresholds", self.thresholds), _tuple("rates", self.rates)
        thresholds = tuple(_number("thresholds", value, 0, strict=True) for value in thresholds)
        for low, high in zip(thresholds, thresholds[1:]):
            if low >= high:
                raise ValueError(f"thresholds: expected ascending values, got {high!r} after {low!r}")
        rates = tuple(_number("rates", value, 1, integer=True) for value in rates)
        if len(rates) != len(thresholds) + 1:
            expected = f"{len(thresholds) + 1} values (one a threshold, one for larger distances)"
            raise ValueError(f"rates: expected {expected}, got {len(rates)}")
        object.__setattr__(self, "thresholds", thresholds)
        object.__setattr__(self, "rates", rates)

    def rate(self, distance: float) -> int:
        """The rate for a distance. NaN and Inf give 1: the next step is computed."""
        if not math.isfinite(distance):
            return 1
        return next((k for t, k in zip(self.thresholds, self.rates) if distance < t), self.rates[-1])

    def scaled(self, factor: float) -> Codebook:
        """The same rates with every threshold multiplied: below 1 more faithful, above 1 faster."""
        _number("factor", factor, 0, strict=True)
        return Codebook(tuple(t * factor for t in self.thresholds), self.rates)

    @classmethod
    def parse(cls, text: str) -> Codebook:
        """From `0.03:12,0.05:10,3`: threshold:rate pairs, then the rate of every larger distance."""
        *pairs, last = [entry.strip() for entry in text.split(",")]
        try:
            split = [pair.split(":") for pair in pairs]
            return cls(tuple(float(t) for t, _ in split), (*(int(k) for _, k in split), int(last)))
        except ValueError as error:
            if str(error).startswith(("thresholds:", "rates:")):
                raise
            expected = "threshold:rate pairs and a last rate, as in 0.03:12,0.05:10,3"
            raise ValueError(f"codebook: expected {expected}, got {text!r}") from None

    def __str__(self) -> str:
        pairs = [f"{t!r}:{k}" for t, k in zip(self.thresholds, self.rates)]
        return ",".join([*pairs, str(self.rates[-1])])


@dataclass(frozen=True)
class MadeFor(_Json):
    """What a schedule was searched for, and on.

    Attributes:
        transformer: class name.
        blocks: in its lists.
        scheduler: class name.
        num_steps: of a run.
        latents: shape of one video's, as the transformer gets them, without the batch.
        prompts: that it was searched on.
        seeds: likewise, and those held out.
        versions: of the packages.
        date: of the day.
    """

    transformer: str
    blocks: int
    scheduler: str
    num_steps: int
    latents: tuple[int, ...]
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    date: str = ""

    def __post_init__(self):
        for name in ("latents", "prompts", "seeds"):
            object.__setattr__(self, name, _tuple(name, getattr(self, name)))
        object.__setattr__(self, "versions", tuple(tuple(pair) for pair in _tuple("versions", self.versions)))

    def differences(self, **found) -> list[str]:
        """Which of the attributes given are others here, each in a few words."""
        pairs = [(name, getattr(self, name), value) for name, value in found.items()]
        return [f"{name} {value} instead of {own}" for name, own, value in pairs if own != value]


@dataclass(frozen=True)
class FixedSchedule(_Json):
    """Which steps of a run are computed, as a list: nothing is measured, nothing decided.

    Args:
        steps: the computed ones, ascending, counted from 1, which is the first of them.
        num_steps: of the run that the list is for, at least as many as its last step.
        made_for: what it was searched for, if it was: used elsewhere, it warns.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    steps: tuple[int, ...]
    num_steps: int
    made_for: MadeFor | None = None

    def __post_init__(self):
        if self.made_for is not None and not isinstance(self.made_for, MadeFor):
            raise TypeError(f"made_for: expected a MadeFor or None, got {self.made_for!r}")
        steps = tuple(_number("steps", step, 1, integer=True) for step in _tuple("steps", self.steps))
        if not steps or steps[0] != 1:
            raise ValueError(f"steps: expected 1 as the first, got {self.steps!r}")
        for before, after in zip(steps, steps[1:]):
            if before >= after:
                raise ValueError(f"steps: expected ascending values, got {after!r} after {before!r}")
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "num_steps", _number("num_steps", self.num_steps, steps[-1], integer=True))

    @classmethod
    def from_dict(cls, data: Mapping) -> FixedSchedule:
        if isinstance(data, Mapping) and data.get("made_for") is not None:
            data = {**data, "made_for": MadeFor.from_dict(data["made_for"])}
        return super().from_dict(data)

    def for_run(self, num_steps: int) -> tuple[int, ...]:
        """The computed steps of a run.

        Raises:
            ValueError: the list is for a run of another length.
        """
        if num_steps != self.num_steps:
            raise ValueError(
                f"config.schedule.num_steps: expected {num_steps}, the steps of the run, got {self.num_steps}"
            )
        return self.steps


FOR_AN_END = 8  # computed steps behind the first ones: with fewer, a second one at the end is better spent before it


@dataclass(frozen=True)
class DenseEarly(_Json):
    """Which steps of a run of any length are computed: a wanted share of them, densely early, then at growing gaps.

    An error of the first steps is carried through all later ones, and residuals change fastest there, and again at the
    end. Of N steps round(N / speedup) are computed: a share of them first, in a row, then at gaps that grow
    geometrically up to step 0.94 N, and step 0.98 N; where few are left for that, up to step 0.96 N. Nothing is
    measured, so it neither collapses nor idles on a model that nobody has calibrated.

    Args:
        speedup: wanted, in steps of the run a computed one; >= 1.
        warmup: share of the computed steps that come first, in a row; at least 3 steps are.
        growth: of the gaps, the last over the first; >= 1.
    """

    speedup: float
    warmup: float = 0.4
    growth: float = 2.0

    def __post_init__(self):
        for name, minimum in (("speedup", 1), ("warmup", 0), ("growth", 1)):
            object.__setattr__(self, name, _number(name, getattr(self, name), minimum))
        if self.warmup > 1:
            raise ValueError(f"warmup: expected a share of at most 1, got {self.warmup!r}")

    def for_run(self, num_steps: int) -> tuple[int, ...]:
        """The computed steps of a run: round(num_steps / speedup) of them, at least 3 where the run has as many."""
        count = min(max(3, math.floor(num_steps / self.speedup + 0.5)), num_steps)
        first = min(max(3, math.floor(count * self.warmup + 0.5)), count)
        later = count - first
        if later == 0:
            return tuple(range(1, count + 1))
        shares = (0.06, 0.02) if later >= FOR_AN_END else (0.04,)
        ends = [num_steps - max(len(shares) - i, round(share * num_steps)) for i, share in enumerate(shares)]
        ends = [max(end, count - len(ends) + i) for i, end in enumerate(ends, 1)]  # where hardly any step is left out
        later -= len(ends) - 1
        sizes = [self.growth ** (i / max(later - 1, 1)) for i in range(later)]
        unit, place, places = (ends[0] - first) / sum(sizes), float(first), [first]
        for i, size in enumerate(sizes, 1):
            place += size * unit
            places.append(min(max(math.floor(place + 0.5), places[-1] + 1), ends[0] - (later - i)))
        # Rounding makes them alternate, which a forecast from the last gap takes for a change of slope: in order, then.
        gaps = sorted(b - a for a, b in zip(places, places[1:]))
        return (*range(1, first), *itertools.accumulate(gaps, initial=first), *ends[1:])


@dataclass(frozen=True)
class MotionRegularization(_Json):
    """MoReg: a livelier video gets a larger distance and so more computed steps.

    With r the new residual and s a stride in latent frames (Kahatapitiya et al., arXiv 2411.02397, with the
    normalisation, power and absolute value of the released code)

        m_s = sum|r[:, s:] - r[:, :-s]| / (sum|r[:, s:]| + sum|r[:, :-s]|),    m = mean of m_s over strides
        M   = (m / scale) ** power / divisor  inside the window, else 1
        G   = gradient_weight * (M - M_prev) / k_prev
        distance <- distance * (M + |G|)

    Args:
        window: first and last step (counted from 1, both included) in which M is measured.
        frame_strides: strides s in latent frames; those as long as the video are left out.
        scale: motion that leaves the distance as it is. 0.385 was fitted to Open-Sora.
        power: how sharply M rises around the scale.
        divisor: of the power; the released configuration ran with 1.
        gradient_weight: weight of the change of M, 0 to leave it out.
    """

    window: tuple[int, int]
    frame_strides: tuple[int, ...] = (1,)
    scale: float = 0.385
    power: float = 8
    divisor: float = 1
    gradient_weight: float = 10

    def __post_init__(self):
        window, strides = _tuple("window", self.window), _tuple("frame_strides", self.frame_strides)
        if len(window) != 2:
            raise ValueError(f"window: expected two steps (first, last), got {self.window!r}")
        window = tuple(_number("window", step, 0, integer=True) for step in window)
        if not 1 <= window[0] <= window[1]:
            raise ValueError(f"window: expected 1 <= first <= last, got {self.window!r}")
        if not strides or len(set(strides)) != len(strides):
            raise ValueError(f"frame_strides: expected distinct strides, at least one, got {self.frame_strides!r}")
        strides = tuple(_number("frame_strides", stride, 1, integer=True) for stride in strides)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "frame_strides", strides)
        for name, strict in (("scale", True), ("power", False), ("divisor", True), ("gradient_weight", False)):
            object.__setattr__(self, name, _number(name, getattr(self, name), 0, strict=strict))

    def scale_of(self, motion: float) -> float:
        """M for a motion score m inside the window; Inf where it overflows."""
        try:
            return (motion / self.scale) ** self.power / self.divisor
        except OverflowError:
            return math.inf

    def rescaled(self, published: int, steps: int) -> MotionRegularization:
        """The same for a run of another length: the window keeps its share of the steps."""
        _number("published", published, 1, integer=True)
        _number("steps", steps, 1, integer=True)
        first, last = (max(1, math.floor(s * steps / published + 0.5)) for s in self.window)
        return dataclasses.replace(self, window=(first, last))


FORECASTS = {"none": 1, "fitted": 2, "quadratic": 3}  # and how many residuals each keeps
GRANULARITIES = ("stack", "block", "module")
MODULES = ("attention", "cross_attention", "mlp")


@dataclass(frozen=True)
class AdaCacheConfig(_Json):
    """How a transformer is cached: by a codebook, or by a fixed schedule.

    Args:
        codebook: from the residual's distance to the rate: the trade of speed against fidelity. None with a schedule.
        motion: MoReg, or None. It spends more steps on lively videos and fewer on still ones.
        num_steps: denoising steps of a run, at least 3, where a bare transformer is cached. None for a pipeline,
            which says so itself, and with a schedule, which does.
        probe_block: index of the block whose attention residual is measured, from 0 (negative: from the end).
            None is the middle one, as in the paper.
        metric: of the distance: `l1` as in the released code, `l2` or `cosine` as in the paper's ablation.
        granularity: what keeps a residual: the whole `stack` (least memory, and no block runs on a reused step),
            each `block`, or each `module`: attention, cross-attention and MLP. A compiled transformer (`torch.compile`)
            takes the first two.
        modules: with granularity `module`, which of `attention`, `cross_attention` and `mlp` are cached, and how
            often in a row each may be reused (None: as long as the rate says). What is not named is computed on
            every step.
        per_video: whether each video of a batch follows a schedule of its own, the same as if it were alone. Else
            one decision is taken for all of them, as in the paper.
        schedule: which steps are computed, instead of a codebook: a `FixedSchedule`, or a `DenseEarly` of a wanted
            speed-up. A second transformer's first one is in any case.
        forecast: what a reused step adds. `none`: the residual kept last, as in the paper. `fitted`: that residual
            carried on along its last change, as far as was right for each sample at the computed step before; keeps
            two. `quadratic`: the mean of the line through the last two and the parabola through the last three. Both
            are for granularity `stack`.
        correct: whether a computed step also puts right what the reused ones before it did to the latents, now that
            the residuals on both sides of them are known. For pipelines with an Euler flow-matching scheduler.
    """

    codebook: Codebook | None = None
    motion: MotionRegularization | None = None
    num_steps: int | None = None
    probe_block: int | None = None
    metric: str = "l1"
    granularity: str = "stack"
    modules: Mapping[str, int | None] | tuple[tuple[str, int | None], ...] | None = None
    per_video: bool = False
    schedule: FixedSchedule | DenseEarly | None = None
    forecast: str = "none"
    correct: bool = False

    def __post_init__(self):
        if self.schedule is not None and not isinstance(self.schedule, (FixedSchedule, DenseEarly)):
            raise TypeError(f"schedule: expected a FixedSchedule, a DenseEarly or None, got {self.schedule!r}")
        if self.schedule is None and not isinstance(self.codebook, Codebook):
            raise TypeError(f"codebook: expected a Codebook, got {self.codebook!r}")
        for name in ("codebook", "motion", "probe_block"):
            if self.schedule is not None and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}: expected None with a schedule, which measures nothing, got {value!r}")
        if self.motion is not None and not isinstance(self.motion, MotionRegularization):
            raise TypeError(f"motion: expected a MotionRegularization or None, got {self.motion!r}")
        if self.num_steps is not None:
            object.__setattr__(self, "num_steps", _number("num_steps", self.num_steps, 3, integer=True))
        if self.probe_block is not None and (
            isinstance(self.probe_block, bool) or not isinstance(self.probe_block, int)
        ):
            raise TypeError(f"probe_block: expected an integer or None, got {self.probe_block!r}")
        for name in ("per_video", "correct"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        _known("metric", self.metric, METRICS)
        _known("granularity", self.granularity, GRANULARITIES)
        _known("forecast", self.forecast, FORECASTS)
        if self.forecast != "none" and self.granularity != "stack":
            raise ValueError(f"forecast: expected 'none' with granularity {self.granularity!r}, got {self.forecast!r}")
        fixed = self.schedule
        if isinstance(fixed, FixedSchedule) and self.num_steps not in (None, fixed.num_steps):
            raise ValueError(f"num_steps: expected {fixed.num_steps} or None with that schedule, got {self.num_steps}")
        if fixed is not None and self.metric != "l1":
            raise ValueError(f"metric: expected none with a schedule, which measures nothing, got {self.metric!r}")
        if self.modules is not None:
            if self.granularity != "module":
                raise ValueError(f"modules: expected None with granularity {self.granularity!r}, got {self.modules!r}")
            try:
                modules = dict(self.modules)
            except (TypeError, ValueError):
                modules = None
            if not modules:
                raise TypeError(f"modules: expected a mapping of modules to reuses in a row, got {self.modules!r}")
            for name, reuses in modules.items():
                _known("modules", name, MODULES)
                if reuses is not None:
                    _number(f"modules[{name!r}]", reuses, 0, integer=True)
            object.__setattr__(self, "modules", tuple(modules.items()))  # immutable

    @classmethod
    def from_dict(cls, data: Mapping) -> AdaCacheConfig:
        if isinstance(data, Mapping):
            data = dict(data)
            kinds = {"codebook": Codebook, "motion": MotionRegularization, "schedule": FixedSchedule}
            if isinstance(data.get("schedule"), Mapping) and "speedup" in data["schedule"]:
                kinds["schedule"] = DenseEarly
            for name, kind in kinds.items():
                if data.get(name) is not None:
                    data[name] = kind.from_dict(data[name])
        return super().from_dict(data)

    @classmethod
    def for_speedup(cls, speedup: float, calibration: Calibration | str | Path | None = None) -> AdaCacheConfig:
        """So many times fewer computed steps; 2 to 3 is a usual choice.

        Args:
            speedup: steps of a run a computed one.
            calibration: of the model, or its file, written by `adacache-triton calibrate`. None: the best schedule
                that needs none, on any model.

        Raises:
            ValueError: the calibration has no point within 10 % of it.
        """
        if calibration is not None:
            return _loaded(calibration).for_speedup(speedup)
        return cls(schedule=DenseEarly(speedup), forecast="fitted", correct=True)

    @classmethod
    def for_quality(cls, psnr: float, calibration: Calibration | str | Path) -> AdaCacheConfig:
        """The fastest schedule of a calibration that reached a PSNR in dB against the uncached video, on held-out ones.

        Raises:
            ValueError: none did.
        """
        return _loaded(calibration).for_quality(psnr)

    @classmethod
    def official(cls, name: str, *, moreg: bool = False) -> AdaCacheConfig:
        """A preset of the released code, `open-sora-100`, `open-sora-30-fast` or `open-sora-30-slow`.

        The number in the name is the number of steps that it was published for.
        """
        return cls.preset(_known("preset", name, OFFICIAL), moreg=moreg)

    @classmethod
    def preset(cls, name: str, *, moreg: bool = False) -> AdaCacheConfig:
        """An official preset, or `embedded`: the one of the small model in `adacache_triton.testbed`."""
        preset = PRESETS[_known("preset", name, PRESETS)]
        return cls(preset.codebook, preset.motion if moreg else None)


def _loaded(calibration: Calibration | str | Path) -> Calibration:
    from .calibrate import Calibration

    if isinstance(calibration, (str, Path)):
        return Calibration.load(calibration)
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration: expected a Calibration or the path of its file, got {calibration!r}")
    return calibration


@dataclass(frozen=True)
class Preset:
    """A codebook, its MoReg, and the number of steps of a run that both were published for."""

    codebook: Codebook
    motion: MotionRegularization
    steps: int


def _known(argument: str, name: str, names) -> str:
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(names)}, got {name!r}")
    return name


OFFICIAL = {
    "open-sora-100": Preset(
        Codebook((0.03, 0.05, 0.07, 0.09, 0.11), (12, 10, 8, 6, 4, 3)), MotionRegularization((10, 90)), 100
    ),
    "open-sora-30-fast": Preset(
        Codebook((0.08, 0.16, 0.24, 0.32, 0.40), (6, 5, 4, 3, 2, 1)), MotionRegularization((4, 26)), 30
    ),
    "open-sora-30-slow": Preset(Codebook((0.08, 0.16), (3, 2, 1)), MotionRegularization((4, 26)), 30),
}

PRESETS = OFFICIAL | {
    # The thresholds of open-sora-30-fast, scaled to where this model's distances lie, and a MoReg scale near its mean
    # motion: chosen from benchmarks/results/embedded_preset.csv, on seeds that the demo does not show.
    "embedded": Preset(
        OFFICIAL["open-sora-30-fast"].codebook.scaled(0.25), MotionRegularization((5, 45), scale=0.1, power=1), 50
    ),
}

"""Schedules that set themselves: searched for a model on a few videos, checked on others, kept with their origin.

What is searched is a list of computed steps, by real runs: the error of a reused step grows or shrinks on its way to
the video, and no measurement in the run tells how much. What is found is data, a `Calibration`.
"""

from __future__ import annotations

import datetime
import inspect
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from ._version import __version__
from .apply import apply_adacache
from .config import AdaCacheConfig, DenseEarly, FixedSchedule, MadeFor, _Json, _number
from .generate import LoopTimer
from .models import stack_of

BEST = 80.0  # dB; a video as near as that to the uncached one counts no more
MOVES = (-1, 1, -2, 2, -3, 3)  # steps by which a computed one is moved


@dataclass(frozen=True)
class CalibratedPoint(_Json):
    """A schedule and what it does on videos that it was not searched on.

    Attributes:
        steps: the computed ones.
        psnr: mean over the held-out videos against the uncached ones, dB.
        psnr_interval: half the width of its 95 % interval.
        psnr_min: of the worst of them.
        speedup: steps of a run a computed one.
        speedup_seconds: uncached over cached time of the same runs.
    """

    steps: tuple[int, ...]
    psnr: float
    psnr_interval: float
    psnr_min: float
    speedup: float
    speedup_seconds: float

    def __post_init__(self):
        object.__setattr__(self, "steps", tuple(self.steps))


@dataclass(frozen=True)
class Calibration(_Json):
    """Schedules for one model at several speed-ups, and where they are from.

    Attributes:
        made_for: model, sampler, size and versions.
        forecast, correct: as in `AdaCacheConfig`.
        points: by speed-up.
    """

    made_for: MadeFor
    forecast: str
    correct: bool
    points: tuple[CalibratedPoint, ...]

    def __post_init__(self):
        if not self.points:
            raise ValueError("points: expected at least one, got none")
        object.__setattr__(self, "points", tuple(sorted(self.points, key=lambda point: point.speedup)))

    @classmethod
    def from_dict(cls, data) -> Calibration:
        if isinstance(data, dict) and {"made_for", "points"} <= data.keys():
            points = tuple(CalibratedPoint.from_dict(point) for point in data["points"])
            data = data | {"made_for": MadeFor.from_dict(data["made_for"]), "points": points}
        return super().from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """From a file that `save` wrote."""
        return cls.from_json(Path(path).read_text())

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n")

    def config(self, point: CalibratedPoint) -> AdaCacheConfig:
        schedule = FixedSchedule(point.steps, self.made_for.num_steps, self.made_for)
        return AdaCacheConfig(schedule=schedule, forecast=self.forecast, correct=self.correct)

    def for_speedup(self, speedup: float) -> AdaCacheConfig:
        """The point nearest to a wanted speed-up.

        Raises:
            ValueError: none is within 10 % of it.
        """
        speedup = _number("speedup", speedup, 1)
        nearest = min(self.points, key=lambda point: abs(point.speedup / speedup - 1))
        if abs(nearest.speedup / speedup - 1) > 0.1:
            found = ", ".join(f"{point.speedup:.2f}" for point in self.points)
            raise ValueError(f"speedup: expected one within 10 % of those calibrated ({found}), got {speedup:g}")
        return self.config(nearest)

    def for_quality(self, psnr: float) -> AdaCacheConfig:
        """The fastest point that reached a wanted PSNR on held-out videos, its interval allowed for.

        Raises:
            ValueError: none did.
        """
        psnr = _number("psnr", psnr, 0)
        good = [point for point in self.points if point.psnr - point.psnr_interval >= psnr]
        if not good:
            best = max(point.psnr - point.psnr_interval for point in self.points)
            raise ValueError(f"psnr: expected at most {best:.1f} dB, which the calibration reached, got {psnr:g}")
        return self.config(good[-1])


def psnr_of(reference: np.ndarray, frames: np.ndarray) -> float:
    """PSNR in dB of a video against another, [T, H, W, 3] in [0, 1], at most `BEST`; 0 where it is not finite."""
    error = float(np.square(reference.astype(np.float64) - frames).mean())
    if not np.isfinite(error):
        return 0.0
    return min(BEST, -10 * np.log10(max(error, 1e-12)))


def worth(psnrs: Sequence[float]) -> float:
    """What the search raises: the mean less half of the standard deviation, as a mean alone may hide a broken video."""
    return statistics.fmean(psnrs) - 0.5 * (statistics.stdev(psnrs) if len(psnrs) > 1 else 0.0)


def shapes(num_steps: int, count: int) -> Iterable[tuple[int, ...]]:
    """Lists to start from."""
    for warmup in (0.4, 0.25):
        for growth in (2, 5):
            yield DenseEarly(num_steps / count, warmup, growth).for_run(num_steps)


def resized(steps: Sequence[int], num_steps: int, count: int) -> tuple[int, ...]:
    """A list of the same shape with `count` steps."""
    places = np.interp(np.linspace(0, len(steps) - 1, count), range(len(steps)), steps)
    found: list[int] = []
    for i, place in enumerate(places):
        least = found[-1] + 1 if found else 1
        found.append(min(max(round(float(place)), least), num_steps - (count - 1 - i)))
    return tuple(found)


def search(
    score: Callable[[tuple[int, ...]], float],
    num_steps: int,
    starts: Iterable[tuple[int, ...]],
    evaluations: int,
    deadline: float = float("inf"),
    seed: int = 0,
) -> tuple[int, ...]:
    """The best list found: from the best start, one step moved at a time, kept where that helps.

    Args:
        score: of a list; higher is better. Never asked twice for one.
        num_steps: of the run.
        starts: lists of one length.
        evaluations: scores asked for at most.
        deadline: in `time.monotonic()`, behind which nothing new is tried.
        seed: of the order of moves: the same search repeats exactly.
    """
    scored: dict[tuple[int, ...], float] = {}
    order = random.Random(seed)

    def tried(steps: tuple[int, ...]) -> bool:
        if steps in scored or len(scored) >= evaluations or (scored and time.monotonic() > deadline):
            return False
        scored[steps] = score(steps)
        return True

    for start in starts:
        tried(tuple(start))
    improved = True
    while improved and len(scored) < evaluations and time.monotonic() <= deadline:
        improved, best = False, max(scored, key=scored.get)
        for moved in _moves(best, num_steps, order):
            if tried(moved) and scored[moved] > scored[best]:
                improved = True
                break
    return max(scored, key=scored.get)


def _moves(steps: tuple[int, ...], num_steps: int, order: random.Random) -> list[tuple[int, ...]]:
    """All lists that differ in one step, in random order."""
    found = set()
    for i in range(1, len(steps)):
        rest = set(steps[:i] + steps[i + 1 :])
        for place in (*(steps[i] + move for move in MOVES), *_middles(steps, num_steps)):
            if 1 < place <= num_steps and place not in rest and place != steps[i]:
                found.add(tuple(sorted(rest | {place})))
    return order.sample(sorted(found), len(found))


def _middles(steps: tuple[int, ...], num_steps: int) -> list[int]:
    """The middles of the three longest gaps: a step from anywhere may go there."""
    gaps = sorted(zip(steps, (*steps[1:], num_steps + 1)), key=lambda gap: gap[0] - gap[1])
    return [(a + b) // 2 for a, b in gaps[:3] if b - a > 1]


def calibrate(
    run: Callable[[AdaCacheConfig | None, bool], tuple[list[np.ndarray], float]],
    made_for: MadeFor,
    speedups: Sequence[float],
    *,
    forecast: str = "fitted",
    correct: bool = True,
    evaluations: int = 30,
    minutes: float = float("inf"),
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> Calibration:
    """Search a schedule for each wanted speed-up, and measure it on held-out videos.

    Args:
        run: makes the calibration's videos, or those held out, with a configuration, or uncached with None; returns
            their frames, each [T, H, W, 3] in [0, 1], and the seconds of the denoising loops.
        made_for: where the schedules belong.
        speedups: wanted, each in steps of the run a computed one.
        forecast, correct: as in `AdaCacheConfig`.
        evaluations: runs for the greatest speed-up at most; the others get as much time, so fewer, but at least 8.
        minutes: for all of it, held-out runs included.
        on_progress: is told what is being done, and the share of all that is done.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if not speedups:
        raise ValueError("speedups: expected at least one, got none")
    num_steps, began = made_for.num_steps, time.monotonic()
    counts = sorted({max(3, round(num_steps / _number("speedup", speedup, 1))) for speedup in speedups}, reverse=True)
    base = AdaCacheConfig(schedule=DenseEarly(1), forecast=forecast, correct=correct)

    def config(steps: tuple[int, ...]) -> AdaCacheConfig:
        return replace(base, schedule=FixedSchedule(steps, num_steps))

    on_progress("uncached", 0.0)
    uncached, _ = run(None, False)
    reference, seconds_uncached = run(None, True)
    reserve = 2 * (time.monotonic() - began)
    allowed = {count: max(8, round(evaluations * counts[-1] / count)) for count in counts}
    found: dict[int, tuple[int, ...]] = {}
    tries = 0

    def score(steps: tuple[int, ...]) -> float:
        nonlocal tries
        tries += 1
        on_progress(f"{len(steps)} of {num_steps} steps", min(0.99, tries / sum(allowed.values())))
        frames, _ = run(config(steps), False)
        return worth([psnr_of(a, b) for a, b in zip(uncached, frames)])

    for i, count in enumerate(counts):
        starts = [*(resized(steps, num_steps, count) for steps in list(found.values())[-1:]), *shapes(num_steps, count)]
        left = began + 60 * minutes - reserve - time.monotonic()
        deadline = time.monotonic() + left / (len(counts) - i)
        found[count] = search(score, num_steps, starts, allowed[count], deadline)
    points = []
    for count, steps in found.items():
        on_progress(f"held out: {count} of {num_steps} steps", 0.99)
        frames, seconds = run(config(steps), True)
        psnrs = [psnr_of(a, b) for a, b in zip(reference, frames)]
        spread = statistics.stdev(psnrs) / len(psnrs) ** 0.5 if len(psnrs) > 1 else 0.0
        points.append(
            CalibratedPoint(
                steps,
                psnr=round(statistics.fmean(psnrs), 3),
                psnr_interval=round(1.96 * spread, 3),
                psnr_min=round(min(psnrs), 3),
                speedup=round(num_steps / count, 4),
                speedup_seconds=round(seconds_uncached / seconds, 4),
            )
        )
    on_progress("done", 1.0)
    return Calibration(made_for, forecast, correct, tuple(points))


class Videos:
    """What a calibration runs: a pipeline on prompts and seeds, some of which are held out.

    Args:
        pipeline: of diffusers, silent, on its device.
        prompts: each is made with every seed.
        num_steps: of a run.
        seeds: as many for the search, and as many again held out.
        first_seed: the first of them.
        batch: videos in a call of the pipeline.
        arguments: of its call besides.
    """

    def __init__(
        self, pipeline, prompts, num_steps: int, seeds: int = 1, first_seed: int = 0, batch: int = 1, **arguments
    ):
        self.pipeline, self.prompts, self.num_steps = pipeline, tuple(prompts), num_steps
        self.batch, self._arguments = batch, arguments
        self.seeds = tuple(range(first_seed, first_seed + 2 * seeds))

    def made_for(self) -> MadeFor:
        """Where the schedules belong. Makes a video of two steps, to see the latents."""
        model, shapes = self.pipeline.transformer, []
        stack = stack_of(model)

        def look(module, args, kwargs):
            names = inspect.signature(module.forward).parameters
            shapes.append(stack.call(dict(zip(names, args)) | kwargs, None).latents)

        hook = model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
        try:
            self._make(self.prompts[:1], self.seeds[:1], 2)
        finally:
            hook.remove()
        names = ("torch", "diffusers")
        return MadeFor(
            type(model).__name__,
            sum(len(model.get_submodule(path)) for path in stack.lists),
            type(self.pipeline.scheduler).__name__,
            self.num_steps,
            shapes[0],
            self.prompts,
            self.seeds,
            (("adacache-triton", __version__), *((name, metadata.version(name)) for name in names)),
            datetime.date.today().isoformat(),
        )

    def __call__(self, config: AdaCacheConfig | None, held_out: bool) -> tuple[list[np.ndarray], float]:
        """The frames of the videos, of the search or held out, and the seconds of their denoising loops."""
        half = len(self.seeds) // 2
        seeds = self.seeds[half:] if held_out else self.seeds[:half]
        videos = [(prompt, seed + 1000 * i) for i, prompt in enumerate(self.prompts) for seed in seeds]
        frames, seconds = [], 0.0
        for i in range(0, len(videos), self.batch):
            prompts, noises = zip(*videos[i : i + self.batch])
            handle = None if config is None else apply_adacache(self.pipeline, config)
            try:
                with LoopTimer(self.pipeline, self.pipeline.transformer.device, lambda forwards: None) as timer:
                    frames += self._make(prompts, noises, self.num_steps)
                seconds += timer.seconds()
            finally:
                if handle:
                    handle.remove()
        return frames, seconds

    def _make(self, prompts, noises, steps: int) -> list[np.ndarray]:
        generators = [torch.Generator().manual_seed(seed) for seed in noises]
        output = self.pipeline(prompt=list(prompts), num_inference_steps=steps, generator=generators, **self._arguments)
        return [np.asarray(frames, dtype=np.float32) for frames in output.frames]

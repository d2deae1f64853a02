"""What is evaluated: this package's methods, their controls, and other packages' caches as users install them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from adacache_triton import AdaCacheConfig, DenseEarly, FixedSchedule, MotionRegularization, apply_adacache
from adacache_triton.calibrate import Calibration
from adacache_triton.config import OFFICIAL

STEPS = 50
COUNTS = (33, 25, 17, 12, 10)  # computed of them: 1.5, 2, 3, 4 and 5 times fewer
PEERS = ("diffusers", "cache-dit")  # how the names of other packages' methods begin
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Method:
    """One method at one setting.

    Attributes:
        name, setting: as rows and tables have them.
        put: a context for one run of a pipeline; what it yields gives the computed steps afterwards, where it knows.
        steps: of the run.
    """

    name: str
    setting: str
    put: Callable
    steps: int = STEPS


def ours(config: AdaCacheConfig):
    @contextmanager
    def put(pipe) -> Iterator[Callable[[], list[int]]]:
        handle = apply_adacache(pipe, config)
        try:
            yield lambda: handle.report().computed_steps
        finally:
            handle.remove()

    return put


def listed(steps, **options) -> AdaCacheConfig:
    return AdaCacheConfig(schedule=FixedSchedule(tuple(steps), STEPS), **options)


@contextmanager
def nothing(pipe):
    yield list


def calibrated(model: str, forecast: str, correct: bool) -> dict[int, tuple[int, ...]]:
    """Searched schedules by their number of steps; none where no calibration lies there."""
    path = RESULTS / f"calibration_{model}_{forecast}_{'corrected' if correct else 'plain'}.json"
    if not path.exists():
        return {}
    return {len(point.steps): point.steps for point in Calibration.load(path).points}


def best_calibrated(model: str) -> tuple[str, dict[int, tuple[int, ...]]]:
    """Of the corrected calibrations the forecast that did better on their own held-out videos, and its schedules."""
    found = {f: calibrated(model, f, True) for f in ("fitted", "quadratic")}

    def worth(forecast: str) -> float:
        path = RESULTS / f"calibration_{model}_{forecast}_corrected.json"
        return np.mean([point["psnr"] for point in json.loads(path.read_text())["points"]]) if found[forecast] else 0

    best = max(found, key=worth)
    return best, found[best]


def methods(model: str) -> list[Method]:
    """In order of value."""
    forecast, searched = best_calibrated(model)
    speedups = {count: STEPS / count for count in COUNTS}
    found = [
        Method("ours, calibrated", str(n), ours(listed(s, forecast=forecast, correct=True)))
        for n, s in searched.items()
    ]
    found += [Method("ours, uncalibrated", str(n), ours(AdaCacheConfig.for_speedup(x))) for n, x in speedups.items()]
    fast, slow, long = (OFFICIAL[name] for name in ("open-sora-30-fast", "open-sora-30-slow", "open-sora-100"))
    books = [("fast", fast, x) for x in (0.08, 0.15, 0.3, 0.6, 1.2)]
    books += [("slow", slow, x) for x in (0.3, 0.7)] + [("100", long, x) for x in (0.25, 0.6, 1.0)]
    found += [
        Method("AdaCache official", f"{name} x {x:g}", ours(AdaCacheConfig(preset.codebook.scaled(x))))
        for name, preset, x in books
    ]
    for plan in ("fitted", "quadratic", "none"):
        found += [
            Method(f"searched list, {plan}", str(n), ours(listed(s, forecast=plan)))
            for n, s in calibrated(model, plan, False).items()
        ]
    found += peers(model)
    found += [Method("fewer steps", str(n), nothing, n) for n in COUNTS]
    even = {n: tuple(dict.fromkeys(np.linspace(1, STEPS, n).round().astype(int).tolist())) for n in COUNTS}
    for plan in ("none", "fitted"):
        found += [Method(f"uniform, {plan}", str(n), ours(listed(s, forecast=plan))) for n, s in even.items()]
    window = (STEPS // 10, STEPS * 9 // 10)
    forms = {
        "official form": MotionRegularization(window),
        "own scale": MotionRegularization(window, scale=0.1, power=1),
    }
    found += [
        Method(f"AdaCache + MoReg, {name}", f"fast x {x:g}", ours(AdaCacheConfig(fast.codebook.scaled(x), motion)))
        for name, motion in forms.items()
        for x in (0.18, 0.3)
    ]
    for name, options in {
        "dense early alone": dict(),
        "dense early, fitted": dict(forecast="fitted"),
        "dense early, corrected": dict(correct=True),
        "dense early, quadratic, corrected": dict(forecast="quadratic", correct=True),
    }.items():
        found += [
            Method(name, str(n), ours(AdaCacheConfig(schedule=DenseEarly(STEPS / n), **options))) for n in (25, 17, 12)
        ]
    return found


def diffusers_cache(kind: str, make: Callable):
    """A cache of diffusers, by its configuration."""

    @contextmanager
    def put(pipe):
        import diffusers

        model = pipe.transformer
        named = model.register_forward_pre_hook(name_arguments, prepend=True, with_kwargs=True)
        try:
            model.enable_cache(make(getattr(diffusers, kind, None) or getattr(diffusers.hooks, kind), pipe))
            yield list
        finally:
            named.remove()
            if model.is_cache_enabled:
                model.disable_cache()

    return put


def name_arguments(model, args, kwargs):
    """As Wan's pipeline hands them over: FasterCache takes only what has a name for one of both guidance branches."""
    return (), dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), args)) | kwargs


def mag_ratios(pipe, kind) -> list[float]:
    """MagCache's own calibration on one video, whose ratios it prints."""
    printed = io.StringIO()
    pipe.transformer.enable_cache(kind(calibrate=True, num_inference_steps=STEPS))
    try:
        with contextlib.redirect_stdout(printed):
            make_video(pipe, pipe.calibration_prompt, 7, STEPS)
    finally:
        pipe.transformer.disable_cache()
    return [float(x) for x in re.findall(r"\[([\d., e+-]+)\]", printed.getvalue())[-1].split(",")]


def cache_dit(taylor: bool, threshold: float, warmup: int, most: int):
    """DBCache, as cache-dit documents it for a transformer."""

    @contextmanager
    def put(pipe):
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
        import cache_dit as package

        config = package.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=warmup, max_continuous_cached_steps=most,
            residual_diff_threshold=threshold, num_inference_steps=STEPS, enable_separate_cfg=pipe.NAME == "wan",
        )  # fmt: skip
        options = dict(calibrator_config=package.TaylorSeerCalibratorConfig(taylorseer_order=1)) if taylor else {}
        package.enable_cache(pipe.transformer, cache_config=config, **options)
        try:
            yield list
        finally:
            package.disable_cache(pipe.transformer)

    return put


def peers(model: str) -> list[Method]:
    def mag(kind, pipe, threshold, most, retained=0.2):
        if not hasattr(pipe, "mag_ratios"):
            pipe.mag_ratios = mag_ratios(pipe, kind)
        options = dict(retention_ratio=retained, mag_ratios=pipe.mag_ratios, num_inference_steps=STEPS)
        return kind(threshold=threshold, max_skip_steps=most, **options)

    def timestep(pipe):
        return lambda: int(pipe.current_timestep)

    found = []
    for x in (0.03, 0.06, 0.1, 0.16, 0.25):
        put = diffusers_cache("FirstBlockCacheConfig", lambda kind, pipe, x=x: kind(threshold=x))
        found.append(Method("diffusers FirstBlockCache", f"{x:g}", put))
    for every in (2, 3, 5, 10):  # the modules that it looks for by itself these models do not have
        put = diffusers_cache(
            "TaylorSeerCacheConfig",
            lambda kind, pipe, n=every: kind(
                cache_interval=n, disable_cache_before_step=8, taylor_factors_dtype=torch.float32,
                cache_identifiers=[r".*blocks\.\d+\.(attn1|attn2|ffn|ff)"],
            ),
        )  # fmt: skip
        found.append(Method("diffusers TaylorSeer", f"every {every}", put))
    for setting in ((0.03, 2), (0.06, 3), (0.24, 5), (1, 10, 0.1)):
        put = diffusers_cache("MagCacheConfig", lambda kind, pipe, s=setting: mag(kind, pipe, *s))
        found.append(Method("diffusers MagCache", ", ".join(f"{x:g}" for x in setting), put))
    settings = ((0.1, 1), (0.2, 2), (0.4, 3), (0.8, 5))
    for x, most in settings[-1:] if model == "latte" else settings:  # there it computes every step
        put = diffusers_cache(
            "SeaCacheConfig",
            lambda kind, pipe, x=x, most=most: kind(
                threshold=x,
                max_consecutive_cached=most,
                # It finds Wan's latents by itself; for another class it asks for this.
                raw_vision_callback=None if model == "wan" else lambda m, args, kw: list(kw["hidden_states"]),
            ),
        )
        found.append(Method("diffusers SeaCache", f"{x:g}, {most}", put))
    for taylor in (False, True):
        name = "cache-dit DBCache" + (" + TaylorSeer" if taylor else "")
        for x, warmup, most in ((0.04, 8, 4), (0.08, 8, 4), (0.16, 8, 4), (0.4, 4, 8)):
            found.append(Method(name, f"{x:g}, {warmup}, {most}", cache_dit(taylor, x, warmup, most)))
    for every in (2, 4):
        put = diffusers_cache(
            "PyramidAttentionBroadcastConfig",
            lambda kind, pipe, n=every: kind(
                spatial_attention_block_skip_range=n, temporal_attention_block_skip_range=n,
                cross_attention_block_skip_range=n, current_timestep_callback=timestep(pipe),
            ),
        )  # fmt: skip
        found.append(Method("diffusers PAB", f"every {every}", put))
    put = diffusers_cache(
        "FasterCacheConfig",
        lambda kind, pipe: kind(
            spatial_attention_block_skip_range=2, current_timestep_callback=timestep(pipe),
            attention_weight_callback=lambda _: 0.5, tensor_format="BCFHW",
        ),
    )  # fmt: skip
    found.append(Method("diffusers FasterCache", "every 2", put))
    return found


def make_video(pipe, prompt: str, seed: int, steps: int) -> np.ndarray:
    """One video, [T, H, W, 3]."""
    return pipe(prompt, steps, generator=torch.Generator().manual_seed(seed)).frames[0]


def controls(rows: list[dict], name: str, setting: str) -> list[Method]:
    """Of an adaptive method at a setting: its mean schedule for all videos, and its schedules dealt to others.

    Args:
        rows: of the method, with the schedule of each video.
    """
    lists = {(row["class"], int(row["seed"])): [int(s) for s in row["schedule"].split()] for row in rows}
    count = round(np.mean([len(steps) for steps in lists.values()]))
    places = np.linspace(0, 1, count)
    means = np.mean([np.interp(places, np.linspace(0, 1, len(s)), s) for s in lists.values()], axis=0)
    common: list[int] = []
    for i, place in enumerate(means):
        common.append(min(max(round(float(place)), common[-1] + 1 if common else 1), STEPS - (count - 1 - i)))
    keys = sorted(lists)  # by class, so that as many further on as there are seeds is the next class
    seeds = len({seed for _, seed in keys})
    dealt = {key: lists[keys[(i + seeds) % len(keys)]] for i, key in enumerate(keys)}

    def deal(pipe):
        return ours(listed(dealt[pipe.video]))(pipe)

    return [
        Method(f"{name}: mean schedule", setting, ours(listed(common))),
        Method(f"{name}: schedules dealt", setting, deal),
    ]


def oracle(model: str, count: int, score: Callable[[AdaCacheConfig], float], tries: int) -> AdaCacheConfig:
    """The best schedule found for one video by moving single steps of the common one, its score known."""
    from adacache_triton.calibrate import search

    forecast, searched = best_calibrated(model)
    base = AdaCacheConfig(schedule=DenseEarly(STEPS / count), forecast=forecast, correct=True)
    start = searched.get(count) or DenseEarly(STEPS / count).for_run(STEPS)

    def config(steps):
        return replace(base, schedule=FixedSchedule(tuple(steps), STEPS))

    return config(search(lambda steps: score(config(steps)), STEPS, [start], tries))

"""Where caching cannot help: what a run showed, and what to change."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median

from torch import nn

from .config import AdaCacheConfig, Codebook
from .report import Report
from .schedule import Step

FEW = 10  # steps of a run
SCHEDULERS = ("LCMScheduler", "FlowMatchLCMScheduler", "TCDScheduler")  # of distilled models
ADAPTERS = re.compile("lcm|lightning|turbo|hyper|dmd|causvid", re.IGNORECASE)
QUANTISERS = ("bitsandbytes", "torchao", "quanto", "gguf")
FLOOR = 0.02  # a distance below which noise does not matter
GROWTH = math.log(1.3) / math.log(3)  # the exponent with which a distance over three steps is 1.3 times that over one
SPREAD = 0.5  # of gaps, as squared logarithms, below which nothing can be fitted: 1, 2, 1, 2 has 0.96
SLOPE = 0.1
CAUSES = {
    "not finite": "what was kept was not finite: run the model in bfloat16 or float32",
    "changed": "the calls' shapes, conditions or plain arguments changed, or the weights did: keep them for a run",
    "doubt": "the calls of a step could not be told apart: say calls_per_step",
}


def advise(
    report: Report,
    num_steps: int,
    config: AdaCacheConfig,
    models: Sequence[nn.Module] = (),
    scheduler: object | None = None,
    slopes: Sequence[float] = (),
) -> dict[str, str]:
    """What a user should know of a run that is over: messages by kind, none where all is well.

    Args:
        report: of the run.
        num_steps: that it had, over all its transformers.
        config: that it ran with.
        models: the transformers.
        scheduler: the pipeline's.
        slopes: that a fitted forecast found in the middle of the run.
    """
    hints = ", ".join(_distilled(models, scheduler))
    if 0 < num_steps < FEW:
        seen = f"a run of {num_steps} steps" + (f", with {hints}" if hints else "")
        advice = f"below about {FEW} steps caching saves little and costs quality; remove() it, or use more steps"
        return {"few steps": f"{seen}: {advice}"}
    said = {}
    if hints:
        said["distilled"] = f"{hints}: a distilled model's steps differ too much to leave any out; remove() the cache"
    for run in report.videos or (report,):
        if run.steps and run.steps[-1].step >= num_steps:  # not one that was left
            found = {"restarts": _restarts(run.steps)} | _codebook(run.steps, num_steps, config.codebook, models)
            if (noise := _noise(run.steps, num_steps, slopes)) and not found["restarts"]:
                found["noise"] = noise + _quantised(models)
            said = {kind: message for kind, message in found.items() if message} | said
    return said


def _distilled(models: Sequence[nn.Module], scheduler: object | None) -> Iterator[str]:
    """Signs of a model distilled to few steps; that there is no guidance is none."""
    if type(scheduler).__name__ in SCHEDULERS:
        yield type(scheduler).__name__
    for model in models:
        adapters = getattr(model, "peft_config", None) or ()
        yield from (f"the LoRA {name!r}" for name in adapters if ADAPTERS.search(str(name)))


def _quantised(models: Sequence[nn.Module]) -> str:
    """A sentence on the first kind of weights found that hold a byte a number or less."""
    for model in models:
        for parameter in model.parameters():
            library = type(parameter).__module__.partition(".")[0]
            if any(name in type(parameter).__module__ for name in QUANTISERS):
                kind = f"{library} {type(parameter).__name__}"
            elif parameter.element_size() == 1:
                kind = str(parameter.dtype).removeprefix("torch.")
            else:
                continue
            return (
                f"; {type(model).__name__} has quantised weights ({kind}), whose noise no threshold tells from change"
            )
    return ""


def _middle(step: int, num_steps: int) -> bool:
    """The half of a run in which residuals change slowly and evenly."""
    return num_steps / 4 < step <= num_steps * 3 / 4


def _restarts(steps: Sequence[Step]) -> str | None:
    causes = Counter(s.cause for s in steps if s.reason == "restart")
    count = causes.total()
    if 3 * count <= len(steps):
        return None
    cause = causes.most_common(1)[0][0]
    return f"{count} of {len(steps)} steps were to be reused but computed; {CAUSES.get(cause, cause)}"


def _codebook(
    steps: Sequence[Step], num_steps: int, codebook: Codebook | None, models: Sequence[nn.Module]
) -> dict[str, str]:
    """Whether it never lets a step be reused, or always at its largest rate; the factor that moves it between.

    That puts the median distance of the middle of the run at its middle threshold.
    """
    if codebook is None or not codebook.thresholds or len(set(codebook.rates)) == 1:
        return {}
    decided = [s for s in steps if s.rate is not None and s.regularized is not None and math.isfinite(s.regularized)]
    middle = [s for s in decided if _middle(s.step, num_steps) and s.regularized > 0]
    if not middle:
        return {}
    most, computed = max(codebook.rates), sum(s.computed for s in steps)
    seen = [s.regularized for s in decided]
    numbers = f"distances were {min(seen):.3g} to {max(seen):.3g}, thresholds are {codebook.thresholds[0]:.3g} to "
    numbers += f"{codebook.thresholds[-1]:.3g}"
    factor = median(s.regularized for s in middle) / codebook.thresholds[len(codebook.thresholds) // 2]
    change = f"set codebook.scaled({factor:.2g}), or none at all: apply_adacache(pipe)" + _quantised(models)
    if computed == len(steps) and not any(s.reason == "restart" for s in steps):
        return {"never": f"none of {len(steps)} steps was reused: {numbers}; {change}"}
    free = [s for s in decided if num_steps / 10 < s.step < num_steps - 1]
    # Forced are the first two and the last two; one more may be.
    if len(free) > 1 and all(s.rate == most for s in free) and computed <= len(steps) / most + 5:
        return {
            "always": f"only {computed} of {len(steps)} steps were computed, the fewest possible: {numbers}; {change}"
        }
    return {}


def _noise(steps: Sequence[Step], num_steps: int, slopes: Sequence[float]) -> str | None:
    """Whether the residual differs from step to step by noise rather than by change.

    Let a step's residual be a smooth one, which moves by v a step, and noise of its own of size sigma. Over a gap of
    k steps it then differs by sqrt(v^2 k^2 + 2 sigma^2): in proportion to k where it changes, by as much over any gap
    where it is noise. Two things tell:

    The exponent b of D ~ k^b, with D the distance before it is divided by the gap: 1 for change, 0 for noise. A
    codebook takes short gaps where the change is fast and long ones where it is slow, and so keeps D about constant by
    itself: the mean of D at one gap over that at another says nothing. So each comparison is set against those just
    before and after it, which takes out a speed that goes up or down, and b is fitted to the logarithms of D and k
    relative to theirs. Where the gap hardly changes, there is nothing to fit, and nothing is said.

    The slope that a fitted forecast finds. Of two differences that follow each other, a step's worth each, it is the
    regression of the later on the earlier: v^2 k^2 - sigma^2 over v^2 k^2 + 2 sigma^2. About 1 for change, 0 where the
    noise is as large as the change, -1/2 (clipped to 0) for noise alone.
    """
    if len(slopes) >= 4 and (slope := median(slopes)) < SLOPE:
        return (
            f"each change of the residual is undone by the next (a slope of {slope:.2g} was fitted, near 1 where a "
            "forecast helps): it is noise; set forecast='none', or remove() the cache"
        )
    computed = [s for s in steps if s.computed]
    found = []  # gap and distance over it
    for before, step in zip(computed, computed[1:]):
        distance = step.distance * step.previous_rate if step.distance is not None else 0
        good = math.isfinite(distance) and distance > FLOOR and _middle(step.step, num_steps)
        found.append((step.step - before.step, distance) if good else None)
    places = []  # gap and distance of a comparison, as logarithms, over the mean of those before and after it
    for before, each, after in zip(found, found[1:], found[2:]):
        if before and each and after:
            places.append([math.log(b) - math.log(a * c) / 2 for a, b, c in zip(before, each, after)])
    spread = sum(gap * gap for gap, _ in places)
    if spread < SPREAD or sum(gap * distance for gap, distance in places) > GROWTH * spread:
        return None
    (short, small), (long, large) = min(filter(None, found)), max(filter(None, found))
    return (
        f"the residual differs as much over {long} steps ({large:.3g}) as over {short} ({small:.3g}): it is noise, "
        "which the thresholds take for change; remove() the cache, or take a schedule, which measures nothing: "
        "AdaCacheConfig(schedule=DenseEarly(2))"
    )

"""Where caching cannot help: each kind is said once, with what was seen and what to change; nothing on good runs."""

import dataclasses
import random
import warnings

import pytest
import torch
from diffusers import LCMScheduler
from loops import Loop
from torch import nn

from adacache_triton import AdaCacheConfig, Codebook, DenseEarly, apply_adacache
from adacache_triton.advice import advise
from adacache_triton.report import Report
from adacache_triton.schedule import Schedule, Step
from adacache_triton.testbed.pipeline import EmbeddedPipeline

BOOK = Codebook((0.02, 0.04, 0.06, 0.08, 0.1), (6, 5, 4, 3, 2, 1))  # the preset of the embedded model
CONFIG = AdaCacheConfig(BOOK)


@pytest.fixture(autouse=True)
def _strict():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "AdaCache")
        yield


def decided(distance, num_steps: int = 50, config: AdaCacheConfig = CONFIG) -> Report:
    """A run whose residual differs by `distance(step, gap)` over a gap that ends at a step."""
    schedule = Schedule(config, num_steps)
    for step in range(1, num_steps + 1):
        before = schedule.computed
        if schedule.begin(step).computed:
            schedule.decide(None if before == 0 else [distance(step, step - before), 1.0])
    return Report(num_steps, tuple(schedule.steps), 0)


def measured(gaps, distance, num_steps: int = 60) -> Report:
    """A run with these gaps between its computed steps, again and again."""
    steps, gap, computed, i = [], 1, 0, 0
    for step in range(1, num_steps + 1):
        if computed and step < computed + gap:
            steps.append(Step(step, "reused"))
            continue
        distances = {} if not computed else {"previous_rate": gap, "distance": distance(step, gap) / gap}
        gap, computed, i = gaps[i % len(gaps)], step, i + 1
        steps.append(Step(step, "rate", **distances, rate=gap))
    return Report(num_steps, tuple(steps), 0)


def test_records_of_change_say_nothing_and_those_of_noise_do():
    def noisy(change: float, noise: float):
        draw = random.Random(0)
        return lambda step, gap: ((change * gap) ** 2 + 2 * noise**2) ** 0.5 * draw.uniform(0.97, 1.03)

    for gaps in ([1, 3], [2, 5, 3], [1, 2], [1, 2, 1, 4]):
        for noise in (0, 0.01, 0.03):
            assert not advise(measured(gaps, noisy(0.03, noise)), 60, AdaCacheConfig(BOOK))
        said = advise(measured(gaps, noisy(0.002, 0.03)), 60, AdaCacheConfig(BOOK))
        assert list(said) == ["noise"] and f"over {max(gaps)} steps (0.04" in said["noise"]
        assert f"as over {min(gaps)} (0.04" in said["noise"] and "DenseEarly(2)" in said["noise"]
        assert not advise(measured(gaps, noisy(0.0005, 0.005)), 60, AdaCacheConfig(BOOK))  # too little to matter
    assert not advise(measured([4], noisy(0, 0.03)), 60, AdaCacheConfig(BOOK))  # one gap tells nothing


@pytest.mark.parametrize("slow", [0.02, 0.03, 0.05])
def test_a_codebook_that_keeps_its_distance_about_constant_is_not_taken_for_noise(slow):
    def speed(step):  # fast and slow in turns
        return slow * (1 + 0.6 * torch.sin(torch.tensor(step / 4)).item()) + 0.3 / step**1.5

    report = decided(lambda step, gap: sum(speed(step - i) for i in range(gap)))
    gaps = {s.rate for s in report.steps if s.rate and 12 < s.step < 38}
    assert len(gaps) > 1 and not advise(report, 50, CONFIG)


def test_a_slope_near_zero_is_noise():
    report = Report(30, tuple(Step(i, "listed") for i in range(1, 31)), 0)
    config = AdaCacheConfig.for_speedup(2.5)
    assert not advise(report, 30, config, slopes=[0.6, 0.9, 1.0, 1.1])
    assert not advise(report, 30, config, slopes=[0.0, 0.0])
    said = advise(report, 30, config, slopes=[0.0, 0.0, 0.0, 0.3])
    assert list(said) == ["noise"] and "a slope of 0 was fitted" in said["noise"] and "forecast='none'" in said["noise"]


def test_a_codebook_that_never_or_always_fires():
    def speed(step):
        return 0.5 + 3 / step

    said = advise(decided(lambda step, gap: speed(step) * gap), 50, CONFIG)
    assert list(said) == ["never"] and "none of 50 steps was reused: distances were 0.56 to 2" in said["never"]
    assert "thresholds are 0.02 to 0.1; set codebook.scaled(10), or none at all" in said["never"]
    report = decided(lambda step, gap: speed(step) * gap, config=AdaCacheConfig(BOOK.scaled(10)))
    assert not advise(report, 50, AdaCacheConfig(BOOK.scaled(10)))  # what was advised helps
    said = advise(decided(lambda step, gap: 0.01 * speed(step) * gap), 50, CONFIG)
    assert list(said) == ["always"] and "only 11 of 50 steps" in said["always"] and "scaled(0.1)" in said["always"]
    dense = AdaCacheConfig(Codebook((1e-6,), (1, 1)))  # as it was wanted
    assert not advise(decided(lambda step, gap: gap, config=dense), 50, dense)


def test_quantised_weights_are_named():
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(model.weight.to(torch.float8_e4m3fn), requires_grad=False)
    report = decided(lambda step, gap: 0.5)  # noise: as much over any gap
    said = advise(report, 50, CONFIG, [model])
    assert list(said) == ["never"] and "Linear has quantised weights (float8_e4m3fn)" in said["never"]
    assert "quantised" not in advise(report, 50, CONFIG, [nn.Linear(4, 4)])["never"]
    kind = type("AffineQuantizedTensor", (nn.Parameter,), {"__module__": "torchao.dtypes"})
    model.weight = kind(torch.zeros(4, 4))
    assert "(torchao AffineQuantizedTensor)" in advise(report, 50, CONFIG, [model])["never"]


@pytest.mark.parametrize(
    "cause, change",
    [("not finite", "bfloat16"), ("changed", "shapes"), ("doubt", "calls_per_step"), ("other", "other")],
)
def test_restarts_are_told_with_their_cause(cause, change):
    kinds = [Step(1, "first"), Step(2, "rate")] + [Step(i, "restart", cause=cause) for i in range(3, 10)]
    steps = kinds + [Step(i, "rate" if i % 2 else "reused") for i in range(10, 21)]
    said = advise(Report(20, tuple(steps), 0), 20, CONFIG)
    assert list(said) == ["restarts"] and "7 of 20 steps" in said["restarts"] and change in said["restarts"]
    assert not advise(Report(30, tuple(steps), 0), 30, CONFIG)  # left before its end


def test_of_several_videos_each_kind_is_said_once():
    fast = decided(lambda step, gap: gap)
    report = Report(50, (), 0, videos=(fast, decided(lambda step, gap: 0.05 * gap), fast))
    assert list(advise(report, 50, CONFIG)) == ["never"]


def said(action) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in seen if "AdaCache" in str(w.message)]


def test_few_steps_are_told_once_a_handle():
    loop = Loop("toy", 1, AdaCacheConfig.for_speedup(2), "cpu")

    def use():
        for _ in range(2):
            loop(8)
            loop.handle.report()

    (message,) = said(use)
    assert message.startswith("AdaCache: advice: a run of 8 steps: below about 10") and "remove() it" in message
    loop(2)
    loop.handle.remove()
    with pytest.raises(UserWarning, match="a run of 2 steps"):
        loop = Loop("toy", 1, AdaCacheConfig.for_speedup(2), "cpu")
        loop(2)
        loop.handle.report()
    with pytest.raises(UserWarning, match="a run of 8 steps"):
        loop = Loop("toy", 1, AdaCacheConfig.for_speedup(2), "cpu")
        loop(8)
        loop.handle.remove()
    assert not hasattr(loop.transformer, "_adacache_handle")  # where warnings are errors, too


def test_a_run_of_a_bare_transformer():
    transformer = Loop("latte", 1, CONFIG, "cpu").transformer
    transformer._adacache_handle.remove()
    handle = apply_adacache(transformer, AdaCacheConfig(schedule=DenseEarly(2), num_steps=6))
    x, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, 8)

    @torch.no_grad()
    def use(steps=6):
        with handle.run():
            for t in range(steps):
                transformer(x, timestep=torch.full((2,), 900 - t), encoder_hidden_states=text)

    assert not said(lambda: use(3))  # left
    (message,) = said(lambda: (use(), use(), handle.report(), handle.remove()))
    assert "a run of 6 steps" in message


def test_signs_of_a_distilled_model():
    loop = Loop("toy", 1, AdaCacheConfig.for_speedup(2), "cpu")
    loop.transformer.peft_config = {"wan_lightx2v_CausVid": None, "style": None}
    (message,) = said(lambda: (loop(12), loop.handle.report(), loop(12), loop.handle.report()))
    assert message.startswith("AdaCache: advice: the LoRA 'wan_lightx2v_CausVid': a distilled model's steps")
    assert "remove()" in message
    report = Report(4, (), 0)
    assert list(advise(report, 4, CONFIG, scheduler=LCMScheduler())) == ["few steps"]
    assert "4 steps, with LCMScheduler:" in advise(report, 4, CONFIG, scheduler=LCMScheduler())["few steps"]


@pytest.mark.parametrize("size", [0, 0.2])
def test_noise_in_the_blocks_of_a_model(size):
    """The uncalibrated default on the trained model; the end of a pipeline's call tells."""
    pipe = EmbeddedPipeline.load()
    for name, block in pipe.transformer.named_modules():
        if size and name.rpartition(".")[0] in ("transformer_blocks", "temporal_transformer_blocks"):
            block.register_forward_hook(lambda block, args, out: out + size * out.std() * torch.randn(out.shape))
    handle = apply_adacache(pipe)
    messages = said(lambda: [pipe("still", 24, generator=torch.Generator().manual_seed(0)) for _ in range(2)])
    assert len(messages) == bool(size) and not said(handle.remove)
    if size:
        assert "each change of the residual is undone by the next" in messages[0]


def generate(config, steps: int) -> list[str]:
    pipe = EmbeddedPipeline.load()
    handle = apply_adacache(pipe, config)
    messages = said(lambda: pipe("texture", steps, generator=torch.Generator().manual_seed(0)))
    assert not said(lambda: (handle.report(), handle.remove()))
    return messages


@pytest.mark.parametrize("moreg", [False, True])
def test_a_healthy_run_of_50_steps(moreg):
    assert not generate(AdaCacheConfig.preset("embedded", moreg=moreg), 50)


@pytest.mark.parametrize("factor, kind", [(1e-4, "none of 20 steps was reused"), (1e4, "the fewest possible")])
def test_a_codebook_of_another_model(factor, kind):
    config = AdaCacheConfig.preset("embedded")
    config = dataclasses.replace(config, codebook=config.codebook.scaled(factor))
    (message,) = generate(config, 20)
    assert kind in message
    advised = config.codebook.scaled(float(message.partition("scaled(")[2].partition(")")[0]))
    assert not generate(dataclasses.replace(config, codebook=advised), 20)

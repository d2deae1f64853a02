"""Each video of a batch on a schedule of its own: the same, and the same video, as if it were alone."""

import contextlib
import copy
import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from doubles.outputs import tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, build, sample
from tiny_pipelines import PIPELINES
from torch import nn

from adacache_triton import AdaCacheConfig, BlockStack, Codebook, FixedSchedule, MotionRegularization, apply_adacache
from adacache_triton.models import described
from adacache_triton.split import join
from adacache_triton.testbed.pipeline import EmbeddedPipeline

repeatable = settings(max_examples=30, derandomize=True, deadline=None, database=None)
CODEBOOK = Codebook((0.03, 0.1, 0.3), (4, 3, 2, 1))
ALWAYS = Codebook((1e6,), (4, 1))  # every comparison gives rate 4: steps 1, 2, 6 and the last two of a run


def same_run(mine, other) -> bool:
    """Whether two reports tell of one schedule, decided by the same numbers to rounding."""
    rates = [[(s.step, s.reason, s.previous_rate, s.rate) for s in each.steps] for each in (mine, other)]
    numbers = [
        [x or 0.0 for s in each.steps for x in (s.distance, s.motion, s.motion_scale, s.motion_gradient, s.regularized)]
        for each in (mine, other)
    ]
    whole = [(each.num_steps, each.kept_bytes, each.granularity) for each in (mine, other)]
    return rates[0] == rates[1] and numbers[0] == pytest.approx(numbers[1], 1e-4, 1e-5) and whole[0] == whole[1]


# A model whose arithmetic does not depend on the batch: equal bit for bit.

FRAMES, WIDTH = 3, 4


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return x * self.weight


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.after = Scale(), Scale()

    def forward(self, hidden_states, text):
        x = hidden_states + bounded(self.attention(hidden_states) + text)
        return x + bounded(self.after(x))


def bounded(x):
    return x / (1 + x.abs())


class Toy(nn.Module):
    """latents [B, T S, C], timestep [B], text [B, C] -> velocity as the latents, and what was made of the text."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.norm_out = Scale(), nn.ModuleList(Block() for _ in range(3)), Scale()
        self.calls = []

    def forward(self, hidden_states, timestep, text):
        self.calls.append(hidden_states)
        x = self.embed(hidden_states) + timestep[:, None, None] / 1000
        for block in self.blocks:
            x = block(x, text[:, None])
        return self.norm_out(x), {"text": 2 * text, "none": None}


STACK = BlockStack(
    lists=("blocks",), probe_after="after", frames=lambda model, call: FRAMES, modules={"attention": ("attention",)}
)


class Video:
    """A video in the making. `changes` say how fast its latents change in each step, so how far its rates go."""

    def __init__(self, seed: int, changes, texts: int = 2, tokens: int = 4):
        draw = torch.Generator().manual_seed(seed)
        self.start, self.noise = torch.randn(2, FRAMES * tokens, WIDTH, generator=draw)
        self.texts = torch.randn(texts, WIDTH, generator=draw)
        self.changes, self.latents, self.outputs = changes, self.start, []

    def again(self) -> "Video":
        """The same video, yet to be made."""
        fresh = copy.copy(self)
        fresh.latents, fresh.outputs = self.start, []
        return fresh


ONE, BATCH, CALLS, BOTH = ((0,),), ((0, 1),), ((0,), (1,)), ((0, 1), (2,))  # the texts of each call of a step


@torch.no_grad()
def advance(model, videos: list[Video], calls=BATCH, held: dict | None = None) -> None:
    """One denoising step of some videos, each where it is in its own run. `held` keeps the texts of each batch."""
    outputs = []
    for texts in calls:
        rows = [(video, text) for text in texts for video in videos]
        call = dict(
            hidden_states=torch.stack([video.latents for video, _ in rows]),
            timestep=torch.tensor([900.0 - 50 * len(video.outputs) for video, _ in rows]),
            text=torch.stack([video.texts[text] for video, text in rows]),
        )
        if held is not None:
            call["text"] = held.setdefault(tuple((id(video), text) for video, text in rows), call["text"])
        velocity, extra = model(**call)
        assert torch.equal(extra["text"], 2 * call["text"]) and extra["none"] is None, "in the batch's order"
        outputs += velocity.chunk(len(texts))
    for i, video in enumerate(videos):
        video.outputs.append([each[i] for each in outputs])
        change = video.changes[len(video.outputs) - 1]
        video.latents = video.latents + 0.02 * sum(video.outputs[-1]) + change * video.noise


def says(error: type, message: str):
    return pytest.raises(error, match=message)


def same(a: Video, b: Video) -> bool:
    return all(torch.equal(x, y) for x, y in zip(sum(a.outputs, []), sum(b.outputs, []), strict=True))


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    return Toy()


changes = st.sampled_from([0.0, 0.05, 0.5, 5.0])


@contextlib.contextmanager
def cached(model, per_video=True, codebook=CODEBOOK, motion=None, num_steps=None, granularity="stack", **kwargs):
    """A handle of the toy; whatever a test does in it, the toy is clean afterwards."""
    config = AdaCacheConfig(codebook, motion, num_steps, granularity=granularity, per_video=per_video)
    handle = apply_adacache(model, config, stack=STACK, **kwargs)
    try:
        yield handle
    finally:
        handle.remove()


def alone(model, video: Video, calls=BATCH, **kwargs):
    """The same video by itself, its decision the usual one; and what the run was."""
    video, steps = video.again(), len(video.changes)
    with cached(model, per_video=False, num_steps=steps, calls_per_step=len(calls), **kwargs) as handle:
        with handle.run():
            for _ in range(steps):
                advance(model, [video], calls)
        return video, handle.report()


@repeatable
@given(
    st.lists(st.lists(changes, min_size=9, max_size=9), min_size=1, max_size=5),
    st.sampled_from([ONE, BATCH, CALLS]),
    st.sampled_from([None, MotionRegularization((2, 8), scale=0.5, power=1)]),
    st.sampled_from(["stack", "stack", "block", "module"]),
)
def test_a_batch_is_its_videos_alone_bit_for_bit(toy, speeds, calls, motion, granularity):
    videos = [Video(seed, each) for seed, each in enumerate(speeds)]
    settings = dict(motion=motion, granularity=granularity)
    expected = [alone(toy, video, calls, **settings) for video in videos]
    settings |= dict(num_steps=9, calls_per_step=len(calls), branches_in_batch=len(calls[0]))
    with cached(toy, **settings) as handle, handle.run():
        for _ in range(9):
            toy.calls.clear()
            advance(toy, videos, calls)
            report = handle.report()
            done = [each.steps[-1].computed for each in report.videos or (report,)]
            together = len(set(done)) if granularity == "stack" else len(videos)
            assert len(toy.calls) == len(calls) * together, "one more launch where they do not all do the same"
    report = handle.report()
    assert all(same(video, other) for video, (other, _) in zip(videos, expected, strict=True))
    assert all(same_run(*each) for each in zip(report.videos or (report,), (r for _, r in expected), strict=True))
    assert report.computed_steps == sorted({s for _, r in expected for s in r.computed_steps})
    assert report.num_steps == 9 and report.kept_bytes == sum(r.kept_bytes for _, r in expected)


def test_rows_that_are_evenly_spaced_are_not_copied(toy):
    """Of four videos the first and the third are a step ahead."""
    videos = [Video(seed, [0.0] * 9) for seed in range(4)]
    call = dict(hidden_states=torch.randn(4, 12, WIDTH), timestep=torch.full((4,), 5.0), text=torch.randn(4, WIDTH))
    with cached(toy) as handle, torch.no_grad():
        sessions = [handle.session(9) for _ in videos]
        for _ in range(2):
            with handle.step(sessions[::2]):
                advance(toy, videos[::2], ONE)
        toy.calls.clear()
        with handle.step(sessions):
            toy(**call)
    computing, reusing = toy.calls
    assert computing.shape == reusing.shape == (2, 12, WIDTH) and computing.stride(0) == reusing.stride(0) == 96
    assert [x.data_ptr() for x in (reusing, computing)] == [x.data_ptr() for x in call["hidden_states"][:2]]


# Sessions: requests come and go.


@repeatable
@given(
    st.lists(st.tuples(st.integers(0, 6), st.lists(changes, min_size=1, max_size=9)), min_size=1, max_size=6),
    st.sampled_from([ONE, BATCH, CALLS, BOTH]),
    st.sampled_from(["stack", "stack", "block", "module"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_interleaving_gives_each_request_its_own_video(toy, requests, calls, granularity, held, chance):
    """They arrive at any time, with any number of steps, take their turns in any order, and sit out some."""
    made = [Video(seed, speeds, texts=3) for seed, (_, speeds) in enumerate(requests)]
    reports, now, held = {}, 0, {} if held else None
    with cached(toy, granularity=granularity) as handle:
        waiting = [(arrival, handle.session(len(v.changes)), v) for (arrival, _), v in zip(requests, made)]
        while waiting:
            here = [(session, video) for arrival, session, video in waiting if arrival <= now and chance.random() < 0.8]
            chance.shuffle(here)
            if here:
                with handle.step([session for session, _ in here]):
                    advance(toy, [video for _, video in here], calls, held)
            reports |= {id(video): session.report() for session, video in here if session.over}
            waiting = [each for each in waiting if not each[1].over]
            now += 1
    for video in made:
        if len(video.changes) >= 3:
            other, report = alone(toy, video, calls, granularity=granularity)
            assert same(video, other) and same_run(reports[id(video)], report)
        else:
            assert all(step.computed for step in reports[id(video)].steps)


def three(handle, steps=(2, 1, 2), calls=BATCH):
    """Still videos, and their sessions, after some steps: what is left of 9."""
    videos = [Video(seed, [0.0] * 9, texts=3) for seed in range(len(steps))]
    sessions = [handle.session(9) for _ in steps]
    for session, video, done in zip(sessions, videos, steps):
        for _ in range(done):
            with handle.step([session]):
                advance(handle._cached[0].model(), [video], calls)
    return sessions, videos


def twice_in(module, args, kwargs):
    return args, kwargs | {"hidden_states": 2 * kwargs["hidden_states"]}


def twice_out(module, args, output):
    return 2 * output[0], output[1]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("put", [
    lambda toy: toy.register_forward_pre_hook(twice_in, with_kwargs=True),
    lambda toy: toy.register_forward_hook(twice_out),
], ids=["in", "out"])  # fmt: skip
def test_what_others_hooks_change_they_change_once(toy, put, when):
    """Whichever part a video is in, and whoever was there first."""
    hook, made = put(toy) if when == "before" else None, []
    for split in (True, False):
        with cached(toy, codebook=ALWAYS) as handle:
            hook = hook or put(toy)
            (a, b), videos = three(handle, (2, 1))
            for sessions, which in [([a, b], videos)] if split else [([a], videos[:1]), ([b], videos[1:])]:
                with handle.step(sessions):
                    advance(toy, which)
            made.append(videos)
            assert [session.report().steps[-1].computed for session in (a, b)] == [False, True]
    hook.remove()
    assert all(map(same, *made))


def test_a_list_that_is_not_described_is_found_in_a_split_batch():
    class More(Toy):
        def __init__(self):
            super().__init__()
            self.more = nn.ModuleList([Scale()])

        def forward(self, hidden_states, timestep, text):
            for block in self.blocks:
                hidden_states = block(hidden_states, text[:, None])
            return self.norm_out(self.more[0](hidden_states)), {"text": 2 * text, "none": None}

    toy = More()
    with cached(toy, codebook=ALWAYS) as handle:
        sessions, videos = three(handle, (2, 1))
        with says(ValueError, "^BlockStack.lists: expected 'more' among them"), handle.step(sessions):
            advance(toy, videos)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["the part that computes", "the part that reuses", "between two calls", "the loop"])
@pytest.mark.parametrize("calls", [BATCH, CALLS])
def test_a_step_that_fails_can_be_tried_again(toy, calls, where, error):
    """What its videos keep is gone, so they compute; the third one goes on as if nothing had been."""
    expected, _ = alone(toy, Video(2, [0.0] * 9, texts=3), calls, codebook=ALWAYS)
    seen = []

    def fail(*_):
        seen.append(where)
        if where != "the part that reuses" or len(seen) == 2:
            raise error

    with cached(toy, codebook=ALWAYS) as handle:
        (a, b, c), (first, second, third) = three(handle, calls=calls)
        module = {"the part that computes": toy.blocks[1], "the part that reuses": toy.embed}.get(where)
        hook = module.register_forward_pre_hook(fail) if module is not None else None
        with pytest.raises(error), handle.step([a, b]):
            advance(toy, [first.again(), second.again()], calls[:1] if where == "between two calls" else calls)
            fail()
        if hook is not None:
            hook.remove()
        assert type(toy.blocks) is nn.ModuleList and len(list(toy.blocks)) == 3, "back at once"
        assert not a.nbytes and not b.nbytes and c.nbytes
        assert [session.step for session in (a, b, c)] == [2, 1, 2]
        for _ in range(7):
            with handle.step([c]):
                advance(toy, [third], calls)
            with handle.step([a, b]):
                advance(toy, [first, second], calls)
        assert same(third, expected) and [s.reason for s in c.report().steps][2:5] == ["reused"] * 3
        assert a.over and not b.over and not a.nbytes
        assert [s.reason for s in a.report().steps][2:6] == ["restart", "rate", "reused", "reused"]
        assert [s.reason for s in b.report().steps][1:5] == ["rate", "rate", "reused", "reused"]
        assert a.report().steps[2].distance is None and b.report().steps[1].distance is None


def test_whatever_changes_the_weights_drops_what_sessions_keep(toy):
    with cached(toy, codebook=ALWAYS) as handle:
        sessions, videos = three(handle, (3, 4, 1))
        handle.reset()
        assert not any(session.nbytes for session in sessions)
        with handle.step(sessions):
            advance(toy, videos)
        assert [session.report().steps[-1].reason for session in sessions] == ["restart", "restart", "rate"]
        with handle.run():
            pass
        assert all(session.nbytes for session in sessions), "another run is none of theirs"
    assert not any(session.nbytes for session in sessions), "removed"


@pytest.mark.parametrize("method", ["fuse_lora", "load_state_dict", "_reset_stateful_cache"])
def test_weights_that_diffusers_changes_drop_it_too(monkeypatch, method):
    tiny = MODELS["wan"]
    model = tiny.model()
    monkeypatch.setattr(type(model), method, lambda self: None)
    handle = apply_adacache(model, AdaCacheConfig(ALWAYS, per_video=True))
    sessions = [handle.session(9) for _ in range(2)]
    for step in range(1, 5):
        if step == 4:
            getattr(model, method)()
        with torch.no_grad(), handle.step(sessions):
            model(**together("wan", [tiny.inputs(seed, 900 - step) for seed in (0, 1)]))
    assert [[s.reason for s in session.report().steps][2:] for session in sessions] == [["reused", "restart"]] * 2


def test_what_is_kept_is_that_of_the_videos_alone_and_goes_with_them(toy):
    def live() -> int:
        return sum(type(x) is torch.Tensor and x.shape == (2, 3, 7, WIDTH) for x in gc.get_objects())

    with cached(toy) as handle:
        sessions, videos = [handle.session(9) for _ in range(3)], [Video(i, [0.0] * 9, tokens=7) for i in range(3)]
        gc.collect()
        before = live()
        for _ in range(3):
            with handle.step(sessions):
                advance(toy, videos)
        one = 2 * 3 * 7 * WIDTH * 4
        assert [session.nbytes for session in sessions] == [2 * one] * 3
        branch = sessions[1].branches[0]
        gone = [weakref.ref(x) for x in (sessions[1], branch.probes[0], branch.residuals["norm_out"].kept[0])]
        gc.disable()
        try:
            del sessions[1], videos[1], branch
            assert [x() for x in gone] == [None] * 3, "at once"
        finally:
            gc.enable()
        for _ in range(6):
            with handle.step(sessions):
                advance(toy, videos)
        assert all(session.over and not session.nbytes for session in sessions)
        assert [session.report().kept_bytes for session in sessions] == [2 * one] * 2
        gc.collect()
        assert live() == before


def test_a_batch_that_changes_in_the_middle_of_a_run_starts_afresh(toy):
    sizes = [2, 2, 2, 3, 3, 3, 2, 2, 2]

    def outputs(handle=None) -> list:
        made = []
        for step, size in enumerate(sizes):
            videos = [Video(seed, [0.0]) for seed in range(size)]
            for video in videos:
                video.latents = video.latents + 0.1 * step
            advance(toy, videos)
            made.append(torch.stack([output for video in videos for output in video.outputs[0]]))
            if handle is not None:
                assert [len(each.steps) for each in handle.report().videos] == [step % 3 + 1] * size
        return made

    plain = outputs()
    with cached(toy, codebook=ALWAYS, num_steps=9, branches_in_batch=2) as handle, handle.run():
        equal = [torch.equal(a, b) for a, b in zip(outputs(handle), plain)]
    assert equal == [True, True, False, True, True, False, True, True, True], "the last two are the run's tail"


def test_a_video_whose_size_changes_is_computed(toy):
    with cached(toy, codebook=ALWAYS) as handle:
        (a, b), (first, second) = three(handle, (2, 2))
        smaller = Video(5, [0.0] * 9, tokens=2)
        with handle.step([a]):
            advance(toy, [smaller])
        with handle.step([b]):
            advance(toy, [second])
        assert [session.report().steps[-1].reason for session in (a, b)] == ["restart", "reused"]


@pytest.mark.parametrize("again", [True, False])
def test_guidance_calls_never_take_each_others_residual(toy, again):
    """The second call of a computed step is repeated, or left out from a later step on."""
    video, plain = Video(0, [0.05] * 9), Video(0, [0.05] * 9)
    with cached(toy, codebook=ALWAYS) as handle, torch.no_grad():
        session = handle.session(9)
        for _ in range(2):
            with handle.step([session]):
                if again and len(video.outputs) == 1:
                    broken = toy.blocks[0].register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
                    with pytest.raises(ZeroDivisionError):
                        toy(video.latents[None], torch.tensor([0.0]), video.texts[1][None])
                    broken.remove()
                advance(toy, [video], CALLS)
        if not again:
            with says(RuntimeError, r"^step: expected 2 calls for sessions\[0\], as in its step before, got 1; name"):
                with handle.step([session]):
                    advance(toy, [video.again()], ((1,),))
            return
        with handle.step([session]):
            advance(toy, [video], CALLS)
    for _ in range(3):
        advance(toy, [plain], CALLS)
    assert same(video, plain), "all of it was computed"


def test_a_call_of_another_thread_is_not_the_steps(toy):
    video, other = Video(0, [0.05] * 9), Video(1, [0.05] * 9)
    plain = other.again()
    advance(toy, [plain], ONE)
    with cached(toy, codebook=ALWAYS) as handle, torch.no_grad():
        session = handle.session(9)
        for _ in range(3):
            with handle.step([session]):
                if len(video.outputs) == 2:
                    thread = threading.Thread(target=advance, args=(toy, [other], ONE))
                    thread.start()
                    thread.join()
                advance(toy, [video], ONE)
        assert session.report().steps[-1].reason == "reused"
    assert same(other, plain)


def test_nothing_is_kept_behind_a_last_step_that_is_reused(toy):
    video = Video(0, [0.05] * 4)
    config = AdaCacheConfig(schedule=FixedSchedule((1, 2), 4), per_video=True)
    handle = apply_adacache(toy, config, stack=STACK)
    session = handle.session(4)
    for _ in range(4):
        assert session.nbytes or not session.step
        with handle.step([session]):
            advance(toy, [video], CALLS)
    handle.remove()
    assert session.over and not session.nbytes


def test_mistakes_are_named(toy):
    with cached(toy) as handle, torch.no_grad():
        (a, b), (first, second) = three(handle, (2, 2))
        for steps in (0, -1, 2.0, True, "5", None):
            with says((TypeError, ValueError), f"^num_steps: expected an integer >= 1, got {steps!r}$"):
                handle.session(steps)
        with says(ValueError, r"^sessions: expected at least one, got none$"), handle.step([]):
            pass
        with says(ValueError, r"^sessions\[2\]: expected each session once in a step, got one of them again$"):
            with handle.step([a, b, a]):
                pass
        with says(ValueError, r"^sessions\[1\]: expected one made by this handle's session\(\), got 7$"):
            with handle.step([a, 7]):
                pass
        with handle.step([a]), says(RuntimeError, "^step: expected no step in progress; leave its `with` block first"):
            with handle.step([b]):
                pass
        batch = "^batch: expected the samples of 2 videos, equally many of each, got a batch of 3$"
        with says(ValueError, batch), handle.step([a, b]):
            advance(toy, [first, second, first], ONE)
        outside = r"^config.num_steps: expected the number of steps outside of handle.step\(\), got None$"
        with says(ValueError, outside):
            advance(toy, [first])
        (over,), _ = three(handle, (9,))
        with says(ValueError, r"^sessions\[0\]: expected steps to do, got a run that has had its 9$"):
            with handle.step([over]):
                pass
        assert (a.step, b.step) == (3, 2), "none of that was a step"
    with cached(toy) as handle:
        with says(ValueError, r"^sessions\[0\]: expected one made by this handle's session\(\), got <"):
            with handle.step([a]):
                pass
    with says(RuntimeError, "^step: expected a handle in use, got one that was removed$"), handle.step([a]):
        pass
    with cached(toy, num_steps=9) as handle, says(ValueError, "^branches_in_batch: expected how many guidance branch"):
        advance(toy, [first])
    with cached(toy, num_steps=9, branches_in_batch=2) as handle:
        with says(ValueError, "^branches_in_batch: expected a divisor of the batch of 3, got 2$"):
            advance(toy, [first, first, first], ONE)
    with cached(toy, per_video=False, num_steps=9) as handle:
        with says(ValueError, r"^config.per_video: expected True for session\(\), got False$"):
            handle.session(9)
        with says(ValueError, r"^config.per_video: expected True for step\(\), got False$"), handle.step([a]):
            pass
    pipe = PIPELINES["wan"].make(4)[0]
    handle = apply_adacache(pipe, AdaCacheConfig(CODEBOOK, per_video=True))
    with says(TypeError, "^session: expected a handle of a bare transformer; a pipeline tells its steps itself$"):
        handle.session(9)


# Every class that is described, tiny and untrained.

STEPS = 7
EVERY_SECOND = Codebook((1e6,), (2, 1))
COMPUTED = [1, 2, 4, 6, 7]
STACKS = {name: described(tiny.kind) for name, tiny in MODELS.items() if tiny.available}
# A sequence that is packed for one video has no batch; SkyReels V2 cannot tell a batch its frame rates.
BATCHED = [
    name
    for name, stack in STACKS.items()
    if stack.refused is None and stack.layout != "(t s) c" and not MODELS[name].config.get("inject_sample_info")
]
SMALLER = [
    (name, granularity) for name in ("latte", "wan", "hunyuan_video", "ltx2") for granularity in ("block", "module")
]
TOLERANCE = {"kandinsky_5": 1e-4}  # rounds what goes into its attention to bfloat16


def together(name: str, calls: list[dict]) -> dict:
    """The arguments of one forward for several videos of as many samples each: halves one after the other."""
    stack, (first, *_) = STACKS[name], calls
    samples = len(first[stack.input])
    rows = [range(i, samples * len(calls), len(calls)) for i in range(len(calls))]
    whole = dict(first)
    for argument, value in first.items():
        alike = argument in stack.shared or (isinstance(value, torch.Tensor) and len(value) != samples)
        if not alike:
            values, listed = [call[argument] for call in calls], argument in stack.listed
            whole[argument] = join(values, rows, samples * len(calls), listed=listed)
    return whole


def of_video(output, i: int, videos: int) -> list[torch.Tensor]:
    return [tensor[i::videos] for tensor in tensors(output)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "granularity"), [*((name, "stack") for name in BATCHED), *SMALLER])
@torch.no_grad()
def test_described_classes(name, granularity):
    """Two videos, the second a step behind, so that one computes what the other reuses, in turn."""
    tiny, stack, outputs, reports = MODELS[name], STACKS[name], [[], []], []
    model, common = tiny.model(), {k: v for k, v in tiny.inputs(0).items() if k in stack.shared}

    def inputs(video: int, step: int) -> dict:
        return tiny.inputs(video, 900 - 100 * step) | common

    config = AdaCacheConfig(EVERY_SECOND, num_steps=STEPS, granularity=granularity)
    handle = apply_adacache(model, config)
    for video in (0, 1):
        with handle.run():
            outputs[video] = [tensors(model(**inputs(video, step))) for step in range(1, STEPS + 1)]
        reports.append(handle.report())
    handle.remove()

    handle = apply_adacache(model, dataclasses.replace(config, num_steps=None, per_video=True))
    sessions = [handle.session(STEPS) for _ in (0, 1)]
    for now in range(1, STEPS + 2):
        here = [(video, now - video) for video in (0, 1) if 1 <= now - video <= STEPS]
        with handle.step([sessions[video] for video, _ in here]):
            output = model(**together(name, [inputs(*each) for each in here]))
        for i, (video, step) in enumerate(here):
            for mine, other in zip(of_video(output, i, len(here)), outputs[video][step - 1], strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=TOLERANCE.get(name, 1e-5))
    handle.remove()
    assert reports[0].computed_steps == COMPUTED
    assert all(same_run(session.report(), report) for session, report in zip(sessions, reports))


class Counting:
    """A compiler that leaves each graph as it is."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize(("how", "granularity"), [("whole", "stack"), ("in place", "block"), ("blocks", "stack")])
@torch.no_grad()
def test_compiled(how, granularity):
    """Each video has calls of its own, so two graphs do whatever the videos do, however many there are."""
    torch._dynamo.reset()
    tiny, compiler, plain = MODELS["wan"], Counting(), Counting()
    model, config = build(tiny.kind, tiny.config | {"num_layers": 2}), AdaCacheConfig(EVERY_SECOND, None, STEPS)
    config = dataclasses.replace(config, granularity=granularity)
    handle, expected = apply_adacache(model, config), []
    for video in range(3):
        with handle.run():
            expected.append([sample(model(**tiny.inputs(video, 900 - 50 * step))) for step in range(STEPS)])
    report = handle.report()
    handle.remove()

    root, graphs = model, 2
    if how == "whole":
        root = torch.compile(model, backend=compiler, fullgraph=True)
    elif how == "in place":
        model.compile(backend=compiler, fullgraph=True)
    else:
        for block in model.blocks:
            block.compile(backend=plain, fullgraph=True)
        model(**tiny.inputs())
        graphs = plain.graphs
        for block in model.blocks:
            block.compile(backend=compiler, fullgraph=True)
    handle = apply_adacache(root, dataclasses.replace(config, per_video=True))
    sessions, done = [handle.session(STEPS) for _ in range(3)], [0, 0, 0]
    for here in [(0,), (0, 1), (0, 1, 2), (0, 2), (0, 1, 2), (1, 2), (0, 1), (2, 0, 1), (2, 1), (2,)]:
        inputs = [tiny.inputs(video, 900 - 50 * done[video]) for video in here]
        with handle.step([sessions[video] for video in here]):
            output = root(**together("wan", inputs))
        for i, video in enumerate(here):
            assert torch.equal(of_video(output, i, len(here))[0], expected[video][done[video]])
            done[video] += 1
    handle.remove()
    torch._dynamo.reset()
    assert done == [STEPS] * 3 and compiler.graphs == graphs
    assert all([s.reason for s in session.report().steps] == [s.reason for s in report.steps] for session in sessions)


# Whole pipelines.


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def embedded():
    pipe = EmbeddedPipeline.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("motion", [None, MotionRegularization((2, 18), scale=0.04, power=4)], ids=["plain", "moreg"])
def test_a_still_video_beside_a_lively_one_keeps_its_savings(embedded, motion):
    def made(per_video: bool, **prompts: int):
        codebook = AdaCacheConfig.preset("embedded").codebook.scaled(1 if motion else 0.7)
        handle = apply_adacache(embedded, AdaCacheConfig(codebook, motion, per_video=per_video))
        frames = embedded(list(prompts), num_inference_steps=20, generator=generators(*prompts.values())).frames
        handle.remove()
        return torch.from_numpy(frames), handle.report()

    alone = [made(False, still=0), made(False, texture=1)]
    both, report = made(True, still=0, texture=1)
    for frames, mine, (other, expected) in zip(both, report.videos, alone, strict=True):
        assert same_run(mine, expected)
        torch.testing.assert_close(frames, other[0], rtol=0, atol=1e-5)
    still, lively = report.videos
    joint, decision = made(False, still=0, texture=1)
    assert len(still.computed_steps) < len(decision.computed_steps) < len(lively.computed_steps)
    assert (joint[0] - both[0]).abs().max() > 1e-3, "it is another video then"


KINDS = ["latte", "cogvideox", "wan", "wan_2_2", "ltx", "ltx2", "hunyuan_video_1_5"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if PIPELINES[kind].available])
def test_pipelines(kind):
    """Two prompts and a generator each: guidance in one batch, in two calls, in calls of several sizes."""
    pipe, call = PIPELINES[kind].make(8)
    draw = torch.Generator().manual_seed(3)
    texts = {name: value for name, value in call.items() if "prompt" in name and isinstance(value, torch.Tensor)}
    others = {n: x if "mask" in n else torch.randn(x.shape, generator=draw) for n, x in texts.items()}

    def made(config, *which: int):
        prompts = {name: torch.cat([(texts, others)[i][name] for i in which]) for name in texts}
        handle = apply_adacache(pipe, config)
        videos = sample(pipe(**call | prompts | {"generator": generators(*which)}))
        handle.remove()
        return videos, handle.report()

    # A threshold between the two videos' first distances, those of the second transformer where there is one.
    _, report = made(AdaCacheConfig(Codebook((1e-9,), (1, 1)), per_video=True), 0, 1)
    second = max(step.step for step in report.videos[0].steps if step.reason == "first") + 1
    low, high = sorted(video.steps[second - 1].distance for video in report.videos)
    config = AdaCacheConfig(Codebook(((low * high) ** 0.5,), (3, 1)), per_video=True)
    both, report = made(config, 0, 1)
    assert len({tuple(video.computed_steps) for video in report.videos}) == 2
    for i in (0, 1):
        video, expected = made(dataclasses.replace(config, per_video=False), i)
        assert same_run(report.videos[i], expected)
        torch.testing.assert_close(both[i], video[0], rtol=0, atol=3e-4)  # DDIM and its guidance amplify rounding


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["wan", "sana_video"])
def test_several_videos_of_one_prompt(kind):
    pipe, call = PIPELINES[kind].make(8)
    config = AdaCacheConfig(ALWAYS, per_video=True)
    handle = apply_adacache(pipe, config)
    both = sample(pipe(**call | dict(num_videos_per_prompt=2, generator=generators(0, 1))))
    report = handle.report()
    for seed in (0, 1):
        video = sample(pipe(**call | dict(generator=generators(seed))))
        assert same_run(report.videos[seed], handle.report())
        torch.testing.assert_close(both[seed], video[0], rtol=0, atol=3e-4)


class Loop:
    """A pipeline of somebody's own, without the method that prepares the latents."""

    def __init__(self, transformer, scheduler):
        self.transformer, self.scheduler = transformer, scheduler


def test_a_pipeline_that_does_not_tell_its_videos_is_said_to_decide_jointly():
    pipe, call = PIPELINES["wan"].make(8)
    pipe = Loop(pipe.transformer, pipe.scheduler)
    unknown = pytest.warns(UserWarning, match="how many videos a batch of 2 holds is not known, so they decide togeth")
    for branches, videos, warned in ((None, 1, unknown), (1, 2, contextlib.nullcontext())):
        handle = apply_adacache(pipe, AdaCacheConfig(ALWAYS, per_video=True), branches_in_batch=branches)
        pipe.scheduler.set_timesteps(8)
        with torch.no_grad(), warned:
            for t in pipe.scheduler.timesteps:
                arguments = together("wan", [MODELS["wan"].inputs(seed, t) for seed in (0, 1)])
                output = sample(pipe.transformer(**arguments))
                pipe.scheduler.step(output, t, output)
        report = handle.report()
        assert len(report.videos or (report,)) == videos and report.computed_steps == [1, 2, 6, 7, 8]
        handle.remove()

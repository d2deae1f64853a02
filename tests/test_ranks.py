"""Several ranks at one video: one schedule for all of them, that of a single rank, and nobody waits for ever.

A GPU for each rank where there are enough, else processes on the CPU, joined by gloo.
"""

import contextlib
import os
import re
import time
from dataclasses import replace
from functools import partial
from unittest import mock

import diffusers
import pytest
import torch
import torch.distributed as dist
from doubles.stdit3 import STDiT3
from packaging.version import Version
from parallel import device, gaps_filled, parallel, placed
from ranks import RankError, World
from tiny_models import MODELS, sample
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, Report, apply_adacache
from adacache_triton.config import OFFICIAL

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]
newest = pytest.mark.skipif(Version(diffusers.__version__) < Version("0.42"), reason="plans of diffusers 0.42")

STEPS = 16
CONFIG = AdaCacheConfig(
    Codebook((0.04, 0.07, 0.1, 0.16), (5, 4, 3, 2, 1)),
    MotionRegularization((3, 14), (1, 2), scale=0.22, power=2, gradient_weight=1),
    STEPS,
)
FRAME = 16 * 24 * 4  # bytes of a frame's tokens in the tiny Wan


@pytest.fixture(scope="module")
def worlds():
    made = {}

    def world(backend, size):
        return made.get((backend, size)) or made.setdefault((backend, size), World(size, backend))

    yield world
    for each in made.values():
        each.close()


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def ranks(request, worlds):
    """ranks(2): that many."""

    def of(size):
        if request.param == "nccl" and torch.cuda.device_count() < size:
            pytest.skip(f"needs {size} GPUs")
        return worlds(request.param, size)

    return of


# What follows runs on the ranks. A run is a video and a report.


def on_one_rank(function, *args):
    """What it returns on the first rank, None on the others, which have no use for it."""
    return function(*args) if dist.get_rank() == 0 else None


def tiny(name: str, **changes) -> nn.Module:
    return replace(MODELS[name], config=MODELS[name].config | changes).model().to(device())


def moment(step: int) -> float:
    """A timestep, from 1000 to 0, fast at both ends."""
    u = (step - 1) / (STEPS - 1)
    return 1000 * (1 - (4 * (u - 0.5) ** 3 + 0.5))


def inputs(name: str, step: int, seed: int = 0, size: int | None = None) -> dict:
    """The arguments of a step, of a smaller picture if wanted."""
    found = MODELS[name].inputs(seed, moment(step))
    if size is not None:
        found["hidden_states"] = found["hidden_states"][..., :size, :size].contiguous()
    if name == "ltx":
        found["encoder_attention_mask"] = None  # diffusers keeps all heads of a mask under Ulysses
    return placed(found)


def joined(name: str, step: int, seeds: tuple[int, ...]) -> dict:
    """Those of several videos in one batch."""
    each = [inputs(name, step, seed) for seed in seeds]
    return {key: torch.cat([one[key] for one in each]) for key in each[0]}


def further(latents: Tensor, velocity: Tensor) -> Tensor:
    """One step on; conditions that lie beside the latents stay."""
    axis, moved = 1 if latents.dim() == 5 else 2, latents.clone()
    moved.narrow(axis, 0, velocity.shape[axis]).sub_(velocity / STEPS)
    return moved


@torch.no_grad()
def denoise(model: nn.Module, arguments, config: AdaCacheConfig = CONFIG, around: nn.Module | None = None, **kwargs):
    """A run; `arguments` are those of a step, and `around` is called where something wraps the model."""
    handle = apply_adacache(model, config, **kwargs)
    latents = arguments(1)["hidden_states"]
    with handle.run():
        for step in range(1, STEPS + 1):
            velocity = (around or model)(**arguments(step) | {"hidden_states": latents}, return_dict=False)[0]
            latents = further(latents, velocity)
        report = handle.report()
    handle.remove()
    return latents.cpu(), report


# What follows does not.


def videos_of(report: Report) -> tuple[Report, ...]:
    return report.videos or (report,)


def schedule(report: Report) -> list[tuple]:
    return [(s.step, s.reason, s.rate) for s in report.steps]


def numbers(report: Report) -> list[float]:
    """Distance and motion of every comparison."""
    return [x or 0.0 for s in report.steps for x in (s.distance, s.motion, s.motion_scale)]


def agree(*reports: Report) -> bool:
    """Whether all say the same, bit by bit."""
    first, *others = ([video.steps for video in videos_of(report)] for report in reports)
    return all(other == first for other in others)


def same(run: tuple, other: tuple, tolerance: float = 1e-5) -> bool:
    """Whether two runs took one schedule for the same reasons, measured the same, and made the same video."""
    (video, report), (other_video, other_report) = run, other
    return (
        schedule(report) == schedule(other_report)
        and numbers(report) == pytest.approx(numbers(other_report), tolerance, 1e-9)
        and torch.allclose(video, other_video, 0, tolerance)
    )


def worth_comparing(report: Report) -> bool:
    """Several rates, steps that were reused, and motion that counted."""
    rates = {s.rate for s in report.steps if s.rate}
    return (
        len(rates) >= 3 and len(report.computed_steps) <= STEPS - 5 and len({s.motion_scale for s in report.steps}) > 3
    )


# The context parallelism of diffusers

U, R = {"ulysses_degree": 2}, {"ring_degree": 2}
UNEVEN, FOUR_HEADS = dict(size=6), dict(num_attention_heads=4, attention_head_dim=6)  # 27 tokens
U_ANY, R_ANY = U | {"ulysses_anything": True}, R | {"ring_anything": True}
PLANS = [
    (2, "wan", U, {}),
    (2, "wan", U, {"granularity": "block"}),
    (2, "wan", U, {"granularity": "module"}),
    (2, "wan", R, {}),
    (2, "wan", U_ANY, UNEVEN),
    (2, "wan", R_ANY, UNEVEN),
    (2, "wan_2_2_ti2v", U, {}),
    (2, "chronoedit", U, {}),
    (2, "chronoedit", R, {"granularity": "block"}),
    (2, "minimax_h3", U_ANY, {"motion": None}),
    (2, "ltx", U, {}),
    (2, "ltx", R, {}),
    (2, "ltx", R, {"granularity": "module"}),
    (4, "wan", U | R, {"granularity": "block"}),
    (4, "wan", {"ring_degree": 4}, {}),
    (4, "wan", {"ring_degree": 4, "ring_anything": True}, UNEVEN),
    (4, "wan", {"ulysses_degree": 4, "ulysses_anything": True}, UNEVEN | FOUR_HEADS),
]


def on_all_tokens_and_on_shards(name, degrees, changes):
    """The run on one rank alone, and that of all."""
    config = replace(CONFIG, **{field: changes.pop(field) for field in ("granularity", "motion") if field in changes})
    arguments = partial(inputs, name, size=changes.pop("size", None))
    alone = on_one_rank(denoise, tiny(name, **changes), arguments, config)
    with gaps_filled():
        return alone, denoise(parallel(tiny(name, **changes), **degrees), arguments, config)


@newest
@pytest.mark.parametrize(("size", "name", "degrees", "changes"), PLANS)
def test_context_parallel_ranks_decide_as_one(ranks, size, name, degrees, changes):
    runs = ranks(size).run(on_all_tokens_and_on_shards, name, degrees, changes)
    assert agree(*(report for _, (_, report) in runs))
    exact = name.startswith("wan") and "ring_degree" not in degrees  # the model itself: the same bits on shards
    alone = runs[0][0]
    assert all(same(shared, alone, 1e-6 if exact else 1e-5) for _, shared in runs)
    assert worth_comparing(alone[1]) or name == "minimax_h3"  # which has no frames


@torch.no_grad()
def guided(model, videos: list[dict], texts: list[Tensor]) -> None:
    """One step of some videos, each at its own, for both branches of guidance, which the model is told by name."""
    outputs = []
    for name, text in zip(("cond", "uncond"), texts):
        with model.cache_context(name):
            arguments = dict(
                hidden_states=torch.cat([video["latents"] for video in videos]),
                timestep=torch.tensor([moment(video["step"]) for video in videos], device=device()),
                encoder_hidden_states=torch.cat([text + video["text"] for video in videos]),
            )
            outputs.append(model(**arguments, return_dict=False)[0].chunk(len(videos)))
    for video, positive, negative in zip(videos, *outputs):
        velocity = negative + 2 * (positive - negative)
        video["latents"] = further(video["latents"], video["speed"] * velocity)
        video["step"] += 1


def new_videos(count: int) -> list[dict]:
    """The later, the livelier."""
    starts = [inputs("wan", 1, seed) for seed in range(count)]
    return [
        dict(latents=x["hidden_states"], text=x["encoder_hidden_states"], speed=0.2 + 0.8 * i, step=1)
        for i, x in enumerate(starts)
    ]


def one_by_one(texts, videos):
    """Each by itself, with a cached model that knows of one."""
    runs = []
    for video in new_videos(videos):
        model = tiny("wan")
        handle = apply_adacache(model, CONFIG, calls_per_step=2)
        with handle.run():
            while video["step"] <= STEPS:
                guided(model, [video], texts)
            runs.append((video["latents"].cpu(), handle.report()))
    return runs


def as_requests(degrees, videos):
    """Guidance in two calls: videos one by one on one rank, then on all, as requests that arrive one after another."""
    texts, split = [placed(torch.zeros(1, 6, 8)), placed(torch.ones(1, 6, 8))], 0
    alone = on_one_rank(one_by_one, texts, videos)
    with gaps_filled():
        model = parallel(tiny("wan"), **degrees)
        handle = apply_adacache(model, replace(CONFIG, num_steps=None, per_video=True))
        requests = [(handle.session(STEPS), video) for video in new_videos(videos)]
        for now in range(STEPS + videos):
            here = [each for arrival, each in enumerate(requests) if arrival <= now and not each[0].over]
            if here:
                with handle.step([session for session, _ in here]):
                    guided(model, [video for _, video in here], texts)
                split += len({session.schedule.steps[-1].computed for session, _ in here}) > 1
    return alone, [(video["latents"].cpu(), session.report()) for session, video in requests], split


@newest
@pytest.mark.parametrize(("size", "degrees"), [(2, U), (4, U | R)])
def test_requests_with_schedules_of_their_own_on_context_parallel_ranks(ranks, size, degrees):
    results = ranks(size).run(as_requests, degrees, 2)
    alone = results[0][0]
    for _, shared, split in results:
        assert all(same(*each) for each in zip(shared, alone, strict=True))
        assert split >= 3, "steps in which some computed what others reused"
    for video in range(2):
        assert agree(*(shared[video][1] for _, shared, _ in results))
    assert len({tuple(schedule(report)) for _, report in alone}) == 2


def a_pipeline(name, degrees):
    from tiny_pipelines import PIPELINES  # which takes a while

    pipeline, call = PIPELINES[name].make(STEPS)
    for transformer in filter(None, (pipeline.transformer, getattr(pipeline, "transformer_2", None))):
        if degrees:
            parallel(transformer, **degrees)
    pipeline.to(device())
    handle = apply_adacache(pipeline, replace(CONFIG, codebook=CONFIG.codebook.scaled(2), num_steps=None))
    with gaps_filled():
        return sample(pipeline(**placed(call))).cpu(), handle.report()


def pipelines(name, degrees):
    """A pipeline's run on one rank alone, and that of all."""
    return on_one_rank(a_pipeline, name, {}), a_pipeline(name, degrees)


@newest
@pytest.mark.parametrize("name", ["wan", "wan_2_2", "wan_2_2_ti2v"])
def test_pipelines_with_context_parallel_transformers(ranks, name):
    runs = ranks(2).run(pipelines, name, U)
    alone = runs[0][0]
    assert agree(*(report for _, (_, report) in runs)) and len(alone[1].computed_steps) < STEPS - 2
    assert all(same(shared, alone) for _, shared in runs)


# Ranks that see different data


def uncoupled():
    """Each rank decides for itself, as it would without the reduction."""
    return mock.patch("adacache_triton.hooks.group_of", lambda *_: None)


def replicas(coupled):
    """A model on each rank, nothing in it shared, the videos different; decided together, and all on one rank."""
    mine, ranks = dist.get_rank(), tuple(range(dist.get_world_size()))
    with contextlib.nullcontext() if coupled else uncoupled():
        run = denoise(tiny("wan"), lambda step: inputs("wan", step, mine), group=dist.group.WORLD)
    return run, on_one_rank(denoise, tiny("wan"), lambda step: joined("wan", step, ranks))


@pytest.mark.parametrize("size", [2, 4])
def test_different_data_and_one_schedule(ranks, size):
    """That of all the data on one rank. Without the reduction each would have gone its own way."""
    runs = ranks(size).run(replicas, True)
    videos, together = runs[0][1]
    assert agree(*(report for (_, report), _ in runs)) and worth_comparing(together)
    assert all(same(run, (videos[rank : rank + 1], together)) for rank, (run, _) in enumerate(runs))
    apart = {tuple(report.computed_steps) for (_, report), _ in ranks(size).run(replicas, False)}
    assert len(apart) == size


def with_a_collective_inside(coupled):
    """One block waits for the other ranks, as sequence parallelism does."""
    model = tiny("wan")
    model.blocks[2].register_forward_hook(lambda *_: dist.all_reduce(torch.zeros(1, device=device())))
    with contextlib.nullcontext() if coupled else uncoupled():
        _, report = denoise(model, lambda step: inputs("wan", step, dist.get_rank()), group=dist.group.WORLD)
    return report


def test_a_rank_does_not_wait_for_one_that_reuses(ranks):
    assert agree(*ranks(2).run(with_a_collective_inside, True))


def test_without_the_reduction_it_would():
    with World(2, timeout=3) as world:
        began = time.monotonic()
        outcomes = world.outcomes(with_a_collective_inside, False)
        assert time.monotonic() - began < 20
    assert any(isinstance(outcome, RankError) and "with_a_collective_inside" in str(outcome) for outcome in outcomes)


@torch.no_grad()
def gone_wrong(value, block, coupled):
    """On the last rank, what goes into a block at step 5 is not finite. Every comparison would give rate 3."""
    model, wrong = tiny("wan"), dist.get_rank() == dist.get_world_size() - 1
    config = AdaCacheConfig(Codebook((1e6,), (3, 1)), num_steps=12)
    with contextlib.nullcontext() if coupled else uncoupled():
        handle, outputs = apply_adacache(model, config, group=dist.group.WORLD), []
        model.blocks[block].register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:]))
        with handle.run():
            for step in range(1, 13):
                factor = value if step == 5 and wrong else 1.0
                outputs.append(model(**inputs("wan", step), return_dict=False)[0].isfinite().all().item())
            return outputs, handle.report().computed_steps


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("block", [0, 2], ids=["before the probe", "behind it"])
def test_what_is_not_finite_on_one_rank_makes_all_compute(ranks, value, block):
    world = ranks(2)
    (finite, computed), (wrong, same) = world.run(gone_wrong, value, block, True)
    assert computed == same and all(finite) and not wrong[4]
    if world.backend == "gloo":  # else what is kept is looked at a step later
        assert computed == ([1, 2, 5, 6, 7, 10, 11, 12] if block == 0 else [1, 2, 5, 6, 9, 11, 12])
        assert wrong.count(False) == 1
    assert world.run(gone_wrong, value, block, False)[0][1] == [1, 2, 5, 8, 11, 12] != computed


# Data parallelism


class Wire(TorchDispatchMode):
    """The collectives that run inside, whoever calls them: name, and bytes of each tensor on this rank."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            sizes = [x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.calls.append((function.__name__.split(".")[0], sizes))
        return function(*args, **(kwargs or {}))


def replica(seed):
    """A model for itself, and what it says to other ranks."""
    with Wire() as wire:
        run = denoise(tiny("wan"), lambda step: inputs("wan", step, dist.get_rank() if seed is None else seed))
    return run, wire.calls


def test_data_parallel_ranks_are_not_coupled(ranks):
    for seed, ((video, report), calls) in enumerate(ranks(2).run(replica, None)):
        (((alone, other), _),) = ranks(1).run(replica, seed)
        assert not calls and agree(report, other) and torch.equal(video, alone)


# Sharded parameters


def fsdp(model: nn.Module, mesh=None) -> nn.Module:
    """The model with its parameters sharded as FSDP2 does it, block by block."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model: nn.Module) -> nn.Module:
    """What is to be called then: the blocks and the model are wrapped."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = partial(FullyShardedDataParallel, device_id=device(), use_orig_params=True)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wrapped(block)
    return wrapped(model)


def mesh(*shape: int, names: tuple[str, ...]):
    return dist.device_mesh.init_device_mesh(device().type, shape, mesh_dim_names=names)


def with_sharded_parameters(way, videos, changes):
    """A run of each rank's own videos; all of them on one rank, where the ranks' videos are samples of one."""
    config, rank, ranks = replace(CONFIG, **changes), dist.get_rank(), dist.get_world_size()
    mine, every = tuple(range(rank * videos, (rank + 1) * videos)), tuple(range(ranks * videos))
    model = tiny("wan")
    around = fsdp1(model) if way == "FSDP1" else fsdp(model)
    run = denoise(model, partial(joined, "wan", seeds=mine), config, around, branches_in_batch=1)
    together = partial(denoise, branches_in_batch=ranks)
    return run, on_one_rank(together, tiny("wan"), partial(joined, "wan", seeds=every), config)


@pytest.mark.parametrize(
    ("way", "videos", "changes"),
    [
        ("FSDP2", 1, {}),
        ("FSDP2", 2, {"granularity": "block"}),
        ("FSDP2", 2, {"per_video": True}),
        ("FSDP1", 1, {}),
        ("FSDP1", 1, {"granularity": "module"}),
    ],
)
def test_ranks_that_share_their_parameters_decide_as_one(ranks, way, videos, changes):
    runs = ranks(2).run(with_sharded_parameters, way, videos, changes)
    every, together = runs[0][1]
    assert agree(*(report for (_, report), _ in runs))
    for rank, ((mine, report), _) in enumerate(runs):
        assert torch.allclose(mine, every[rank * videos : (rank + 1) * videos], 0, 1e-5)
        for video, other in zip(videos_of(report), videos_of(together), strict=True):
            assert schedule(video) == schedule(other) and numbers(video) == pytest.approx(numbers(other), 1e-5, 1e-9)
    assert len({tuple(schedule(video)) for video in videos_of(together)}) == len(videos_of(together))


def in_pairs(tokens, parameters, told, together):
    """Two pairs of ranks, a video on each, and the same on this rank: its own, or those of all that decide together."""
    pair, arguments = dist.get_rank() // 2, partial(joined, "wan")
    grid = mesh(2, 1, 2, names=("pair", "ring", "ulysses"))
    with gaps_filled():
        model = tiny("wan")
        if parameters:
            fsdp(model, grid["pair", "ulysses"] if parameters == "replicated" else grid._flatten("all"))
        if tokens:
            parallel(model, ulysses_degree=2, mesh=grid["ring", "ulysses"])
        run = denoise(model, partial(arguments, seeds=(pair,)), group=dist.group.WORLD if told else None)
    video, report = denoise(tiny("wan"), partial(arguments, seeds=(0, 1) if together else (pair,)))
    return run, (video[pair : pair + 1] if together else video, report)


@newest
@pytest.mark.parametrize(
    ("tokens", "parameters", "told", "together"),
    [
        (True, None, False, False),
        (False, "replicated", False, False),
        (True, "replicated", False, False),
        (True, "sharded", False, True),
        (True, None, True, True),
    ],
)
def test_two_pairs_of_ranks_with_a_video_each(ranks, tokens, parameters, told, together):
    """A pair shares its video's tokens, or its parameters, which all four may share; or they are told to agree."""
    runs = ranks(4).run(in_pairs, tokens, parameters, told, together)
    assert all(same(run, reference) for run, reference in runs)
    assert len({tuple(schedule(report)) for (_, report), _ in runs}) == (1 if together else 2)


# A rank for each branch of guidance


@torch.no_grad()
def branches(models, texts, exchange, **kwargs) -> tuple:
    """Guidance by calls of these models with these texts; `exchange` makes both branches' outputs of them."""
    handles = [apply_adacache(model, CONFIG, **kwargs) for model in dict.fromkeys(models)]
    latents = inputs("wan", 1)["hidden_states"]
    with contextlib.ExitStack() as runs:
        for handle in handles:
            runs.enter_context(handle.run())
        for step in range(1, STEPS + 1):
            arguments = inputs("wan", step) | {"hidden_states": latents}
            outputs = [
                model(**arguments | {"encoder_hidden_states": text}, return_dict=False)[0]
                for model, text in zip(models, texts)
            ]
            positive, negative = exchange(outputs)
            latents = further(latents, negative + 2 * (positive - negative))
        return latents.cpu(), [handle.report() for handle in handles]


def a_branch_each(joint, degrees):
    """The run of all ranks; that of one rank alone, with both branches, in one model or in two."""
    grid = mesh(2, 1, dist.get_world_size() // 2, names=("branch", "ring", "ulysses"))
    text = inputs("wan", 1)["encoder_hidden_states"]
    texts, across = [text, 4 * torch.flip(text, [1])], grid["branch"].get_group()

    def exchange(outputs):
        both = [torch.empty_like(outputs[0]) for _ in range(2)]
        dist.all_gather(both, outputs[0].contiguous(), group=across)
        return both

    model = tiny("wan")
    if degrees:
        parallel(model, **degrees, mesh=grid["ring", "ulysses"])
    mine = texts[dist.get_rank(across) :][:1]
    run = branches([model], mine, exchange, group=dist.group.WORLD if joint else None)
    if joint:
        return run, on_one_rank(partial(branches, calls_per_step=2), [tiny("wan")] * 2, texts, list)
    return run, on_one_rank(branches, [tiny("wan"), tiny("wan")], texts, list)


@newest
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
@pytest.mark.parametrize(("size", "degrees"), [(2, {}), (4, U)])
def test_ranks_that_share_out_the_branches_of_guidance(ranks, size, degrees, joint):
    runs = ranks(size).run(a_branch_each, joint, degrees)
    video, reports = runs[0][1]
    for rank, ((mine, (report,)), _) in enumerate(runs):
        assert same((mine, report), (video, reports[0 if joint else rank // (size // 2)]))
    assert len({tuple(schedule(report)) for (_, (report,)), _ in runs}) == (1 if joint else 2)


# Open-Sora's own sequence parallelism


def each_a_part_of_every_frame(model: STDiT3, frames: int) -> STDiT3:
    """As Open-Sora 1.2 does it: from the embedder on, until all are gathered for the final layer.

    Within a frame attention sees all tokens, so here keys and values are gathered; there the heads are exchanged.
    """
    size, rank = dist.get_world_size(), dist.get_rank()

    def gathered(x: Tensor, axis: int) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, axis)

    def split(module, args, x):
        return x.unflatten(1, (frames, -1)).chunk(size, 2)[rank].flatten(1, 2)

    def gather(module, args):
        return (gathered(args[0].unflatten(1, (frames, -1)), 2).flatten(1, 2), *args[1:])

    model.x_embedder.register_forward_hook(split)
    for block in (*model.spatial_blocks, *model.temporal_blocks):
        block.register_forward_pre_hook(lambda block, args: (*args[:-1], args[-1] // size))
    for block in model.spatial_blocks:
        block.attn.register_forward_pre_hook(lambda attention, args: (args[0], gathered(args[0], 1)))
    model.final_layer.register_forward_pre_hook(gather)
    return model


@torch.no_grad()
def stdit3(granularity, shared):
    """A run of the model, and what it said to other ranks."""
    torch.manual_seed(0)
    model = STDiT3().eval().to(device())
    x, text = placed((torch.randn(2, 4, 5, 8, 8), torch.randn(2, 6, 32)))
    if shared:
        each_a_part_of_every_frame(model, frames=5)
    group = dist.group.WORLD if shared else None
    handle = apply_adacache(model, replace(CONFIG, granularity=granularity), group=group)
    with handle.run(), Wire() as wire:
        for step in range(1, STEPS + 1):
            x = x - model(x, torch.full((2,), moment(step), device=device()), text) / STEPS
        return (x.cpu(), handle.report()), wire.calls


def open_sora(granularity):
    return on_one_rank(stdit3, granularity, False), stdit3(granularity, True)


@pytest.mark.parametrize(("size", "granularity"), [(2, "stack"), (2, "block"), (2, "module"), (4, "stack")])
def test_a_part_of_every_frame_on_each_rank(ranks, size, granularity):
    """Nothing is exchanged for motion, and what is kept is this rank's part."""
    results = ranks(size).run(open_sora, granularity)
    alone, _ = results[0][0]
    assert agree(*(report for _, ((_, report), _) in results)) and worth_comparing(alone[1])
    for _, (shared, calls) in results:
        assert same(shared, alone) and shared[1].kept_bytes * size == alone[1].kept_bytes
        assert {name for name, _ in calls} == {"allgather_", "allreduce_"}  # the first are the model's
        assert max(sizes for name, sizes in calls if name == "allreduce_") == [4 * 6]


# Bytes on the wire


@torch.no_grad()
def on_the_wire(degrees, preset, calls, videos):
    """In every step of a run, the bytes of what is summed, and of the tokens that come over a border."""
    config = replace(AdaCacheConfig.official(preset, moreg=True), num_steps=20, per_video=videos > 1)
    found = []
    with gaps_filled(), Wire() as wire:
        model = parallel(tiny("wan"), **degrees)
        handle = apply_adacache(model, config, calls_per_step=calls, branches_in_batch=1)
        with handle.run():
            for step in range(1, 21):
                arguments = joined("wan", 1 + step * (STEPS - 1) / 20, tuple(range(videos)))
                for _ in range(calls):
                    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"] + 1
                    model(**arguments, return_dict=False)
                made, wire.calls = wire.calls, []
                summed = sum(sum(sizes) for name, sizes in made if name == "allreduce_")
                found.append((summed, [sizes[0] for name, sizes in made if name == "alltoall_base_"]))
            return found, handle.report()


COSTS = [
    (2, U, "open-sora-100", 2, 1),
    (2, U, "open-sora-30-fast", 1, 2),
    (2, U, "open-sora-30-slow", 1, 1),
    (4, {"ring_degree": 4}, "open-sora-30-fast", 2, 1),
]


@newest
@pytest.mark.parametrize(("size", "degrees", "preset", "calls", "videos"), COSTS)
def test_a_decision_costs_a_few_bytes(ranks, size, degrees, preset, calls, videos):
    """At most 64 for each video in a step, and where motion is looked at a frame's tokens over each border."""
    first, last = OFFICIAL[preset].motion.window
    for rank, (found, report) in enumerate(ranks(size).run(on_the_wire, degrees, preset, calls, videos)):
        halo = min(rank * 3 * FRAME // size, FRAME)  # of the tokens on the ranks before
        for step, (summed, halos) in enumerate(found, 1):
            records = [each.steps[step - 1] for each in videos_of(report)]
            compared, computed = (sum(x) for x in zip(*((s.distance is not None, s.computed) for s in records)))
            lengths = size * videos * (step == 1)  # of the ranks' runs of tokens, once in a run
            assert summed == 4 * calls * (4 * compared + computed + lengths) <= 64 * videos
            assert halos == [halo] * (calls * compared if first <= step <= last else 0)
        assert any(halos for _, halos in found)


# Ranks that leave


@torch.no_grad()
def left_alone(what):
    """Every comparison gives rate 3, so steps 1, 2, 5 and 8 are computed; behind the fifth the other rank is gone.

    Returns the step in which this one noticed, the error, how long it waited, and whether the step was then computed.
    """
    model, plain = tiny("wan"), tiny("wan")
    apply_adacache(model, AdaCacheConfig(Codebook((1e6,), (3, 1)), num_steps=12), group=dist.group.WORLD)
    for step in range(1, 13):
        if step == 6 and dist.get_rank() == 1:
            os._exit(3) if what == "dies" else time.sleep(60)
        began = time.monotonic()
        try:
            model(**inputs("wan", step), return_dict=False)
        except RuntimeError as error:
            waited = time.monotonic() - began
            with mock.patch.object(dist, "all_reduce", lambda *_, **__: mock.Mock()):  # none is missing
                again = model(**inputs("wan", step), return_dict=False)[0]
            whole = plain(**inputs("wan", step), return_dict=False)[0]
            return step, str(error), waited, torch.equal(again, whole)
    return None


@pytest.mark.parametrize("what", ["dies", "hangs"])
def test_a_rank_that_leaves_between_steps_is_noticed(what):
    """With NCCL, its watchdog would end the process."""
    with World(2, timeout=3) as world:
        first, second = world.outcomes(left_alone, what)
    assert isinstance(second, RankError)
    step, error, waited, computed = first
    assert 6 <= step <= 9 and waited < 10 and computed
    assert re.search("time(d )?out|connection", error, re.IGNORECASE), error


# Groups and batches that do not fit


def refused(groups):
    """What is said of a group, and whether the model is cached all the same."""
    group = [dist.new_group(each) for each in groups][dist.get_rank()]
    model = fsdp(tiny("wan"))
    try:
        apply_adacache(model, CONFIG, group=group)
    except ValueError as error:
        return str(error), hasattr(model, "_adacache_handle")


def test_a_group_that_does_not_fit_is_refused(ranks):
    swapped = ranks(2).run(refused, [[1], [0]])
    own = ranks(2).run(refused, [[0], [1]])
    for rank in range(2):
        assert swapped[rank][0].startswith(f"group: expected a process group that holds this rank, {rank}, got one")
        assert own[rank][0].startswith(
            "group: expected one that holds ranks [0, 1], which run the blocks together, got"
        )
        assert not swapped[rank][1] and not own[rank][1], "nothing is applied"


def batches_that_differ():
    """The second rank has a video more, each with a schedule of its own."""
    seeds = tuple(range(1 + dist.get_rank()))
    config = replace(CONFIG, per_video=True)
    return denoise(
        tiny("wan"), partial(joined, "wan", seeds=seeds), config, branches_in_batch=1, group=dist.group.WORLD
    )


def test_batches_that_differ_are_an_error_not_a_video():
    with World(2, timeout=3) as world:
        began = time.monotonic()
        outcomes = world.outcomes(batches_that_differ)
        assert time.monotonic() - began < 20
    assert all(isinstance(outcome, RankError) for outcome in outcomes)

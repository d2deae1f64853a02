"""Ranks that work on one video: who decides together, where its tokens are split, motion across their borders."""

import os
import time
from functools import partial
from itertools import accumulate, pairwise
from unittest import mock

import diffusers
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from parallel import device, gaps_filled, parallel
from ranks import RankError, World
from tiny_models import MODELS
from torch import nn

from adacache_triton.distributed import Shards, entered, group_of, motion_sums, sequence_group, splits
from adacache_triton.kernels import as_frames, residual_stats

# The first failure as it comes: shrinking it would wait for ranks again and again.
repeatable = settings(
    max_examples=40, derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate]
)
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]
newest = pytest.mark.skipif(Version(diffusers.__version__) < Version("0.42"), reason="plans of diffusers 0.42")


def backends(size):
    nccl = pytest.mark.skipif(torch.cuda.device_count() < size, reason=f"needs {size} GPUs")
    return [f"gloo {size}", pytest.param(f"nccl {size}", marks=[pytest.mark.gpu, nccl])]


@pytest.fixture(scope="module")
def worlds():
    made = {}

    def world(name, size):
        return made.get((name, size)) or made.setdefault((name, size), World(size, name))

    yield world
    for each in made.values():
        each.close()


@pytest.fixture(params=[*backends(2), *backends(4)])
def world(request, worlds):
    name, size = request.param.split()
    return worlds(name, int(size))


@pytest.fixture(params=backends(2))
def two(request, worlds):
    return worlds(request.param.split()[0], 2)


@pytest.fixture(params=backends(4))
def four(request, worlds):
    return worlds(request.param.split()[0], 4)


# What follows runs on the ranks.


def mesh(*shape, names):
    return dist.device_mesh.init_device_mesh(device().type, shape, mesh_dim_names=names)


def ranks(group):
    return None if group is None else dist.get_process_group_ranks(group)


def refusal(function, *args):
    """The message with which a function refuses its arguments."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    raise AssertionError("it took them")


# Who decides together


def found_without_parallelism():
    model = nn.Linear(2, 2)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    return [ranks(group_of(model, [model], group)) for group in (None, alone, dist.group.WORLD)]


def test_replicas_are_not_coupled_and_a_given_group_is_taken(world):
    assert world.run(found_without_parallelism) == world.size * [[None, None, list(range(world.size))]]


def test_without_process_groups_everyone_is_alone():
    model = nn.Linear(2, 2)
    assert group_of(model, [model], None) is None


def refused_as_not_in_it():
    others = dist.new_group([0])
    model = nn.Linear(2, 2)
    return refusal(group_of, model, [model], others) if dist.get_rank() else None


def test_a_group_without_the_rank_is_refused(two):
    message = two.run(refused_as_not_in_it)[1]
    assert message == "group: expected a process group that holds this rank, 1, got one without it"


def found_under_context_parallelism():
    """Two pairs, each with a video."""
    pairs = mesh(2, 1, 2, names=("video", "ring", "ulysses"))["ring", "ulysses"]
    model = parallel(MODELS["wan"].model(), ulysses_degree=2, mesh=pairs)
    across = [dist.new_group(pair) for pair in ([0, 2], [1, 3])][dist.get_rank() % 2]
    own, whole = (ranks(group_of(model, model.blocks[:1], group)) for group in (None, dist.group.WORLD))
    return own, whole, refusal(group_of, model, model.blocks[:1], across)


@newest
def test_context_parallel_ranks_decide_together(four):
    for rank, (own, whole, refused) in enumerate(four.run(found_under_context_parallelism)):
        pair, across = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        assert own == pair and whole == [0, 1, 2, 3]
        assert refused == (
            f"group: expected one that holds ranks {pair}, which run the blocks together, got one of ranks {across}"
        )


def found_with_sharded_parameters():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    grid = mesh(2, 2, names=("replicas", "shards"))
    found = []
    for part in (grid["shards"], grid, grid._flatten("all")):
        model = MODELS["wan"].model().to(device())
        for block in model.blocks:
            fully_shard(block, mesh=part)
        found.append(ranks(group_of(model, model.blocks[:1], None)))
    model = MODELS["wan"].model().to(device())
    parallelize_module(model.blocks[0], grid["shards"], {"ffn.net.2": RowwiseParallel()})
    found.append(ranks(group_of(model, model.blocks[:1], None)))
    fully_shard(model.blocks[0], mesh=grid["replicas"])
    found.append(refusal(group_of, model, model.blocks[:1], None))
    # Nothing but the embedders, which run on every step.
    model = MODELS["wan"].model().to(device())
    fully_shard(model.condition_embedder, mesh=grid["shards"])
    return *found, ranks(group_of(model, model.blocks[:1], None))


def test_the_ranks_that_share_a_blocks_parameters_decide_together(four):
    for rank, found in enumerate(four.run(found_with_sharded_parameters)):
        pair, across = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        by_fsdp, replicated, by_all, by_tensor, by_two, by_none = found
        assert (by_fsdp, replicated, by_all, by_tensor, by_none) == (pair, pair, [0, 1, 2, 3], pair, None)
        needed = sorted({*pair, *across})
        assert by_two == f"group: expected one that holds ranks {needed}, which run the blocks together, got None"


def found_under_both():
    from torch.distributed.fsdp import fully_shard

    grid = mesh(1, 2, 2, names=("ring", "ulysses", "fsdp"))
    found = []
    for part in (grid["fsdp"], grid["ulysses", "fsdp"]._flatten("both")):
        model = MODELS["wan"].model().to(device())
        for block in model.blocks:
            fully_shard(block, mesh=part)
        parallel(model, ulysses_degree=2, mesh=grid["ring", "ulysses"])
        found.append(partial(group_of, model, model.blocks[:1]))
    return refusal(found[0], None), ranks(found[0](dist.group.WORLD)), ranks(found[1](None))


@newest
def test_parameters_and_tokens_on_different_ranks(four):
    refused, given, over_both = four.run(found_under_both)[0]
    assert refused == "group: expected one that holds ranks [0, 1, 2], which run the blocks together, got None"
    assert given == over_both == [0, 1, 2, 3]


# Where the tokens are split

SPLIT_AT_A_BLOCK = ("wan", "wan_i2v", "wan_2_2_ti2v", "chronoedit", "minimax_h3", "qwenimage")
SPLIT_AT_THE_ROOT = ("ltx", "flux")


def entrance(name):
    """What the first block's own forward got, and what is said of it from the arguments that came to its door."""
    tiny, seen, came = MODELS[name], [], []
    model = tiny.model()
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
    kind, forward = type(blocks[0]), type(blocks[0]).forward

    def recorded(self, hidden_states, *args, **kwargs):
        seen.append((hidden_states, *args, *kwargs.values()))
        return forward(self, hidden_states, *args, **kwargs)

    recorded.__wrapped__ = forward  # for its signature
    with mock.patch.object(kind, "forward", recorded), torch.no_grad():
        before = splits(blocks[0])
        parallel(model, ulysses_degree=2, ulysses_anything=name == "minimax_h3")
        blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: came.append((args, kwargs)), with_kwargs=True, prepend=True
        )
        inputs = tiny.inputs()
        if name == "ltx":
            inputs["encoder_attention_mask"] = None  # diffusers keeps all heads of a mask under Ulysses
        with gaps_filled():
            model(**inputs, return_dict=False)  # which a root with a split hook must return
    args, kwargs = entered(blocks[0], *came[0])
    got, said, door = (
        [x for x in values if isinstance(x, torch.Tensor)]
        for values in (seen[0], (*args, *kwargs.values()), (*came[0][0], *came[0][1].values()))
    )
    changed = sum(a.shape != b.shape for a, b in zip(said, door))
    same = len(got) == len(said) and all(torch.equal(a, b) for a, b in zip(got, said))
    group = sequence_group(model, blocks[1], False, None)
    return before, splits(blocks[0]), splits(blocks[1]), changed, same, ranks(group)


@newest
@pytest.mark.parametrize("name", SPLIT_AT_A_BLOCK)
def test_arguments_behind_the_split_at_the_first_block(worlds, name):
    split = {"minimax_h3": 2, "qwenimage": 3}.get(name, 1)  # arguments
    for before, first, second, changed, same, group in worlds("gloo", 2).run(entrance, name):
        assert not before and first and same and changed == split and group == [0, 1]
        assert second == (name in ("minimax_h3", "qwenimage"))


@newest
@pytest.mark.parametrize("name", SPLIT_AT_THE_ROOT)
def test_arguments_of_a_model_split_at_its_root(worlds, name):
    for _, first, _, changed, same, group in worlds("gloo", 2).run(entrance, name):
        assert not first and same and changed == 0 and group == [0, 1]


def sequence_of_others():
    """Helios gathers in its blocks; others say how they share tokens."""
    helios = MODELS["helios"]
    with torch.no_grad():
        model = parallel(getattr(diffusers, helios.kind)(**dict(helios.config) | dict(num_layers=40)), ring_degree=2)
    block, world = nn.Linear(2, 2), dist.group.WORLD
    asked = [(False, None), (False, world), (True, world)]
    groups = [sequence_group(model, model.blocks[0], True, world), *(sequence_group(block, block, *a) for a in asked)]
    return [ranks(group) for group in groups]


@newest
def test_ranks_that_hold_whole_sequences(two):
    assert two.run(sequence_of_others) == 2 * [[None, None, None, [0, 1]]]


# Motion across borders


def video(batch, tokens, channels, dtype, seed=0):
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)


def motion_of_a_run(lengths, batch, frames, strides, dtype):
    """This rank's motion sums, how many elements it sent, and the sums that it would have had by itself."""
    whole = video(batch, sum(lengths), 8, dtype).to(device())
    start, stop = list(pairwise([0, *accumulate(lengths)]))[dist.get_rank()]
    shards = Shards(stop - start, dist.group.WORLD, device())
    sent, send = [], dist.all_to_all_single

    def counted(received, tokens, *args, **kwargs):
        sent.append(tokens.numel())
        return send(received, tokens, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", counted):
        sums = motion_sums(whole[:, start:stop], shards, frames, strides)
    return sums.cpu(), sum(sent)


def expected(lengths, batch, frames, strides, dtype):
    frame = as_frames(video(batch, sum(lengths), 8, dtype), frames)
    return residual_stats(frame, frame_strides=strides)[:, 2:]


@repeatable
@given(data=st.data(), frames=st.integers(1, 5), tokens=st.integers(1, 6), batch=st.integers(1, 3))
@pytest.mark.parametrize("size", [2, 4])
def test_motion_is_that_of_one_rank_wherever_the_borders_lie(worlds, size, data, frames, tokens, batch):
    borders = data.draw(st.lists(st.integers(0, frames * tokens), min_size=size - 1, max_size=size - 1).map(sorted))
    lengths = [b - a for a, b in pairwise([0, *borders, frames * tokens])]
    strides = data.draw(st.sampled_from([(1,), (2,), (1, 2), (3, 1), (1, 7)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    task = (lengths, batch, frames, strides, dtype)
    sums, sent = zip(*worlds("gloo", size).run(motion_of_a_run, *task))
    torch.testing.assert_close(sum(sums), expected(*task), rtol=1e-6, atol=1e-6)
    reach = max((s for s in strides if s < frames), default=0) * tokens
    assert sum(sent) <= (size - 1) * reach * batch * 8


@pytest.mark.parametrize("lengths", [(24, 24), (27, 21), (45, 3)])
def test_motion_of_two_ranks(two, lengths):
    task = (lengths, 2, 3, (1, 2), torch.bfloat16)
    sums, _ = zip(*two.run(motion_of_a_run, *task))
    torch.testing.assert_close(sum(sums), expected(*task), rtol=1e-6, atol=1e-6)
    assert (sums[0] != expected(*task)).any() and (sums[1] != 0).all()


@pytest.mark.parametrize("lengths", [(12, 12, 12, 12), (13, 13, 13, 9), (2, 1, 1, 44), (44, 1, 1, 2)])
def test_motion_of_four_ranks(four, lengths):
    task = (lengths, 1, 4, (1, 3), torch.float32)
    sums, _ = zip(*four.run(motion_of_a_run, *task))
    torch.testing.assert_close(sum(sums), expected(*task), rtol=1e-6, atol=1e-6)


def refused_frames():
    shards = Shards(5, dist.group.WORLD, device())
    return refusal(motion_sums, torch.zeros(1, 5, 8, device=device()), shards, 3, (1,))


def test_frames_that_the_tokens_do_not_fill_are_refused_by_every_rank(two):
    message = "BlockStack.frames: expected a divisor of the 10 tokens of all ranks, got 3"
    assert two.run(refused_frames) == [message, message]


# Ranks that fail


def reduce_unless(rank, what):
    if dist.get_rank() == rank and what == "dies":
        os._exit(3)
    if dist.get_rank() == rank and what == "hangs":
        time.sleep(60)
    return Shards(4, dist.group.WORLD, device()).ends


@pytest.mark.parametrize("what", ["dies", "hangs"])
def test_ranks_do_not_wait_for_ever(what):
    with World(2, timeout=3) as world:
        began = time.monotonic()
        first, second = world.outcomes(reduce_unless, 1, what)
        assert time.monotonic() - began < 20
        assert ("died with exit code 3" if what == "dies" else "no answer") in str(second)
        assert isinstance(first, RankError) and "readback.py" in str(first)  # the group gave up, not the test
        assert world.run(reduce_unless, None, None) == [[4, 8], [4, 8]]

"""A batch in parts: the rows of a forward's arguments, and the parts' outputs as one."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from doubles import latte_class, latte_t2v, open_sora_plan, stdit3
from doubles.outputs import tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from adacache_triton.models import described, stack_of
from adacache_triton.split import join, take

repeatable = settings(max_examples=30, derandomize=True, deadline=None, database=None)
Pair = namedtuple("Pair", "video audio")
STACKS = {name: described(tiny.kind) for name, tiny in MODELS.items() if tiny.available}
# Of diffusion forcing with a frame rate, diffusers' own forward takes one video at a time.
BATCHED = [
    name
    for name, stack in STACKS.items()
    if stack.refused is None and stack.layout != "(t s) c" and name != "skyreels_v2_df"
]
TOLERANCE = {"kandinsky_5": 1e-4}  # it rounds queries and keys to bfloat16
LATENTS = (4, 5, 8, 8)  # five frames, or five channels of Latte's


def _t2v(batch: int) -> dict:
    return dict(
        hidden_states=torch.randn(batch, *LATENTS), timestep=torch.rand(batch) * 900,
        encoder_hidden_states=torch.randn(batch, 6, 8), added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
    )  # fmt: skip


# Their own repositories' models, as their samplers call them.
PAPER = {
    "latte": (latte_t2v.LatteT2V, _t2v),
    "open-sora-plan": (
        open_sora_plan.LatteT2V, lambda batch: _t2v(batch) | dict(encoder_attention_mask=torch.ones(batch, 6))
    ),
    "open-sora": (
        stdit3.STDiT3,
        lambda batch: dict(
            x=torch.randn(batch, *LATENTS), timestep=torch.rand(batch) * 900, y=torch.randn(batch, 6, 32),
            mask=torch.ones(batch, 6).long().tril(3), x_mask=torch.rand(batch, 5) > 0.3, fps=torch.tensor([24.0]),
        ),
    ),
    "latte-class": (
        latte_class.Latte,
        lambda batch: dict(
            x=torch.randn(batch, 5, 4, 8, 8), t=torch.rand(batch) * 900, y=torch.arange(batch), use_fp16=False
        ),
    ),
}  # fmt: skip


@st.composite
def partitions(draw) -> tuple[int, list[list[int]]]:
    """A batch and its samples in parts, in any order."""
    batch = draw(st.integers(1, 8))
    order, cuts = draw(st.permutations(range(batch))), draw(st.sets(st.integers(1, batch)))
    ends = sorted({batch, *cuts})
    return batch, [list(order[a:b]) for a, b in zip([0, *ends], ends)]


def everything(batch: int) -> dict:
    """All kinds of arguments, the batch first in each."""
    x = torch.randn(2 * batch, 3, 4)
    return dict(
        latents=x[:batch], strided=x[::2], transposed=x[:batch].mT, expanded=x[:1].expand(batch, 3, 4),
        timestep=torch.arange(batch) * 10, layers=[x[batch:], x[:batch]], halves=(x[:batch], None),
        guidance=dict(scale=2.0, images=[x[batch:, 0]]), pair=Pair(x[:batch], x[batch:]), fps=16, name="cond",
        output=Transformer2DModelOutput(sample=x[batch:]), ordered=OrderedDict(a=x[:batch], b=1.5), flag=True, no=None,
    )  # fmt: skip


def same(a, b) -> bool:
    """Of one kind, with equal values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple, dict)):
        keys = list(a) == list(b) if isinstance(a, dict) else len(a) == len(b)
        a, b = ((x.values() if isinstance(x, dict) else x, type(x)) for x in (a, b))
        return keys and a[1] is b[1] and all(map(same, a[0], b[0]))
    return a == b


@repeatable
@given(partitions())
def test_the_parts_joined_are_the_whole(partition):
    batch, rows = partition
    arguments = everything(batch)
    parts = [take(arguments, part, batch) for part in rows]
    assert same(join(parts, rows, batch), arguments)
    for part, of_part in zip(parts, rows):
        assert torch.equal(part["timestep"], arguments["timestep"][of_part]), "in the order asked for"
        assert all(len(x) == len(of_part) for x in tensors(list(part.values())))
    for kind in (list, tuple, Transformer2DModelOutput, lambda x: x[0]):
        outputs = [kind([part["latents"]]) for part in parts]
        assert same(join(outputs, rows, batch), kind([arguments["latents"]]))


@repeatable
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4))
def test_evenly_spaced_rows_are_views(first, step, count):
    """Those of one video in a batch of guidance halves, of every second one, or of neighbours."""
    rows = [first + step * i for i in range(count)]
    x = torch.randn(rows[-1] + 2, 3)
    taken = take(dict(x=x), rows, len(x))["x"]
    assert torch.equal(taken, x[rows])
    assert taken.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.operations.append(operation.overloadpacket)
        return operation(*args, **kwargs or {})


@repeatable
@given(partitions())
def test_nothing_but_slices_and_concatenations(partition):
    """No table of indices goes to the device; and no more than one copy of a tensor is made."""
    batch, rows = partition
    x = torch.randn(batch, 3)
    with Recorded() as recorded:
        parts = [take(dict(x=x, t=0.5, n=None), part, batch)["x"] for part in rows]
        copies = recorded.operations.count(torch.ops.aten.cat)
        join(parts, rows, batch)
    assert set(recorded.operations) <= {torch.ops.aten.slice, torch.ops.aten.cat}
    assert copies <= len(rows) and recorded.operations.count(torch.ops.aten.cat) <= copies + 1


@repeatable
@given(partitions())
def test_fake_tensors(partition):
    batch, rows = partition
    with FakeTensorMode():
        arguments = everything(batch)
        whole = join([take(arguments, part, batch) for part in rows], rows, batch)
        assert [x.shape for x in tensors(whole)] == [x.shape for x in tensors(arguments)]


def test_what_has_no_batch_is_left_alone():
    cos, mask, image = torch.randn(2, 7), torch.ones(1, 7), dict(scale=0.5)
    arguments = dict(
        x=torch.randn(2, 7), frames=torch.arange(2), rotary=(cos, cos), skipped=[3, 4], mask=mask, size=(1, 2),
        kwargs=image,
    )  # fmt: skip
    part = take(arguments, [1], 2, ("frames", "rotary", "skipped"))
    assert (
        all(part[name] is arguments[name] for name in ("frames", "rotary", "skipped", "mask")) and len(part["x"]) == 1
    )
    assert part["size"] == (1, 2) and part["kwargs"] == image
    part["kwargs"].pop("scale")
    assert image, "a forward may pop from its own"


def test_an_item_a_sample():
    """Latents in a list, or plain values: by name, for lists of layers may be as long."""
    clips = [torch.randn(3, i) for i in range(3)]
    arguments = dict(x=clips, fps=[8, 16, 24], skipped=[0, 1, 2], axes=[torch.arange(3)] * 3)
    part = take(arguments, [2, 0], 3, listed=("x", "fps"))
    assert part["x"][0] is clips[2] and part["x"][1] is clips[0]
    assert part["fps"] == [24, 8] and part["skipped"] == [0, 1, 2]
    assert [x.tolist() for x in part["axes"]] == [[2, 0]] * 3
    assert take(dict(fps=16), [0], 3, listed=("fps",)) == dict(fps=16)

    whole = join([(part["x"],), ([clips[1]],)], [[2, 0], [1]], 3, listed=True)
    assert isinstance(whole, tuple) and all(a is b for a, b in zip(whole[0], clips, strict=True))
    x = torch.randn(3, 2)
    assert same(join([[x[:2]], [x[2:]]], [[0, 1], [2]], 3, listed=True), [x]), "a list that is not as long"


def test_a_row_a_video():
    """Samplers that repeat what both guidance halves share leave that to the model: a mask has half the rows."""
    x, mask = torch.randn(6, 4), torch.randn(3, 5)
    for videos, rows in (([1], [1, 4]), ([0, 2], [0, 2, 3, 5])):
        part = take(dict(x=x, mask=mask, fps=[8, 16, 24]), rows, 6, listed=("fps",), videos=3)
        assert torch.equal(part["x"], x[rows]) and torch.equal(part["mask"], mask[videos])
        assert part["fps"] == [(8, 16, 24)[video] for video in videos]
    assert take(dict(mask=mask), [1, 4], 6)["mask"] is mask


@pytest.mark.parametrize(
    "outputs, message",
    [
        ((torch.ones(2, 3), torch.ones(2, 3)), r"output of 1 samples has shape \(2, 3\)"),
        ((torch.ones(4, 3), torch.ones(2, 3)), r"output of 2 samples has shape \(4, 3\)"),  # frames among the samples
        (((torch.ones(2, 3),), (torch.ones(1, 4),)), r"output\.0 of 1 samples has shape \(1, 4\)"),
        ((torch.ones(2), torch.ones(1).half()), "output of 1 samples .* torch.float16, expected .* torch.float32"),
        ((torch.ones(2), None), "output is of several kinds: Tensor, NoneType"),
        ((dict(a=1), dict(b=1)), r"output has items \['a'\] and \['b'\]"),
        (([torch.ones(2)], [torch.ones(1)] * 2), "output has items"),
        ((dict(steps=3), dict(steps=4)), r"output\.steps has the values 3 and 4"),
    ],
)
def test_parts_that_do_not_fit(outputs, message):
    with pytest.raises(ValueError, match=f"join: {message}"):
        join(outputs, [[0, 2], [1]], 3)


@pytest.mark.parametrize("rows", [[[0, 1]], [[0, 1], [1, 2]], [[0], [2]], [[0, 1, 2]]])
def test_samples_are_in_one_part_each(rows):
    with pytest.raises(ValueError, match="join: expected the 3 samples in 2 parts"):
        join([torch.ones(1), torch.ones(1)], rows, 3)


def several(name: str, batch: int) -> dict:
    """A forward's arguments for that many samples, no two alike."""
    tiny, stack = MODELS[name], STACKS[name]
    size = len(tiny.inputs()[stack.input])
    inputs = [tiny.inputs(seed, timestep=900.0 - 100 * seed) for seed in range(-(-batch // size))]
    rows = [range(size * seed, size * (seed + 1)) for seed in range(len(inputs))]
    whole = dict(inputs[0])
    for argument, first in whole.items():
        if argument in stack.listed:
            whole[argument] = first * len(inputs)
        elif argument not in (*stack.shared, "ofs"):  # one for all samples
            whole[argument] = join([each[argument] for each in inputs], rows, size * len(inputs))
    return take(whole, range(batch), size * len(inputs), stack.shared, stack.listed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BATCHED)
@torch.no_grad()
def test_models_in_parts(name):
    """As many samples as there are frames, axes, tensors in a list, among others: nothing else is taken for them."""
    model, stack = MODELS[name].model(), STACKS[name]
    for batch, rows in ((2, [[1], [0]]), (3, [[0, 2], [1]]), (4, [[0, 3, 1], [2]]), (4, [[1, 3], [0, 2]])):
        arguments = several(name, batch)
        in_parts(model, arguments, batch, rows, stack, TOLERANCE.get(name, 1e-5))


@pytest.mark.parametrize("name", PAPER)
@torch.no_grad()
def test_papers_models_in_parts(name):
    model = PAPER[name][0]()
    for batch, rows in ((3, [[0, 2], [1]]), (4, [[1, 3], [0, 2]]), (5, [[4, 0, 1], [2, 3]])):
        in_parts(model, PAPER[name][1](batch), batch, rows, stack_of(model))


def in_parts(model, arguments, batch: int, rows: list[list[int]], stack, tolerance: float = 1e-5):
    whole = model(**arguments)
    joined = join([model(**take(arguments, part, batch, stack.shared, stack.listed)) for part in rows], rows, batch)
    assert type(joined) is type(whole)
    for a, b in zip(tensors(joined), tensors(whole), strict=True):
        assert (a[0] - a[1]).abs().max() > 1e-3, "the samples differ"
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)

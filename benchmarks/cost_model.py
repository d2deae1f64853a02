"""What a denoising step costs by count, and what the runs of `end_to_end.py` should take: docs/end_to_end.md.

    python benchmarks/cost_model.py     writes it, and benchmarks/results/counts.json

Multiplications are counted by formula, from a model's sizes; the tests hold the formulas to PyTorch's own counter.
What else eager PyTorch reads and writes is counted operation by operation, on tensors without memory.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from importlib import metadata

import torch
from architectures import (
    COGVIDEOX,
    HUNYUAN,
    LATTE,
    LATTE_T2V,
    LTX,
    ROOT,
    ROWS,
    STDIT3,
    WAN,
    Architecture,
    Row,
    Video,
)  # fmt: skip
from contenders import CONTENDERS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from adacache_triton.models import described

PATH, COUNTS = ROOT / "docs/end_to_end.md", ROOT / "benchmarks/results/counts.json"
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINNED = {name: re.findall(rf"^{name}==([\d.]+)", CONSTRAINTS, re.MULTILINE)[-1] for name in ("torch", "diffusers")}
HALF = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Linear:
    """rows x inputs times inputs x outputs; several of the same rows and inputs count as one."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs

    @property
    def bytes(self) -> int:
        return HALF * (self.rows * (self.inputs + self.outputs) + self.inputs * self.outputs)


@dataclass(frozen=True)
class Attention:
    """Queries x keys of so many sequences, over all heads: Q K^T, then times V."""

    sequences: int
    queries: int
    keys: int
    heads: int
    width: int  # of a head

    @property
    def flops(self) -> int:
        return 4 * self.sequences * self.queries * self.keys * self.heads * self.width

    @property
    def tiled(self) -> int:
        """What a fused kernel does: whole tiles of queries and keys, heads padded."""
        q, k, d = (-(-n // tile) * tile for n, tile in zip((self.queries, self.keys, self.width), TILE))
        return 4 * self.sequences * q * k * self.heads * d


TILE = 128, 64, 32  # queries, keys, channels: FlashAttention-2's for heads of 64 to 128
Part = tuple[int, Linear | Attention]  # how many of it


@dataclass(frozen=True)
class Work:
    """Multiplications of one call of a transformer: in its blocks, and outside of them."""

    blocks: tuple[Part, ...]
    outside: tuple[Part, ...]


def flops(parts: Iterable[Part], kind: type = object) -> int:
    return sum(count * part.flops for count, part in parts if isinstance(part, kind))


def text_to(width: int, inputs: int, rows: int) -> list[Part]:
    """Two layers of a caption."""
    return [(1, Linear(rows, inputs, width)), (1, Linear(rows, width, width))]


def stdit3(c, v: Video, samples: int) -> Work:
    width, heads, tokens = c["width"], c["heads"], v.frames * (v.height // 2) * (v.width // 2)
    rows, text, frame = samples * tokens, samples * v.text, tokens // v.frames
    each = [
        (1, Linear(rows, width, 14 * width)),  # q, k, v and out; q and out of the text's attention; MLP
        (1, Linear(text, width, 2 * width)),
        (1, Attention(samples, tokens, v.text, heads, width // heads)),
    ]
    spatial = Attention(samples * v.frames, frame, frame, heads, width // heads)
    temporal = Attention(samples * frame, v.frames, v.frames, heads, width // heads)
    blocks = [(2 * c["depth"] * n, part) for n, part in each] + [(c["depth"], part) for part in (spatial, temporal)]
    patch, t = 4 * c["channels"], [Linear(samples, 16, width), Linear(samples, width, 7 * width)]
    return Work(tuple(blocks), ((2, Linear(rows, patch, width)), *((1, part) for part in t)))


def latte_blocks(layers: int, width: int, heads: int, v: Video, samples: int) -> list[Part]:
    frame = (v.height // 2) * (v.width // 2)
    rows, text = samples * v.frames * frame, samples * v.frames * v.text  # a copy of the text a frame
    parts = [
        Linear(rows, width, 26 * width),  # two attentions, two MLPs, q and out of the text's attention
        Linear(text, width, 2 * width),
        Attention(samples * v.frames, frame, frame, heads, width // heads),
        Attention(samples * v.frames, frame, v.text, heads, width // heads),
        Attention(samples * frame, v.frames, v.frames, heads, width // heads),
    ]
    return [(layers, part) for part in parts]


def latte_t2v(c, v: Video, samples: int) -> Work:
    width, rows = c["width"], samples * v.frames * v.height * v.width // 4
    outside = [
        Linear(rows, 4 * c["channels"], width), Linear(rows, width, 8 * c["channels"]),
        Linear(samples, 16, width), Linear(samples, width, 7 * width), Linear(samples * v.text, 8, width),
    ]  # fmt: skip
    blocks = latte_blocks(c["num_layers"], width, c["heads"], v, samples)
    return Work(tuple(blocks), tuple((1, part) for part in outside))


def latte(c, v: Video, samples: int) -> Work:
    heads, width = c["num_attention_heads"], c["num_attention_heads"] * c["attention_head_dim"]
    rows = samples * v.frames * v.height * v.width // 4
    outside = [
        (1, Linear(rows, 4 * c["in_channels"], width)), (1, Linear(rows, width, 4 * c["out_channels"])),
        (1, Linear(samples, 256, width)), (1, Linear(samples, width, 7 * width)),
        *text_to(width, c["caption_channels"], samples * v.text),
    ]  # fmt: skip
    return Work(tuple(latte_blocks(c["num_layers"], width, heads, v, samples)), tuple(outside))


def cogvideox(c, v: Video, samples: int) -> Work:
    heads, head, t = c["num_attention_heads"], c["attention_head_dim"], c["time_embed_dim"]
    width, tokens = heads * head, v.frames * (v.height // 2) * (v.width // 2)
    block = [
        Linear(samples * (tokens + v.text), width, 12 * width),
        Linear(samples, t, 12 * width),  # modulation
        Attention(samples, tokens + v.text, tokens + v.text, heads, head),
    ]
    outside = [
        Linear(samples * tokens, 4 * c["in_channels"], width), Linear(samples * tokens, width, 4 * c["out_channels"]),
        Linear(samples * v.text, c["text_embed_dim"], width), Linear(samples, width, t), Linear(samples, t, t),
        Linear(samples, t, 2 * width),
    ]  # fmt: skip
    return Work(tuple((c["num_layers"], part) for part in block), tuple((1, part) for part in outside))


def wan(c, v: Video, samples: int) -> Work:
    heads, head = c["num_attention_heads"], c["attention_head_dim"]
    width, tokens = heads * head, v.frames * (v.height // 2) * (v.width // 2)
    rows, text = samples * tokens, samples * v.text
    block = [
        Linear(rows, width, 6 * width + 2 * c["ffn_dim"]),
        Linear(text, width, 2 * width),
        Attention(samples, tokens, tokens, heads, head),
        Attention(samples, tokens, v.text, heads, head),
    ]
    outside = [
        (1, Linear(rows, 4 * c["in_channels"], width)), (1, Linear(rows, width, 4 * c["out_channels"])),
        (1, Linear(samples, c["freq_dim"], width)), (1, Linear(samples, width, 7 * width)),
        *text_to(width, c["text_dim"], text),
    ]  # fmt: skip
    return Work(tuple((c["num_layers"], part) for part in block), tuple(outside))


def ltx(c, v: Video, samples: int) -> Work:
    heads, head, tokens = c["num_attention_heads"], c["attention_head_dim"], v.frames * v.height * v.width
    width, rows, text = heads * head, samples * tokens, samples * v.text
    block = [
        Linear(rows, width, 14 * width),
        Linear(text, c["cross_attention_dim"], 2 * width),
        Attention(samples, tokens, tokens, heads, head),
        Attention(samples, tokens, v.text, heads, head),
    ]
    outside = [
        (1, Linear(rows, c["in_channels"], width)), (1, Linear(rows, width, c["out_channels"])),
        (1, Linear(samples, 256, width)), (1, Linear(samples, width, 7 * width)),
        *text_to(width, c["caption_channels"], text),
    ]  # fmt: skip
    return Work(tuple((c["num_layers"], part) for part in block), tuple(outside))


def hunyuan(c, v: Video, samples: int) -> Work:
    heads, head = c["num_attention_heads"], c["attention_head_dim"]
    width, tokens = heads * head, v.frames * (v.height // 2) * (v.width // 2)
    both, text = samples * (tokens + v.text), samples * v.text
    joint = Attention(samples, tokens + v.text, tokens + v.text, heads, head)
    dual = [Linear(both, width, 12 * width), Linear(samples, width, 12 * width), joint]
    single = [Linear(both, width, 12 * width), Linear(samples, width, 3 * width), joint]
    embedded = [Linear(samples, 256, width), Linear(samples, width, width)]  # of a timestep, and of the guidance
    refiner = [Linear(text, width, 12 * width), Linear(samples, width, 2 * width)]
    refiner.append(Attention(samples, v.text, v.text, heads, head))
    outside = [
        (1, Linear(samples * tokens, 4 * c["in_channels"], width)),
        (1, Linear(samples * tokens, width, 4 * c["out_channels"])),
        *((3, part) for part in embedded),  # the refiner has a timestep of its own
        *text_to(width, c["pooled_projection_dim"], samples),
        *text_to(width, c["text_embed_dim"], samples),
        (1, Linear(text, c["text_embed_dim"], width)),
        *((c["num_refiner_layers"], part) for part in refiner),
        (1, Linear(samples, width, 2 * width)),
    ]
    blocks = [(c["num_layers"], p) for p in dual] + [(c["num_single_layers"], p) for p in single]
    return Work(tuple(blocks), tuple(outside))


FORMULAS: dict[Architecture, Callable[..., Work]] = {
    STDIT3: stdit3, LATTE_T2V: latte_t2v, LATTE: latte, COGVIDEOX: cogvideox, WAN: wan, LTX: ltx, HUNYUAN: hunyuan,
}  # fmt: skip


def work(row: Row) -> Work:
    """Of one call."""
    return FORMULAS[row.architecture](row.architecture.config, row.video, row.samples)


@dataclass(frozen=True)
class Moved:
    """What eager PyTorch does beside multiplications and attention, and how many operations it starts in all."""

    bytes: float
    operations: float

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.bytes + other.bytes, self.operations + other.operations)

    def __mul__(self, times: float) -> Moved:
        return Moved(times * self.bytes, times * self.operations)


MULTIPLICATIONS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}
NOT_RUN = {"empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "detach", "lift_fresh"}


class Counter(TorchDispatchMode):
    """Counts bytes of inputs and outputs of every operation that is neither a view nor a multiplication."""

    def __init__(self):
        super().__init__()
        self.moved = Moved(0, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        aliases = [returned.alias_info for returned in func._schema.returns]
        view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        if not view and name not in NOT_RUN:
            tensors = [t for t in tree_iter((args, kwargs, result)) if isinstance(t, Tensor)]
            self.moved += Moved(0 if name in MULTIPLICATIONS else sum(map(_bytes, tensors)), 1)
        return result


class FusedAttention(TorchFunctionMode):
    """On tensors without memory PyTorch would take attention apart; on a GPU it is one kernel."""

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, *_, value = args if len(args) > 2 else (kwargs["query"], kwargs["value"])
        self.counter.moved += Moved(0, 1)
        return query.new_empty(*query.shape[:-1], value.shape[-1])


def _bytes(tensor: Tensor) -> int:
    """Of its elements, once where it repeats them."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride()) if stride)
    return tensor.element_size() * math.prod(sizes)


@dataclass(frozen=True)
class Counted:
    """Of a call: operations in the blocks and between them, and outside; and the model's bytes."""

    blocks: Moved
    outside: Moved
    weights: float

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.blocks + other.blocks, self.outside + other.outside, self.weights + other.weights)

    def __mul__(self, times: float) -> Counted:
        return Counted(self.blocks * times, self.outside * times, self.weights * times)


@functools.cache
def counted(row: Row) -> Counted:
    """What was counted last."""
    blocks, outside, weights = json.loads(COUNTS.read_text())[row.name]
    return Counted(Moved(*blocks), Moved(*outside), weights)


def count(row: Row) -> Counted:
    """From a model with one block a list, and from models with one more: a list's blocks are alike."""
    architecture = row.architecture
    few = dict.fromkeys(architecture.depths, 1)
    total = first = _count(row, few)
    for name in architecture.depths:
        total += (_count(row, few | {name: 2}) + first * -1) * (architecture.config[name] - 1)
    return total


def _count(row: Row, depths: dict[str, int]) -> Counted:
    architecture, stack = row.architecture, described(row.architecture.kind)
    config = {**architecture.config, **depths}
    model = architecture.build("meta", torch.bfloat16, **depths)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    noise = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    arguments = {
        stack.input: noise(row.samples, *architecture.latents(config, row.video)),
        stack.timestep: torch.empty(row.samples, device="meta"),
        **architecture.condition(config, row.video, row.samples, noise),
    }
    moved = []
    for emptied in (False, True):
        if emptied:
            for path in stack.lists:
                setattr(model, path, nn.ModuleList())
        with torch.no_grad(), Counter() as counter, FusedAttention(counter):
            model(**arguments)
        moved.append(counter.moved)
    return Counted(moved[0] + moved[1] * -1, moved[1], weights)


@dataclass(frozen=True)
class Chip:
    """Peak dense bfloat16 FLOP/s and bytes/s by the data sheet, and the share of the peak that attention reaches."""

    name: str
    flops: float
    bandwidth: float
    attention: float


# Shares that are assumed, not measured: of a linear layer; of a copy (4.3 of an H200's 4.8 TB/s have been measured);
# of fused attention, FlashAttention-2's on an A100, and on Hopper between its 0.35 and what cuDNN's reaches.
LINEAR, MEMORY = 0.75, 0.9
CHIPS = (
    Chip("A100", 312e12, 2.04e12, 0.6),
    Chip("H100", 989e12, 3.35e12, 0.45),
    Chip("H200", 989e12, 4.8e12, 0.45),
)
OPERATION = 8e-6  # seconds of the host to start one from Python
HOOKS = 1e-4  # seconds of the host that a reused step adds: benchmarks/results/step_cost.csv
# Rows on which other packages' caches run; on the others they raise.
PEERS = ("wan-1.3b", "cogvideox-2b", "ltx", "hunyuan-720p")


def on_device(chip: Chip, parts: Iterable[Part], moved: Moved) -> float:
    """Seconds, one after the other."""
    memory = MEMORY * chip.bandwidth
    total = moved.bytes / memory
    for count, part in parts:
        if isinstance(part, Linear):
            total += count * max(part.flops / (LINEAR * chip.flops), part.bytes / memory)
        else:
            total += count * part.tiled / (chip.attention * chip.flops)
    return total


def on_host(moved: Moved) -> float:
    return OPERATION * moved.operations


class Stream:
    """The hidden state that goes through a row's blocks, in one call; and what caches keep of it, in all calls."""

    def __init__(self, row: Row, config=None, video: Video | None = None):
        architecture, video = row.architecture, video or row.video
        config = config or architecture.config
        width = config.get("width") or config["num_attention_heads"] * config["attention_head_dim"]
        patch = 1 if architecture is LTX else 4
        self.row, self.blocks = row, {name: config[name] for name in architecture.depths}
        self.tokens = video.frames * video.height * video.width // patch
        self.bytes = HALF * row.samples * self.tokens * width
        self.beside = HALF * row.samples * video.text * width  # text that goes through the blocks, too
        self.exit = 2 if architecture is WAN else 1  # times as wide at the stack's exit: float32

    @property
    def count(self) -> int:
        """Blocks in all lists; a depth is that of several lists, where there are more of these."""
        lists = len(described(self.row.architecture.kind).lists)
        return sum(self.blocks.values()) * lists // len(self.blocks)

    @property
    def kept(self) -> int:
        """Bytes: the stack's residual and the probe's."""
        return 2 * self.row.calls * self.bytes

    @property
    def kept_by_released(self) -> int:
        """Two residuals a block, or one where a block adds attention and MLP together, and one of the text."""
        architecture = self.row.architecture
        residuals = 2 * self.count - (self.blocks["num_single_layers"] if architecture is HUNYUAN else 0)
        of_text = self.count if architecture in (COGVIDEOX, HUNYUAN) else 0
        return self.row.calls * (residuals * self.bytes + of_text * self.beside)

    @property
    def keep(self) -> int:
        """Bytes moved to keep the stack's residual, in one call: the stream's end and beginning, and the residual."""
        return (self.exit + 2) * self.bytes

    @property
    def reuse(self) -> int:
        return (2 * self.exit + 1) * self.bytes

    @property
    def decision(self) -> int:
        """The probe's residual made by a subtraction, then read once beside the one before it."""
        made = 3 if self.exit == 1 else 7  # a float32 difference, then rounded
        return (made + 2) * self.bytes


@dataclass(frozen=True)
class Predicted:
    """Seconds of a row on a chip: of steps, and of loops by contender; what computed and reused steps are bound by."""

    row: Row
    chip: Chip
    uncached: float
    floor: float
    decision: float
    steps: dict[str, tuple[float, float]]  # computed, reused
    bound: tuple[str, str]

    def loop(self, name: str) -> float:
        computed, reused = self.steps[name]
        count = len(self.row.schedule)
        return count * computed + (self.row.steps - count) * reused

    def speedup(self, name: str) -> float:
        return self.row.steps * self.uncached / self.loop(name)

    def share(self, name: str) -> float:
        return self.speedup(name) / self.row.ideal


ADACACHE, FIXED, RELEASED, FIRST_BLOCK, CACHE_DIT = (kind.name for kind in CONTENDERS[1:])


@functools.cache
def predicted(row: Row, chip: Chip) -> Predicted:
    count, stream, multiplied = counted(row), Stream(row), work(row)
    memory = MEMORY * chip.bandwidth
    passes = stream.bytes / memory
    everything, outside = count.blocks + count.outside, count.outside
    device = on_device(chip, (*multiplied.blocks, *multiplied.outside), everything)
    uncached = max(device, on_host(everything))
    device_floor = on_device(chip, multiplied.outside, outside)
    floor = max(device_floor, on_host(outside))
    one = (uncached - floor) / stream.count
    keep, decision = stream.keep / memory, stream.decision / memory
    device_reused, host_reused = device_floor + stream.reuse / memory, on_host(outside) + OPERATION + HOOKS
    reused = max(device_reused, host_reused)
    bound = ("GPU" if device == uncached else "host"), ("GPU" if device_reused == reused else "host")
    fixed = uncached + keep
    # The released code reads a residual eleven times to decide, and adds two residuals a block to reuse them. Where
    # nothing was released, a computed block pays two subtractions.
    extra = (3 if row.architecture is STDIT3 else 6) * stream.count * passes + 11 * passes
    steps = {
        ADACACHE: (fixed + decision, reused),
        FIXED: (fixed, reused),
        RELEASED: (uncached + extra, floor + 6 * stream.count * passes),
    }
    if row.name in PEERS:
        # Subtract, compare in nine passes, add or subtract. Where there are two lists, cache-dit has one cache a list.
        steps[FIRST_BLOCK] = (uncached + 15 * passes, floor + one + 15 * passes)
        lists = len(described(row.architecture.kind).lists)
        steps[CACHE_DIT] = (uncached + 6 * lists * passes, floor + lists * (one + 6 * passes))
    per_step = {name: (row.calls * computed, row.calls * again) for name, (computed, again) in steps.items()}
    return Predicted(row, chip, row.calls * uncached, row.calls * floor, row.calls * decision, per_step, bound)


HEAD = f"""# End to end, by count

Written by `python benchmarks/cost_model.py` with torch {PINNED["torch"]} and diffusers {PINNED["diffusers"]}. What
`benchmarks/end_to_end.py` times on a GPU, and what it should find there; nothing on this page is measured.

## The runs

Models at full size with random weights in bfloat16: the classes of diffusers, and for `STDiT3` and `LatteT2V` the
interface doubles of `tests/support/doubles`. Their blocks multiply as the originals' do; the first is without norms of
queries and keys and without rotary embeddings, the second without masks. Guidance comes in one batch of two, in two
calls, or not at all. Schedules are

- a trace of the released rule, recorded on made residuals: `tests/data/decisions.json`; or
- `typical(preset, steps, computed)`: what an official codebook computes where the residual turns by an angle of
  speed * (4 (u - 1/2)^3 + 1/2), fast at both ends of a run and slowly in its middle, as in those traces, 13 of 15 of
  which (those without MoReg, in float32) come out step by step. The speed is the least that gives the count, the count
  the most that the published speed-up of the whole pipeline allows.

No schedule of a real video was published. What is timed depends on the count of computed steps, hardly on which.

"""
RUN = ("`end_to_end.py`", "run", "blocks", "tokens a call", "samples x calls", "computed", "ideal", "from", "steps")

WORK = f"""
## A step

All calls of a step together. TFLOP, and GB of 10^9 bytes.

- **linear, attention**: multiplications of the blocks by formula, 2 x rows x inputs x outputs of a linear layer and
  4 x queries x keys x width of an attention; PyTorch's counter gives the same numbers. **tiled**: attention as a fused
  kernel runs it, in tiles of {TILE[0]} queries and {TILE[1]} keys, heads padded to a multiple of {TILE[2]} channels.
- **other**: bytes that eager PyTorch reads and writes in the blocks' norms, modulation, activations, rotary embeddings,
  sums and copies, one operation after the other; **operations**: how many it starts, multiplications included. Counted
  on tensors without memory.
- **outside**: the same of what runs outside of the blocks: a reused step, but for its one addition.
- **keep, reuse, decide**: bytes that this package moves.
- **kept**: by this package, two tensors a call; by the released code's way, two a block.

"""
COUNTED = (
    "", "linear TFLOP", "attention", "tiled", "other GB", "operations", "outside TFLOP", "GB", "operations", "keep GB",
    "reuse", "decide", "weights GB", "kept GB", "released", "times",
)  # fmt: skip

SHARES = ", ".join(f"{chip.attention:g} on an {chip.name}" for chip in CHIPS)
PREDICTION = f"""
## Predicted

    seconds = sum over linear layers of max(FLOP / ({LINEAR:g} peak), bytes / ({MEMORY:g} bandwidth))
            + tiled FLOP of attention / (share peak)
            + other bytes / ({MEMORY:g} bandwidth)

or the host's, where it takes longer: {1e6 * OPERATION:g} us an operation, and {1e6 * HOOKS:g} us for the hooks of a
reused step. Peaks and bandwidths are the data sheets'; the shares are assumed, that of attention is
{SHARES}. A computed step of this package also keeps the stack's residual and
decides. One of the released code's way takes eleven passes over a residual to decide, and a sum a block more (two
subtractions, where nothing was released for a model); a reused one, two additions a block. FirstBlockCache and
cache-dit run the first block on every step. *Bound by* is of computed and of reused steps; the decision's time is over
that of a computed step.

Targets on an H200: a reused step at most 1.05 times its floor, which is what runs outside of the blocks; a decision at
most 0.1% of a computed step; at least 98% of the ideal, and 4.7x on the first run; ahead of every other loop; at least
50 times less kept than by the released code's way.

"""
COLUMNS = (
    "", "", "without a cache, s a step", "computed s", "reused ms", "bound by", "of its floor", "decision",
    "loop s", "speed-up", "of the ideal", "released code's way", "FirstBlockCache", "cache-dit",
)  # fmt: skip

PUBLISHED = {"open-sora-720p": 419.60, "open-sora-480p": 54.02, "latte": 32.45, "open-sora-plan": 129.67}  # s, A100


def counts() -> str:
    """JSON: for each row bytes and operations of the blocks, the same outside, and the weights' bytes."""
    found = {row.name: count(row) for row in ROWS}
    lines = [json.dumps([astuple(c.blocks), astuple(c.outside), c.weights]) for c in found.values()]
    return "{\n" + ",\n".join(f'"{name}": {line}' for name, line in zip(found, lines)) + "\n}\n"


def document() -> str:
    parts = [HEAD, *_table(RUN, map(_run, ROWS), text=(0, 1, 7, 8)), WORK, *_table(COUNTED, map(_counted, ROWS))]
    guesses = [predicted(row, chip) for row in ROWS for chip in CHIPS]
    parts += [PREDICTION, *_table(COLUMNS, map(_predicted, guesses), text=(0, 1)), _doubts()]
    return "".join(parts)


def _doubts() -> str:
    published = [row for row in ROWS if row.name in PUBLISHED]
    slower = [PUBLISHED[row.name] / row.steps / predicted(row, CHIPS[0]).uncached for row in published]
    guesses = [predicted(row, CHIPS[-1]) for row in ROWS]
    over = [guess.steps[ADACACHE][1] / guess.floor for guess in guesses]
    reused = [(p.row.steps - len(p.row.schedule)) * p.steps[ADACACHE][1] / p.loop(ADACACHE) for p in guesses]
    return f"""
## What to expect of it

- **Faster than what was published.** On A100s the paper's pipelines without a cache took {min(slower):.1f} to
  {max(slower):.1f} times as long a step as predicted here, prompts and decoding included. In a slower model a reused
  step weighs less, so the shares of the ideal err on the low side.
- **A reused step against its floor**, predicted at {min(over):.2f} to {max(over):.2f} times on an H200, misses its
  target everywhere. The head reads and writes the hidden state a few times, and the addition takes three passes more,
  or, where the host is slower than the device, the hooks take their time; only fused with the head's first operation
  could it come close. All reused steps together are at most {max(reused):.1%} of a loop.
- **Kept.** The released code's way keeps two residuals a block: of 56 blocks 56 times as much as this package's two
  tensors, of 28 to 60 blocks of other kinds 28 to 40 times.
- **Attention with a mask**, HunyuanVideo's and that of LTX to the text, may not run on the fastest kernel.
- **The host.** A reused step takes the device a fraction of a millisecond to two, Python about as long to start it.
"""


def _run(row: Row) -> tuple[str, ...]:
    architecture, stream = row.architecture, Stream(row)
    blocks = " + ".join(str(n) for n in stream.blocks.values()) if len(stream.blocks) > 1 else str(stream.count)
    return (
        row.name, f"{architecture.model}, `{architecture.kind}`: {row.size}", blocks, f"{stream.tokens:,}",
        f"{row.samples} x {row.calls}", f"{len(row.schedule)} of {row.steps}", f"{row.ideal:.2f}x", row.source,
        " ".join(map(str, row.schedule)),
    )  # fmt: skip


def _counted(row: Row) -> tuple[str, ...]:
    blocks, outside, count, stream, calls = work(row).blocks, work(row).outside, counted(row), Stream(row), row.calls
    tiled = sum(n * part.tiled for n, part in blocks if isinstance(part, Attention))
    tera = (flops(blocks, Linear), flops(blocks, Attention), tiled)
    return (
        row.name, *(f"{calls * n / 1e12:,.1f}" for n in tera), f"{calls * count.blocks.bytes / 1e9:,.0f}",
        f"{calls * count.blocks.operations:,.0f}", f"{calls * flops(outside) / 1e12:.3f}",
        f"{calls * count.outside.bytes / 1e9:.2f}", f"{calls * count.outside.operations:.0f}",
        *(f"{calls * n / 1e9:.2f}" for n in (stream.keep, stream.reuse, stream.decision)), f"{count.weights / 1e9:.2f}",
        f"{stream.kept / 1e9:.2f}", f"{stream.kept_by_released / 1e9:.2f}",
        f"{stream.kept_by_released / stream.kept:.0f}",
    )  # fmt: skip


def _predicted(guess: Predicted) -> tuple[str, ...]:
    computed, reused = guess.steps[ADACACHE]
    ours = guess.loop(ADACACHE)
    others = (RELEASED, FIRST_BLOCK, CACHE_DIT)
    times = [f"{guess.loop(name) / ours:.2f}x" if name in guess.steps else "raises" for name in others]
    return (
        guess.row.name, guess.chip.name, f"{guess.uncached:.3f}", f"{computed:.3f}", f"{1e3 * reused:.2f}",
        ", ".join(guess.bound), f"{reused / guess.floor:.2f}x", f"{guess.decision / computed:.3%}", f"{ours:.2f}",
        f"{guess.speedup(ADACACHE):.2f}x", f"{guess.share(ADACACHE):.1%}", *times,
    )  # fmt: skip


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], text: tuple[int, ...] = (0,)) -> list[str]:
    rule = "".join("---|" if i in text else "--:|" for i in range(len(columns)))
    return [f"| {' | '.join(columns)} |\n|{rule}\n", *(f"| {' | '.join(cells)} |\n" for cells in rows)]


if __name__ == "__main__":
    found = {name: metadata.version(name).partition("+")[0] for name in PINNED}
    if found != PINNED:
        raise SystemExit(f"expected what constraints.txt pins, {PINNED}, got {found}")
    COUNTS.write_text(counts())
    PATH.write_text(document())

"""The bytes that the documentation promises are the bytes that the kernels load and store.

Counted in Triton's interpreter, by mask and address, so `test_interpreter.py` runs this file.
"""

import sys
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch
from kernel_cases import RULE, traffic

from adacache_triton.kernels import (
    METRICS,
    decide,
    gated_residual,
    initial_state,
    keep,
    relative_distance,
    residual_stats,
    reuse,
)

from .kernel_views import BACKEND, INTERPRETED, guarded, values

if not INTERPRETED:
    pytest.skip("counted where Triton interprets", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BATCH, FRAMES, TOKENS, CHANNELS = SHAPE = (2, 5, 3, 8)
PLANE = TOKENS * CHANNELS
BLOCK, TILES = 16, 2  # of a plane; the second tile is half empty
OPERATIONS = ("residual_stats", "gated_residual", "reuse", "keep")
STATS, GATED, REUSE, KEEP = (sys.modules[f"adacache_triton.kernels.{name}"] for name in OPERATIONS)


def tensor(dtype=FP32, layout="frame_major"):
    return guarded(values(SHAPE, 0), layout, dtype)


class Counter:
    """Bytes that kernels load and store, by the memory they lie in."""

    def __init__(self):
        self.loaded, self.stored = [], []  # an entry an access: addresses, bytes of an element

    @contextmanager
    def counting(self):
        def counted(name, accesses):
            access = getattr(InterpreterBuilder, name)

            def note(builder, pointers, *arguments):
                mask = next(a.data for a in arguments if a is not None and a.data.dtype == bool)
                accesses.append((pointers.data[mask], pointers.get_element_ty().primitive_bitwidth // 8))
                return access(builder, pointers, *arguments)

            return patch.object(InterpreterBuilder, name, note)

        with counted("create_masked_load", self.loaded), counted("create_masked_store", self.stored):
            yield

    def take(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Loaded from and stored to the storage of a tensor, and counted no more."""
        storage = tensor.untyped_storage()
        start, taken = storage.data_ptr(), []
        for accesses in (self.loaded, self.stored):
            mine = [(addresses >= start) & (addresses < start + storage.nbytes()) for addresses, _ in accesses]
            taken.append(sum(int(m.sum()) * size for m, (_, size) in zip(mine, accesses)))
            accesses[:] = [(addresses[~m], size) for m, (addresses, size) in zip(mine, accesses)]
        return tuple(taken)

    def left(self) -> tuple[int, int]:
        return tuple(sum(len(addresses) * size for addresses, size in a) for a in (self.loaded, self.stored))


def check(call, tensors, *, span=None, scalars=(), partials=0):
    """Hold the bytes that a call moves against `traffic`, tensor by tensor.

    Every program may read of the `scalars`; `partials` floats are written besides, and that is all.
    """
    counter = Counter()
    with counter.counting():
        call(backend=BACKEND)
    counted = {name: counter.take(tensor) for name, tensor in tensors.items()}
    assert counted == {name: (m.read, m.written) for name, m in traffic(call, span).items()}
    assert all(counter.take(scalar)[1] == 0 for scalar in scalars)
    assert counter.left() == (0, 4 * partials)


def launched(module, **fields):
    """The launch of a module's calls; four warps, of which the interpreter knows nothing."""
    return patch.object(module, "launch_for", return_value=module.Launch(block=BLOCK, warps=4, **fields))


@pytest.mark.parametrize("span", [FRAMES, 2])
@pytest.mark.parametrize("frame_strides", [(), (1,), (2,), (1, 3, FRAMES)])
@pytest.mark.parametrize("options", [{"refresh": True}, {"metric": "cosine"}], ids=str)
def test_residual_stats(options, frame_strides, span):
    new, old = tensor(BF16, "spatial_major"), tensor(FP32)
    call = partial(residual_stats, new, old, frame_strides=frame_strides, **options)
    columns = METRICS[options.get("metric", "l1")] + 2 * len(frame_strides)
    with launched(STATS, span=span):
        check(call, {"new": new, "old": old}, span=span, partials=BATCH * columns * TILES * -(-FRAMES // span))


def test_the_first_residual_is_read_alone():
    new = tensor(FP16)
    with launched(STATS, span=FRAMES):
        check(partial(residual_stats, new, frame_strides=(1,)), {"new": new}, partials=BATCH * 4 * TILES)


@pytest.mark.parametrize("refresh", [False, True])
def test_relative_distance(refresh):
    new, old = tensor(BF16), tensor(FP16)
    with launched(STATS, span=1):
        partials = BATCH * 2 * -(-FRAMES * PLANE // BLOCK)
        check(partial(relative_distance, new, old, refresh=refresh), {"new": new, "old": old}, partials=partials)


@pytest.mark.parametrize("per", [None, "sample", "frame", "token", "frame and token"])
@pytest.mark.parametrize(
    "span, into, options",
    [(FRAMES, "hidden", {}), (2, "out", {"frame_strides": (1, 3)}), (2, "out", {"measure": False})],
    ids=str,
)
def test_gated_residual(span, into, options, per):
    tensors = {name: tensor(BF16) for name in {"hidden", "kept", into}} | {"branch": tensor(BF16, "spatial_major")}
    gate = None
    if per is not None:
        sizes = BATCH, FRAMES if "frame" in per else 1, TOKENS if "token" in per else 1, CHANNELS
        gate = tensors["gate"] = values(sizes, 1)
    call = partial(
        gated_residual, tensors["hidden"], tensors["branch"], gate, tensors["kept"], out=tensors[into], **options
    )
    columns = 2 + 2 * len(options.get("frame_strides", ())) if options.get("measure", True) else 0
    with launched(GATED, span=span):
        check(call, tensors, span=span, partials=BATCH * columns * TILES * -(-FRAMES // span))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("into", ["hidden", "out"])
def test_reuse(into, count, per_sample):
    tensors = {"hidden": tensor(FP32, "token_range"), "out": tensor(FP32)}
    residuals = {f"residuals[{i}]": tensor(BF16, "frame_range") for i in range(count)}
    weights = torch.ones(*(BATCH, count) if per_sample else (count,))
    call = partial(reuse, tensors["hidden"], tuple(residuals.values()), weights, out=tensors[into])
    used = {name: tensors[name] for name in {"hidden", into}}
    with launched(REUSE):
        check(call, used | residuals, scalars=[weights])


@pytest.mark.parametrize("depth, length", [(depth, length) for depth in (1, 2, 3) for length in range(depth + 1)])
@pytest.mark.parametrize("span", [1, 3])
def test_keep(span, depth, length):
    output, input = tensor(FP32), tensor(FP32, "token_range")
    history = {f"history[{i}]": tensor(BF16) for i in range(length)}
    made = tensor(BF16)  # stands for the tensor by which a history grows
    tensors = {"output": output, "input": input} | history | ({"kept": made} if length < depth else {})
    ratio = torch.ones(BATCH)
    call = partial(keep, output, input, tuple(history.values()), depth=depth, ratio=ratio, dtype=BF16)
    partials = BATCH * 5 * -(-FRAMES * PLANE // (BLOCK * span))
    with launched(KEEP, span=span), patch.object(KEEP.torch, "empty_like", return_value=made):
        check(call, tensors, scalars=[ratio], partials=partials)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, about 0 / 0
@pytest.mark.parametrize("videos", [1, 2, 4])
def test_decide(videos):
    sums, state = torch.rand(4, 4), initial_state(videos)
    check(partial(decide, sums, state, RULE), {"sums": sums, "state": state})

"""Kernel runs under pytest-benchmark: `pytest benchmarks --benchmark-only`.

On a GPU at the shapes of real models, beside the released code's expressions in eager and compiled PyTorch and beside
what other caches run. Times are the device's, of calls replayed from a CUDA graph, over input sets that together are
three times the L2 cache, so that each call finds it cold. Before each round a large copy runs, which tells what
bandwidth the memory gives at that moment. On a CPU small shapes and the PyTorch backend, to show that it runs.

With `--benchmark-json FILE` the `extra_info` of each run is a row: `python benchmarks/kernel_rows.py FILE` keeps the
rows and draws them.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import partial

import machine
import numpy as np
import pytest
import torch
from kernel_cases import MODELS, SHAPES, Case, tensors_of, timed, traffic

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUNDS = 30 if CUDA else 3
GRAPH_SECONDS = 2e-3  # of work in a graph: the gaps between replays are small beside it


# What the released code, or somebody who writes the operation down in PyTorch, runs. Arguments as in the operations.


def residual_stats(new, old, frame_strides, refresh):
    """AdaCache's distance and motion score as it is released, and the refresh of the kept residual."""
    results = [(old - new).norm(p=1) / old.norm(p=1)]
    for s in frame_strides:
        later, earlier = new[:, s:], new[:, :-s]
        results.append((later - earlier).norm(p=1) / (later.norm(p=1) + earlier.norm(p=1)))
    old.copy_(new)
    return torch.stack(results)


def gated_residual(hidden, branch, gate, kept, frame_strides, out):
    residual = gate * branch
    return (hidden + residual).to(hidden.dtype), residual_stats(residual, kept, frame_strides, refresh=True)


def reuse(hidden, residuals, weights=None):
    if weights is None:
        return hidden + residuals[0]
    weights = weights.view(-1, weights.shape[-1], *[1] * (hidden.dim() - 1))
    return (hidden + sum(weights[:, i] * r for i, r in enumerate(residuals))).to(hidden.dtype)


def keep(output, input, history, depth, ratio, dtype):
    residual = (output - input).to(dtype)
    if depth == 1:
        return residual, residual.abs().sum()
    r1, r0 = history
    change, before = (residual - r1).flatten(1).float(), (r1 - r0).flatten(1).float()
    fit = (change * before).sum(1), before.square().sum(1)
    errors = change.abs().sum(1), (change - ratio[:, None] * before).abs().sum(1)
    return residual, torch.stack([*fit, *errors, residual.flatten(1).abs().sum(1, dtype=torch.float32)], 1)


def relative_distance(new, old):
    return (new - old).abs().mean() / old.abs().mean()


def decide(sums, state, rule):
    return released_rule(sums[:, 0].sum() / sums[:, 1].sum(), sums[:, 2].sum() / sums[:, 3].sum(), state, rule)


def decision(new, old, state, rule):
    return released_rule(*residual_stats(new, old, (1,), refresh=True), state, rule)


def released_rule(distance, score, state, rule):
    """AdaCache's rule as it is released: each comparison is one of the host's, which waits for the device."""
    step, previous_rate, previous_scale, _ = state[0]
    motion = rule.motion
    distance = distance / previous_rate
    if motion.window[0] <= step <= motion.window[1]:
        scale = (score / motion.scale) ** motion.power / motion.divisor
        distance = distance * (scale + (motion.gradient_weight * (scale - previous_scale) / previous_rate).abs())
    return next((rate for threshold, rate in zip(rule.thresholds, rule.rates) if distance < threshold), rule.rates[-1])


def teacache(new, old):
    """TeaCache's gate: the distance is taken to the host, to be put into a polynomial there."""
    return relative_distance(new, old).cpu().item()


def first_block_cache(new, old, threshold=0.1):
    """The gate of ParaAttention's first-block cache."""
    return ((old - new).abs().mean() / old.abs().mean()).item() < threshold


EAGER = {f.__name__: f for f in (residual_stats, gated_residual, reuse, keep, relative_distance, decide, decision)}
PEERS = {"TeaCache": teacache, "first-block cache": first_block_cache}
ON_HOST = {"decide", "decision", *PEERS}  # they read what the device made: no graph can hold that
COMPILED = {"torch.compile": None, "max-autotune": "max-autotune-no-cudagraphs"}


def contenders(operation: str) -> list[str]:
    compiled = COMPILED if CUDA and operation not in ON_HOST else ()
    return ["adacache-triton", "eager", *compiled, *(PEERS if operation == "relative_distance" else ())]


if not CUDA:
    SHAPES["tiny"] = (2, 4, 36, 64)
TIMED = timed(*MODELS) if CUDA else timed("tiny")
RUNS = [(case, contender) for case in TIMED for contender in contenders(case.operation)]


def contestant(operation: str, contender: str) -> Callable | None:
    """What runs instead of the operation, with the same arguments."""
    if contender == "adacache-triton":
        return None
    function = PEERS.get(contender) or EAGER[operation]
    if contender in COMPILED:
        return torch.compile(function, mode=COMPILED[contender], fullgraph=True, dynamic=False)
    return function


class Moment:
    """A place in the device's queue; the difference of two is the seconds between them."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


class PerCall(Moment):
    """The same over the number of calls between, as the timer of pytest-benchmark."""

    calls = 1

    def __sub__(self, earlier: Moment) -> float:
        return super().__sub__(earlier) / self.calls


def recorded(calls: list[Callable]) -> Callable:
    """Calls in a row as one CUDA graph, whose replay takes next to nothing of the host."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def in_a_row(calls: list[Callable]) -> Callable:
    def replay():
        for call in calls:
            call()

    return replay


def host_seconds(call: Callable) -> float:
    """Median time until a call returns, on a device that has nothing else to do."""
    seconds = []
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def launches(call: Callable) -> int:
    """Kernels and copies that a call starts on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@pytest.fixture(scope="session")
def where() -> dict:
    return machine.where()


@pytest.fixture(scope="session")
def copy() -> Callable:
    """A copy, on a GPU of 512 MiB."""
    source = torch.randn(2**27 if CUDA else 2**20, device=DEVICE)
    call = partial(torch.empty_like(source).copy_, source)
    call.bytes = 2 * source.nbytes
    return call


def call_of(case: Case, function: Callable | None) -> partial:
    """The operation with tensors of its own, or another function on such tensors."""
    call = case.bind(lambda *shape, dtype: torch.randn(shape, device=DEVICE, dtype=dtype))
    return call if function is None else partial(function, *call.args, **call.keywords)


def prepared(case: Case, function: Callable | None, size: int, graph: bool) -> tuple[Callable, dict]:
    """What a round runs on a GPU, and what the row says about it. `size` is the bytes of a call's tensors."""
    calls = [call_of(case, function)]
    calls[0]()  # compiles
    start = Moment()
    calls[0]()
    seconds = Moment() - start
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = min(1 + math.ceil(3 * cache / size), 64)
    calls += [call_of(case, function) for _ in range(sets - 1)]
    facts = {"launches": launches(calls[0]), "host_us": 1e6 * host_seconds(calls[0])}
    facts |= {"cold": sets * size >= 3 * cache, "graph": graph}
    PerCall.calls = max(sets, min(math.ceil(GRAPH_SECONDS / seconds), 500))
    row = list(itertools.islice(itertools.cycle(calls), PerCall.calls))
    for call in calls:  # warm: a graph can hold no compilation
        call()
    return recorded(row) if graph else in_a_row(row), facts


@pytest.mark.benchmark(timer=PerCall if CUDA else time.perf_counter)
@pytest.mark.parametrize("case, contender", RUNS, ids=str)
@torch.no_grad()
def test_kernel(benchmark, where, copy, case: Case, contender: str):
    torch._dynamo.reset()
    function = contestant(case.operation, contender)
    call = case.bind(partial(torch.empty, device="meta"))
    moved = traffic(call).values()
    if CUDA:
        torch.cuda.empty_cache()
        graph = contender == "adacache-triton" or not ON_HOST & {case.operation, contender}
        run, facts = prepared(case, function, sum(m.size for m in moved), graph)
    else:
        run, facts = call_of(case, function), {"launches": None, "host_us": None, "cold": False, "graph": False}
    copies = []
    moment = Moment if CUDA else time.perf_counter

    def copied():
        copy()  # the device is still at it when the second one is in its queue
        start = moment()
        copy()
        copies.append((start, moment()))

    benchmark.pedantic(run, setup=copied, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    low, median, high = np.percentile(benchmark.stats.stats.data, (20, 50, 80)) * 1e6
    benchmark.extra_info |= where | facts
    benchmark.extra_info |= {
        "operation": case.operation,
        "model": case.model,
        "what": case.what,
        "contender": contender,
        "shape": SHAPES[case.model],
        "dtype": "/".join(sorted({str(m.dtype)[6:] for m in tensors_of(call)})),
        "bytes": sum(m.floor for m in moved),
        "median_us": median,
        "p20_us": low,
        "p80_us": high,
        "copy_GBps": copy.bytes / np.median([end - start for start, end in copies]) / 1e9,
    }

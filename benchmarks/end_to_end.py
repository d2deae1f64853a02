"""Time a denoising loop at full size, with random weights: `python benchmarks/end_to_end.py ROW --out DIR`.

    python benchmarks/end_to_end.py                                  what rows there are, and what each takes
    python benchmarks/end_to_end.py latte --out DIR                  on the GPU
    python benchmarks/end_to_end.py latte --out DIR --compiled       with the blocks compiled one by one
    python benchmarks/end_to_end.py latte --out DIR --small          a small copy, on the CPU: that it runs

One call times one row: every contender of `contenders.py`, or some with compiled blocks. What each gives is a line of
DIR/ROW.jsonl, written when it is through; a call skips what is there, and stops where the next would not end within
`--seconds`. It returns 0 when nothing is left, 3 when it is to be called again, 1 where no cache, or this
package, failed. What another package raises is its result.

Times are the device's, by events between which nothing waits. A contender first takes seven steps, of which three are
computed, each on an idle device: that warms it up and tells the host's time. Then the whole loop runs, or, where it
would take longer than `--loop-seconds`, times of those steps are multiplied. Right before, and after unless a step
takes many seconds, steps without a cache are timed, against which its speed-up counts: clocks drift.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import machine
import torch
from architectures import BY_NAME, ROWS, Row
from contenders import COMPILED, CONTENDERS, AdaCache, Loop, NoCache
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FLOOR = "embedders and head"
FIRST, TRIED = 7, (1, 2, 5)  # steps, and the computed ones of them
REFERENCE_SECONDS = 3.0  # of steps without a cache, before and after each contender
LONG = 10.0  # seconds of a step; such a one is not timed more often than it must be
HOST_BOUND = 0.9  # of the device's time: where the host takes as much, the device waits for it
AGAIN = 3
ATTENTION = (
    (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION),
)


class Clock:
    """Marks in time: events on a GPU, the time itself on a CPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin, end) -> float:
        """Seconds."""
        if not self.cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def wait(self) -> None:
        """Until the device has nothing to do."""
        if self.cuda:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.cuda else None


@dataclass(frozen=True)
class Timed:
    """Steps of a run: seconds of each on the device and on the host, and of all; which were computed."""

    steps: list[float]
    host: list[float]
    loop: float
    computed: list[int]
    latents: Tensor

    def of(self, computed: bool, since: int = 3, host: bool = False) -> list[float]:
        """Of computed or reused steps; the first ones still warm up."""
        times = self.host if host else self.steps
        return [t for step, t in enumerate(times, 1) if step >= since and (step in self.computed) == computed]


def run(loop: Loop, contender: NoCache, clock: Clock, schedule: Sequence[int], upto: int, apart: bool) -> Timed:
    """A loop's first steps; `apart`: each begins on an idle device."""
    marks, host, latents = [], [], loop.latents
    contender.start(schedule)
    clock.wait()
    for step in range(1, upto + 1):
        if apart:
            clock.wait()
        begin, called = clock.mark(), time.perf_counter()
        contender.tell(step)
        latents = loop.step(latents, step)
        host.append(time.perf_counter() - called)
        marks.append((begin, clock.mark()))
    clock.wait()
    computed = contender.finish()
    steps = [clock.between(*pair) for pair in marks]
    return Timed(steps, host, clock.between(marks[0][0], marks[-1][1]), computed, latents)


class Bench:
    """A row's measurements.

    A line has, besides the row's facts, in seconds and bytes: `computed_s`, `reused_s` of a step, the median, with
    `..._host_s` until its call has returned on an idle device, and `..._bound`, which of the two that waits for;
    `decision_s` from before the probe's residual is made until its sums are sent, all calls of a step; `loop_s`, and
    how it was `timed`; `uncached_s` of a step without a cache, around it; `speedup`, and `share` of the ideal;
    `peak_bytes` allocated, weights included, and `kept_bytes`. What a decision costs is also `computed_s` over that of
    the fixed schedule, within the noise of two runs.
    """

    def __init__(self, row: Row, device: str, small: bool, loop_seconds: float, ends: float, backend: str):
        self.row, self.device, self.small, self.backend = row, device, small, backend
        self.loop_seconds, self.ends = loop_seconds, ends
        self.clock, self._loop, self._attention = Clock(torch.device(device)), None, None
        self._step_seconds: dict[bool, float] = {}  # of a step without a cache, by whether blocks are compiled

    @property
    def loop(self) -> Loop:
        if self._loop is None:
            self._loop = Loop(self.row, self.device, torch.bfloat16, self.small)
            self._weights = self._loop.weights_bytes
        return self._loop

    def forget(self) -> None:
        """The model, after a contender left it in an unknown state."""
        self._loop = None
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()

    def attention(self):
        """A context in which the fused attention that is fastest for this row is preferred."""
        if not self.clock.cuda:
            return nullcontext()
        if self._attention is None:
            seconds: dict[tuple, float] = {}
            for order in ATTENTION:
                with suppress(RuntimeError), sdpa_kernel(list(order), set_priority=True):
                    for _ in range(2):  # the first warms up
                        begin = self.clock.mark()
                        self.loop.step(self.loop.latents, 1)
                        seconds[order] = self.clock.between(begin, self.clock.mark())
                        if seconds[order] > LONG:
                            break
            self._attention = min(seconds, key=seconds.get)
            self._step_seconds.setdefault(False, seconds[self._attention])
        return sdpa_kernel(list(self._attention), set_priority=True)

    def reference(self, compiled: bool) -> float:
        """Seconds of a step without a cache, now."""

        def steps(count: int) -> float:
            return run(self.loop, NoCache(self.loop), self.clock, range(1, count + 1), count, apart=False).loop

        known = self._step_seconds.get(compiled)  # from the choice of the attention, if not from here
        if known is None or compiled:  # kernels are chosen, or compiled, maybe anew after a cache was there
            steps(1)
        known = known or steps(1)
        count = self._count(known)
        seconds = steps(count) / count
        self._step_seconds[compiled] = seconds
        return seconds

    def _count(self, step_seconds: float) -> int:
        return max(1, min(self.row.steps - 2, 20, int(REFERENCE_SECONDS / step_seconds)))

    def room(self, seconds: float) -> bool:
        """Whether so much fits the time that is left."""
        return time.monotonic() + seconds < self.ends

    def expected(self, compiled: bool) -> float:
        """Seconds that a contender takes, from what a step took before."""
        step = self._step_seconds.get(compiled) or self._step_seconds.get(False)
        if step is None:
            return 0.0
        whole = len(self.row.schedule) * step
        return 2 * REFERENCE_SECONDS + 5 * step + (whole if whole < self.loop_seconds else 0.0) + 60 * compiled

    @torch.no_grad()
    def floor(self) -> dict:
        """The embedders and the head alone: what no cache of blocks goes below."""
        with self.attention(), self.loop.emptied():
            apart = run(self.loop, NoCache(self.loop), self.clock, (), self.row.steps, apart=True)
            timed = run(self.loop, NoCache(self.loop), self.clock, (), self.row.steps, apart=False)
        host = statistics.median(apart.host), statistics.median(apart.steps)
        return {"reused_s": statistics.median(timed.steps), "reused_bound": bound(*host), "reused_host_s": host[0]}

    @torch.no_grad()
    def measure(self, kind: type[NoCache], compiled: bool) -> dict:
        row = self.row
        with ExitStack() as stack:
            stack.enter_context(self.attention())
            if compiled:
                stack.enter_context(self.loop.compiled(self.backend))
            before = self.reference(compiled)
            contender = kind(self.loop)
            try:
                result = self._race(contender, compiled)
            finally:
                contender.remove()
            after = self.reference(compiled) if before < LONG else None
        reference = before if after is None else (before + after) / 2
        result |= {"uncached_s": reference, "uncached_before_s": before, "uncached_after_s": after}
        result["speedup"] = row.steps * reference / result["loop_s"]
        result["share"] = result["speedup"] / (row.steps / result["computed"])
        return result

    def _race(self, contender: NoCache, compiled: bool) -> dict:
        row, clock, loop = self.row, self.clock, self.loop
        uncached = type(contender) is NoCache
        schedule = range(1, row.steps + 1) if uncached else row.schedule
        first, tried = FIRST, TRIED
        if uncached:  # as many as a reference has, behind two that warm up
            first = 2 + self._count(self._step_seconds[compiled])
            tried = range(1, first + 1)
        if type(contender) is AdaCache:
            contender.mark = clock.mark
        clock.reset_peak()
        timed = short = run(loop, contender, clock, tried, first, apart=True)
        check(contender, short.computed, tried)
        computed, reused = (statistics.median(short.of(kind) or [0.0]) for kind in (True, False))
        seconds, how = len(schedule) * computed + (row.steps - len(schedule)) * reused, f"{first} steps, multiplied"
        if seconds <= self.loop_seconds and self.room(seconds):
            clock.reset_peak()
            timed = run(loop, contender, clock, schedule, row.steps, apart=False)
            check(contender, timed.computed, schedule)
            seconds, how = timed.loop, "the loop"
        if not bool(torch.isfinite(timed.latents).all()):
            raise RuntimeError(f"{contender.name}: expected finite latents, got some that are not")
        result = {
            "computed": len(schedule), "loop_s": seconds, "timed": how, "peak_bytes": clock.peak_bytes,
            "kept_bytes": contender.kept_bytes, "decision_s": self._decisions(contender),
        }  # fmt: skip
        for name, kind in (("computed", True), ("reused", False)):
            if times := timed.of(kind):
                host = statistics.median(short.of(kind, host=True))
                result |= {
                    f"{name}_s": statistics.median(times),
                    f"{name}_host_s": host,
                    f"{name}_bound": bound(host, statistics.median(short.of(kind))),
                }
        return result

    def _decisions(self, contender: NoCache) -> float | None:
        """The device's median time of a step's measurements; the first has nothing to compare."""
        by_step: dict[int, float] = {}
        for step, begin, end in getattr(contender, "decisions", ()):
            by_step[step] = by_step.get(step, 0.0) + self.clock.between(begin, end)
        return statistics.median(list(by_step.values())[1:]) if len(by_step) > 1 else None

    def facts(self) -> dict:
        """What all rows of the file share."""
        row, order = self.row, self._attention
        return machine.where() | {
            "row": row.name, "model": row.architecture.model, "kind": row.architecture.kind, "size": row.size,
            "small": self.small, "steps": row.steps, "branches": row.branches, "calls": row.calls,
            "schedule": list(row.schedule), "source": row.source, "ideal": row.ideal, "dtype": "bfloat16",
            "weights_bytes": self._weights, "attention": order and order[0].name,
            "diffusers": version("diffusers"), "cache_dit": version("cache-dit"),
        }  # fmt: skip


def check(contender: NoCache, computed: Iterable[int], schedule: Iterable[int]) -> None:
    """A row whose contender did not compute what it was told says nothing."""
    if list(computed) != list(schedule):
        raise RuntimeError(f"{contender.name}: expected steps {list(schedule)} to be computed, got {list(computed)}")


def bound(host: float, device: float) -> str:
    """What a step on an idle device waits for."""
    return "host" if host >= HOST_BOUND * device else "GPU"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def parts(compiled: bool) -> dict[str, type[NoCache] | None]:
    """What a call times, in order, by name; None is the floor."""
    if compiled:
        return {f"{kind.name}, compiled": kind for kind in COMPILED}
    return {FLOOR: None} | {kind.name: kind for kind in CONTENDERS}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("row", nargs="?", choices=BY_NAME)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--seconds", type=float, default=500, help="this call is to end within")
    parser.add_argument("--loop-seconds", type=float, default=90, help="the longest loop that is run as a whole")
    parser.add_argument("--compiled", action="store_true", help="with blocks compiled one by one")
    parser.add_argument("--small", action="store_true", help="a small copy on the CPU")
    options = parser.parse_args(arguments)
    if options.row is None:
        for row in ROWS:
            print(f"{row.name:16}{row.title}; computed {len(row.schedule)}, ideal {row.ideal:.2f}x; {row.source}")
        return 0
    if not options.small and not torch.cuda.is_available():
        parser.error("no GPU is there: --small runs a small copy on the CPU")
    ends, file = time.monotonic() + options.seconds, options.out / f"{options.row}.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    there = {json.loads(line)["contender"] for line in lines}
    device, backend = ("cpu", "eager") if options.small else ("cuda", "inductor")
    bench = Bench(BY_NAME[options.row], device, options.small, options.loop_seconds, ends, backend)
    status = 0
    for name, kind in parts(options.compiled).items():
        if name in there:
            continue
        if not bench.room(bench.expected(options.compiled)):
            print(f"{name}: left for the next call")
            return status or AGAIN
        error, result = None, {}
        try:
            result = bench.floor() if kind is None else bench.measure(kind, options.compiled)
        except Exception as raised:  # another package's, or memory that does not suffice
            error = f"{type(raised).__name__}: {raised}".split("\n")[0][:300]
        if error is not None or (kind is not None and not kind.ours):
            bench.forget()
        print(f"{name}: {error or summary(result)}", flush=True)
        if error is not None and (kind is None or kind.ours):
            status = 1  # not written: to be tried again
            continue
        line = bench.facts() | {"contender": name, "compiled": options.compiled, "error": error} | result
        with file.open("a") as out:
            out.write(json.dumps({k: plain(v) for k, v in line.items()}) + "\n")
    return status


def summary(result: dict) -> str:
    if "loop_s" not in result:
        return f"{1e3 * result['reused_s']:.3f} ms a step"
    return f"{result['loop_s']:.2f} s a loop, {result['speedup']:.2f}x, {result['share']:.1%} of the ideal"


def plain(value):
    """A number that JSON has none for as None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())

"""Whether the GPU waits for the host: its queue around a decision, steps beside a busy host, and steps as CUDA graphs.

    python benchmarks/no_stall.py trace busy graphs     or some of them

On a GPU a Latte of the released size (28 pairs of blocks, width 1152, 16 latent frames of 64 x 64, bfloat16) with
random weights and guidance in one batch; rows go to `benchmarks/results/no_stall.csv`. On a CPU a tiny one, to show
that it runs; rows go where `--out` says.

trace   Three variants, each profiled for a few steps: the decision as it is made, one that the host reads at the probe
        as soon as it is sent, like the `.item()` of other caches (the same code but for that wait), and no cache. An
        idle time of the device counts where its queue was empty: the host launched what ran next only after all that
        was launched before had ended. Rows have the longest and the sum of those behind the probe, from one step to the
        next, and anywhere else. The profiler slows the host down; the device's own gaps between two kernels, about
        1 us, are not counted. `--traces` keeps the traces.
busy    Time of whole runs over their steps, for the same variants, beside processes that do nothing but count: none,
        one for each core, two for each. With rate 1 all three compute every step and differ by the decision alone; with
        rate 3 two steps of three are reused. Variants take turns, so that a noisy machine slows all of them.
graphs  Time of a step from an idle device to an idle device: of the model without a cache, of a computed step and of a
        reused one; eager, and compiled with CUDA graphs (`backend="cudagraphs"`, `mode="reduce-overhead"`), each graph
        captured before. `decision` is what a computed step takes beyond one without a cache: measuring, keeping and
        sending. Also for the package's embedded model, which is so small that launches are all that it waits for.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import machine
import numpy as np
import torch
from diffusers import LatteTransformer3DModel
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, apply_adacache, batch
from adacache_triton.readback import Readback
from adacache_triton.testbed.pipeline import EmbeddedPipeline

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RESULTS = Path(__file__).parent / "results/no_stall.csv"
LATTE = dict(
    attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
    norm_elementwise_affine=False, norm_eps=1e-6, in_channels=4, out_channels=4, patch_size=2,
)  # fmt: skip
SIZE = dict(
    num_layers=28, num_attention_heads=16, attention_head_dim=72, cross_attention_dim=1152, caption_channels=4096,
    sample_size=64, video_length=16,
)  # fmt: skip
TINY = dict(
    num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
    sample_size=8, video_length=3,
)  # fmt: skip
STEPS, ROUNDS, CALLS = (12, 5, 100) if CUDA else (6, 1, 2)


class Sent(Readback):
    """The reader as it is, whose part in a trace is marked."""

    def __init__(self, numbers, group=None):
        self.decides = numbers.shape[1] > 1  # else it is the check of what is kept
        with record_function("probe" if self.decides else "check"):
            super().__init__(numbers, group)


class ReadAtTheProbe(Sent):
    """The host waits for what a decision needs where it is sent."""

    def __init__(self, numbers, group=None):
        super().__init__(numbers, group)
        if self.decides:
            with record_function("probe"):
                self.row(0)


VARIANTS = {"asynchronous": Sent, "read at the probe": ReadAtTheProbe, "no cache": None}


def latte() -> nn.Module:
    torch.manual_seed(0)
    if not CUDA:
        return LatteTransformer3DModel(**LATTE, **TINY).eval()
    with torch.device("cuda"):
        return LatteTransformer3DModel(**LATTE, **SIZE).to("cuda", torch.bfloat16).eval()


def embedded() -> nn.Module:
    return EmbeddedPipeline.load().transformer.to(DEVICE)


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A video's latents, twice for guidance, and captions."""
    c = model.config
    shapes = {
        "hidden_states": (2, c.in_channels, c.video_length, c.sample_size, c.sample_size),
        "encoder_hidden_states": (2, 1 if c.caption_channels < 100 else 120, c.caption_channels),
    }
    return {name: torch.randn(shape, device=DEVICE, dtype=model.dtype) for name, shape in shapes.items()}


def every(rate: int, num_steps: int = STEPS) -> AdaCacheConfig:
    """Measures, motion too, and takes that rate whatever comes of it."""
    return AdaCacheConfig(Codebook((1e9,), (rate, 1)), MotionRegularization((1, num_steps)), num_steps)


@contextmanager
def cached(model: nn.Module, reader: type[Readback] | None, config: AdaCacheConfig) -> Iterator[None]:
    """One run under the cache, with that reader; without a reader, there is no cache."""
    if reader is None:
        yield
        return
    handle = apply_adacache(model, config)
    try:
        with mock.patch.object(batch, "Readback", reader), handle.run():
            yield
        reused = not all(step.computed for step in handle.report().steps)
        if reused != (config.codebook.rates[0] > 1):
            raise RuntimeError(f"expected rate {config.codebook.rates[0]}, got {handle.report()}")
    finally:
        handle.remove()


@torch.no_grad()
def denoise(model: nn.Module, reader: type[Readback] | None, rate: int) -> float:
    """A run from an idle device to an idle device: seconds a step."""
    call = inputs_of(model)
    latents = call.pop("hidden_states")[:1]
    timesteps = [torch.full((2,), 1000.0 - 80 * step, device=DEVICE) for step in range(STEPS)]
    with cached(model, reader, every(rate)):
        synchronize()
        start = time.perf_counter()
        for step, t in enumerate(timesteps, start=1):
            with record_function(f"step {step}"):
                velocity = model(torch.cat([latents] * 2), timestep=t, return_dict=False, **call)[0]
                uncond, cond = velocity.chunk(2)
                latents = latents - (uncond + 4 * (cond - uncond)) / STEPS
        synchronize()
        return (time.perf_counter() - start) / STEPS


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def gaps(events: Iterable[dict]) -> dict[str, list[float]]:
    """How long the device had nothing to do because its queue was empty, in us, by where that was.

    Args:
        events: of a trace in Chrome's format, times in us: the device's operations with the `correlation` of the calls
            that launched them, and on the host annotations "step ..." and "probe".

    Returns:
        idle times "behind the probe", before what was launched next; "between steps"; "elsewhere".
    """
    spans, launches, operations = [], {}, []
    for event in events:
        category, correlation = event.get("cat"), event.get("args", {}).get("correlation")
        if category == "user_annotation":
            spans.append((event["name"], event["ts"], event["ts"] + event["dur"]))
        elif category in ("cuda_runtime", "cuda_driver") and correlation is not None:
            launches[correlation] = event["ts"]
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            operations.append((event["ts"], event["ts"] + event["dur"], correlation))

    def launched_in(operation: tuple, prefix: str) -> str | None:
        moment = launches.get(operation[2], -1.0)
        return next((name for name, start, end in spans if name.startswith(prefix) and start <= moment <= end), None)

    found = {"behind the probe": [], "between steps": [], "elsewhere": []}
    last = None  # of the operations so far, that which ended last
    for operation in sorted(operations):
        if last is not None and min(operation[0], launches.get(operation[2], 0.0)) > last[1]:
            if launched_in(last, "probe") and not launched_in(operation, "probe"):
                place = "behind the probe"
            elif launched_in(last, "step") != launched_in(operation, "step"):
                place = "between steps"
            else:
                place = "elsewhere"
            found[place].append(operation[0] - last[1])
        if last is None or operation[1] > last[1]:
            last = operation
    return found


def row(values: Iterable[float], unit: str, **facts) -> dict:
    """What was measured, `facts` in the columns before."""
    values, columns = np.array(list(values)), dict.fromkeys(("model", "variant", "rate", "spinning", "what"))
    numbers = {"longest": values.max() if values.size else 0, "total": values.sum(), "count": values.size}
    if values.size:
        low, median, high = np.percentile(values, (20, 50, 80))
        numbers |= {"median": median, "p20": low, "p80": high}
    order = ("median", "p20", "p80", "longest", "total", "count")
    return columns | facts | {"unit": unit} | {name: _rounded(numbers.get(name)) for name in order}


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")


def trace(folder: Path | None) -> Iterator[dict]:
    model, activities = latte(), [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    for variant, reader in VARIANTS.items():
        denoise(model, reader, 3)  # Triton compiles
        for _ in range(2):  # the profiler's own first time takes longer
            with profile(activities=activities) as profiler:
                denoise(model, reader, 3)
        with tempfile.TemporaryDirectory() as temporary:
            path = (folder or Path(temporary)) / f"trace-{variant.replace(' ', '-')}.json.gz"
            profiler.export_chrome_trace(str(path))
            with gzip.open(path, "rt") as file:
                found = gaps(json.load(file)["traceEvents"])
        for place, idle in found.items():
            if reader is not None or place != "behind the probe":
                yield row(idle, "us", model="latte", variant=variant, rate=reader and 3, what=f"empty {place}")


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Beside so many processes that only count."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def busy() -> Iterator[dict]:
    model, cores = latte(), len(os.sched_getaffinity(0))
    turns = [(variant, rate) for variant, reader in VARIANTS.items() for rate in (1, 3) if reader or rate == 1]
    for count in (0, cores, 2 * cores) if CUDA else (0, 1):
        seconds = {turn: [] for turn in turns}
        with spinning(count):
            for round in range(1 + ROUNDS):
                for variant, rate in turns:
                    took = denoise(model, VARIANTS[variant], rate)
                    if round:  # else Triton compiles
                        seconds[variant, rate].append(1e3 * took)
        for (variant, rate), values in seconds.items():
            rate = rate if VARIANTS[variant] else None
            yield row(values, "ms", model="latte", variant=variant, rate=rate, spinning=count, what="step")


MODELS = {"latte": latte, "embedded": embedded}
COMPILED = {"eager": {}, "cudagraphs": {"backend": "cudagraphs"}, "reduce-overhead": {"mode": "reduce-overhead"}}
if not CUDA:
    MODELS, COMPILED = {"latte": latte}, {"eager": {}, "compiled": {"backend": "eager"}}


@torch.no_grad()
def calls_of(model: nn.Module, config: AdaCacheConfig | None) -> tuple[list[float], list[float]]:
    """Milliseconds of single calls, until the device has done with them and until they return to the host."""
    call, device, host = inputs_of(model), [], []
    timestep = torch.full((2,), 500.0, device=DEVICE)
    with cached(model, Readback if config else None, config):
        for _ in range(10 + CALLS):  # of the first ten some compile, warm up and capture
            synchronize()
            start = time.perf_counter()
            model(timestep=timestep, return_dict=False, **call)
            host.append(1e3 * (time.perf_counter() - start))
            synchronize()
            device.append(1e3 * (time.perf_counter() - start))
    return device[10:], host[10:]


def graphs() -> Iterator[dict]:
    steps = 2 * (10 + CALLS)
    configs = {"no cache": None, "computed": every(1, steps), "reused": every(steps, 2 * steps)}
    for (name, build), (how, options) in itertools.product(MODELS.items(), COMPILED.items()):
        if how == "reduce-overhead" and name == "latte":
            continue  # its many blocks take Inductor minutes
        median = {}
        for step, config in configs.items():
            torch._dynamo.reset()
            model = build()
            if options:
                model.compile(fullgraph=True, **options)
            device, host = calls_of(model, config)
            median[step] = np.median(device)
            facts = {"model": name, "variant": how}
            yield row(device, "ms", **facts, what=step)
            yield row(host, "ms", **facts, what=f"{step}, until the call returns")
        yield row([median["computed"] - median["no cache"]], "ms", **facts, what="decision")


def save(measured: str, rows: Iterable[dict], path: Path) -> None:
    """Into a file, in place of what it has of that measurement; each row as soon as it is there."""
    others, where = [], machine.where()
    if path.exists():
        with path.open(newline="") as file:
            others = [each for each in csv.DictReader(file) if each["measured"] != measured]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["measured", *row((), ""), *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows(others)
        for each in rows:
            writer.writerow({"measured": measured} | each | where)
            file.flush()
            print(*(value for value in each.values() if value is not None), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", nargs="+", choices=("trace", "busy", "graphs"))
    parser.add_argument("--out", type=Path, help=f"rows, default {RESULTS.relative_to(Path(__file__).parents[1])}")
    parser.add_argument("--traces", type=Path, help="folder for the profiler's traces")
    args = parser.parse_args(arguments)
    if args.out is None and not CUDA:
        parser.error("--out: expected with rows of a CPU, which show that the benchmark runs and no more")
    for measured in args.measured:
        rows = trace(args.traces) if measured == "trace" else {"busy": busy, "graphs": graphs}[measured]()
        save(measured, rows, args.out or RESULTS)


if __name__ == "__main__":
    main()

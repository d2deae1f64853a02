"""Serving video requests with a step cache: a discrete-event simulator, and its check against a real run.

    python benchmarks/simulate.py check   the embedded model on this CPU: its costs, then serving predicted and measured
    python benchmarks/simulate.py sweep   1 to 64 GPUs, by the costs that `check` measured and by assumed ones

Each of `replicas` servers is a group of `ranks` GPUs that share every sequence. Requests wait in one queue; whenever
servers are ready, each request goes to the one of them with the fewest videos, up to `limit`. A server is ready before
every step under continuous batching, else when its batch is through. A denoising step in which c videos compute and r
reuse takes, on P ranks,

    seconds = compute(c) + decide(c) + reuse(r) + communication(c),  f(n) = base + slope * n / P, 0 for no video
    communication(c) = exchanges * alpha + c * exchanged * (P - 1) / P^2 / bandwidth    the attention's all-to-alls
                       + REDUCTIONS * (alpha + c * DECISION_BYTES / bandwidth)          the decision's all-reduces

communication being 0 for P = 1 or c = 0. Nothing of it overlaps with computation. Left out: prompts and decoding,
memory, the gather of a step's output, and that a GPU does less per second on a smaller share of a sequence.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import heapq
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

import diffusers
import numpy as np
import torch

from adacache_triton import AdaCacheConfig, AdaCacheSession, Codebook, Schedule, __version__, apply_adacache
from adacache_triton.generate import device_name
from adacache_triton.testbed.pipeline import EmbeddedPipeline
from adacache_triton.testbed.videos import CLASSES, NUM_FRAMES, SIZE

RESULTS = Path(__file__).parent / "results"
MEASURED = RESULTS / "simulate_costs.json"
POLICIES = ("no cache", "joint", "per video", "continuous")
GPUS = (1, 2, 4, 8, 16, 32, 64)
DECISION_BYTES = 64  # a video, at most
REDUCTIONS = 2  # a computed step: the sums at the probe, and whether what is kept is finite


@dataclass(frozen=True)
class Cost:
    """Seconds of a forward on n videos: base + slope * n / ranks; no forward where there is none.

    The base is below 0 where a larger batch takes longer a video, as on a CPU whose caches it leaves.
    """

    base: float
    slope: float

    def __post_init__(self):
        if not (0 <= self.slope < np.inf and 0 <= self.base + self.slope < np.inf):
            raise ValueError(f"Cost: expected slope >= 0 and base + slope >= 0, got {self.base} and {self.slope}")

    def __call__(self, videos: int, ranks: int = 1) -> float:
        return self.base + self.slope * videos / ranks if videos else 0.0

    @classmethod
    def fit(cls, rows: Iterable[tuple[int, float]]) -> Cost:
        """From rows (videos, seconds): least squares of the seconds a video."""
        videos, seconds = np.array(list(rows), float).T
        slope, base = np.polyfit(videos, seconds, 1, w=1 / videos)
        if slope < 0:
            base, slope = np.average(seconds, weights=videos**-2), 0.0
        return cls(float(max(base, -slope)), float(slope))


@dataclass(frozen=True)
class Link:
    """What ranks that share a sequence exchange, and how fast.

    Args:
        exchanges: all-to-alls of a computed step.
        exchanged: bytes of the whole tensors in them, a video.
        alpha: seconds of any collective, however small.
        bandwidth: bytes per second that a GPU sends.
        ranks: the most that are linked like this.
    """

    exchanges: int
    exchanged: float
    alpha: float
    bandwidth: float
    ranks: int


@dataclass(frozen=True)
class Costs:
    """What a denoising step costs, all guidance calls included.

    Args:
        name, source: which, and where the numbers are from.
        compute: a step without a cache.
        reuse: a reused step.
        decide: what the cache adds to a computed step.
        link: None where no ranks share a sequence.
    """

    name: str
    source: str
    compute: Cost
    reuse: Cost
    decide: Cost
    link: Link | None = None

    def __post_init__(self):
        if self.link and min(self.compute.base, self.reuse.base, self.decide.base) < 0:
            raise ValueError("link: expected None where a cost has a base below 0, which ranks would not share")

    @classmethod
    def from_dict(cls, data: dict) -> Costs:
        costs = {name: Cost(**data[name]) for name in ("compute", "reuse", "decide")}
        return cls(**data | costs | {"link": data.get("link") and Link(**data["link"])})

    def step(self, computing: int, reusing: int, ranks: int = 1, cached: bool = True) -> float:
        """Seconds of a step in which so many videos compute and so many reuse."""
        seconds = self.compute(computing, ranks) + self.reuse(reusing, ranks)
        if cached:
            seconds += self.decide(computing, ranks)
        if ranks == 1:
            return seconds
        if self.link is None or ranks > self.link.ranks:
            raise ValueError(f"ranks: expected at most {self.link.ranks if self.link else 1}, got {ranks}")
        alpha, bandwidth = self.link.alpha, self.link.bandwidth
        if computing:
            sent = computing * self.link.exchanged * (ranks - 1) / ranks**2
            seconds += self.link.exchanges * alpha + sent / bandwidth
            if cached:
                seconds += REDUCTIONS * (alpha + computing * DECISION_BYTES / bandwidth)
        return seconds


def assumed() -> Costs:
    """Wan 2.1 14B at 720 x 1280 and 81 frames on H200s, in bfloat16, from counted FLOPs and bytes. Nothing is measured.

    A step's two guidance calls. Data sheet: 989 TFLOP/s, 4.8 TB/s, NVLink 450 GB/s a direction; assumed: 45 % of the
    first, 80 % of the others, 20 us a collective. A GPU is full with one video, so computing has no base; the host's
    part of a reused step is 0.7 ms a call, as on the CPU in `step_cost.csv`.
    """
    calls, layers, tokens, text, width, mlp = 2, 40, 21 * 45 * 80, 512, 5120, 13824
    stream = 2 * tokens * width  # bytes
    projections = 2 * tokens * (6 * width**2 + 2 * width * mlp)  # q, k, v, o; q, o of cross-attention; MLP
    attention = 4 * tokens * (tokens + text) * width
    computed = calls * layers * (projections + attention)  # FLOPs
    # Embedding and head: a write, the norm's read and write, a read; the addition: two reads and a write.
    reused = calls * 7 * stream
    # The probe's residual is measured and kept, the stack's is kept: two reads and a write each.
    decided = calls * 6 * stream
    exchanges = calls * layers * 4  # q, k, v and the output
    flops, memory = 0.45 * 989e12, 0.8 * 4.8e12
    return Costs(
        "H200, assumed",
        f"predicted, not measured: Wan 2.1 14B, 720p, 81 frames. Computed {computed / 1e15:.1f} PFLOP at 45 % of 989 "
        f"TFLOP/s, reused {reused / 1e9:.1f} GB and decision {decided / 1e9:.1f} GB at 80 % of 4.8 TB/s, all-to-alls "
        f"{exchanges * stream / 1e9:.0f} GB at 80 % of 450 GB/s and 20 us each; schedules of the embedded model",
        compute=Cost(0.0, computed / flops),
        reuse=Cost(calls * 0.7e-3, reused / memory),
        decide=Cost(0.0, decided / memory),
        link=Link(exchanges, exchanges * stream, alpha=20e-6, bandwidth=0.8 * 450e9, ranks=8),
    )


@dataclass(frozen=True)
class Video:
    """What a request's run does when it decides alone.

    Args:
        num_steps: of the run.
        computed: the steps that are computed, from 1.
        distances: what the codebook saw at each of them; None where there was nothing to compare.
    """

    num_steps: int
    computed: Sequence[int]
    distances: Sequence[float | None] = ()


def together(videos: Sequence[Video], codebook: Codebook) -> list[int]:
    """The computed steps of one decision for several videos, as far as their own runs tell.

    It sees the mean of the videos' distances, each interpolated between the steps that the video computed.
    """
    lengths = sorted({video.num_steps for video in videos})
    if len(lengths) > 1:
        raise ValueError(f"videos: expected equally many steps to decide together, got {lengths}")
    steps = range(1, lengths[0] + 1)
    seen = np.mean([np.interp(steps, v.computed, np.array(v.distances, float)) for v in videos], axis=0)
    schedule, rate = Schedule(AdaCacheConfig(codebook), lengths[0]), 1
    for step, distance in zip(steps, seen.tolist()):
        if schedule.begin(step).computed:
            schedule.decide((distance * rate, 1.0))  # the rule divides by the rate
            rate = schedule.steps[-1].rate
    return [record.step for record in schedule.steps if record.computed]


def poisson(rate: float, count: int, seed: int = 0) -> list[float]:
    """Arrival times in seconds of a Poisson process."""
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum().tolist()


@dataclass(frozen=True)
class Served:
    """What became of each request: when it came and was done, in seconds, and the steps computed for it."""

    arrivals: Sequence[float]
    finishes: list[float]
    computed: list[list[int]]

    @property
    def summary(self) -> dict[str, float]:
        """Videos per second from the first arrival to the last finish; seconds from arrival to finish; mean steps."""
        latency = np.subtract(self.finishes, self.arrivals)
        return {
            "throughput": len(latency) / (max(self.finishes) - min(self.arrivals)),
            "latency_mean": float(latency.mean()),
            "latency_p50": float(np.percentile(latency, 50)),
            "latency_p95": float(np.percentile(latency, 95)),
            "computed": float(np.mean([len(steps) for steps in self.computed])),
        }


def simulate(
    videos: Sequence[Video],
    arrivals: Sequence[float],
    policy: str,
    costs: Costs,
    *,
    joint: Callable[[Sequence[Video]], Iterable[int]],
    limit: int = 4,
    replicas: int = 1,
    ranks: int = 1,
) -> Served:
    """Serve videos that arrive at these times.

    Args:
        videos, arrivals: one each a request.
        policy: `no cache`, one `joint` decision for a static batch, decisions `per video` in a static batch, or these
            under `continuous` batching.
        costs: of a step.
        joint: the computed steps of videos that decide together, see `together`.
        limit: videos in a batch.
        replicas, ranks: of replicas * ranks GPUs.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    if len(videos) != len(arrivals):
        raise ValueError(f"arrivals: expected one for each of {len(videos)} videos, got {len(arrivals)}")
    for name, count in (("limit", limit), ("replicas", replicas), ("ranks", ranks)):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    coming = deque(sorted(range(len(videos)), key=arrivals.__getitem__))
    waiting: deque[int] = deque()
    batches: list[list[int]] = [[] for _ in range(replicas)]
    idle, ends = set(range(replicas)), []  # servers between two steps; a heap of (end of a step, server)
    plans = [set(range(1, v.num_steps + 1) if policy == "no cache" else v.computed) for v in videos]
    at, finishes, computed = [0] * len(videos), [0.0] * len(videos), [[] for _ in videos]
    while coming or ends:
        now = min(ends[0][0] if ends else np.inf, arrivals[coming[0]] if coming else np.inf)
        while coming and arrivals[coming[0]] <= now:
            waiting.append(coming.popleft())
        while ends and ends[0][0] <= now:
            server = heapq.heappop(ends)[1]
            idle.add(server)
            for i in [i for i in batches[server] if at[i] == videos[i].num_steps]:
                finishes[i] = now
                batches[server].remove(i)
        ready = [batches[server] for server in sorted(idle) if policy == "continuous" or not batches[server]]
        while waiting and ready and len(emptiest := min(ready, key=len)) < limit:
            emptiest.append(waiting.popleft())
        if policy == "joint":
            for batch in filter(None, ready):
                plan = set(joint([videos[i] for i in batch]))
                for i in batch:
                    plans[i] = plan
        for server in [server for server in idle if batches[server]]:
            computing = 0
            for i in batches[server]:
                at[i] += 1
                if at[i] in plans[i]:
                    computed[i].append(at[i])
                    computing += 1
            seconds = costs.step(computing, len(batches[server]) - computing, ranks, policy != "no cache")
            heapq.heappush(ends, (now + seconds, server))
            idle.remove(server)
    return Served(arrivals, finishes, computed)


@dataclass
class Request:
    """A request that is really served.

    Attributes:
        index: of it.
        latents, caption: [1, C, T, H, W] and [1, 1, channels].
        step: how many it has had.
        session: its cached run, where it decides alone.
    """

    index: int
    latents: torch.Tensor
    caption: torch.Tensor
    step: int = 0
    session: AdaCacheSession | None = None


class Loop:
    """A real serving loop of the embedded model, one server. Requests in a batch may be at different steps."""

    def __init__(self, pipe: EmbeddedPipeline, num_steps: int, guidance_scale: float = 2.0):
        self.pipe, self.model = pipe, pipe.transformer
        self.num_steps, self.guidance_scale = num_steps, guidance_scale
        pipe.scheduler.set_timesteps(num_steps)
        self.sigmas, self.timesteps = pipe.scheduler.sigmas, pipe.scheduler.timesteps

    def request(self, index: int) -> Request:
        """The classes take turns."""
        caption = torch.zeros(1, 1, self.model.config.caption_channels)
        caption[..., index % len(CLASSES)] = 1
        shape = (1, self.model.config.in_channels, NUM_FRAMES, SIZE, SIZE)
        return Request(index, torch.randn(shape, generator=torch.Generator().manual_seed(index)), caption)

    @torch.no_grad()
    def step(self, batch: Sequence[Request], handle=None) -> float:
        """A denoising step of these requests: seconds that it took.

        Of CPU time: nothing works but this thread, and other programs disturb it less than they do the clock.
        """
        start = process_time()
        sessions = [request.session for request in batch if request.session]
        x, captions = (torch.cat([getattr(r, name) for r in batch]) for name in ("latents", "caption"))
        at = torch.tensor([request.step for request in batch])
        call = torch.cat([x, x]), self.timesteps[at].repeat(2), torch.cat([torch.zeros_like(captions), captions])
        with handle.step(sessions) if sessions else nullcontext():
            uncond, cond = self.model(*call, return_dict=False)[0].chunk(2)
        velocity = uncond + self.guidance_scale * (cond - uncond)
        x = x + (self.sigmas[at + 1] - self.sigmas[at]).view(-1, 1, 1, 1, 1) * velocity
        for request, latents in zip(batch, x.split(1)):
            request.latents, request.step = latents, request.step + 1
        return process_time() - start

    def serve(self, arrivals: Sequence[float], policy: str, codebook: Codebook, limit: int) -> tuple[Served, list]:
        """Serve requests that arrive at these times, in order. Also a `Video` of each that was cached.

        Time in which there is nothing to do is not waited for.
        """
        config = AdaCacheConfig(codebook, num_steps=self.num_steps, per_video=policy != "joint")
        handle = None if policy == "no cache" else apply_adacache(self.model, config)
        now, waiting, batch, run = 0.0, deque(range(len(arrivals))), [], ExitStack()
        finishes, computed, videos = [0.0] * len(arrivals), [[] for _ in arrivals], []
        while waiting or batch:
            if not batch:
                now = max(now, arrivals[waiting[0]])
                if policy == "joint":
                    run.enter_context(handle.run())
            if policy == "continuous" or not batch:
                while waiting and len(batch) < limit and arrivals[waiting[0]] <= now:
                    batch.append(self.request(waiting.popleft()))
                    if policy in ("per video", "continuous"):
                        batch[-1].session = handle.session(self.num_steps)
            now += self.step(batch, handle)
            for request in [request for request in batch if request.step == self.num_steps]:
                finishes[request.index], computed[request.index] = now, list(range(1, self.num_steps + 1))
                if handle:
                    report = (request.session or handle).report()
                    computed[request.index] = report.computed_steps
                    seen = [record.regularized for record in report.steps if record.computed]
                    videos.append(Video(self.num_steps, report.computed_steps, seen))
                batch.remove(request)
            if not batch:
                run.close()
        if handle:
            handle.remove()
        return Served(arrivals, finishes, computed), videos

    def measure(self, batches: Iterable[int] = (1, 2, 4), steps: int = 4) -> list[tuple[str, int, float]]:
        """Rows (kind, videos, seconds): steps without a cache and, in turn with them, computed and reused ones."""
        rows, plain = [], Loop(copy.deepcopy(self.pipe), self.num_steps)
        handle = apply_adacache(self.model, AdaCacheConfig(Codebook((), (2,)), per_video=True))
        for videos in batches:
            without, batch = ([self.request(index) for index in range(videos)] for _ in range(2))
            for request in batch:
                request.session = handle.session(self.num_steps)
            for step in range(steps):
                compute, seconds = plain.step(without), self.step(batch, handle)
                if step == 0:  # which decides nothing
                    continue
                rows.append(("compute", videos, compute))
                computed = batch[0].session.report().steps[-1].computed
                rows.append(("decide", videos, seconds - compute) if computed else ("reuse", videos, seconds))
        handle.remove()
        return rows


def fitted(rows: list[tuple[str, int, float]], name: str, source: str) -> Costs:
    """Costs from the medians of measured rows; a decision that is lost in the noise costs nothing."""
    medians = {key: float(np.median([s for *k, s in rows if tuple(k) == key])) for key in {row[:2] for row in rows}}
    fits = {
        kind: Cost.fit((n, max(s, 0.0)) for (k, n), s in medians.items() if k == kind)
        for kind in ("compute", "reuse", "decide")
    }
    return Costs(name, source, **fits)


def check(pipe, requests: int, rounds: int, num_steps: int, limit: int, load: float) -> tuple[dict, list[dict]]:
    """Costs, codebook and schedules of the embedded model, and rows of serving predicted and measured, by medians.

    Costs are measured before each run, so that a machine that becomes busy slows both.
    """
    codebook, loop = AdaCacheConfig.preset("embedded").codebook, Loop(pipe, num_steps)
    _, videos = loop.serve([0.0] * requests, "continuous", codebook, 1)  # each alone
    rows, served = loop.measure(), {}
    source = f"the embedded model on {device_name(pipe.device)}, 1 thread"
    capacity = limit / num_steps / fitted(rows, "", "").compute(limit)  # videos per second without a cache
    traces = {"all at once": [0.0] * requests, f"load {load}": poisson(load * capacity, requests)}
    for _ in range(rounds):
        for trace, arrivals in traces.items():
            for policy in POLICIES:
                rows += loop.measure()
                result, _ = loop.serve(arrivals, policy, codebook, limit)
                served.setdefault((trace, policy), []).append(result.summary)
    costs, compared = fitted(rows, "CPU, measured", source), []
    for (trace, policy), summaries in served.items():
        result = simulate(videos, traces[trace], policy, costs, joint=lambda v: together(v, codebook), limit=limit)
        row = {"trace": trace, "policy": policy}
        for key, predicted in result.summary.items():
            measured = float(np.median([summary[key] for summary in summaries]))
            row |= {key: f"{measured:.4g}", f"{key}_predicted": f"{predicted:.4g}"}
            row[f"{key}_error"] = f"{predicted / measured - 1:+.1%}"
        compared.append(row | {"limit": limit, "requests": requests, "steps": num_steps, "rounds": rounds})
    kept = {"costs": asdict(costs), "codebook": codebook.to_dict(), "videos": [asdict(video) for video in videos]}
    return kept, compared


def sweep(kept: dict, limit: int, loads: Sequence[float], seed: int, gpus: Sequence[int] = GPUS) -> list[dict]:
    """Rows for so many GPUs, by the kept costs and by the assumed ones, with the kept schedules.

    Loads are arrivals, of what as many single GPUs serve without a cache. Batches of one are all the same but for the
    cache.
    """
    codebook, kinds, plans = Codebook.from_dict(kept["codebook"]), [Video(**video) for video in kept["videos"]], {}

    def joint(videos):
        key = tuple(sorted(map(id, videos)))
        if key not in plans:
            plans[key] = together(videos, codebook)
        return plans[key]

    rows = []
    for costs in (Costs.from_dict(kept["costs"]), assumed()):
        for count in gpus:
            draw = np.random.default_rng(seed)
            videos = [kinds[i] for i in draw.integers(len(kinds), size=200 + 24 * count)]
            capacity = count * limit / kinds[0].num_steps / costs.compute(limit)
            traces = {"all at once": [0.0] * len(videos)}
            traces |= {f"load {load}": poisson(load * capacity, len(videos), seed) for load in loads}
            for ranks in sorted({1, min(count, costs.link.ranks if costs.link else 1)}):
                cluster = {"replicas": count // ranks, "ranks": ranks}
                for size, policies in ((1, ("no cache", "per video")), (limit, POLICIES)):
                    for trace, arrivals in traces.items():
                        for policy in policies:
                            result = simulate(videos, arrivals, policy, costs, joint=joint, limit=size, **cluster)
                            row = {"costs": costs.name, "gpus": count, **cluster, "limit": size, "policy": policy}
                            row |= {"trace": trace, "requests": len(videos), "result": "predicted, not measured"}
                            rows.append(row | {key: f"{value:.4g}" for key, value in result.summary.items()})
    return rows


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(cells: list[list]) -> str:
    """Columns of equal width."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*cells)]
    return "\n".join("  ".join(str(cell).rjust(width) for cell, width in zip(line, widths)) for line in cells)


def overview(rows: list[dict]) -> str:
    """A line for each arrangement and trace of a sweep: mean latency by policy, throughput where all come at once."""
    columns = dict.fromkeys((row["limit"], row["policy"]) for row in rows)
    lines: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row[name] for name in ("costs", "gpus", "replicas", "ranks", "trace"))
        value = row["throughput" if row["trace"] == "all at once" else "latency_mean"]
        lines.setdefault(key, {})[row["limit"], row["policy"]] = value
    head = ["costs", "GPUs", "replicas", "ranks", "trace", *(f"{policy}, {limit}" for limit, policy in columns)]
    return table([head, *([*key, *(values[column] for column in columns)] for key, values in lines.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "sweep"))
    parser.add_argument("--limit", type=int, default=4, help="videos in a batch")
    parser.add_argument("--requests", type=int, default=6, help="check: how many are served")
    parser.add_argument("--rounds", type=int, default=3, help="check: how often, for medians")
    parser.add_argument("--steps", type=int, default=30, help="check: denoising steps of a request")
    parser.add_argument("--load", type=float, default=2.0, help="check: arrivals, of what is served without a cache")
    parser.add_argument("--costs", type=Path, default=MEASURED, help="sweep: what `check` wrote, or a file like it")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.8, 1.6], help="sweep: likewise")
    parser.add_argument("--seed", type=int, default=0, help="sweep: of videos and arrivals")
    args = parser.parse_args()
    if args.what == "sweep":
        kept = json.loads(args.costs.read_text())
        rows = sweep(kept, args.limit, args.loads, args.seed)
        write(RESULTS / "simulate.csv", rows)
        print(f"{kept['costs']['name']}: {kept['costs']['source']}\n{assumed().name}: {assumed().source}")
        print("videos/s where all come at once, else mean latency in s; by policy and batch limit\n")
        print(overview(rows))
        return
    torch.set_num_threads(1)
    kept, rows = check(EmbeddedPipeline.load(), args.requests, args.rounds, args.steps, args.limit, args.load)
    where = {
        "date": datetime.date.today().isoformat(),
        "device": kept["costs"]["source"].partition(" on ")[2],
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "adacache_triton": __version__,
    }
    MEASURED.write_text(json.dumps(kept | where, indent=2) + "\n")
    write(RESULTS / "simulate_check.csv", [row | where for row in rows])
    hidden = ("limit", "requests", "steps", "rounds")
    columns = [column for column in rows[0] if column not in hidden and not column.endswith("_predicted")]
    print("measured (videos/s, s, computed steps a video), and how far off the prediction is\n")
    print(table([columns, *([row[column] for column in columns] for row in rows)]))


if __name__ == "__main__":
    main()

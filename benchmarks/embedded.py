"""The embedded model's preset and the difficulty of its classes, measured.

    python benchmarks/embedded.py preset       computed steps and PSNR per class, over codebook and MoReg scales
    python benchmarks/embedded.py difficulty   per video, the best PSNR of a schedule searched for it, with n steps

Both run on seeds that the demo does not show and append rows with device and versions to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
from pathlib import Path

import diffusers
import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio

from adacache_triton import AdaCacheConfig, FixedSchedule, __version__, apply_adacache
from adacache_triton.config import OFFICIAL, MotionRegularization
from adacache_triton.testbed.pipeline import EmbeddedPipeline
from adacache_triton.testbed.videos import CLASSES

STEPS = 50
FIRST_SEED = 1000  # the demo starts at 0
RESULTS = Path(__file__).parent / "results"


def generate(pipe, label: str, seed: int, config: AdaCacheConfig | None = None):
    """A video [T, H, W, 3] and the report of its run, None without a configuration."""
    handle = apply_adacache(pipe, config) if config else None
    frames = pipe(label, STEPS, generator=torch.Generator().manual_seed(seed)).frames[0]
    if handle:
        handle.remove()
    return frames, handle and handle.report()


def replay(pipe, label: str, seed: int, steps) -> np.ndarray:
    """The video of a fixed list of computed steps."""
    frames, report = generate(pipe, label, seed, AdaCacheConfig(schedule=FixedSchedule(tuple(steps), STEPS)))
    assert report.computed_steps == sorted(steps)
    return frames


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(peak_signal_noise_ratio(a, b, data_range=1))


def dense_early(count: int, warmup: int, power: float) -> list[int]:
    """`count` steps: the first `warmup`, then gaps that grow with `power`, then the last one."""
    u = np.linspace(0, 1, count - warmup + 1)[1:] ** power
    tail = np.round(warmup + u * (STEPS - warmup)).astype(int)
    for i in range(len(tail)):  # distinct, in order
        tail[i] = max(tail[i], (tail[i - 1] if i else warmup) + 1)
    return [*range(1, warmup + 1), *(int(t) for t in tail if t <= STEPS)]


def measure_difficulty(pipe, seeds: range, evaluations: int = 12):
    """An oracle: for each video and number of steps the best PSNR of any schedule tried on that very video.

    Four schedules of a family, then single steps of the best one moved at random, kept where that helps.
    """
    for label in CLASSES:
        for seed in seeds:
            uncached, _ = generate(pipe, label, seed)
            moves = np.random.default_rng(seed)
            for count in (6, 8, 10, 13, 17, 22):
                family = [dense_early(count, warmup, power) for warmup in (2, 4) for power in (1.0, 1.7)]
                scored = {tuple(s): psnr(uncached, replay(pipe, label, seed, s)) for s in family if len(s) == count}
                while len(scored) < 4 + evaluations:
                    best = list(max(scored, key=scored.get))
                    best[moves.integers(1, count)] += int(moves.choice([-3, -2, -1, 1, 2, 3]))
                    moved = tuple(sorted(set(best)))
                    if len(moved) == count and moved[0] == 1 and moved[-1] <= STEPS and moved not in scored:
                        scored[moved] = psnr(uncached, replay(pipe, label, seed, moved))
                best = max(scored, key=scored.get)
                row = {"class": label, "seed": seed, "computed": count, "psnr": f"{scored[best]:.2f}"}
                yield row | {"schedules": len(scored), "steps": " ".join(map(str, best))}


def measure_preset(pipe, seeds: range):
    """Rows of computed steps and PSNR over scaled codebooks, and over MoReg's scale and power for some of them."""
    window = (STEPS // 10, STEPS * 9 // 10)
    settings = [("open-sora-100", factor, None, None) for factor in (1.0, 0.5, 0.25)]
    settings += [("open-sora-30-fast", factor, None, None) for factor in (1.0, 0.5, 0.35, 0.25, 0.18, 0.12)]
    moreg = [(scale, power) for scale in (0.07, 0.1, 0.14) for power in (1, 2)]
    settings += [("open-sora-30-fast", factor, *m) for factor in (0.5, 0.25, 0.18) for m in moreg]
    for label in CLASSES:
        for seed in seeds:
            uncached, _ = generate(pipe, label, seed)
            for codebook, factor, scale, power in settings:
                motion = scale and MotionRegularization(window, scale=scale, power=power)
                config = AdaCacheConfig(OFFICIAL[codebook].codebook.scaled(factor), motion or None)
                frames, report = generate(pipe, label, seed, config)
                measured = [s.motion for s in report.steps if s.motion is not None]
                yield {
                    "class": label,
                    "seed": seed,
                    "codebook": codebook,
                    "factor": factor,
                    "moreg_scale": scale or "",
                    "moreg_power": power or "",
                    "computed": len(report.computed_steps),
                    "psnr": f"{psnr(uncached, frames):.2f}",
                    "motion_mean": f"{np.mean(measured):.4f}" if measured else "",
                    "distance_median": f"{np.median([s.distance for s in report.steps if s.distance]):.4f}",
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("preset", "difficulty"))
    parser.add_argument("--videos", type=int, default=2, help="seeds per class")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = EmbeddedPipeline.load()
    measure = {"preset": measure_preset, "difficulty": measure_difficulty}[args.what]
    where = {
        "date": datetime.date.today().isoformat(),
        "device": f"cpu {platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "adacache_triton": __version__,
    }
    path, writer = RESULTS / f"embedded_{args.what}.csv", None
    with path.open("w", newline="") as file:
        for row in measure(pipe, range(FIRST_SEED, FIRST_SEED + args.videos)):
            if writer is None:
                writer = csv.DictWriter(file, [*row, *where], lineterminator="\n")
                writer.writeheader()
            writer.writerow(row | where)
            file.flush()
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()

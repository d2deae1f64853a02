"""Fidelity against speed, every method side by side on the embedded models.

    python benchmarks/evaluate.py run --model wan --seeds 2      rows into benchmarks/results/evaluate_wan.csv
    python benchmarks/evaluate.py controls --model wan           of the adaptive methods, behind their rows
    python benchmarks/evaluate.py oracle --model wan             a schedule searched for every video
    python benchmarks/evaluate.py draw                           docs/evaluate.png, docs/evaluate.md

Each video is made alone, as other caches decide for a whole batch; it is compared with the uncached one of the same
noise. A row that is there is not run again, so a run may be stopped and go on. Videos come in the order of their
seeds, and for each video all methods one after another: the uncached one before and behind them, whose times a
speed-up is of. Needs cache-dit for its rows: pip install adacache-triton[evaluate].
"""

from __future__ import annotations

import argparse
import csv
import datetime
import logging
import platform
import re
import statistics
import time
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import diffusers
import evaluate_methods as known
import evaluate_tables
import numpy as np
import torch
import video_metrics
from torch import nn

from adacache_triton import __version__
from adacache_triton.models import stack_of
from adacache_triton.testbed.pipeline import EMBEDDED
from adacache_triton.testbed.scenes import GROUNDS, SUBJECTS

STEPS, RESULTS = known.STEPS, known.RESULTS
FIRST_SEED = 50000  # calibrations and the demo have others
MEASURES = dict(
    psnr=video_metrics.psnr, ssim=video_metrics.ssim, gmsd=video_metrics.gmsd, flicker=video_metrics.flicker
)
COLUMNS = [
    "method", "setting", "class", "seed", "computed", "seconds", "seconds_uncached", *MEASURES, "schedule", "error",
    "date", "device", "torch", "diffusers", "cache_dit", "adacache_triton",
]  # fmt: skip


def prompt_of(model: str, label: str, seed: int) -> str:
    """The caption of a class; colours go with the seed."""
    return label if model == "latte" else f"{label} {SUBJECTS[seed % len(SUBJECTS)]} {GROUNDS[seed % len(GROUNDS)]}"


class Work:
    """What the linear layers of the blocks do, in multiplications: the same count for every method."""

    def __init__(self, transformer: nn.Module):
        self.done = 0
        blocks = [transformer.get_submodule(path) for path in stack_of(transformer).lists]
        linears = {m for each in blocks for m in each.modules() if isinstance(m, nn.Linear)}
        self._handles = [linear.register_forward_hook(self._count) for linear in linears]

    def _count(self, linear: nn.Linear, args, output) -> None:
        self.done += output.numel() * linear.in_features

    def take(self) -> int:
        done, self.done = self.done, 0
        return done

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Bench:
    """One model: makes videos, counts and times them, writes rows."""

    def __init__(self, model: str, path: Path | None = None):
        self.model, self.path = model, path or RESULTS / f"evaluate_{model}.csv"
        self.rows = list(csv.DictReader(self.path.open())) if self.path.exists() else []
        self.where = {
            "date": datetime.date.today().isoformat(),
            "device": f"cpu {platform.machine()}, 1 thread",
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "cache_dit": metadata.version("cache-dit") if find_spec("cache_dit") else "",
            "adacache_triton": __version__,
        }
        self._reference: dict[tuple, np.ndarray] = {}
        self.load()

    def load(self) -> None:
        """A fresh pipeline: what a cache has left behind is gone."""
        ratios = getattr(getattr(self, "pipe", None), "mag_ratios", None)
        self.pipe = EMBEDDED[self.model].load()
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.calibration_prompt = prompt_of(self.model, self.pipe.CLASSES[2], 0)
        if ratios is not None:
            self.pipe.mag_ratios = ratios
        self.work = Work(self.pipe.transformer)

    @property
    def current(self) -> set[tuple]:
        return {(row["method"], row["setting"], row["class"], row["seed"]) for row in self.rows}

    def make(self, label: str, seed: int, method: known.Method) -> tuple[np.ndarray, float, int, list[int]]:
        """A video, seconds of it, multiplications in the blocks, and its computed steps where they are told.

        Seconds are those of the processor for this one thread: what else runs on the machine does not count.
        """
        self.pipe.video = label, seed
        with method.put(self.pipe) as computed:
            self.work.take()
            began = time.process_time()
            frames = known.make_video(self.pipe, prompt_of(self.model, label, seed), seed, method.steps)
            return frames, time.process_time() - began, self.work.take(), computed()

    def uncached(self, label: str, seed: int) -> tuple[np.ndarray, float, int]:
        """The reference; the median of all its times of this video so far."""
        frames, seconds, work, _ = self.make(label, seed, known.Method("uncached", "", known.nothing))
        kept = self._reference.setdefault((label, seed), (frames, [], work))
        kept[1].append(seconds)
        if not np.array_equal(kept[0], frames):
            raise RuntimeError(f"uncached: expected the same video as before for {label} {seed}: a cache left a trace")
        return kept[0], statistics.median(kept[1]), kept[2]

    def row(self, label: str, seed: int, method: known.Method) -> dict:
        """The row of one run, or of its error."""
        row = dict.fromkeys(COLUMNS, "") | {
            "method": method.name,
            "setting": method.setting,
            "class": label,
            "seed": seed,
        }
        row |= self.where
        reference, seconds_uncached, whole = self.uncached(label, seed) if not self._reference.get((label, seed)) else (
            self._reference[label, seed][0], statistics.median(self._reference[label, seed][1]),
            self._reference[label, seed][2],
        )  # fmt: skip
        try:
            frames, seconds, work, computed = self.make(label, seed, method)
            if frames.shape != reference.shape or not np.isfinite(frames).all():
                raise RuntimeError(f"output of shape {frames.shape}, finite: {bool(np.isfinite(frames).all())}")
        except Exception as error:  # whatever another package raises
            self.load()
            return row | {
                "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
            }
        row |= {name: f"{measure(reference, frames):.5g}" for name, measure in MEASURES.items()}
        row |= {"computed": f"{STEPS * work / whole:.3f}", "seconds": f"{seconds:.4f}"}
        return row | {"seconds_uncached": f"{seconds_uncached:.4f}", "schedule": " ".join(map(str, computed))}

    def run(self, methods: list[known.Method], seeds: range, deadline: float) -> None:
        broken = {(row["method"], row["setting"]) for row in self.rows if row["error"]}
        for seed in seeds:
            for label in self.pipe.CLASSES:
                missing = [m for m in methods if (m.name, m.setting, label, str(seed)) not in self.current]
                missing = [m for m in missing if (m.name, m.setting) not in broken]
                if not missing:
                    continue
                if time.monotonic() > deadline:
                    return
                self.uncached(label, seed)
                began = len(self.rows)
                for method in missing:
                    if time.monotonic() > deadline:
                        break
                    row = self.row(label, seed, method)
                    if row["error"]:
                        broken.add((method.name, method.setting))
                    self._append(row)
                    print(*(row[name] for name in COLUMNS[:10]), row["error"], flush=True)
                    if method.name.startswith(known.PEERS):
                        self.load()
                self._timed(label, seed, began)

    def _timed(self, label: str, seed: int, began: int) -> None:
        """Behind a video's rows, those from `began` on: the uncached video again, which must be the same, and its time.

        Every peer had the pipeline to itself, so one that differs says that a cache has changed a class.
        """
        _, seconds, _ = self.uncached(label, seed)
        for row in self.rows[began:]:
            if row["seconds_uncached"]:
                row["seconds_uncached"] = f"{seconds:.4f}"
        self._write(self.rows, "w")

    def _append(self, row: dict) -> None:
        self.rows.append({name: str(value) for name, value in row.items()})
        self._write(self.rows[-1:], "a" if self.path.exists() else "w")

    def _write(self, rows: list[dict], mode: str) -> None:
        with self.path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


def run_controls(bench: Bench, deadline: float) -> None:
    """For each adaptive method the settings nearest to three and four times fewer steps."""
    for name in sorted(
        {row["method"] for row in bench.rows if row["method"].startswith("AdaCache") and ":" not in row["method"]}
    ):
        own = [row for row in bench.rows if row["method"] == name and row["computed"]]
        means = {
            s: np.mean([float(r["computed"]) for r in own if r["setting"] == s]) for s in {r["setting"] for r in own}
        }
        for count in (17, 12):
            setting = min(means, key=lambda s: abs(means[s] - count))
            rows = [row for row in own if row["setting"] == setting]
            seeds = sorted({int(row["seed"]) for row in rows})
            whole = [seed for seed in seeds if sum(int(r["seed"]) == seed for r in rows) == len(bench.pipe.CLASSES)]
            rows = [row for row in rows if int(row["seed"]) in whole]
            if rows:
                bench.run(known.controls(rows, name, setting), range(whole[0], whole[-1] + 1), deadline)


def run_oracle(bench: Bench, seeds: range, tries: int, deadline: float) -> None:
    for count in (17, 12):
        for seed in seeds:
            for label in bench.pipe.CLASSES:
                if ("oracle", str(count), label, str(seed)) in bench.current or time.monotonic() > deadline:
                    continue
                reference, _, _ = bench.uncached(label, seed)

                def score(config, label=label, seed=seed, reference=reference):
                    frames, *_ = bench.make(label, seed, known.Method("", "", known.ours(config)))
                    return video_metrics.psnr(reference, frames)

                config = known.oracle(bench.model, count, score, tries)
                bench._append(bench.row(label, seed, known.Method("oracle", str(count), known.ours(config))))
                print(*bench.rows[-1].values(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "controls", "oracle", "draw"))
    parser.add_argument("--model", choices=tuple(EMBEDDED))
    parser.add_argument("--seeds", type=int, default=4, help="videos of each class (4)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help=f"({FIRST_SEED})")
    parser.add_argument("--methods", default="", help="those in whose name this regular expression is found (all)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="behind which nothing new is begun")
    parser.add_argument("--tries", type=int, default=16, help="schedules that the oracle tries on a video (16)")
    args = parser.parse_args()
    if args.what == "draw":
        evaluate_tables.draw()
        return
    if args.model is None:
        parser.error("--model: expected one of latte, wan")
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    bench = Bench(args.model)
    deadline, seeds = time.monotonic() + 60 * args.minutes, range(args.first_seed, args.first_seed + args.seeds)
    if args.what == "run":
        bench.run([m for m in known.methods(args.model) if re.search(args.methods, m.name)], seeds, deadline)
    elif args.what == "controls":
        run_controls(bench, deadline)
    else:
        run_oracle(bench, seeds, args.tries, deadline)


if __name__ == "__main__":
    main()

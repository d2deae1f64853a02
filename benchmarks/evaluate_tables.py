"""What `evaluate.py draw` makes of its rows: the Pareto picture, docs/evaluate.md, and the README's table.

A point is a method at one setting: its mean over videos. Between two points of a method that a threshold steers its
fidelity is interpolated over the logarithm of the speed-up, never beyond them. Intervals are of 95 %, from 2000
bootstrap samples of the videos with a fixed seed.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
STEPS = 50
SPEEDUPS = (1.5, 2, 3, 4, 5)
MODELS = {"latte": "Latte", "wan": "Wan"}
OURS, BASE = ("ours, calibrated", "ours, uncalibrated"), "AdaCache official"
PEERS = ("diffusers", "cache-dit")
FAMILY = {  # of the picture: colour (Okabe and Ito's), marker
    "ours, calibrated": ("#d55e00", "o"),
    "ours, uncalibrated": ("#e69f00", "s"),
    "AdaCache official": ("#0072b2", "^"),
    "searched list, none": ("#7f7f7f", "v"),
    "searched list, fitted": ("#000000", "D"),
    "diffusers FirstBlockCache": ("#56b4e9", "<"),
    "diffusers TaylorSeer": ("#009e73", ">"),
    "diffusers MagCache": ("#cc79a7", "p"),
    "diffusers SeaCache": ("#8c564b", "h"),
    "cache-dit DBCache": ("#9467bd", "*"),
    "cache-dit DBCache + TaylorSeer": ("#5b3a86", "X"),
    "uniform, none": ("#b0b0b0", "."),
    "fewer steps": ("#c9b400", "+"),
}


def load(model: str) -> list[dict]:
    path = RESULTS / f"evaluate_{model}.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def whole(rows: list[dict]) -> list[dict]:
    """Rows of the videos that all methods have seen which saw at least half as many as any, controls left aside.

    So all means are of the same videos, and a method that has seen fewer than these is left out.
    """
    ran = [row for row in rows if row["computed"] and ": " not in row["method"] and row["method"] != "oracle"]
    seen: dict[tuple, set] = {}
    for row in ran:
        seen.setdefault((row["method"], row["setting"]), set()).add((row["class"], row["seed"]))
    most = max(map(len, seen.values()), default=0)
    common = set.intersection(*(v for v in seen.values() if 2 * len(v) >= most)) if seen else set()
    complete = {key for key, videos in seen.items() if videos >= common}
    return [row for row in ran if (row["method"], row["setting"]) in complete and (row["class"], row["seed"]) in common]


class Curve:
    """Of one method: for each setting the speed-up, by computed steps or by time, and the PSNR of every video.

    Attributes:
        x: mean speed-up of each setting, ascending.
        y: PSNR, [settings, videos], the videos in one order for all methods.
    """

    def __init__(self, rows: list[dict], by: str = "computed"):
        points = []
        for _, own in itertools.groupby(sorted(rows, key=lambda r: r["setting"]), lambda r: r["setting"]):
            own = sorted(own, key=lambda r: (r["class"], int(r["seed"])))
            if by == "computed":
                x = STEPS / np.mean([float(r["computed"]) for r in own])
            else:
                x = np.median([float(r["seconds_uncached"]) / float(r["seconds"]) for r in own])
            points.append((x, [float(r["psnr"]) for r in own]))
        points.sort(key=lambda point: point[0])
        self.x, self.y = np.array([x for x, _ in points]), np.array([y for _, y in points])

    def at(self, speedup: float) -> np.ndarray | None:
        """PSNR of every video at a speed-up; None outside of what was run, 3 % allowed for."""
        x, z = np.log(self.x), np.log(speedup)
        if not x[0] - 0.03 <= z <= x[-1] + 0.03:
            return None
        right = min(max(int(np.searchsorted(x, z)), 1), len(x) - 1) if len(x) > 1 else 0
        left = max(right - 1, 0)
        share = 0.0 if left == right else float(np.clip((z - x[left]) / (x[right] - x[left]), 0, 1))
        return (1 - share) * self.y[left] + share * self.y[right]


def interval(values: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean over videos."""
    samples = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.percentile(values[samples].mean(1), (2.5, 97.5))
    return float(high - low) / 2


def cell(values: np.ndarray | None) -> str:
    return "" if values is None else f"{values.mean():.1f} ± {interval(values):.1f}"


def curves(rows: list[dict], by: str = "computed") -> dict[str, list[Curve]]:
    """By method, those of the picture first; of AdaCache one a codebook, as a scale goes along each of them."""
    found: dict[str, list[Curve]] = {}
    there = dict.fromkeys(row["method"] for row in rows)
    for method in [*(name for name in FAMILY if name in there), *(name for name in there if name not in FAMILY)]:
        own = [row for row in rows if row["method"] == method]
        books = {row["setting"].split(" x ")[0] if " x " in row["setting"] else "" for row in own}
        found[method] = [Curve([r for r in own if r["setting"].startswith(book)], by) for book in sorted(books)]
    return found


def best(found: Iterable[Curve], speedup: float) -> np.ndarray | None:
    values = [value for curve in found if (value := curve.at(speedup)) is not None]
    return max(values, key=np.mean) if values else None


def table(model: str, short: bool = False) -> str:
    """PSNR by method and speed-up in computed steps; below it, what does not run. The short one is of the picture's."""
    rows = [row for row in load(model) if not short or row["method"] in FAMILY or row["method"].startswith(PEERS)]
    lines = ["| PSNR dB | " + " | ".join(f"{x:g}x" for x in SPEEDUPS) + " |", "|---|" + "--:|" * len(SPEEDUPS)]
    for method, found in curves(whole(rows)).items():
        if ":" in method or method == "oracle":
            continue
        cells = [cell(best(found, x)) for x in SPEEDUPS]
        if max(curve.x[-1] for curve in found) < 1.01:
            cells[0] = "runs, but computes every step"
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    ran = {row["method"] for row in whole(rows)}
    for method in dict.fromkeys(row["method"] for row in rows if row["error"]):
        if method not in ran:
            error = next(row["error"] for row in rows if row["method"] == method and row["error"])
            lines.append(f"| {method} | does not run: {error} " + "| " * (len(SPEEDUPS) - 1) + "|")
    return "\n".join(lines) + "\n"


def comparison(model: str) -> str:
    """Ours less others on the same videos, dB: at equal computed steps, against peers at equal measured speed."""
    rows = whole(load(model))
    equal, timed = curves(rows), curves(rows, "seconds")
    heads = ["| difference, dB | " + " | ".join(f"{x:g}x" for x in SPEEDUPS) + " |", "|---|" + "--:|" * len(SPEEDUPS)]

    def line(name: str, ours: str, pick, own: dict) -> str:
        cells = []
        for x in SPEEDUPS:
            mine, other = best(own[ours], x), pick(x)
            cells.append(
                "" if mine is None or other is None else f"{np.mean(mine - other):+.1f} ± {interval(mine - other):.1f}"
            )
        return f"| {ours} less {name} | " + " | ".join(cells) + " |"

    def peer(x: float):
        return best([c for method, found in timed.items() if method.startswith(PEERS) for c in found], x)

    def searched(x: float):
        return best([c for method, found in equal.items() if method.startswith("searched") for c in found], x)

    for ours in OURS:
        if ours in equal:
            heads.append(
                line("AdaCache official, best codebook and scale", ours, lambda x: best(equal.get(BASE, []), x), equal)
            )
            heads.append(line("best searched list without correction", ours, searched, equal))
            heads.append(line("best peer at the same measured speed", ours, peer, timed))
    return "\n".join(heads) + "\n"


def adaptivity(model: str) -> str:
    """Adaptive methods against their controls and the oracle, on the videos that all have seen."""
    rows = [row for row in load(model) if row["computed"]]
    lines = ["| | setting | computed | PSNR dB | less its control, dB |", "|---|---|--:|--:|--:|"]

    def values(method: str, setting: str, videos=None) -> tuple[dict, float]:
        own = {(r["class"], r["seed"]): r for r in rows if (r["method"], r["setting"]) == (method, setting)}
        own = {key: r for key, r in own.items() if videos is None or key in videos}
        return {key: float(r["psnr"]) for key, r in own.items()}, np.mean([float(r["computed"]) for r in own.values()])

    classes = {row["class"] for row in rows}
    pairs = {(r["method"].split(": ")[0], r["setting"], r["method"]) for r in rows if ": " in r["method"]}
    pairs |= {("oracle", r["setting"], OURS[0]) for r in rows if r["method"] == "oracle"}
    for method, setting, control in sorted(pairs):
        theirs, count = values(control, setting)
        mine, computed = values(method, setting, theirs)
        theirs = {key: theirs[key] for key in mine}
        if {label for label, _ in mine} != classes:  # of some classes alone, the totals would not be equal
            continue
        difference = np.array([mine[key] - theirs[key] for key in mine])
        name = control.split(": ")[-1]
        lines.append(f"| {method} | {setting} | {computed:.1f} | {np.mean(list(mine.values())):.1f} | |")
        lines.append(
            f"| its control: {name} | | {count:.1f} | {np.mean(list(theirs.values())):.1f} | "
            f"{difference.mean():+.2f} ± {interval(difference):.2f} |"
        )
    return "\n".join(dict.fromkeys(lines)) + "\n"


def by_class(model: str) -> str:
    """Per motion class: computed steps and PSNR of some methods near three times fewer steps."""
    rows = whole(load(model))
    classes = list(dict.fromkeys(row["class"] for row in rows))
    lines = ["| | setting | " + " | ".join(classes) + " |", "|---|---|" + "--:|" * len(classes)]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        settings = {row["setting"] for row in own}
        mean = {s: np.mean([float(r["computed"]) for r in own if r["setting"] == s]) for s in settings}
        setting = min(sorted(settings), key=lambda s: abs(np.log(mean[s] / 17)))
        cells = []
        for label in classes:
            found = [r for r in own if r["setting"] == setting and r["class"] == label]
            computed, psnr = (np.mean([float(r[name]) for r in found]) for name in ("computed", "psnr"))
            cells.append(f"{computed:.1f}: {psnr:.1f} dB")
        lines.append(f"| {method} | {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def points(model: str) -> str:
    """Every method and setting, all measures."""
    rows = whole(load(model))
    lines = [
        "| method | setting | computed | speed-up of the loop | PSNR dB | worst | SSIM | GMSD | flicker |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for method, setting in dict.fromkeys((row["method"], row["setting"]) for row in rows):
        own = [row for row in rows if (row["method"], row["setting"]) == (method, setting)]

        def column(name: str, own=own) -> np.ndarray:
            return np.array([float(row[name]) for row in own])

        speed = np.median(column("seconds_uncached") / column("seconds"))
        psnr = column("psnr")
        others = f"{column('ssim').mean():.4f} | {column('gmsd').mean():.4f} | {column('flicker').mean():.2f}"
        computed = column("computed").mean()
        cells = f"{computed:.1f} | {speed:.2f}x | {cell(psnr)} | {psnr.min():.1f} | {others}"
        lines.append(f"| {method} | {setting} | {cells} |")
    return "\n".join(lines) + "\n"


def source(model: str) -> str:
    rows = load(model)
    seeds = sorted({int(row["seed"]) for row in whole(rows)})
    videos = len({(row["class"], row["seed"]) for row in whole(rows)})
    classes = len({row["class"] for row in whole(rows)})
    first = rows[0]
    return (
        f"`python benchmarks/evaluate.py run --model {model}`: {videos} videos (of {classes} classes, seeds {seeds[0]} "
        f"to {seeds[-1]}), {first['device']}, torch {first['torch']}, diffusers {first['diffusers']}; rows in "
        f"`benchmarks/results/evaluate_{model}.csv`."
    )


def readme() -> str:
    """The table in the README."""
    parts = []
    for model, name in MODELS.items():
        if load(model):
            parts += [
                f"**{name}**, PSNR to the uncached video. {source(model)}\n",
                table(model, True),
                comparison(model),
            ]
    return "\n" + "\n".join(parts) if parts else ""


def page() -> str:
    """docs/evaluate.md."""
    parts = [
        "# Fidelity against speed\n",
        "Written by `python benchmarks/evaluate.py draw`; see `benchmarks/evaluate.py`.\n",
        "![](evaluate.png)\n",
    ]
    for model, name in MODELS.items():
        if load(model):
            parts += [
                f"## {name}\n", source(model) + "\n", table(model), comparison(model),
                "### Does adapting to the video bring anything?\n", adaptivity(model),
                "### Computed steps and PSNR by class, near three times fewer steps\n", by_class(model),
                "### All points\n", points(model),
            ]  # fmt: skip
    return "\n".join(parts)


def picture(path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    models = [model for model in MODELS if load(model)]
    figure = Figure(figsize=(6.4 * len(models), 6.2), dpi=100)
    handles = {}
    for i, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), i + 1)
        for method, found in curves(whole(load(model))).items():
            if method not in FAMILY:
                continue
            colour, marker = FAMILY[method]
            bold = method in OURS
            if method == BASE:  # the best of its codebooks and scales
                grid = np.geomspace(1.3, 5.6, 30)
                x, y = zip(*((g, v) for g in grid if (v := best(found, g)) is not None))
            else:
                x, y = found[0].x, found[0].y
            style = dict(color=colour, linewidth=3 if bold else 1.4, zorder=3 if bold else 2)
            marks = dict(marker=None if method == BASE else marker, markersize=7 if bold else 5)
            (line,) = axes.plot(x, [v.mean() for v in y], **style, **marks)
            low, high = zip(*((v.mean() - interval(v), v.mean() + interval(v)) for v in y))
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            handles.setdefault(method, line)
        axes.set_xscale("log")
        axes.set_xlim(1.3, 5.7)
        axes.xaxis.set_major_locator(FixedLocator(SPEEDUPS))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(SPEEDUPS, [f"{x:g}x" for x in SPEEDUPS])
        axes.set_xlabel("times fewer block stacks computed")
        axes.set_ylabel("PSNR to the uncached video, dB" if i == 0 else "")
        axes.set_title(f"{MODELS[model]}, embedded, 50 steps")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    order = [method for method in FAMILY if method in handles]
    figure.legend([handles[m] for m in order], order, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.07 if len(models) > 1 else 0.12, right=0.985, top=0.94, bottom=0.27, wspace=0.14)
    figure.savefig(path)


def draw() -> None:
    picture(ROOT / "docs/evaluate.png")
    (ROOT / "docs/evaluate.md").write_text(page())
    print(readme())  # update_readme.py puts it into the README

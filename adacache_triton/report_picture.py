"""The picture of a report: a strip of its steps, coloured by why each was computed, above what was measured."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .report import REASONS, Report, finite

COLOURS = {  # Okabe and Ito's
    "first": "#000000",
    "warm-up": "#56b4e9",
    "listed": "#0072b2",
    "rate": "#0072b2",
    "tail": "#cc79a7",
    "restart": "#d55e00",
    "reused": "#e5e7eb",
}
INK, MUTED = "#1b1f27", "#6b7280"


def draw(report: Report) -> Figure:
    """A strip for each video; below them, where it was measured, distance, MoReg's M, rate and time of every step."""
    runs = report.videos or (report,)
    lines = {
        "distance": [[s.distance for s in run.steps] for run in runs],
        "MoReg's M": [[s.motion_scale for s in run.steps] for run in runs],
        "rate": [[s.rate for s in run.steps] for run in runs],
        "ms a step": [[s.seconds and 1000 * s.seconds for s in run.steps] for run in runs],
    }
    lines = {name: rows for name, rows in lines.items() if any(v is not None for row in rows for v in row)}
    heights = [0.35 * len(runs) + 0.1, *[1.5] * len(lines)]
    total = sum(heights) + 1.5
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": MUTED}):
        figure = Figure(figsize=(10, total), dpi=100)
        grid = figure.add_gridspec(
            len(heights), 1, height_ratios=heights, left=0.09, right=0.98, top=1 - 0.95 / total, bottom=0.5 / total,
            hspace=0.28,
        )  # fmt: skip
        strip = figure.add_subplot(grid[0])
        _strip(strip, runs)
        axes = [strip]
        for i, (name, rows) in enumerate(lines.items(), 1):
            ax = figure.add_subplot(grid[i], sharex=strip)
            for run, row in zip(runs, rows):
                pairs = [(s.step, v) for s, v in zip(run.steps, finite(row)) if v == v]
                ax.plot(
                    *zip(*pairs), marker="o", markersize=3, linewidth=1.2, color=None if len(runs) > 1 else "#0072b2"
                )
            if name == "distance" and any(v for row in rows for v in finite(row) if v == v and v > 0):
                ax.set_yscale("log")
            else:
                ax.set_ylim(bottom=0)
            ax.set_ylabel(name)
            axes.append(ax)
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(colors=MUTED, labelcolor=INK, labelbottom=ax is axes[-1])
        strip.set_xlim(0.2, max(report.num_steps, 1) + 0.8)
        axes[-1].set_xlabel("step")
        seen = [reason for reason in REASONS if any(s.reason == reason for run in runs for s in run.steps)]
        patches = [Patch(color=COLOURS[reason], label=reason) for reason in seen]
        figure.legend(
            handles=patches,
            loc="upper left",
            bbox_to_anchor=(0.08, 1 - 0.38 / total),
            ncols=len(patches),
            frameon=False,
        )
        figure.text(0.09, 1 - 0.3 / total, _title(report), fontsize=12, fontweight="bold", color=INK)
    return figure


def _title(report: Report) -> str:
    runs = report.videos or (report,)
    counts = ", ".join(f"{len(run.computed_steps)}" for run in runs)
    saved = "" if report.time_saved is None else f", {report.time_saved:.3g} s saved"
    return f"{counts} of {report.num_steps} steps computed, {report.kept_bytes:,} bytes kept{saved}"


def _strip(ax, runs) -> None:
    for row, run in enumerate(runs):
        for step in run.steps:
            ax.bar(step.step, 0.8, 0.84, row - 0.4, color=COLOURS[step.reason])
            if step.cause is not None:
                ax.text(step.step, row, step.cause[0], color="white", ha="center", va="center", fontsize=7)
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_yticks(range(len(runs)), [f"video {i}" for i in range(1, len(runs) + 1)] if len(runs) > 1 else [""])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)

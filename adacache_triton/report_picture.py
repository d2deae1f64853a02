"""The picture of a report: a strip of its steps, coloured by why each was computed, above what was measured."""

from __future__ import annotations

import math

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .report import CAUSES, REASONS, Report

# Okabe and Ito's for the reasons, Tol's for the videos: both are told apart by the colour-blind.
COLOURS = {
    "first": "#000000",
    "warm-up": "#56b4e9",
    "listed": "#0072b2",
    "rate": "#0072b2",
    "tail": "#cc79a7",
    "restart": "#d55e00",
    "reused": "#dfe3e8",
}
VIDEOS = ("#117733", "#aa4499", "#999933", "#332288", "#44aa99", "#882255", "#cc6677")
INK, MUTED, PALE, PAPER = "#1b1f27", "#6b7280", "#d1d5db", "#ffffff"
MARKED = dict(linewidth=1.4, marker="o", markersize=3.4)


def draw_report(report: Report) -> Figure:
    """A strip for each video; below, where they were measured, distance, MoReg's M, rate and time of every step."""
    runs = report.runs
    panels = [("distance", "distance", 2.0), ("MoReg's M", "motion_scale", 1.2), ("rate", "rate", 1.2)]
    panels.append(("ms a step", "seconds", 1.2))
    numbers = {f: [getattr(s, f) for run in runs for s in run.steps] for _, f, _ in panels}
    panels = [p for p in panels if any(v is not None and math.isfinite(v) for v in numbers[p[1]])]
    heights = [0.3 * len(runs) + 0.12, *(height for *_, height in panels)]
    total = sum(heights) + 1.25 + 0.2 * len(panels)
    with matplotlib.rc_context({"font.size": 10, "text.parse_math": False, "axes.edgecolor": MUTED}):
        figure = Figure(figsize=(10, total), dpi=100, facecolor=PAPER)
        names = [run.name or (f"video {i}" if len(runs) > 1 else "") for i, run in enumerate(runs, 1)]
        names = [name if len(name) <= 32 else name[:15] + "…" + name[-16:] for name in names]
        left = min(0.3, max(0.085, 0.0085 * max(map(len, names)) + 0.02))
        sides = dict(left=left, right=0.92 if len(runs) > 1 else 0.985)
        grid = figure.add_gridspec(
            len(heights), 1, height_ratios=heights, top=1 - 0.72 / total, bottom=0.5 / total, hspace=0.25, **sides
        )
        axes = [figure.add_subplot(grid[0])]
        axes += [figure.add_subplot(grid[i], sharex=axes[0]) for i in range(1, len(heights))]
        _strip(axes[0], runs, names)
        for ax, (label, field, _) in zip(axes[1:], panels):
            _PANELS[field](ax, report)
            ax.set_ylabel(label)
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(colors=MUTED, labelcolor=INK, labelbottom=ax is axes[-1])
        for text, colour in zip(axes[0].get_yticklabels(), _colours(runs)):
            text.set_color(colour if len(runs) > 1 else INK)
        axes[0].set_xlim(0.2, max(report.num_steps, 1) + 0.8)
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes[-1].set_xlabel("step")
        figure.legend(
            handles=_reasons(runs), loc="upper left", bbox_to_anchor=(0.081, 1 - 0.36 / total), ncols=8,
            frameon=False, borderaxespad=0, borderpad=0.3, handlelength=1.2, columnspacing=1.4,
        )  # fmt: skip
        figure.text(0.085, 1 - 0.27 / total, report.totals(), fontsize=12, fontweight="bold", color=INK)
    return figure


def _reasons(runs) -> list[Patch]:
    """An entry for each reason that occurs; a restart's tells its causes by the letters on the strip."""
    steps = [s for run in runs for s in run.steps]
    causes = ", ".join(f"{cause[0]} {cause}" for cause in CAUSES if any(s.cause == cause for s in steps))
    seen = {s.reason for s in steps}
    labels = {reason: reason for reason in REASONS if reason in seen}
    if causes:
        labels["restart"] = f"restart: {causes}"
    return [Patch(color=COLOURS[reason], label=label) for reason, label in labels.items()]


def _strip(ax, runs, names) -> None:
    for row, run in enumerate(runs):
        for step in run.steps:
            ax.bar(step.step, 0.8, 0.84, row - 0.4, color=COLOURS[step.reason])
            if step.cause is not None:
                ax.text(step.step, row, step.cause[0], color=PAPER, ha="center", va="center", fontsize=8)
        if len(runs) > 1:
            place = dict(xytext=(6, 0), textcoords="offset points", va="center", fontsize=9, color=MUTED)
            share = f"{len(run.computed_steps)} of {run.num_steps}"
            ax.annotate(share, (1, row), xycoords=ax.get_yaxis_transform(), annotation_clip=False, **place)
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_yticks(range(len(runs)), names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _colours(runs) -> list[str]:
    """Of the lines: one a video."""
    return [VIDEOS[i % len(VIDEOS)] for i in range(len(runs))] if len(runs) > 1 else [COLOURS["rate"]]


def _plot(ax, run, field: str, **style) -> None:
    """A line through the steps that have a positive, finite number."""
    points = [(s.step, v) for s in run.steps if (v := getattr(s, field)) is not None and 0 < v < math.inf]
    ax.plot([step for step, _ in points], [value for _, value in points], **style)


def _distance(ax, report: Report) -> None:
    """As measured; of a single run also as MoReg lets the codebook see it, and the codebook's thresholds."""
    runs = report.runs
    for run, colour in zip(runs, _colours(runs)):
        _plot(ax, run, "distance", color=colour, **MARKED)
    entries = []
    if len(runs) == 1 and any(s.motion_scale is not None for s in runs[0].steps):
        dashed = dict(color=COLOURS["rate"], linestyle=(0, (3, 2)), mfc=PAPER) | MARKED
        _plot(ax, runs[0], "regularized", **dashed)
        entries += [Line2D([], [], color=COLOURS["rate"], label="measured", **MARKED)]
        entries += [Line2D([], [], label="seen by the codebook", **dashed)]
    bottom, top = _logarithmic(ax, least=2)
    thresholds = ((report.config or {}).get("codebook") or {}).get("thresholds", ())
    for threshold in thresholds:
        ax.axhline(threshold, color=PALE, linewidth=0.8, zorder=0)
    ax.set_ylim(bottom, top)
    if any(bottom < threshold < top for threshold in thresholds):
        entries.append(Line2D([], [], color=PALE, label="thresholds"))
    if entries:
        ax.legend(handles=entries, loc="upper right", frameon=False, fontsize=9, ncols=len(entries), borderaxespad=0)


def _motion(ax, report: Report) -> None:
    ax.axhline(1, color=PALE, linewidth=0.8, zorder=0)
    for run, colour in zip(report.runs, _colours(report.runs)):
        _plot(ax, run, "motion_scale", color=colour, **MARKED)
    _from_zero(ax)


def _rate(ax, report: Report) -> None:
    for run, colour in zip(report.runs, _colours(report.runs)):
        _plot(ax, run, "rate", color=colour, drawstyle="steps-post", **MARKED)
    _from_zero(ax, integer=True)


def _time(ax, report: Report) -> None:
    """A bar a step, coloured by its reason; of several videos, what each of them took of it."""
    below: dict[int, float] = {}
    for run, colour in zip(report.runs, _colours(report.runs)):
        for step in run.steps:
            height, bottom = 1000 * (step.seconds or 0.0), below.get(step.step, 0.0)
            # In the strip's grey so low a bar would be lost.
            one = "#9aa1ab" if step.reason == "reused" else COLOURS[step.reason]
            ax.bar(step.step, height, 0.84, bottom, color=colour if len(report.runs) > 1 else one)
            below[step.step] = bottom + height
    _from_zero(ax)


_PANELS = {"distance": _distance, "motion_scale": _motion, "rate": _rate, "seconds": _time}


def _from_zero(ax, **ticks) -> None:
    ax.margins(y=0.12)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(4, **ticks))


def _logarithmic(ax, least: float) -> tuple[float, float]:
    """Plain numbers on a logarithmic axis, around what is drawn and at least a factor wide. Returns its limits."""
    shown = [y for line in ax.lines for y in line.get_ydata()] or [1.0]
    low, high = min(shown), max(shown)
    widen = max(1.15, math.sqrt(max(1.0, least * low / high)))
    ax.set_yscale("log")
    ax.set_ylim(low / widen, high * widen * 1.1)
    decades = math.log10(high / low * widen**2)
    subs = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.6 else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    return ax.get_ylim()

"""The pictures of `adacache-triton generate`: videos side by side, contact sheet, schedules."""

from __future__ import annotations

import math
from pathlib import Path

import imageio.v2 as imageio
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont

from .generate import ADACACHE, MOREG, UNCACHED, Request, Variant, Video
from .terminal import decibels

INK, MUTED, PAPER = "#1b1f27", "#6b7280", "#ffffff"
COLOURS = {UNCACHED: "#4b5563", ADACACHE: "#1f6fd6", MOREG: "#d9620f"}
FPS, SECONDS = 8, 4  # a shorter video is repeated up to this length


def write_video(folder: Path, video: Video) -> str:
    """The variants side by side under a caption each, as mp4, or as gif where there is no ffmpeg.

    Small frames are enlarged to about 192 pixels. Returns the file's name.
    """
    panels = [_panels(variant) for variant in video.variants]
    gap = np.full((*panels[0].shape[:2], 8, 3), 255, np.uint8)
    frames = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=2)
    # yuv420p, which every player knows, halves both dimensions.
    padding = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    frames = np.pad(frames, padding, constant_values=255)
    frames = np.tile(frames, (math.ceil(FPS * SECONDS / len(frames)), 1, 1, 1))
    if _has_ffmpeg():
        name = f"{video.stem}.mp4"
        options = dict(fps=FPS, codec="libx264", quality=8, macro_block_size=2, ffmpeg_log_level="error")
        imageio.mimwrite(folder / name, frames, format="FFMPEG", **options)
    else:
        name = f"{video.stem}.gif"
        imageio.mimwrite(folder / name, frames, format="GIF", duration=1000 / FPS, loop=0)
    return name


def _has_ffmpeg() -> bool:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    return True


def _panels(variant: Variant) -> np.ndarray:
    """A variant's frames, enlarged, under their caption: bytes [T, H, W, 3]."""
    frames = _bytes(variant.frames)
    factor = max(1, round(192 / min(frames.shape[1:3])))
    frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = frames.shape[1:3]
    size = max(9, min(15, width // 13))
    caption = Image.new("RGB", (width, 3 * size + 4), PAPER)
    draw = ImageDraw.Draw(caption)
    draw.text((2, 2), variant.name, COLOURS[variant.name], _font(size, bold=True))
    draw.text((2, 3 + 1.35 * size), _numbers(variant), INK, _font(size - 2))
    strip = np.broadcast_to(np.asarray(caption), (len(frames), *np.asarray(caption).shape))
    return np.concatenate([strip, frames], axis=1)


def _numbers(variant: Variant) -> str:
    if variant.psnr is None:
        return f"{variant.share} steps"
    return f"{variant.share}, {variant.speedup:.1f}x, {decibels(variant.psnr)} dB"


def contact_sheet(videos: list[Video]) -> Image.Image:
    """A row for each prompt and variant, with its label and up to eight frames evenly spaced."""
    first = videos[0].variants[0].frames
    height, width = _cell(*first.shape[1:3])
    columns = np.unique(np.linspace(0, len(first) - 1, 8).round().astype(int))
    label, gap, between, margin = 190, 4, 18, 14
    rows = sum(len(video.variants) for video in videos)
    size = (
        2 * margin + label + len(columns) * (width + gap) - gap,
        2 * margin + rows * (max(height, 52) + gap) + (len(videos) - 1) * between,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    y = margin
    for video in videos:
        for variant in video.variants:
            lines = [
                (_shorten(video.prompt, 22), INK, _font(14, bold=True)),
                (variant.name, COLOURS[variant.name], _font(14)),
                (_sheet_numbers(variant), MUTED, _font(13)),
            ]
            top = y + max(0, height - 52) // 2
            for i, (text, colour, font) in enumerate(lines):
                draw.text((margin, top + 18 * i), text, colour, font)
            frames = _bytes(variant.frames)
            for i, column in enumerate(columns):
                x = margin + label + i * (width + gap)
                image = Image.fromarray(frames[min(column, len(frames) - 1)])
                enlarged = height >= image.height
                filter = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
                sheet.paste(image.resize((width, height), filter), (x, y))
            y += max(height, 52) + gap
        y += between
    return sheet


def _cell(height: int, width: int) -> tuple[int, int]:
    """Size of a frame on the sheet: a whole multiple of a small one, a large one reduced."""
    if height <= 72 and width <= 128:
        factor = max(1, round(72 / height))
        return height * factor, width * factor
    scale = min(1, 96 / height, 160 / width)
    return round(height * scale), round(width * scale)


def _sheet_numbers(variant: Variant) -> str:
    fidelity = "" if variant.psnr is None else f" / {decibels(variant.psnr)} dB"
    return f"{variant.share}{fidelity}"


def schedule(videos: list[Video], request: Request) -> Figure:
    """Against the step, a row for each prompt: distances and computed steps, MoReg's M, rate."""
    cached = {name: config for name, config in request.variants.items() if config}
    moreg = request.variants.get(MOREG)
    columns = 3 if moreg else 2
    height = 1.95 * len(videos) + 1.25
    figure = Figure(figsize=(13.5 if moreg else 10.5, height), dpi=100, facecolor=PAPER)
    grid = figure.add_gridspec(
        len(videos),
        columns,
        width_ratios=[2.3, *[1] * (columns - 1)],
        left=0.09 if moreg else 0.11,
        right=0.985,
        top=1 - 0.95 / height,
        bottom=0.5 / height,
        hspace=0.32,
        wspace=0.16,
    )
    # Common to all rows, so that one can compare down a column.
    limits = _limits(videos, lambda step: (step.distance, step.regularized), least=(0.03, 0.1))
    motion_limits = _limits(videos, lambda step: (step.motion_scale,), least=(0.5, 2))
    with matplotlib.rc_context({"font.size": 10, "text.parse_math": False, "axes.edgecolor": MUTED}):
        for row, video in enumerate(videos):
            variants = [variant for variant in video.variants if variant.name in cached]
            cell = grid[row, 0].subgridspec(2, 1, height_ratios=[4, 0.55 * len(variants)], hspace=0.06)
            axes = [figure.add_subplot(cell[0]), figure.add_subplot(cell[1])]
            axes += [figure.add_subplot(grid[row, i]) for i in range(1, columns)]
            for ax in axes:
                steps = max(variant.num_steps for variant in variants)
                ax.set_xlim(0.2, steps + 0.8)
                ax.spines[["top", "right"]].set_visible(False)
                ax.tick_params(colors=MUTED, labelcolor=INK)
            _plot_distance(axes[0], variants, next(iter(cached.values())).codebook, limits)
            axes[0].set_ylabel(_shorten(video.prompt, 20), fontsize=12, fontweight="bold", labelpad=8)
            _plot_computed(axes[1], variants)
            if moreg:
                _plot_motion(axes[2], variants[-1], moreg.motion.window, motion_limits)
            _plot_rate(axes[-1], variants)
            axes[0].tick_params(labelbottom=False)
            if row == len(videos) - 1:
                for ax in axes[1:]:
                    ax.set_xlabel("step")
            if row == 0:
                axes[0].set_title("distance of the probed residual; below, computed steps filled", fontsize=11)
                if moreg:
                    axes[2].set_title("MoReg's M", fontsize=11)
                axes[-1].set_title("rate: steps until the next computed", fontsize=11)
        _legend(figure, cached, height)
        figure.text(0.012, 1 - 0.3 / height, request.title, fontsize=12, fontweight="bold", color=INK)
    return figure


def _limits(videos: list[Video], values, least: tuple[float, float]) -> tuple[float, float]:
    """Of a logarithmic axis: around all values of all steps, and at least as wide as `least`."""
    reports = [variant.report for video in videos for variant in video.variants if variant.report]
    shown = [v for r in reports for s in r.steps for v in values(s) if v is not None and 0 < v < math.inf]
    return min(*least, *shown) / 1.3, max(*least, *shown) * 1.3


def _positive(values) -> list[float]:
    """For a logarithmic axis: what it cannot show is left out of the line."""
    return [v if v is not None and 0 < v < math.inf else math.nan for v in values]


def _plot_distance(ax, variants: list[Variant], codebook, limits: tuple[float, float]) -> None:
    _logarithmic(ax, limits)
    for threshold in codebook.thresholds:
        ax.axhline(threshold, color="#d1d5db", linewidth=0.8, zorder=0)
    for variant in variants:
        steps = [s for s in variant.report.steps if s.distance is not None]
        x, colour = [s.step for s in steps], COLOURS[variant.name]
        ax.plot(x, _positive(s.distance for s in steps), color=colour, linewidth=1.5, marker="o", markersize=3.2)
        if variant.name == MOREG:
            y = _positive(s.regularized for s in steps)
            ax.plot(
                x,
                y,
                color=colour,
                linewidth=1.1,
                linestyle=(0, (3, 2)),
                marker="o",
                markersize=3.2,
                mfc=PAPER,
            )


def _plot_computed(ax, variants: list[Variant]) -> None:
    """A cell a step: filled where it was computed."""
    for row, variant in enumerate(variants):
        computed, colour = set(variant.computed_steps), COLOURS[variant.name]
        for step in range(1, variant.num_steps + 1):
            ax.bar(step, 0.78, 0.82, row - 0.39, color=colour if step in computed else "#e5e7eb")
    ax.set_ylim(len(variants) - 0.5, -0.5)
    ax.set_yticks(range(len(variants)), [variant.share for variant in variants], fontsize=9)
    for label, variant in zip(ax.get_yticklabels(), variants):
        label.set_color(COLOURS[variant.name])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _plot_motion(ax, variant: Variant, window: tuple[int, int], limits: tuple[float, float]) -> None:
    steps = [s for s in variant.report.steps if s.motion_scale is not None]
    ax.axvspan(window[0] - 0.5, window[1] + 0.5, color="#fdf1e7", zorder=0)
    ax.axhline(1, color="#c4c8cf", linewidth=0.8, zorder=0)
    y = _positive(s.motion_scale for s in steps)
    ax.plot([s.step for s in steps], y, color=COLOURS[MOREG], linewidth=1.3, marker="o", markersize=3.2)
    _logarithmic(ax, limits)


def _logarithmic(ax, limits: tuple[float, float]) -> None:
    """Plain numbers at 1, 2 and 5 of each decade, at 1 alone where that would be many."""
    ax.set_yscale("log")
    ax.set_ylim(limits)
    decades = math.log10(limits[1] / limits[0])
    subs = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.6 else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def _plot_rate(ax, variants: list[Variant]) -> None:
    top = 1
    for variant, width in zip(variants, (3.0, 1.4)):
        steps = [s for s in variant.report.steps if s.rate is not None]
        x, y = [s.step for s in steps], [s.rate for s in steps]
        if steps:
            top = max(top, *y)
            x, y = [*x, variant.num_steps + 1], [*y, y[-1]]
        ax.plot(x, y, color=COLOURS[variant.name], linewidth=width, alpha=0.85, drawstyle="steps-post")
    ax.set_ylim(0, top + 0.9)
    ax.yaxis.get_major_locator().set_params(integer=True)


def _legend(figure: Figure, cached: dict, height: float) -> None:
    entries = [Line2D([], [], color=COLOURS[n], marker="o", markersize=4, label=f"{n}: distance") for n in cached]
    if MOREG in cached:
        entries.append(
            Line2D(
                [],
                [],
                color=COLOURS[MOREG],
                linestyle=(0, (3, 2)),
                marker="o",
                markersize=4,
                mfc=PAPER,
                label=f"{MOREG}: distance seen by the codebook",
            )
        )
    entries.append(Line2D([], [], color="#c4c8cf", label="thresholds"))
    if MOREG in cached:
        entries.append(Patch(color="#fdf1e7", label="MoReg's window"))
    figure.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(0.008, 1 - 0.33 / height),
        ncols=len(entries),
        frameon=False,
        fontsize=10,
        handlelength=2.2,
        columnspacing=1.6,
    )


def _bytes(frames: np.ndarray) -> np.ndarray:
    return (np.nan_to_num(frames).clip(0, 1) * 255).round().astype(np.uint8)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"

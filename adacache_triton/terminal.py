"""What `generate` shows: the steps of a run as they happen, and the table at its end."""

from __future__ import annotations

import math
import time
from itertools import groupby
from pathlib import Path

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from .generate import Request, Runner, UsageError, Variant, Video, load

REFRESH = 0.1  # seconds between two redraws: rarely enough that a redraw does not show in the times
COLOURS = {"uncached": "default", "AdaCache": "cyan", "AdaCache+MoReg": "magenta"}


class Progress:
    """A context: on a terminal a live strip of the run's steps and a bar over all runs.

    Either way one line remains of each run whose result is handed to `finish`.
    """

    def __init__(self, request: Request):
        self._console = Console(highlight=False)
        self._request = request
        self._blocks = "█░" if self._console.encoding.lower().startswith("utf") else "#."
        columns = TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Bar(*columns, auto_refresh=False, console=self._console)
        runs = len(request.prompts) * len(request.variants) * request.repeats
        self._task = self._bar.add_task("runs", total=runs)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._steps: dict[int, bool] = {}
        self._label, self._drawn = Text(), 0.0
        self._widths = [max(map(len, names)) for names in ([_short(p) for p in request.prompts], request.variants)]

    def __enter__(self) -> Progress:
        for note in self._request.notes:
            self._console.print(note, markup=False, soft_wrap=True)
        if self._console.is_terminal:
            self._live.start()
            self._draw()
        return self

    def __exit__(self, *_) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def start(self, prompt: str, name: str) -> None:
        """A run of the variant `name` begins."""
        self._steps = {}
        prompt = _short(prompt)
        self._label = Text.assemble(
            (prompt.ljust(self._widths[0]), "bold"), "  ", (name.ljust(self._widths[1]), COLOURS[name])
        )
        self._draw()

    def step(self, step: int, computed: bool) -> None:
        """A forward of a step (from 1) has ended."""
        self._steps[step] = computed
        if time.monotonic() - self._drawn > REFRESH:
            self._draw()

    def finish(self, run: Variant | None) -> None:
        """The run has ended; with its result, its line is printed."""
        self._bar.advance(self._task)
        if run is not None:
            line = Text.assemble(self._label, "  ", self._strip(), f"  {run.share}, {run.seconds[0]:.2f} s")
            self._console.print(line, soft_wrap=True)
        self._draw()

    def _strip(self) -> Text:
        strip = Text()
        for computed, steps in groupby(self._steps[step] for step in sorted(self._steps)):
            block = self._blocks[0 if computed else 1]
            strip.append(block * len(list(steps)), style="bold green" if computed else "dim")
        return strip

    def _draw(self) -> None:
        if not self._console.is_terminal:
            return
        self._drawn = time.monotonic()
        strip = self._strip()
        room = max(10, self._console.width - len(self._label) - 3)
        line = Text.assemble(self._label, "  ", strip[-room:], no_wrap=True, overflow="crop")
        self._live.update(Group(line, self._bar), refresh=True)


def print_results(request: Request, videos: list[Video], files: list[Path]) -> None:
    """The table of all videos and variants, then the files."""
    console = Console(highlight=False)
    console.print(Text(f"\n{request.title}", style="bold"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("prompt", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for heading in ("computed", "speed-up", "PSNR dB", "SSIM"):
        table.add_column(heading, justify="right", no_wrap=True)
    room = max(8, min(48, console.width - 60))  # what the other columns leave
    for video in videos:
        for i, variant in enumerate(video.variants):
            last = variant is video.variants[-1]
            cached = variant.psnr is not None
            table.add_row(
                Text("" if i else _short(video.prompt, room), style="bold"),
                Text(variant.name, style=COLOURS[variant.name]),
                variant.share,
                f"{variant.speedup:.2f}x" if cached else "",
                decibels(variant.psnr) if cached else "",
                f"{variant.ssim:.4f}" if cached else "",
                end_section=last,
            )
    console.print(table)
    for file in files:
        console.print(str(file), markup=False, soft_wrap=True)


def decibels(psnr: float) -> str:
    """One decimal, or `inf`."""
    return f"{psnr:.1f}" if math.isfinite(psnr) else str(psnr)


def _short(text: str, width: int = 32) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def calibrate_with_progress(request: Request, args) -> None:
    """Calibrate under a progress bar, write the file, and print what was found and how it is used."""
    from .calibrate import Videos, calibrate

    console = Console(highlight=False)
    if request.device.type == "cpu":
        torch.set_num_threads(1 if args.model in ("latte", "wan") else torch.get_num_threads())
    pipeline = load(request)
    arguments = Runner(pipeline, request).arguments
    videos = Videos(pipeline, request.prompts, request.steps, args.seeds, request.seed, args.batch, **arguments)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    try:
        with Bar(*columns, console=console, transient=True) as bar:
            task = bar.add_task("uncached", total=1.0)
            found = calibrate(
                videos,
                videos.made_for(),
                args.speedup,
                forecast=args.forecast,
                correct=args.correct == "on",
                evaluations=args.evaluations,
                minutes=math.inf if args.minutes is None else args.minutes,
                on_progress=lambda what, share: bar.update(task, description=what, completed=share),
            )
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    found.save(args.out)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("computed", "fewer steps", "speed-up", "PSNR dB", "worst", "steps"):
        table.add_column(heading, justify="left" if heading == "steps" else "right")
    for point in found.points:
        numbers = f"{point.psnr:.1f} +- {point.psnr_interval:.1f}", f"{point.psnr_min:.1f}"
        speed = f"{point.speedup:.2f}x", f"{point.speedup_seconds:.2f}x"
        table.add_row(f"{len(point.steps)} of {request.steps}", *speed, *numbers, " ".join(map(str, point.steps)))
    console.print(table)
    middle = found.points[len(found.points) // 2].speedup
    console.print(
        f'apply_adacache(pipe, AdaCacheConfig.for_speedup({middle:.2g}, "{args.out}"))', markup=False, soft_wrap=True
    )

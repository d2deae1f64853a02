"""What `generate` shows: the steps of a run as they happen, and the table at its end."""

from __future__ import annotations

import math
import time
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from .generate import Request, Variant, Video

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

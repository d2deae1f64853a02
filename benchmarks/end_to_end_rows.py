"""Rows of end-to-end runs, predicted until they are measured, and what is made of them: a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from architectures import ROOT, ROWS, Row
from contenders import CONTENDERS
from cost_model import ADACACHE, CACHE_DIT, CHIPS, FIRST_BLOCK, RELEASED, Stream, predicted
from end_to_end import FLOOR

FILE = ROOT / "benchmarks/results/end_to_end.jsonl"
PICTURE = ROOT / "docs/end_to_end.png"
CHIP = CHIPS[-1]
NO_CACHE = CONTENDERS[0].name
PEERS = {FIRST_BLOCK: 7, CACHE_DIT: 6}  # with the caret that shows each in the picture


def rows_of(files: Iterable[Path]) -> list[dict]:
    """The lines of files that `end_to_end.py` wrote."""
    return _last(json.loads(line) for file in files for line in file.read_text().splitlines())


def _last(rows: Iterable[dict]) -> list[dict]:
    """Of a run made twice, the last."""
    return list({(row["row"], row["contender"]): row for row in rows}.values())


def save(rows: list[dict], path: Path = FILE) -> None:
    """Beside those that were measured before."""
    lines = (json.dumps(row) + "\n" for row in _last([*load(path), *rows]))
    path.write_text("".join(lines))


def load(path: Path = FILE) -> list[dict]:
    """No rows where nothing has been measured."""
    return rows_of([path]) if path.exists() else []


@dataclass(frozen=True)
class Run:
    """What is shown of a row. Seconds, bytes; None is not known.

    Args:
        measured: else predicted.
        loops: by contender; None where it raised.
        bound: what a computed and a reused step on an idle device wait for.
    """

    row: Row
    measured: bool
    uncached: float
    computed: float
    reused: float
    floor: float | None
    decision: float | None
    loops: dict[str, float | None]
    kept: int
    kept_by_released: int | None
    bound: tuple[str, str]

    @property
    def speedup(self) -> float:
        return self.row.steps * self.uncached / self.loops[ADACACHE]

    @property
    def share(self) -> float:
        return self.speedup / self.row.ideal


def runs(rows: list[dict]) -> list[Run]:
    """One a row of `architectures.py`: measured, where there is a run of this package at full size on a GPU."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if not row["small"]:
            found.setdefault(row["row"], {})[row["contender"]] = row
    return [_measured(row, found[row.name]) if ADACACHE in found.get(row.name, ()) else _predicted(row) for row in ROWS]


def _measured(row: Row, found: dict[str, dict]) -> Run:
    ours = found[ADACACHE]
    # Against what a step without a cache took right before and after each contender: clocks drift.
    loops = {
        name: None if line["error"] else line["loop_s"] * ours["uncached_s"] / line["uncached_s"]
        for name, line in found.items()
        if name != FLOOR and not line["compiled"]
    }
    return Run(
        row, True, ours["uncached_s"], ours["computed_s"], ours["reused_s"], found.get(FLOOR, {}).get("reused_s"),
        ours["decision_s"], loops, ours["kept_bytes"], found.get(RELEASED, {}).get("kept_bytes"),
        (ours["computed_bound"], ours["reused_bound"]),
    )  # fmt: skip


def _predicted(row: Row) -> Run:
    guess, stream = predicted(row, CHIP), Stream(row)
    loops = {name: guess.loop(name) for name in guess.steps} | {NO_CACHE: row.steps * guess.uncached}
    return Run(
        row, False, guess.uncached, *guess.steps[ADACACHE], guess.floor, guess.decision, loops, stream.kept,
        stream.kept_by_released, guess.bound,
    )  # fmt: skip


def table(rows: list[dict]) -> str:
    """A row a run: its steps, its loop, what is kept, and how many times longer the others' loops take."""
    shown = runs(rows)
    others = [RELEASED, *PEERS]
    columns = [
        "", "", "computed", "step s", "reused ms", "bound by", "of the floor", "decision", "loop s, without",
        "speed-up", "of the ideal", "kept GB", "released GB", *others,
    ]  # fmt: skip
    shows = f"![Speed-up of each run beside its ideal, and what is kept]({PICTURE.relative_to(ROOT)})"
    lines = [
        _head(shown, rows), "", shows, "", "<details><summary>The table</summary>", "", _line(columns),
        f"|---|---|{'--:|' * (len(columns) - 2)}", *(_line(_cells(run, others)) for run in shown), "", "</details>",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _head(shown: list[Run], rows: list[dict]) -> str:
    text = (
        "Denoising loops at full size, random weights in bfloat16, all caches at the same computed steps. "
        f"[docs/end_to_end.md](docs/end_to_end.md) has the schedules, and the cost model by which what is not measured "
        f"is *predicted*, for an {CHIP.name}. "
    )
    if any(run.measured for run in shown):
        facts = [", ".join(dict.fromkeys(str(row[key]) for row in rows)) for key in ("device", "torch", "revision")]
        text += "*Measured* is on {}, torch {}, revision {}, raw: `{}`. ".format(*facts, FILE.relative_to(ROOT))
    else:
        text += "**Nothing here is measured yet**; `bash benchmarks/gpu.sh` does it. "
    return text + (
        "Steps are computed and reused ones; the floor of the latter is the embedders and the head alone. The ideal "
        "speed-up is steps over computed steps. "
        "The last columns are how many times as long the others' loops take, a dash where they raise."
    )


def _cells(run: Run, others: list[str]) -> list[str]:
    def gigabytes(count):
        return "" if count is None else f"{count / 1e9:.2f}"

    ours = run.loops[ADACACHE]
    times = [f"{run.loops[name] / ours:.2f}x" if run.loops.get(name) else "–" for name in others]
    without = run.row.steps * run.uncached
    return [
        run.row.title,
        "measured" if run.measured else "*predicted*",
        str(len(run.row.schedule)),
        f"{run.computed:.3g}",
        f"{1e3 * run.reused:.2f}",
        ", ".join(run.bound),
        f"{run.reused / run.floor:.2f}x" if run.floor else "",
        f"{run.decision / run.computed:.3%}" if run.decision else "",
        f"{ours:.1f}, {without:.1f}",
        f"{run.speedup:.2f}x",
        f"{run.share:.1%}",
        gigabytes(run.kept),
        gigabytes(run.kept_by_released),
        *times,
    ]


def picture(rows: list[dict], path: Path = PICTURE) -> None:
    """Left the speed-ups, ideal beside reached; right the bytes kept, the released code's way beside this package."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = runs(rows)[::-1]  # the first on top
    ink, blue, pale, orange = "#1b1f27", "#1f6fd6", "#d1d5db", "#d9620f"
    caret = dict(color=ink, markersize=5, linestyle="")
    figure = Figure(figsize=(11, 0.62 * len(shown) + 1.5), layout="constrained", dpi=110)
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=[1.35, 1])
    for y, run in enumerate(shown):
        hatch = None if run.measured else "////"
        reached = dict(height=0.36, color=blue if run.measured else "white", edgecolor=blue, hatch=hatch)
        released = dict(height=0.36, color=orange if run.measured else "white", edgecolor=orange, hatch=hatch)
        speed.barh(y + 0.19, run.row.ideal, height=0.36, color=pale)
        speed.barh(y - 0.19, run.speedup, **reached)
        for (name, marker), edge in zip(PEERS.items(), (0.0, -0.38)):
            if loop := run.loops.get(name):
                speed.plot(run.row.steps * run.uncached / loop, y + edge, marker=marker, **caret)
        speed.annotate(f" {run.speedup:.2f}x of {run.row.ideal:.2f}x", (run.row.ideal, y), va="center", fontsize=9)
        if run.kept_by_released:
            memory.barh(y + 0.19, run.kept_by_released / 1e9, **released)
            text = f" {run.kept_by_released / 1e9:.1f} GB, {run.kept_by_released / run.kept:.0f} times"
            memory.annotate(text, (run.kept_by_released / 1e9, y + 0.19), va="center", fontsize=8)
        memory.barh(y - 0.19, run.kept / 1e9, **reached)
        memory.annotate(f" {run.kept / 1e9:.2f} GB", (run.kept / 1e9, y - 0.19), va="center", fontsize=8)
    speed.set_yticks(range(len(shown)), [run.row.title.replace(", ", "\n", 1) for run in shown], fontsize=9)
    speed.set(xlabel="speed-up of the loop", xlim=(0, 1.25 * max(run.row.ideal for run in shown)))
    largest = max(run.kept_by_released or run.kept for run in shown) / 1e9
    memory.set(xlabel="GB kept", xscale="log", xlim=(0.05, 12 * largest))
    memory.xaxis.set_major_formatter("{x:g}")
    for panel in (speed, memory):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    entries = [
        Patch(color=pale, label="ideal: steps over computed steps"),
        Patch(color=blue, label="this package"),
        Patch(color=orange, label="the released code's way"),
    ]
    if not all(run.measured for run in shown):
        entries.append(Patch(facecolor="white", edgecolor=ink, hatch="////", label=f"predicted for an {CHIP.name}"))
    entries += [speed.plot([], [], marker=marker, label=name, **caret)[0] for name, marker in PEERS.items()]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), fontsize=8, frameon=False)
    figure.savefig(path)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

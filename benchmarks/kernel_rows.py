"""Rows of kernel runs, and what is made of them: the README's table and docs/roofline.png."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks/results/kernels.jsonl"
PICTURE = ROOT / "docs/roofline.png"
OURS = "adacache-triton"
UNMEASURED = "Not measured on a GPU yet: `bash benchmarks/gpu.sh` does it where there is one.\n"


def rows_of(files: Iterable[Path]) -> list[dict]:
    """The kernels' rows in what `pytest benchmarks --benchmark-json FILE` wrote; of a run made twice, the last."""
    found = {}
    for file in files:
        for benchmark in json.loads(file.read_text())["benchmarks"]:
            if benchmark["name"].startswith("test_kernel["):
                row = benchmark["extra_info"]
                found[row["operation"], row["model"], row["what"], row["contender"]] = row
    return list(found.values())


def save(rows: list[dict], path: Path = ROWS) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(path: Path = ROWS) -> list[dict]:
    """No rows where nothing has been measured."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict]) -> str:
    """A row a call: its time, its share of what a copy reaches, and how many times longer the others take."""
    if not rows:
        return UNMEASURED
    others = [c for c in dict.fromkeys(row["contender"] for row in rows) if c != OURS]
    columns = ["", "MB", "us (p20 to p80)", "GB/s", "of a copy", "launches", "host us", *others]
    lines = [
        f"{_all(rows, 'device')}, driver {_all(rows, 'driver')}, torch {_all(rows, 'torch')}, Triton "
        f"{_all(rows, 'triton')}, revision {_all(rows, 'revision')}. Median device time of calls from a CUDA graph "
        "with a cold L2 cache; GB/s of the bytes that [docs/kernels.md](docs/kernels.md) counts, and its share of what "
        "a 512 MiB copy reaches in the same run; the host's time of a call. Then how many times as long the released "
        "code's expression takes, eager and compiled, and what other caches run instead. Raw: "
        f"`{ROWS.relative_to(ROOT)}`.",
        "",
        _row(columns),
        f"|---|{'--:|' * (len(columns) - 1)}",
    ]
    for run in _runs(rows):
        ours = run[OURS]
        name = ", ".join(filter(None, (f"`{ours['operation']}`", ours["model"], ours["what"])))
        speeds = [f"{run[c]['median_us'] / ours['median_us']:.2f}x" if c in run else "" for c in others]
        lines.append(_row([name, *_cells(ours), *speeds]))
    lines += ["", f"![Bandwidth of each call over the bytes it moves]({PICTURE.relative_to(ROOT)})"]
    return "\n".join(lines) + "\n"


def _cells(row: dict) -> list[str]:
    time = f"{row['median_us']:.1f} ({row['p20_us']:.1f} to {row['p80_us']:.1f})"
    large = row["bytes"] > 1e6  # else the time is a launch's
    speed = bandwidth(row)
    return [
        f"{row['bytes'] / 1e6:.1f}",
        time,
        f"{speed:.0f}" if large else "",
        f"{speed / row['copy_GBps']:.0%}" if large else "",
        "" if row["launches"] is None else str(row["launches"]),
        "" if row["host_us"] is None else f"{row['host_us']:.1f}",
    ]


def bandwidth(row: dict) -> float:
    """GB/s of the bytes that have to be moved."""
    return row["bytes"] / row["median_us"] / 1e3


def picture(rows: list[dict], path: Path = PICTURE) -> None:
    """A panel an operation: bandwidth over bytes moved, under the roof that a copy reaches."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["bytes"] > 1e6]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    roof = float(np.median([row["copy_GBps"] for row in rows]))
    lines = -(-len(operations) // 3)
    figure = Figure(figsize=(10, 3 * lines + 0.8), layout="constrained", dpi=110)
    grid = figure.subplots(lines, 3, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for panel in panels[len(operations) :]:
        panel.set_axis_off()
    for panel, operation in zip(panels, operations):
        panel.axhline(roof, color="#1b1f27", linewidth=1)
        for i, contender in enumerate(contenders):
            mine = [row for row in rows if (row["operation"], row["contender"]) == (operation, contender)]
            x, y = [row["bytes"] / 1e6 for row in mine], [bandwidth(row) for row in mine]
            panel.plot(x, y, "o" if contender == OURS else "x", color=f"C{i}", label=contender, zorder=2 - i / 100)
        panel.set(title=operation, xscale="log", xlabel="MB moved", ylabel="GB/s", ylim=(0, 1.2 * roof))
        panel.label_outer()
        panel.grid(alpha=0.3)
        panel.annotate("a copy", (0.02, roof), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(contenders), fontsize=8)
    figure.suptitle(_all(rows, "device"))
    figure.savefig(path)


def _runs(rows: list[dict]) -> list[dict[str, dict]]:
    """The rows of each call by contender; a call of which ours is missing is left out."""
    calls = {}
    for row in rows:
        calls.setdefault((row["operation"], row["model"], row["what"]), {})[row["contender"]] = row
    return [run for run in calls.values() if OURS in run]


def _all(rows: list[dict], key: str) -> str:
    return ", ".join(dict.fromkeys(str(row[key]) for row in rows))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

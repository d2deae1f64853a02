"""Put measured numbers and pictures into the README.

    python benchmarks/update_readme.py                    the tables, from the rows that are there, and the prediction
    python benchmarks/update_readme.py demo               and a folder that `make demo` wrote
    python benchmarks/update_readme.py GPU/kernels*.json  and rows that the benchmarks wrote on a GPU
    python benchmarks/update_readme.py GPU/*.jsonl        likewise, of denoising loops

Its tables are written from the demo's `report.json` and from the rows in `benchmarks/results/`; nothing in them is
typed by hand.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import end_to_end_rows
import evaluate_tables
import kernel_rows
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def main(paths: list[Path]) -> None:
    (ROOT / "docs").mkdir(exist_ok=True)
    if paths and paths[0].is_dir():
        for name in ("contact_sheet.png", "schedule.png"):
            shutil.copy(paths[0] / name, ROOT / "docs" / name)
        shutil.copy(paths[0] / "report.json", RESULTS / "demo.json")
    elif paths:
        of = end_to_end_rows if paths[0].suffix == ".jsonl" else kernel_rows
        rows = of.rows_of(paths)
        if any(row["device"].startswith("cpu") for row in rows):
            raise SystemExit("rows of a CPU show that the benchmarks run, not how fast anything is")
        of.save(rows)
        of.picture(of.load())
    else:
        end_to_end_rows.picture(end_to_end_rows.load())
    readme = (ROOT / "README.md").read_text()
    for name, text in tables().items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        head, rest = readme.split(begin)
        readme = head + begin + text + end + rest.split(end)[1]
    (ROOT / "README.md").write_text(readme)


def tables() -> dict[str, str]:
    """By name of the place in the README."""
    return {
        "demo": demo_table(json.loads((RESULTS / "demo.json").read_text())),
        "classes": class_table(),
        "evaluate": evaluate_tables.readme(),
        "end-to-end": end_to_end_rows.table(end_to_end_rows.load()),
        "kernels": kernel_rows.table(kernel_rows.load()),
        "models": "\n" + (ROOT / "docs" / "models.md").read_text().rpartition("\n\n")[2],
    }


def demo_table(report: dict) -> str:
    """A row a prompt: computed steps, speed-up, PSNR and SSIM of each cached variant."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    threads = f", {report['threads']} thread" if report["threads"] else ""
    names = [v["variant"] for v in report["videos"][0]["variants"][1:]]
    lines = [
        f"`make demo` on {report['device_name']}{threads} ({report['dtype']}; {versions}): "
        f"{report['model']} model, {report['steps']} steps, preset `{report['preset']}`, fidelity to the uncached "
        f"video of the same noise, speed-up of the denoising loop (median of {report['repeats']} interleaved runs). "
        "Raw: `benchmarks/results/demo.json`.",
        "",
        _row(["", *(f"{name}: computed | speed-up | PSNR dB | SSIM" for name in names)]),
        f"|---|{'--:|' * 4 * len(names)}",
    ]
    for video in report["videos"]:
        cells = [video["prompt"]]
        for v in video["variants"][1:]:
            cells.append(f"{len(v['computed_steps'])} of {v['num_steps']}")
            cells += [f"{v['speedup']:.2f}x", f"{float(v['psnr']):.1f}", f"{v['ssim']:.3f}"]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


# Codebook factor and MoReg scale of the columns: the preset, with MoReg, and without it at about as many steps.
COLUMNS = {
    "preset": ("0.25", "", ""),
    "preset + MoReg": ("0.25", "0.1", "1"),
    "codebook x 0.18": ("0.18", "", ""),
}


def class_table() -> str:
    """A row a class: how many steps a searched schedule needs, and what the rules compute, over held-out seeds."""
    difficulty = list(csv.DictReader((RESULTS / "embedded_difficulty.csv").open()))
    preset = list(csv.DictReader((RESULTS / "embedded_preset.csv").open()))
    seeds = sorted({row["seed"] for row in difficulty})
    targets = (30, 35, 40)
    lines = [
        f"`python benchmarks/embedded.py difficulty` and `... preset`, {len(seeds)} videos a class (seeds "
        f"{', '.join(seeds)}), {difficulty[0]['device']}, torch {difficulty[0]['torch']}; rows in "
        "`benchmarks/results/`. Left: how few computed steps a schedule searched for the video itself needs; right: "
        "computed steps and PSNR by the decision rule.",
        "",
        _row(["", *(f"{t} dB" for t in targets), *COLUMNS]),
        f"|---|{'--:|' * (len(targets) + len(COLUMNS))}",
    ]
    classes = list(dict.fromkeys(row["class"] for row in difficulty))
    every = []  # [class][video, target]
    for name in classes:
        videos = np.array([[_needed(difficulty, name, seed, target) for target in targets] for seed in seeds])
        needed = videos.mean(0)
        found = [_rule(preset, setting, [name]) for setting in COLUMNS.values()]
        every.append(videos)
        lines.append(_row([name, *(f"{n:.1f}" for n in needed), *found]))
    overall = [_rule(preset, setting, classes) for setting in COLUMNS.values()]
    means, videos = np.array([v.mean(0) for v in every]), np.concatenate(every)
    lines.append(_row(["hardest over easiest class; mean of all", *_spread(means), *overall]))
    lines.append(_row(["hardest over easiest video", *_spread(videos), *[""] * len(COLUMNS)]))
    return "\n".join(lines) + "\n"


def _spread(needed: np.ndarray) -> list[str]:
    return [f"{ratio:.2f} fold" for ratio in needed.max(0) / needed.min(0)]


def _needed(rows: list[dict], name: str, seed: str, target: float) -> float:
    """Computed steps at which the best schedules reach a PSNR, between measured counts by interpolation."""
    found = [row for row in rows if (row["class"], row["seed"]) == (name, seed)]
    found.sort(key=lambda row: int(row["computed"]))
    return float(np.interp(target, [float(r["psnr"]) for r in found], [int(r["computed"]) for r in found]))


def _rule(rows: list[dict], setting: tuple[str, str, str], classes: list[str]) -> str:
    found = [
        row
        for row in rows
        if row["codebook"] == "open-sora-30-fast"
        and (row["factor"], row["moreg_scale"], row["moreg_power"]) == setting
        and row["class"] in classes
    ]
    computed = np.mean([int(row["computed"]) for row in found])
    return f"{computed:.1f}, {np.mean([float(row['psnr']) for row in found]):.1f} dB"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])

"""Put a demo's numbers and pictures into the README: `python benchmarks/update_readme.py demo`.

The table is written from `report.json`; nothing in it is typed by hand.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(demo: Path) -> None:
    report = json.loads((demo / "report.json").read_text())
    readme = (ROOT / "README.md").read_text()
    begin, end = "<!-- demo:begin -->\n", "<!-- demo:end -->"
    head, rest = readme.split(begin)
    (ROOT / "README.md").write_text(head + begin + table(report) + end + rest.split(end)[1])
    (ROOT / "docs").mkdir(exist_ok=True)
    for name in ("contact_sheet.png", "schedule.png"):
        shutil.copy(demo / name, ROOT / "docs" / name)
    shutil.copy(demo / "report.json", ROOT / "benchmarks/results/demo.json")


def table(report: dict) -> str:
    """Markdown: a row a prompt, computed steps, speed-up, PSNR and SSIM of each cached variant."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    threads = f", {report['threads']} thread" if report["threads"] else ""
    names = [v["variant"] for v in report["videos"][0]["variants"][1:]]
    columns = ["", *(f"{name}: computed | speed-up | PSNR dB | SSIM" for name in names)]
    lines = [
        f"`{report['command']}` on {report['device_name']}{threads} ({report['dtype']}; {versions}): "
        f"{report['model']} model, {report['steps']} steps, preset `{report['preset']}`, fidelity to the uncached "
        f"video of the same noise, speed-up of the denoising loop (median of {report['repeats']} interleaved runs). "
        "Raw: `benchmarks/results/demo.json`; written by `benchmarks/update_readme.py`.",
        "",
        f"| {' | '.join(columns)} |",
        f"|---|{'--:|' * 4 * len(names)}",
    ]
    for video in report["videos"]:
        cells = [video["prompt"]]
        for v in video["variants"][1:]:
            cells.append(f"{len(v['computed_steps'])} of {v['num_steps']}")
            cells += [f"{v['speedup']:.2f}x", f"{float(v['psnr']):.1f}", f"{v['ssim']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

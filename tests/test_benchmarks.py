"""The benchmarks run on a CPU, and what is made of their rows is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_rows
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The file of a run of all the kernels."""
    file = tmp_path_factory.mktemp("rows") / "kernels.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_kernels.py", "--benchmark-only"]
    run = subprocess.run(
        [*command, "--benchmark-json", file],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # small shapes on a machine with a GPU too
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"\n{run.stdout}\n{run.stderr}"
    return file


def test_every_operation_is_measured_beside_eager(measured):
    rows = kernel_rows.rows_of([measured])
    runs = {(row["operation"], row["contender"]) for row in rows}
    operations = {"residual_stats", "gated_residual", "reuse", "keep", "relative_distance", "decide", "decision"}
    assert runs >= {(operation, who) for operation in operations for who in ("adacache-triton", "eager")}
    assert runs >= {("relative_distance", "TeaCache"), ("relative_distance", "first-block cache")}
    for row in rows:
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["copy_GBps"] > 0 and row["bytes"] > 0 and row["torch"] and row["device"]
        assert row.keys() >= {"driver", "triton", "revision", "shape", "dtype", "cold", "host_us", "launches"}
    assert next(row["bytes"] for row in rows if row["operation"] == "residual_stats") == 3 * 2 * (2 * 4 * 36 * 64)


def test_rows_become_a_table_and_a_picture(measured, tmp_path):
    gpu = {"device": "GPU", "driver": "1", "launches": 2, "host_us": 12.3, "copy_GBps": 4000.0, "bytes": 360_000_000}
    times = {"adacache-triton": 100.0, "eager": 520.0, "TeaCache": 310.0, "first-block cache": 330.0}
    rows = [
        row | gpu | {"median_us": times[row["contender"]], "p20_us": 90.0, "p80_us": 110.0}
        for row in kernel_rows.rows_of([measured])
    ]
    kernel_rows.save(rows, tmp_path / "rows.jsonl")
    assert kernel_rows.load(tmp_path / "rows.jsonl") == rows
    table, cells = kernel_rows.table(rows), "| 360.0 | 100.0 (90.0 to 110.0) | 3600 | 90% | 2 | 12.3 | 5.20x |"
    assert f"| `residual_stats`, tiny {cells}  |  |" in table
    assert f"| `relative_distance`, tiny {cells} 3.10x | 3.30x |" in table
    kernel_rows.picture(rows, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_run_made_twice_the_last_counts(measured, tmp_path):
    again = json.loads(measured.read_text())
    for benchmark in again["benchmarks"]:
        benchmark["extra_info"]["median_us"] = 1.0
    (tmp_path / "again.json").write_text(json.dumps(again))
    rows = kernel_rows.rows_of([measured, tmp_path / "again.json"])
    assert len(rows) == len(again["benchmarks"]) and all(row["median_us"] == 1.0 for row in rows)


def test_without_rows_nothing_is_claimed():
    assert "Not measured on a GPU" in kernel_rows.table([])

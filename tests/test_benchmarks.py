"""The benchmarks run on a CPU, and what is made of their rows is right."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_rows
import no_stall
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The file of a run of all the kernels."""
    file = tmp_path_factory.mktemp("rows") / "kernels.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_kernels.py", "--benchmark-only"]
    # A process of its own, also where xdist runs this one, for what is measured among workers is no measurement.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        [*command, "--benchmark-json", file],
        cwd=ROOT,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},  # small shapes on a machine with a GPU too
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


def traced(*operations, spans=()):
    """Events of a trace: operations (launched, start, end) on the device, and (name, start, end) on the host."""
    events = [{"ph": "M", "name": "process_name", "args": {"name": "python"}}]
    events += [{"cat": "user_annotation", "name": name, "ts": start, "dur": end - start} for name, start, end in spans]
    events += [{"cat": "gpu_user_annotation", "name": name, "ts": 0, "dur": 9999} for name, *_ in spans]
    for i, (launched, start, end) in enumerate(operations):
        api = "cuda_driver" if i % 2 else "cuda_runtime"  # Triton's launches, and PyTorch's
        events.append({"cat": api, "ts": launched, "dur": 2, "args": {"correlation": i}})
        kind = ("kernel", "gpu_memcpy", "gpu_memset")[i % 3]
        events.append({"cat": kind, "ts": start, "dur": end - start, "args": {"correlation": i}})
    return events[::-1]  # in no order


def test_gaps_of_a_trace():
    steps = ("step 1", 0, 100), ("step 2", 100, 300), ("probe", 20, 35)
    # All is launched before the last has ended: what the device does between two kernels is its own affair.
    full = (0, 10, 50), (20, 50, 60), (40, 63, 120), (110, 200, 250)
    assert no_stall.gaps(traced(*full, spans=steps)) == {"behind the probe": [], "between steps": [], "elsewhere": []}
    # The host reads what the probe sent, and is late with what comes next; then with the next step, and inside it.
    dry = (0, 10, 50), (20, 50, 60), (75, 80, 90), (110, 117, 130), (190, 201, 210), (195, 212, 220)
    assert no_stall.gaps(traced(*dry, spans=steps)) == {
        "behind the probe": [20],
        "between steps": [27],
        "elsewhere": [71],
    }
    # A second stream is at work in between.
    beside = *dry, (15, 55, 195)
    assert no_stall.gaps(traced(*beside, spans=steps)) == {
        "behind the probe": [],
        "between steps": [],
        "elsewhere": [],
    }
    assert no_stall.gaps([]) == no_stall.gaps(traced(*full, spans=steps))


@pytest.mark.skipif(no_stall.CUDA, reason="takes the sizes of a GPU")
def test_no_stall_runs(tmp_path, capsys):
    for measured in (["busy"], ["trace", "busy", "graphs"]):  # what is measured again takes the old rows' place
        no_stall.main([*measured, "--out", str(tmp_path / "rows.csv")])
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    counts = [len([row for row in rows if row["measured"] == measured]) for measured in ("trace", "busy", "graphs")]
    assert counts == [8, 10, 14]
    assert {row["variant"] for row in rows} == {*no_stall.VARIANTS, *no_stall.COMPILED}
    for row in rows:
        assert row["device"].startswith("cpu") and row["torch"] and row.keys() >= {"driver", "triton", "revision"}
        assert row["measured"] == "trace" or row["what"] == "decision" or float(row["p20"]) > 0
    with pytest.raises(SystemExit):
        no_stall.main(["busy"])
    assert "--out: expected with rows of a CPU" in capsys.readouterr().err

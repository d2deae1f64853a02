"""Denoising loops at full size: that they run, at small sizes, and what their cost model says, at full ones."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from importlib import metadata

import cost_model
import end_to_end
import end_to_end_rows
import pytest
import torch
from architectures import BY_NAME, ROWS, TRACES, turning, typical
from contenders import COMPILED, CONTENDERS, AdaCache, CacheDit, FirstBlockCache, Fixed, Loop, NoCache, Released
from cost_model import CHIPS, PEERS, Stream, counted, predicted, work
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adacache_triton import AdaCacheConfig
from adacache_triton.models import described

pytestmark = pytest.mark.filterwarnings("ignore")
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
pinned = pytest.mark.skipif(
    any(metadata.version(name).partition("+")[0] != version for name, version in cost_model.PINNED.items()),
    reason="counted with other versions",
)
EAGER = [kind.name for kind in CONTENDERS]
PRESETS = {"100-fast": "open-sora-100", "30-fast": "open-sora-30-fast", "30-slow": "open-sora-30-slow"}


def small(row) -> tuple[dict, object]:
    architecture = row.architecture
    return {**architecture.config, **architecture.small}, architecture.shrunk


def lines_of(folder, name: str) -> dict[str, dict]:
    lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return {line["contender"]: line for line in lines}


def run(folder, name: str, *options: str) -> int:
    return end_to_end.main([name, "--out", str(folder), "--small", *options])


# Schedules


@rows
def test_schedules_are_what_published_speed_ups_allow(row):
    assert row.schedule[0] == 1 and row.schedule[-2:] == (row.steps - 1, row.steps)
    published = {"open-sora-720p": 4.7, "open-sora-480p": 2.24, "latte": 2.74, "open-sora-plan": 3.7}
    if row.name in published:
        assert row.ideal >= published[row.name] > row.steps / (len(row.schedule) + 2)


def test_a_turning_residual_is_that_of_the_recorded_traces():
    """But for two of fifteen, where a distance of the made residuals falls on the other side of a threshold."""
    plain = [trace for trace in TRACES if trace["moreg"] is None and trace["dtype"] == "float32"]
    same = []
    for trace in plain:
        preset = PRESETS["-".join(trace["name"].split("-")[:2])]
        steps = turning(AdaCacheConfig.official(preset), trace["num_steps"], trace["speed"])
        same.append(list(steps) == [row["step"] for row in trace["trace"]])
    assert (sum(same), len(same)) == (13, 15)


def test_a_count_that_no_speed_gives_is_refused():
    with pytest.raises(ValueError, match="computed: expected a count that open-sora-100 comes to in 100 steps, got 90"):
        typical("open-sora-100", 100, 90)


# The cost model


def counted_by_pytorch(row, config, video) -> tuple[int, int]:
    """FLOPs of a call on tensors without memory: in the blocks, and outside of them."""
    architecture, stack = row.architecture, described(row.architecture.kind)
    model = architecture.build("meta", torch.bfloat16, **config)
    noise = lambda *shape: torch.empty(*shape, device="meta", dtype=torch.bfloat16)  # noqa: E731
    arguments = {
        stack.input: noise(row.samples, *architecture.latents(config, video)),
        stack.timestep: torch.empty(row.samples, device="meta"),
        **architecture.condition(config, video, row.samples, noise),
    }
    flops = []
    for emptied in (False, True):
        for path in stack.lists if emptied else ():
            setattr(model, path, nn.ModuleList())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**arguments)
        flops.append(counter.get_total_flops())
    return flops[0] - flops[1], flops[1]


@rows
def test_multiplications_are_those_that_pytorch_counts(row):
    config, video = small(row)
    full = {**row.architecture.config, **dict.fromkeys(row.architecture.depths, 2)}
    full["num_layers" if "num_layers" in full else "depth"] = 3  # two lists of unequal lengths, where there are two
    for sizes, shape in ((config, video), (full, row.video)):
        formula = cost_model.FORMULAS[row.architecture](sizes, shape, row.samples)
        found = cost_model.flops(formula.blocks), cost_model.flops(formula.outside)
        assert found == counted_by_pytorch(row, sizes, shape)


def test_multiplications_of_a_whole_model():
    row = BY_NAME["open-sora-720p"]
    found = work(row)
    expected = counted_by_pytorch(row, row.architecture.config, row.video)
    assert (cost_model.flops(found.blocks), cost_model.flops(found.outside)) == expected
    assert sum(expected) == pytest.approx(284e12, rel=0.01)


@pinned
def test_the_document_is_what_the_command_writes():
    assert cost_model.COUNTS.read_text() == cost_model.counts()
    assert cost_model.PATH.read_text() == cost_model.document()


def test_bytes_of_operations():
    """x * y + z, y broadcast: two operations, each reads its operands once and writes its result."""
    x, y, z = (torch.empty(shape, device="meta") for shape in ((4, 8), (8,), (4, 8)))
    with cost_model.Counter() as counter:
        (x * y.expand(4, 8) + z).unflatten(0, (2, 2)).transpose(0, 1)
    assert counter.moved == cost_model.Moved(4 * (32 + 8 + 32 + 32 + 32 + 32), 2)


def test_blocks_left_out_are_counted_as_those_that_are_there():
    row = BY_NAME["open-sora-720p"]
    deeper = dataclasses.replace(row.architecture, config={**row.architecture.config, "depth": 4})
    whole = cost_model._count(dataclasses.replace(row, architecture=deeper), {})
    assert cost_model.count(dataclasses.replace(row, architecture=deeper)) == whole


@rows
def test_a_prediction_is_in_proportion(row):
    for chip in CHIPS:
        guess = predicted(row, chip)
        peak = row.calls * (
            cost_model.flops(work(row).blocks) / chip.flops + counted(row).blocks.bytes / chip.bandwidth
        )
        assert peak < guess.uncached < 4 * peak
        assert 0 < guess.floor < guess.steps["AdaCache"][1] < guess.uncached / 50
        assert guess.share("AdaCache") <= guess.share("AdaCache, fixed schedule") <= 1
        assert all(guess.loop("AdaCache") < guess.loop(name) for name in guess.steps if name not in EAGER[:3])


def test_what_the_prediction_says_of_the_targets():
    """Of an H200; the README repeats it until a row is measured."""
    guesses = {row.name: predicted(row, CHIPS[-1]) for row in ROWS}
    assert guesses["open-sora-720p"].speedup("AdaCache") > 4.7
    assert all(guess.share("AdaCache") >= 0.98 for guess in guesses.values())
    assert all(guess.decision <= 1e-3 * guess.steps["AdaCache"][0] for guess in guesses.values())
    assert not any(guess.steps["AdaCache"][1] <= 1.05 * guess.floor for guess in guesses.values()), "missed"
    times = {row.name: Stream(row).kept_by_released / Stream(row).kept for row in ROWS}
    assert [name for name, ratio in times.items() if ratio >= 50] == [row.name for row in ROWS[:4]]


# The runs


def modules_run(loop: Loop) -> list[int]:
    """Counts the calls of the last block's MLP, as the steps go by."""
    calls = [0]
    last = loop.lists[-1][-1]
    mlp = next(m for name, m in last.named_children() if name in ("mlp", "ff", "ffn", "proj_mlp"))
    mlp.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize("kind", CONTENDERS[1:], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["open-sora-480p", "wan-1.3b", "hunyuan-720p"])
@torch.no_grad()
def test_contenders_run_their_blocks_on_computed_steps_alone(kind, name):
    if kind is CacheDit:
        pytest.importorskip("cache_dit")
    if name not in PEERS and kind in (FirstBlockCache, CacheDit):
        pytest.skip("does not run")
    row, steps, ran = BY_NAME[name], end_to_end.FIRST, []
    loop = Loop(row, "cpu", torch.float32, small=True)
    plain, calls = loop.step(loop.latents, 1), modules_run(loop)
    contender = kind(loop)
    for schedule in ((1, 2, 5), (1, 2, 3, 6)):  # a second run is one of its own
        latents = loop.latents
        contender.start(schedule)
        ran = []
        for step in range(1, steps + 1):
            contender.tell(step)
            before = calls[0]
            latents = loop.step(latents, step)
            ran += [step] * ((calls[0] - before) // row.calls)
        assert contender.finish() == list(schedule) == ran
        assert contender.kept_bytes > 0
    contender.remove()
    torch.testing.assert_close(loop.step(loop.latents, 1), plain, rtol=0, atol=0)


@rows
@torch.no_grad()
def test_what_the_released_way_and_this_package_do_and_keep(row):
    """The same video, and the bytes that the cost model says."""
    config, video = small(row)
    stream, schedule, steps = Stream(row, config, video), (1, 2, 5), 7
    kept = {AdaCache: stream.kept, Fixed: stream.kept // 2, Released: stream.kept_by_released}
    results = {}
    for kind in kept:
        loop = Loop(row, "cpu", torch.float32, small=True)
        contender, latents = kind(loop), loop.latents
        contender.start(schedule)
        for step in range(1, steps + 1):
            contender.tell(step)
            latents = loop.step(latents, step)
        contender.finish()
        assert contender.kept_bytes == 2 * kept[kind], "in float32"
        results[kind] = latents
        contender.remove()
    torch.testing.assert_close(results[Fixed], results[AdaCache], rtol=0, atol=0)
    torch.testing.assert_close(results[Released], results[AdaCache], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_to_end, "REFERENCE_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def timed(few_steps, tmp_path_factory):
    """All rows, small, without compiled blocks; the first of them as a whole loop."""
    folder = tmp_path_factory.mktemp("rows")
    for row in ROWS:
        assert run(folder, row.name, "--loop-seconds", "90" if row is ROWS[1] else "0") == 0
    return folder


@rows
def test_every_contender_has_a_line(row, timed):
    lines = lines_of(timed, row.name)
    assert list(lines) == [end_to_end.FLOOR, *EAGER]
    for name, line in lines.items():
        assert line["row"] == row.name and line["schedule"] == list(row.schedule) and line["source"] and line["torch"]
        assert line["small"] and line["weights_bytes"] > 0 and line["device"].startswith("cpu")
        if line["error"] or name == end_to_end.FLOOR:
            continue
        assert line["computed"] == (row.steps if name == "no cache" else len(row.schedule))
        assert line["loop_s"] > 0 and line["computed_s"] > 0 and line["uncached_s"] > 0
        assert line["speedup"] == pytest.approx(row.steps * line["uncached_s"] / line["loop_s"])
        assert line["share"] == pytest.approx(line["speedup"] * line["computed"] / row.steps)
        assert line["timed"] == "the loop" if row is ROWS[1] else "multiplied" in line["timed"]
        assert (line["decision_s"] is not None) == (name == "AdaCache")
        assert line["computed_bound"] in ("host", "GPU")
        assert ("reused_s" in line) == (name != "no cache")
    assert not any(lines[kind.name]["error"] for kind in CONTENDERS if kind.ours)
    assert not lines["released code's way"]["error"]
    assert (lines["FirstBlockCache"]["error"] is None) == (row.name in PEERS)


def test_peers_that_are_not_installed_are_lines_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    monkeypatch.setattr(end_to_end, "CONTENDERS", (CacheDit,))
    assert run(tmp_path, "ltx", "--loop-seconds", "0") == 0
    assert "cache_dit" in lines_of(tmp_path, "ltx")["cache-dit"]["error"]


def test_a_call_goes_on_where_the_last_one_stopped(tmp_path, monkeypatch):
    name = "open-sora-480p"
    room = iter([True, True])
    monkeypatch.setattr(end_to_end.Bench, "room", lambda self, seconds: next(room, False))
    assert run(tmp_path, name) == end_to_end.AGAIN
    assert list(lines_of(tmp_path, name)) == [end_to_end.FLOOR, "no cache"]
    monkeypatch.undo()
    monkeypatch.setattr(end_to_end, "CONTENDERS", (NoCache, Fixed))
    before = lines_of(tmp_path, name)
    assert run(tmp_path, name, "--loop-seconds", "0") == 0
    after = lines_of(tmp_path, name)
    assert list(after) == [end_to_end.FLOOR, "no cache", Fixed.name]
    assert all(after[key] == line for key, line in before.items())


def test_this_package_failing_is_no_line_and_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "CONTENDERS", (AdaCache, Released))
    monkeypatch.setattr(AdaCache, "finish", lambda self: [1])
    assert run(tmp_path, "open-sora-480p", "--loop-seconds", "0") == 1
    assert list(lines_of(tmp_path, "open-sora-480p")) == [end_to_end.FLOOR, Released.name]


def test_compiled_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "COMPILED", COMPILED[:2])
    assert run(tmp_path, "wan-1.3b", "--loop-seconds", "0", "--compiled") == 0
    lines = lines_of(tmp_path, "wan-1.3b")
    assert list(lines) == [f"{kind.name}, compiled" for kind in COMPILED[:2]]
    assert all(line["compiled"] and line["error"] is None for line in lines.values())


class FakeEvent:
    """A CUDA event of a device that is never behind."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        assert self.time

    def elapsed_time(self, end) -> float:
        return 1e3 * (end.time - self.time)


def test_the_way_of_a_gpu(monkeypatch):
    """Events, memory and the choice of the attention, by a stand-in for the GPU."""
    faked = dict(Event=FakeEvent, synchronize=lambda: None, reset_peak_memory_stats=lambda: None)
    faked |= dict(max_memory_allocated=lambda: 123, empty_cache=lambda: None)
    for name, fake in faked.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    orders = []

    @contextlib.contextmanager
    def chosen(order, set_priority):
        assert set_priority
        orders.append(order[0].name)
        if order[0].name == "CUDNN_ATTENTION" and len(orders) == 1:
            raise RuntimeError("no plan for these shapes")
        yield

    monkeypatch.setattr(end_to_end, "sdpa_kernel", chosen)
    bench = end_to_end.Bench(BY_NAME["open-sora-480p"], "cpu", True, 0.0, math.inf, "eager")
    bench.clock.cuda = True
    floor, line = bench.floor(), bench.measure(AdaCache, False)
    assert floor["reused_s"] > 0 and line["peak_bytes"] == 123 and line["decision_s"] > 0
    assert set(orders[1:]) == {"FLASH_ATTENTION"} and bench.facts()["attention"] == "FLASH_ATTENTION"
    bench.forget()


def test_a_long_step_is_not_timed_more_often_than_it_must_be(monkeypatch):
    monkeypatch.setattr(end_to_end, "LONG", 0.0)
    bench = end_to_end.Bench(BY_NAME["open-sora-480p"], "cpu", True, 0.0, math.inf, "eager")
    assert bench.measure(NoCache, False)["uncached_after_s"] is None


def test_without_a_gpu_a_full_row_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        end_to_end.main(["latte", "--out", str(tmp_path)])


def test_a_list_of_the_rows(capsys):
    assert end_to_end.main([]) == 0
    listed = capsys.readouterr().out
    assert all(row.title in listed and row.source in listed for row in ROWS)


# What is made of the rows


def test_rows_become_a_table_and_a_picture(timed, tmp_path):
    found = end_to_end_rows.rows_of(sorted(timed.glob("*.jsonl")))
    assert "*predicted*" in end_to_end_rows.table(found), "small copies are no measurement"
    name = "wan-1.3b"
    measured = [
        row | {"small": False, "device": "GPU"} | ({} if row["error"] or "loop_s" not in row else {"uncached_s": 1.0})
        for row in found
        if row["row"] == name
    ]
    loops = {"no cache": 50.0, "AdaCache": 20.0, "released code's way": 22.0, "FirstBlockCache": 25.0}
    for row in measured:
        if row["contender"] in loops:
            row["loop_s"] = loops[row["contender"]]
    end_to_end_rows.save(measured, tmp_path / "rows.jsonl")
    assert end_to_end_rows.load(tmp_path / "rows.jsonl") == measured
    end_to_end_rows.save(measured[:1], tmp_path / "rows.jsonl")
    assert len(end_to_end_rows.load(tmp_path / "rows.jsonl")) == len(measured), "what was there stays"
    table = end_to_end_rows.table(measured)
    (line,) = (line for line in table.splitlines() if "Wan" in line)
    assert "| measured | 18 |" in line and "| 20.0, 50.0 | 2.50x | 90.0% |" in line and "| 1.10x | 1.25x |" in line
    assert table.count("*predicted*") == len(ROWS)  # the text above the table, and the other rows
    end_to_end_rows.picture(measured, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_a_number_that_json_lacks():
    assert end_to_end.plain(math.nan) is None and end_to_end.plain(1.5) == 1.5 and end_to_end.plain("x") == "x"

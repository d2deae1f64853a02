"""The command: what it writes and prints, and that a mistake is one line and leaves nothing behind."""

import functools
import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import LatteTransformer3DModel

from adacache_triton import AdaCacheConfig, __version__, cli, generate
from adacache_triton.cli import main
from adacache_triton.testbed import pipeline as embedded

VARIANTS = ["uncached", "AdaCache", "AdaCache+MoReg"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Nothing is written outside a test's own folder, and no network is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def latte(tmp_path_factory):
    return tiny_pipelines.save_latte(tmp_path_factory.mktemp("latte"))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return tiny_pipelines.save_wan(tmp_path_factory.mktemp("wan"))


def weights():
    if not (embedded.WEIGHTS / "latte").exists():
        warnings.warn("THE EMBEDDED MODEL HAS NO WEIGHTS: its test is skipped", stacklevel=2)
        pytest.skip(f"THE EMBEDDED MODEL HAS NO WEIGHTS in {embedded.WEIGHTS}")


def table(text: str) -> list[list[str]]:
    """The rows of the printed table: variant, computed, and, where cached, speed-up, PSNR, SSIM."""
    lines = text[text.index("PSNR dB") :].splitlines()[1:]
    rows = [re.search(r"(uncached|AdaCache\S*) +(\d+ of \d+)(.*)", line) for line in lines]
    return [[row[1], row[2], *row[3].split()] for row in rows if row]


def check(out, printed: str, stems: list[str], steps: int, repeats: int, frames: int) -> dict:
    """The files of a run, and that the report, the table and the lines of the runs tell the same."""
    files = {f"{stem}.mp4" for stem in stems} | {"contact_sheet.png", "schedule.png", "report.json"}
    assert {path.name for path in out.iterdir()} == files
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == steps and report["repeats"] == repeats
    assert report["versions"]["torch"] == torch.__version__
    assert [video["file"] for video in report["videos"]] == [f"{stem}.mp4" for stem in stems]
    runs = [variant for video in report["videos"] for variant in video["variants"]]
    names = ["uncached", *report["configs"]]
    assert [run["variant"] for run in runs] == names * len(stems)
    for run, row in zip(runs, table(printed), strict=True):
        computed = run["computed_steps"]
        assert row[:2] == [run["variant"], f"{len(computed)} of {steps}"]
        assert len(run["seconds"]) == repeats and min(run["seconds"]) > 0
        if run["variant"] == "uncached":
            assert computed == list(range(1, steps + 1)) and run["psnr"] is None and len(row) == 2
            continue
        assert computed == [step["step"] for step in run["steps"] if step["reason"] != "reused"]
        assert len(run["steps"]) == steps and {1, 2, steps - 1, steps} <= set(computed)
        assert run["kept_bytes"] > 0
        assert row[2] == f"{run['speedup']:.2f}x"
        assert row[3] == "inf" if run["psnr"] == "inf" else f"{run['psnr']:.1f}"
        assert row[4] == f"{run['ssim']:.4f}"
        strip = "".join("█" if step in computed else "░" for step in range(1, steps + 1))
        assert re.search(rf"{re.escape(run['variant'])} +{strip}  {len(computed)} of {steps}", printed)
        config = AdaCacheConfig.from_dict(report["configs"][run["variant"]])
        assert (config.motion is None) == (run["variant"] == "AdaCache")
    for name in ("contact_sheet.png", "schedule.png"):
        assert np.asarray(imageio.imread(out / name)).std() > 10
    for stem in stems:
        video = np.stack(imageio.mimread(out / f"{stem}.mp4", memtest=False))
        loops = math.ceil(32 / frames)
        assert len(video) == loops * frames
        assert video.shape[1] % 2 == video.shape[2] % 2 == 0
        assert video.shape[2] > 190 * len(names)
    for line in printed.splitlines()[-len(files) :]:
        assert Path(line).resolve().is_file()
    return report


def test_embedded_model(tmp_path, capsys):
    weights()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["generate", "--prompt", "spin", "--steps", "6", "--repeats", "1", "--seed", "3"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    report = check(tmp_path / "adacache-out", printed, ["spin"], steps=6, repeats=1, frames=8)
    assert (report["model"], report["preset"], report["videos"][0]["seed"]) == ("embedded", "embedded", 3)
    assert "embedded model on " in printed and "6 steps, 1 run" in printed
    assert "MoReg's window, 5-45 of 50 steps, becomes 1-5 of 6" in printed

    assert main(["report", "adacache-out/report.json", "--out", "again.png"]) == 0
    assert "spin, AdaCache+MoReg: " in capsys.readouterr().out and (tmp_path / "again.png").is_file()


def test_latte_from_disk(latte, tmp_path, capsys):
    size = "--frames 4 --height 16 --width 24".split()
    argv = ["generate", "--model", str(latte), "--prompt", "a cat runs", "--steps", "10", *size]
    assert main([*argv, "--repeats", "2", "--guidance", "3", "--out", "a/b", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    report = check(tmp_path / "a" / "b", printed, ["a-cat-runs"], steps=10, repeats=2, frames=4)
    assert report["pipeline"] == "LattePipeline" and report["dtype"] == "bfloat16"
    assert report["options"] == {"guidance": 3.0, "frames": 4, "height": 16, "width": 24}
    first = "thresholds published for Open-Sora with 30 steps"
    second = "MoReg's window, 4-26 of 30 steps, becomes 1-9 of 10"
    assert printed.splitlines()[0] == f"preset open-sora-30-fast: {first}; {second}"
    assert re.search(r"^a/b/a-cat-runs.mp4$", printed, re.MULTILINE)


def test_wan_from_disk(wan, tmp_path, capsys):
    size = "--frames 5 --height 16 --width 16".split()
    argv = ["generate", "--model", str(wan), "--prompt", "a cat", "A cat!", "--steps", "9", *size]
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    moreg = ["--codebook", "1000:3,1", "--moreg", "scale=0.4,power=2,window=2-8,strides=1"]
    assert main([*argv, "--repeats", "1", "--out", str(out), *moreg]) == 0
    (out / "mine.txt").unlink()
    report = check(out, capsys.readouterr().out, ["a-cat", "a-cat-2"], steps=9, repeats=1, frames=5)
    assert [video["seed"] for video in report["videos"]] == [0, 1]
    for video in report["videos"]:
        assert video["variants"][1]["computed_steps"] == [1, 2, 5, 8, 9]  # two forwards a step
    motion = report["configs"]["AdaCache+MoReg"]["motion"]
    assert (motion["scale"], motion["power"], motion["window"]) == (0.4, 2, [2, 8])


def test_where_every_step_is_computed_the_video_is_the_same(wan, tmp_path, capsys):
    argv = "generate --prompt dog --steps 3 --repeats 1 --frames 5 --height 16 --width 16 --moreg off".split()
    assert main([*argv, "--model", str(wan), "--codebook", "1e-9:1,1", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    report = check(tmp_path / "out", printed, ["dog"], steps=3, repeats=1, frames=5)
    cached = report["videos"][0]["variants"][1]
    assert (cached["psnr"], cached["ssim"]) == ("inf", 1.0) and list(report["configs"]) == ["AdaCache"]
    assert report["notes"] == [] and " inf " in printed


def test_without_ffmpeg_a_gif(tmp_path, monkeypatch):
    from adacache_triton import pictures

    frames = np.random.default_rng(0).random((3, 5, 7, 3), dtype=np.float32)
    variants = [generate.Variant("uncached", frames, 4, None, [1.0]) for _ in range(2)]
    monkeypatch.setattr(pictures, "_has_ffmpeg", lambda: False)
    name = pictures.write_video(tmp_path, generate.Video("a", "a", 0, variants))
    video = np.stack(imageio.mimread(tmp_path / name, memtest=False))
    assert name == "a.gif" and len(video) == 33 and min(video.shape[1:3]) > 180


def test_the_steps_are_seen_as_they_happen(monkeypatch, capsys):
    from adacache_triton import terminal

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(terminal, "REFRESH", -1)
    request = cli._request(cli._parser().parse_args(["generate", "--prompt", "spin", "--steps", "4"]), "")
    with terminal.Progress(request) as progress:
        progress.start("spin", "AdaCache")
        for step, computed in enumerate((True, True, False), 1):
            progress.step(step, computed)
        seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert re.search(r"spin +AdaCache +█\s.*spin +AdaCache +██\s.*spin +AdaCache +██░\s.*0/9", seen, re.DOTALL)


def test_nothing_heavy_is_imported_before_the_arguments_are_right():
    code = """if True:
        import sys
        from adacache_triton.cli import main
        assert main(["generate", "--steps", "2"]) == 2 and main(["generate", "--help"]) == 0
        heavy = {"diffusers", "transformers", "matplotlib", "skimage", "imageio", "rich"} & sys.modules.keys()
        sys.exit(f"imported: {heavy}" if heavy else 0)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"adacache-triton {__version__}\n"


CLASSES = "still, drift, bounce, spin, cross, texture"
PRESETS = "open-sora-100, open-sora-30-fast, open-sora-30-slow, embedded"
PAIRS = "threshold:rate pairs and a last rate, as in 0.03:12,0.05:10,3"
SETTINGS = (
    "on, off or settings (window, strides, scale, power, divisor, gradient) as in scale=0.4,window=5-45,strides=1+2"
)

MISTAKES = {
    "--steps 2": "--steps: expected an integer >= 3, got 2",
    "--steps ten": "--steps: expected an integer >= 3, got 'ten'",
    "--steps": "--steps: expected one argument",
    "--repeats 0": "--repeats: expected an integer >= 1, got 0",
    "--seed -1": "--seed: expected an integer >= 0, got -1",
    "--preset open-sora": f"--preset: expected one of {PRESETS}, got 'open-sora'",
    "--codebook 0.03": f"--codebook: expected {PAIRS}, got '0.03'",
    "--codebook 0.05:4,0.03:2,1": "--codebook: thresholds: expected ascending values, got 0.03 after 0.05",
    "--codebook 0.03:4,0": "--codebook: rates: expected an integer >= 1, got 0",
    "--codebook nan:4,1": "--codebook: thresholds: expected a finite number > 0, got nan",
    "--codebook inf:4,1": "--codebook: thresholds: expected a finite number > 0, got inf",
    "--moreg maybe": f"--moreg: expected {SETTINGS}, got 'maybe'",
    "--moreg window=9": "--moreg: window: expected two steps (first, last), got (9,)",
    "--moreg window=9-5": "--moreg: window: expected 1 <= first <= last, got (9, 5)",
    "--moreg scale=0": "--moreg: scale: expected a finite number > 0, got 0.0",
    "--prompt spin cat": f"--prompt: expected classes of the embedded model ({CLASSES}), got 'cat'",
    "--frames 16": "--frames: expected none for the embedded model (8 frames of 24 x 24), got 16",
    "--guidance nan": "--guidance: expected a finite number >= 0, got 'nan'",
    "--device tpu": "--device: expected cpu, cuda or cuda:N, got 'tpu'",
    "--device cuda": "--device: expected a device that is there (torch finds no CUDA device), got 'cuda'",
    "--dtype int8": "--dtype: expected one of float32, bfloat16, float16, got 'int8'",
    "--model there": "--model: expected a pipeline's folder or a Hub id owner/name, got 'there'",
    "--model ./a/b": "--model: expected a pipeline's folder or a Hub id owner/name, got './a/b'",
    "--model . --prompt a": "--model: expected a pipeline's folder with a model_index.json, got '.'",
    "--cache 3": "unrecognized arguments: --cache 3",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["generate", *arguments.split(), "--out", "out/deep"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"adacache-triton: error: {MISTAKES[arguments]}\n" and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_no_command_is_a_mistake_too(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err == "adacache-triton: error: the following arguments are required: COMMAND\n"


def fails(argv: list[str], capsys) -> str:
    """The one line of a call that fails."""
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("adacache-triton: error: ")
    return printed.err.removeprefix("adacache-triton: error: ").rstrip("\n")


def test_mistakes_about_models(latte, tmp_path, capsys):
    argv = ["generate", "--out", "out", "--steps", "5", "--model"]
    assert fails([*argv, str(latte)], capsys) == "--prompt: expected at least one text for --model, got none"

    for name, entry in {"PixArtAlpha": ["diffusers", "PixArtTransformer2DModel"], "Wan": [None, None]}.items():
        folder = tmp_path / name
        folder.mkdir()
        index = {"_class_name": f"{name}Pipeline", "_diffusers_version": "0.36.0", "transformer": entry}
        (folder / "model_index.json").write_text(json.dumps(index))
    line = fails([*argv, "PixArtAlpha", "--prompt", "a"], capsys)
    assert re.fullmatch(r"--model: transformer: expected a known class \(.*\).*, got PixArtTransformer2DModel", line)
    expected = "--model: expected a pipeline with a transformer of diffusers"
    assert fails([*argv, "Wan", "--prompt", "a"], capsys) == f"{expected}, got WanPipeline without a transformer"

    (tmp_path / "Wan" / "model_index.json").write_text("{")
    line = fails([*argv, "Wan", "--prompt", "a"], capsys)
    assert line.startswith("--model: expected a pipeline that diffusers can load, got 'Wan': ")

    line = fails([*argv, str(latte), "--prompt", "a", "--height", "12"], capsys)
    assert line.startswith("--model: expected arguments that LattePipeline takes, got ValueError: `height` and")
    assert {path.name for path in tmp_path.iterdir()} == {"PixArtAlpha", "Wan"}


def test_output_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "generate", lambda *_: pytest.fail("was run"))
    (tmp_path / "file").write_text("kept")
    assert fails(["generate", "--out", "file"], capsys) == "--out: expected a folder, got the file 'file'"
    expected = "--out: expected a folder to write to, got 'file/deep': Not a directory"
    assert fails(["generate", "--out", "file/deep"], capsys) == expected

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cli.tempfile, "mkdtemp", refuse)  # root may write anywhere
    expected = "--out: expected a folder to write to, got 'a/b': Permission denied"
    assert fails(["generate", "--out", "a/b"], capsys) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_a_missing_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    line = fails(["generate"], capsys)
    assert line == "skimage: expected an installed package, found none; pip install adacache-triton[demo]"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def breaking(latte, monkeypatch):
    """Arguments of a call that ends with the given error in the middle of its third run."""
    whole, forwards = LatteTransformer3DModel.forward, []

    def arguments(error: BaseException) -> list[str]:
        forwards.clear()

        @functools.wraps(whole)
        def forward(*args, **kwargs):
            forwards.append(1)
            if len(forwards) == generate.WARM_UP_STEPS + 2 * 6 + 3:
                raise error
            return whole(*args, **kwargs)

        monkeypatch.setattr(LatteTransformer3DModel, "forward", forward)
        size = "--frames 4 --height 16 --width 16 --steps 6 --prompt a --out a/b".split()
        return ["generate", "--model", str(latte), *size]

    return arguments


def test_an_interrupt_leaves_nothing(breaking, tmp_path, capsys):
    assert main(breaking(KeyboardInterrupt())) == 130
    printed = capsys.readouterr()
    assert printed.err == "adacache-triton: interrupted, nothing half-written is left\n"
    assert "AdaCache " in printed.out and "MoReg  " not in printed.out
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_what_was_there(breaking, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "report.json").write_text("older")
    assert main(breaking(KeyboardInterrupt())) == 130
    assert [(path.name, path.read_text()) for path in (tmp_path / "a" / "b").iterdir()] == [("report.json", "older")]


def test_an_error_in_the_middle_leaves_nothing(breaking, tmp_path, capsys):
    line = fails(breaking(ValueError("three\nlines\nlong")), capsys)
    assert line == "--model: expected arguments that LattePipeline takes, got ValueError: three"
    with pytest.raises(ZeroDivisionError):  # not of the user's making: a traceback, and nothing left either
        main(breaking(ZeroDivisionError()))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(latte, tmp_path, capsys, monkeypatch):
    from adacache_triton import pictures

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "contact_sheet", full)
    size = "--frames 4 --height 16 --width 16 --steps 3 --repeats 1 --prompt a --out a/b".split()
    line = fails(["generate", "--model", str(latte), *size], capsys)
    assert line == "--out: expected room for the files, got [Errno 28] No space left on device"
    assert list(tmp_path.iterdir()) == []

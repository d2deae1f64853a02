"""The command `adacache-triton`: one line for every mistake, files that are whole or not there."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ._version import __version__
from .config import FORECASTS, OFFICIAL, PRESETS, AdaCacheConfig, Codebook, MotionRegularization
from .generate import ADACACHE, MOREG, UNCACHED, Request, UsageError, generate, report_from
from .report import Report
from .testbed.videos import CLASSES, NUM_FRAMES, SIZE

DTYPES = ("float32", "bfloat16", "float16")
PACKAGES = ("diffusers", "transformers", "matplotlib", "skimage", "imageio", "PIL", "rich")


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 2 after a one-line error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser().parse_args(argv)
        args.run(args, shlex.join(["adacache-triton", *argv]))
    except UsageError as error:
        print(f"adacache-triton: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("adacache-triton: interrupted, nothing half-written is left", file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help and --version
        return stop.code or 0
    return 0


def _generate(args: argparse.Namespace, command: str) -> None:
    request = _request(args, command)
    _check_packages()
    with _staging(args.out) as (folder, publish):
        videos = generate(request, folder)
        files = publish()
    from .terminal import print_results

    print_results(request, videos, files)


def _calibrate(args: argparse.Namespace, command: str) -> None:
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise UsageError(f"--out: expected a file to write in a folder that is there, got {str(args.out)!r}")
    _check_packages()
    from .testbed.pipeline import EMBEDDED

    prompts = args.prompt
    if args.model in EMBEDDED:
        kind = EMBEDDED[args.model]
        prompts = prompts or kind.examples()
        for prompt in prompts:
            try:
                kind.words(prompt)
            except ValueError as error:
                raise UsageError(f"--{error}") from None
    else:
        _check_model(args.model)
        if not prompts:
            raise UsageError("--prompt: expected at least one text for --model, got none")
    device = _device_of(args)
    request = Request(
        command=command, model=None if args.model == "latte" else args.model, prompts=tuple(prompts), steps=args.steps,
        seed=args.seed, repeats=1, device=device, dtype=_dtype_of(args, args.model not in EMBEDDED, device), preset="",
        variants={}, options=_options(args), notes=(),
    )  # fmt: skip
    if request.options and args.model in EMBEDDED and request.options.keys() - {"guidance"}:
        raise UsageError(f"--{min(request.options.keys() - {'guidance'})}: expected none for an embedded model")
    from .terminal import calibrate_with_progress

    calibrate_with_progress(request, args)


def _report(args: argparse.Namespace, command: str) -> None:
    try:
        data = json.loads(args.file.read_text())
        ours = isinstance(data, dict) and "configs" in data  # what generate wrote
        report = report_from(data) if ours else Report.from_dict(data)
    except (OSError, ValueError) as error:
        expected = "expected a report as Report.to_json or generate writes it"
        raise UsageError(f"FILE: {expected}, got {str(args.file)!r}: {error}") from None
    print(report)
    if args.out is not None:
        try:
            report.save_picture(args.out)
        except ModuleNotFoundError as error:
            raise UsageError(str(error)) from None
        except (OSError, ValueError) as error:
            raise UsageError(f"--out: expected a picture to write, got {str(args.out)!r}: {error}") from None
        print(args.out)


def _check_packages() -> None:
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            install = "pip install adacache-triton[demo]"
            raise UsageError(f"{package}: expected an installed package, found none; {install}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="adacache-triton",
        description="Adaptive caching for video diffusion transformers.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"adacache-triton {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    generating = commands.add_parser(
        "generate",
        help="make videos without the cache, with AdaCache and with AdaCache+MoReg, and compare them",
        description="Makes each video without the cache, with AdaCache and with AdaCache+MoReg, from the "
        "same noise, and writes the videos, a contact sheet, a plot of the schedules and a report. Without "
        "arguments: the small embedded model, one video of each of its classes.",
        allow_abbrev=False,
    )
    generating.set_defaults(run=_generate)
    add = generating.add_argument
    add("--model", metavar="PATH_OR_ID", help="a diffusers video pipeline; default: the embedded model")
    add(
        "--prompt",
        metavar="TEXT",
        nargs="+",
        action="extend",
        help="prompts, or classes of the embedded model",
    )
    add("--steps", metavar="N", type=_integer(3), default=50, help="denoising steps (50)")
    add("--preset", metavar="NAME", type=_one_of(PRESETS), help=f"one of {', '.join(PRESETS)}")
    add("--codebook", metavar="T:K,...,K", type=_codebook, help="thresholds and rates, as 0.03:12,0.05:10,3")
    add(
        "--moreg",
        metavar="on|off|SETTINGS",
        type=_moreg,
        default={},
        help="motion regularisation: on, off, or changes to the preset's, as "
        "scale=0.4,power=2,window=5-45,strides=1+2 (also divisor, gradient)",
    )
    add("--out", metavar="DIR", type=Path, default=Path("adacache-out"), help="folder to write (adacache-out)")
    add("--repeats", metavar="R", type=_integer(1), default=3, help="timed runs of each variant (3)")
    _add_common(generating)
    calibrating = commands.add_parser(
        "calibrate",
        help="search the steps to compute for a model at wanted speed-ups, and write them to a file",
        description="Makes a few videos, searches on them which steps to compute for each wanted speed-up, measures "
        "the result on other seeds, and writes it for AdaCacheConfig.for_speedup and for_quality.",
        allow_abbrev=False,
    )
    calibrating.set_defaults(run=_calibrate)
    add = calibrating.add_argument
    add("--model", metavar="PATH_OR_ID", default="latte", help="a diffusers video pipeline, or latte or wan, embedded")
    add("--prompt", metavar="TEXT", nargs="+", action="extend", help="prompts that stand for those to come")
    add("--steps", metavar="N", type=_integer(3), default=50, help="denoising steps (50)")
    speedups = [1.5, 2.0, 3.0, 4.0, 5.0]
    add("--speedup", metavar="X", type=_real, nargs="+", default=speedups, help="wanted, in steps (1.5 2 3 4 5)")
    add("--forecast", type=_one_of(FORECASTS), default="fitted", help=f"one of {', '.join(FORECASTS)} (fitted)")
    add("--correct", type=_one_of(("on", "off")), default="on", help="whether computed steps correct the latents (on)")
    add("--seeds", metavar="N", type=_integer(1), default=1, help="a prompt to search on, and as many held out (1)")
    add("--batch", metavar="N", type=_integer(1), default=1, help="videos at a time (1)")
    add("--evaluations", metavar="N", type=_integer(1), default=30, help="runs to find the fastest schedule (30)")
    add("--minutes", metavar="M", type=_real, default=None, help="time limit; none without")
    add("--out", metavar="FILE", type=Path, default=Path("calibration.json"), help="to write (calibration.json)")
    _add_common(calibrating)
    reporting = commands.add_parser(
        "report",
        help="print a saved report again, and draw it",
        description="Prints a report again, and draws it: per step whether and why it was computed, and what was "
        "measured.",
        allow_abbrev=False,
    )
    reporting.set_defaults(run=_report)
    add = reporting.add_argument
    add("file", metavar="FILE", type=Path, help="what Report.to_json wrote, or generate's report.json")
    add("--out", metavar="PICTURE", type=Path, help="file to draw it to, .png, .svg or .pdf")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that runs a pipeline."""
    add = parser.add_argument
    add("--seed", metavar="N", type=_integer(0, 2**62), default=0, help="of the first video's noise (0)")
    add("--device", metavar="D", type=_device, help="cpu, cuda or cuda:N; default: cuda where there is one")
    add("--dtype", metavar="TYPE", type=_one_of(DTYPES), help=f"one of {', '.join(DTYPES)}")
    add("--guidance", metavar="G", type=_real, help="classifier-free guidance scale; default: the pipeline's")
    for name in ("frames", "height", "width"):
        add(f"--{name}", metavar="N", type=_integer(1), help="of the video; default: the pipeline's")


def _options(args: argparse.Namespace) -> dict[str, float | int]:
    options = {name: getattr(args, name) for name in ("guidance", "frames", "height", "width")}
    return {name: value for name, value in options.items() if value is not None}


def _device_of(args: argparse.Namespace) -> torch.device:
    return args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype_of(args: argparse.Namespace, users: bool, device: torch.device) -> torch.dtype:
    return getattr(torch, args.dtype or ("bfloat16" if users and device.type == "cuda" else "float32"))


def _integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < minimum:
            got = repr(text) if value is None else text
            raise argparse.ArgumentTypeError(f"expected an integer >= {minimum}, got {got}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"expected an integer <= {maximum}, got {text}")
        return value

    return parse


def _real(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text!r}")
    return value


def _one_of(names) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return parse


def _codebook(text: str) -> Codebook:
    try:
        return Codebook.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("codebook: ")) from None


def _integers(separator: str) -> Callable[[str], tuple[int, ...]]:
    return lambda text: tuple(int(entry) for entry in text.split(separator))


_SETTINGS = {
    "window": ("window", _integers("-")),
    "strides": ("frame_strides", _integers("+")),
    "scale": ("scale", float),
    "power": ("power", float),
    "divisor": ("divisor", float),
    "gradient": ("gradient_weight", float),
}


def _moreg(text: str) -> dict | None:
    """Changed fields of MotionRegularization by name; None for `off`."""
    if text in ("on", "off"):
        return {} if text == "on" else None
    changes = {}
    for entry in text.split(","):
        name, _, value = entry.partition("=")
        try:
            field, parse = _SETTINGS[name.strip()]
            changes[field] = parse(value)
        except (KeyError, ValueError):
            expected = f"on, off or settings ({', '.join(_SETTINGS)}) as in scale=0.4,window=5-45,strides=1+2"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None
    try:
        MotionRegularization(**{"window": (1, 1)} | changes)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return changes


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"up to cuda:{count - 1}" if count else "no CUDA device"
        raise argparse.ArgumentTypeError(f"expected a device that is there (torch finds {found}), got {text!r}")
    return device


def _request(args: argparse.Namespace, command: str) -> Request:
    """The arguments checked against each other, defaults filled in."""
    prompts = tuple(args.prompt or (CLASSES if args.model is None else ()))
    options = _options(args)
    if args.model is not None:
        _check_model(args.model)
        if not prompts:
            raise UsageError("--prompt: expected at least one text for --model, got none")
    else:
        for name in prompts:
            if name not in CLASSES:
                raise UsageError(
                    f"--prompt: expected classes of the embedded model ({', '.join(CLASSES)}), got {name!r}"
                )
        for name in options.keys() - {"guidance"}:
            size = f"{NUM_FRAMES} frames of {SIZE} x {SIZE}"
            raise UsageError(f"--{name}: expected none for the embedded model ({size}), got {options[name]}")
    device = _device_of(args)
    preset, variants, notes = _variants(args)
    return Request(
        command=command,
        model=args.model,
        prompts=prompts,
        steps=args.steps,
        seed=args.seed,
        repeats=args.repeats,
        device=device,
        dtype=_dtype_of(args, args.model is not None, device),
        preset=preset,
        variants=variants,
        options=options,
        notes=notes,
    )


def _check_model(model: str) -> None:
    """A local folder that holds a pipeline, or the form of a Hub id."""
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise UsageError(f"--model: expected a pipeline's folder with a model_index.json, got {model!r}")
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise UsageError(f"--model: expected a pipeline's folder or a Hub id owner/name, got {model!r}")


def _variants(args: argparse.Namespace) -> tuple[str, dict[str, AdaCacheConfig | None], tuple[str, ...]]:
    """Name of the preset, the configurations to compare, and notes on what they were published for."""
    name = args.preset
    if name is None:
        nearest = min(OFFICIAL, key=lambda n: abs(OFFICIAL[n].steps - args.steps))
        name = "embedded" if args.model is None else nearest
    preset, notes = PRESETS[name], []
    codebook = args.codebook or preset.codebook
    variants = {UNCACHED: None, ADACACHE: AdaCacheConfig(codebook)}
    if name in OFFICIAL and not args.codebook:
        notes.append(f"thresholds published for Open-Sora with {preset.steps} steps")
    elif not args.codebook:
        factor = codebook.thresholds[0] / OFFICIAL["open-sora-30-fast"].codebook.thresholds[0]
        notes.append(f"thresholds of open-sora-30-fast x {factor:g}, where the embedded model's distances lie")
    if args.moreg is not None:
        motion = preset.motion.rescaled(preset.steps, args.steps)
        if "window" not in args.moreg and args.steps != preset.steps:
            published, scaled = ("{}-{}".format(*m.window) for m in (preset.motion, motion))
            notes.append(f"MoReg's window, {published} of {preset.steps} steps, becomes {scaled} of {args.steps}")
        variants[MOREG] = AdaCacheConfig(codebook, dataclasses.replace(motion, **args.moreg))
    return name, variants, (f"preset {name}: {'; '.join(notes)}",) if notes else ()


@contextmanager
def _staging(out: Path):
    """A temporary folder inside `out`, and a function that moves its files there and returns their paths.

    Whatever ends the block, the folder is gone after it, and where nothing was moved so is what of `out` did
    not exist before.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: expected a folder, got the file {str(out)!r}")
    made = [path for path in (out, *out.parents) if not path.exists()]  # innermost first
    folder = None
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".adacache-", dir=out))
        except OSError as error:
            raise UsageError(f"--out: expected a folder to write to, got {str(out)!r}: {error.strerror}") from None

        def publish() -> list[Path]:
            files = []
            for source in sorted(folder.iterdir()):
                try:
                    os.replace(source, out / source.name)
                except OSError as error:  # a folder of that name
                    expected = f"--out: expected to write the file {source.name!r}"
                    raise UsageError(f"{expected}, got {error.strerror}") from None
                files.append(out / source.name)
            return files

        yield folder, publish
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # it holds what was written, or could not be made
                path.rmdir()

"""What `adacache-triton generate` does: the same videos with and without the cache, timed and compared."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._version import __version__
from .apply import AdaCacheHandle, apply_adacache
from .config import AdaCacheConfig, Codebook
from .models import stack_of
from .report import Report

UNCACHED, ADACACHE, MOREG = "uncached", "AdaCache", "AdaCache+MoReg"
WARM_UP_STEPS = 5  # the fewest of which one is reused


class UsageError(Exception):
    """Something the user can put right; its one line names the argument, what was expected and what came."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One call of `generate`, checked.

    Attributes:
        command: the command line.
        model: folder or Hub id of a diffusers pipeline; None is the embedded model.
        prompts: a video each; class names for the embedded model.
        steps: denoising steps.
        seed: of the first video; each further one has the next.
        repeats: timed runs of each variant.
        device: where the pipeline runs.
        dtype: of its weights.
        preset: name of the preset.
        variants: a configuration by name, None where nothing is cached; the uncached one is first.
        options: those of `guidance`, `frames`, `height` and `width` that were given.
        notes: what the user should know about the preset.
    """

    command: str
    model: str | None
    prompts: tuple[str, ...]
    steps: int
    seed: int
    repeats: int
    device: torch.device
    dtype: torch.dtype
    preset: str
    variants: dict[str, AdaCacheConfig | None]
    options: dict[str, float | int]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Model, device, steps and repeats in one line."""
        runs = f"median of {self.repeats} runs" if self.repeats > 1 else "1 run"
        return f"{self.model or 'embedded model'} on {device_name(self.device)}, {self.steps} steps, {runs}"


@dataclasses.dataclass
class Variant:
    """One video by one variant.

    Attributes:
        name: of the variant.
        frames: of the first repeat, floats in [0, 1], [T, H, W, 3].
        num_steps: denoising steps of the run.
        report: of the cache; None where there was none.
        seconds: of the denoising loop, one a repeat.
        speedup: median seconds uncached / median seconds here.
        psnr: against the uncached video in dB; None for that one itself.
        ssim: likewise, at most 1.
    """

    name: str
    frames: np.ndarray
    num_steps: int
    report: Report | None
    seconds: list[float]
    speedup: float = 1.0
    psnr: float | None = None
    ssim: float | None = None

    @property
    def computed_steps(self) -> list[int]:
        return self.report.computed_steps if self.report else list(range(1, self.num_steps + 1))

    @property
    def share(self) -> str:
        """How much was computed, as `21 of 50`."""
        return f"{len(self.computed_steps)} of {self.num_steps}"

    def to_dict(self) -> dict:
        return {
            "variant": self.name,
            "num_steps": self.num_steps,
            "computed_steps": self.computed_steps,
            "seconds": self.seconds,
            "speedup": _plain(self.speedup),
            "psnr": _plain(self.psnr),
            "ssim": _plain(self.ssim),
            "kept_bytes": self.report.kept_bytes if self.report else 0,
            "steps": [step.to_dict() for step in self.report.steps] if self.report else [],
        }


@dataclasses.dataclass
class Video:
    """One prompt: its variants, uncached first.

    Attributes:
        prompt: as given.
        stem: name of the video's file, without its ending.
        seed: of the noise.
        variants: in the order of the request.
    """

    prompt: str
    stem: str
    seed: int
    variants: list[Variant]


def generate(request: Request, folder: Path) -> list[Video]:
    """Make and compare the videos, and write all files of a request into an empty folder.

    Raises:
        UsageError: where the model cannot be loaded or cannot do what was asked.
    """
    from .terminal import Progress  # this and what follows take seconds to import

    threads = torch.get_num_threads()
    if request.model is None and request.device.type == "cpu":
        torch.set_num_threads(1)  # so small a model is slower on more
    try:
        pipeline = load(request)
        runner = Runner(pipeline, request)
        with Progress(request) as progress:
            videos = [_compare(runner, i, stem, progress) for i, stem in enumerate(_stems(request.prompts))]
        from . import pictures

        try:
            files = [pictures.write_video(folder, video) for video in videos]
            pictures.contact_sheet(videos).save(folder / "contact_sheet.png")
            pictures.schedule(videos, request).savefig(folder / "schedule.png")
            report = _report(request, pipeline, videos, files)
            (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise UsageError(f"--out: expected room for the files, got {error}") from None
    finally:
        torch.set_num_threads(threads)
    return videos


def load(request: Request) -> Any:
    """The pipeline on its device, silent."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    from .testbed.pipeline import EMBEDDED

    embedded = EMBEDDED.get(request.model or "latte")
    if embedded is not None:
        pipeline = embedded.load(request.dtype)
    else:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # newer diffusers call torch_dtype dtype
                _check_class(request.model)
                pipeline = diffusers.DiffusionPipeline.from_pretrained(request.model, torch_dtype=request.dtype)
        except UsageError:
            raise
        except Exception as error:  # of many kinds: network, files, missing packages, versions
            expected = "expected a pipeline that diffusers can load"
            raise UsageError(f"--model: {expected}, got {request.model!r}: {_brief(error)}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(request.device)


def _check_class(model: str) -> None:
    """Refuse a pipeline that cannot be cached before its weights are fetched and read."""
    import diffusers

    index = diffusers.DiffusionPipeline.load_config(model)
    _, name = index.get("transformer") or (None, None)
    kind = getattr(diffusers, name or "", None)
    if kind is None:
        got = name or f"{index.get('_class_name')} without a transformer"
        raise UsageError(f"--model: expected a pipeline with a transformer of diffusers, got {got}")
    try:
        stack_of(object.__new__(kind))  # only its class is looked at
    except TypeError as error:
        raise UsageError(f"--model: {error}") from None


class Runner:
    """Runs one pipeline: arguments by its own names, the time of its denoising loop."""

    def __init__(self, pipeline, request: Request):
        self.pipeline, self.request = pipeline, request
        self.calls_per_step = 1  # of the transformer; learned while warming up
        known = inspect.signature(type(pipeline).__call__).parameters
        names = {
            "guidance": ("guidance_scale",),
            "frames": ("num_frames", "video_length"),
            "height": ("height",),
            "width": ("width",),
        }
        self.arguments: dict[str, Any] = {}
        for option, value in request.options.items():
            name = next((n for n in names[option] if n in known), None)
            if name is None:
                kind = type(pipeline).__name__
                raise UsageError(f"--{option}: expected none, {kind} has no such argument, got {value}")
            self.arguments[name] = value
        self.arguments |= {"output_type": "np"} if "output_type" in known else {}

    def warm_up(self, prompt: str) -> None:
        """A few steps, computed and reused, that leave nothing to be compiled or allocated while timing."""
        once = self.request.device.type != "cuda"  # elsewhere the variants run the same code
        for config in list(filter(None, self.request.variants.values()))[: 1 if once else None]:
            every_second = Codebook((sys.float_info.max,), (2, 1))
            config = dataclasses.replace(config, codebook=every_second)
            latent = {"output_type": "latent"} if "output_type" in self.arguments else {}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "AdaCache: advice")  # of so few steps
                timer, report, _ = self._run(prompt, self.request.seed, config, WARM_UP_STEPS, latent)
            if report.steps:
                self.calls_per_step = max(1, timer.forwards // len(report.steps))

    def run(self, prompt: str, seed: int, name: str, on_step: Callable[[int, bool], None]) -> Variant:
        """One run of a variant. `on_step(step, computed)` is called after each forward."""
        config = self.request.variants[name]

        def after(forwards: int, handle: AdaCacheHandle | None) -> None:
            if handle is None:
                on_step((forwards - 1) // self.calls_per_step + 1, True)
            elif handle.current is not None:
                on_step(handle.current.step, handle.current.computed)

        timer, report, output = self._run(prompt, seed, config, self.request.steps, {}, after)
        num_steps = report.num_steps if report else timer.forwards // self.calls_per_step
        return Variant(name, self._frames(output), num_steps, report, [timer.seconds()])

    def _run(self, prompt, seed, config, steps, changes, after=lambda forwards, handle: None):
        handle = None if config is None else apply_adacache(self.pipeline, config)
        try:
            # Put on after the cache's hooks: they run inside the measured time.
            with LoopTimer(self.pipeline, self.request.device, lambda n: after(n, handle)) as timer:
                output = self._call(
                    prompt=prompt,
                    num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(seed),
                    **self.arguments | changes,
                )
            return timer, handle.report() if handle else None, output
        finally:
            if handle:
                handle.remove()

    def _call(self, **arguments):
        """The pipeline's refusal of what was asked as one line; its messages name sizes and arguments."""
        kind = type(self.pipeline).__name__
        try:
            return self.pipeline(**arguments)
        except torch.OutOfMemoryError:
            raise UsageError(f"--device: expected memory for {kind}, got too little on {self.request.device}") from None
        except (TypeError, ValueError) as error:
            raise UsageError(f"--model: expected arguments that {kind} takes, got {_brief(error)}") from error

    def _frames(self, output) -> np.ndarray:
        """The first video as floats [T, H, W, 3]."""
        frames = np.asarray(getattr(output, "frames", [0])[0], dtype=np.float32)
        if frames.ndim != 4 or frames.shape[-1] != 3:
            kind = type(self.pipeline).__name__
            raise UsageError(f"--model: expected a pipeline that makes RGB videos, got {kind}")
        return frames


class LoopTimer:
    """Seconds from the start of the transformer's first forward to the end of its last.

    On a GPU that is the GPU's own time: it is drained before the first forward, nothing is waited for in
    between, and an event after each forward says when that one was done.
    """

    def __init__(self, pipeline, device: torch.device, after: Callable[[int], None]):
        self.forwards = 0
        # Pipelines with a second transformer change over to it in the middle of the loop.
        self._modules = [m for n in ("transformer", "transformer_2") if (m := getattr(pipeline, n, None))]
        self._device, self._after = device, after
        self._first = self._last = None

    def __enter__(self) -> LoopTimer:
        self._handles = []
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._begin, prepend=True))
            self._handles.append(module.register_forward_hook(self._end))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def seconds(self) -> float:
        if self._device.type == "cuda":
            self._last.synchronize()
            return self._first.elapsed_time(self._last) / 1000
        return self._last - self._first

    def _begin(self, module, args) -> None:
        if self._first is None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._first = self._now()

    def _end(self, module, args, output) -> None:
        self._last = self._now()
        self.forwards += 1
        self._after(self.forwards)

    def _now(self):
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _compare(runner: Runner, index: int, stem: str, progress) -> Video:
    """All variants of one prompt, in turn, as often as asked."""
    request, prompt = runner.request, runner.request.prompts[index]
    seed, variants = request.seed + index, {}
    if index == 0:
        runner.warm_up(prompt)
    for repeat in range(request.repeats):
        for name in request.variants:
            progress.start(prompt, name)
            run = runner.run(prompt, seed, name, progress.step)
            progress.finish(run if repeat == 0 else None)
            variants.setdefault(name, run).seconds += run.seconds if repeat else []
    reference = variants[UNCACHED]
    for variant in variants.values():
        if variant is not reference:
            variant.speedup = statistics.median(reference.seconds) / statistics.median(variant.seconds)
            variant.psnr, variant.ssim = fidelity(reference.frames, variant.frames)
    return Video(prompt, stem, seed, list(variants.values()))


def fidelity(reference: np.ndarray, frames: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM of a video against another, [T, H, W, 3] in [0, 1], averaged over frames.

    A frame that equals its reference has no PSNR; it is left out, and the mean is inf where every frame does.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    window = min(7, *(size - 1 + size % 2 for size in reference.shape[1:3]))
    psnr, ssim = [], []
    for a, b in zip(reference, frames):
        if not np.array_equal(a, b):
            psnr.append(peak_signal_noise_ratio(a, b, data_range=1))
        ssim.append(structural_similarity(a, b, data_range=1, channel_axis=-1, win_size=window))
    return float(np.mean(psnr)) if psnr else math.inf, float(np.mean(ssim))


def device_name(device: torch.device) -> str:
    """A GPU's or a processor's product name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _report(request: Request, pipeline, videos: list[Video], files: list[str]) -> dict:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "command": request.command,
        "versions": {"adacache-triton": __version__} | {p: version(p) for p in ("torch", "triton", "diffusers")},
        "model": request.model or "embedded",
        "pipeline": type(pipeline).__name__,
        "transformer": type(pipeline.transformer).__name__,
        "device": str(request.device),
        "device_name": device_name(request.device),
        "threads": torch.get_num_threads() if request.device.type == "cpu" else None,
        "dtype": str(request.dtype).removeprefix("torch."),
        "steps": request.steps,
        "seed": request.seed,
        "repeats": request.repeats,
        "options": request.options,
        "preset": request.preset,
        "notes": list(request.notes),
        "configs": {name: config.to_dict() for name, config in request.variants.items() if config},
        "videos": [
            {"prompt": v.prompt, "seed": v.seed, "file": file, "variants": [x.to_dict() for x in v.variants]}
            for v, file in zip(videos, files)
        ],
    }


def report_from(data: Mapping) -> Report:
    """Of what `_report` wrote: the cached runs as the videos of one report, named by prompt and variant.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    runs = []
    try:
        for video in data["videos"]:
            for variant in video["variants"]:
                config = data["configs"].get(variant["variant"])
                if config is not None:
                    run = {name: variant[name] for name in ("num_steps", "kept_bytes", "steps")}
                    run |= {"name": f"{video['prompt']}, {variant['variant']}", "config": config}
                    runs.append(Report.from_dict(run | {"granularity": config["granularity"]}))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"report: expected what `generate` writes, got {type(error).__name__}: {error}") from None
    if not runs:
        raise ValueError("videos: expected one with a cached variant, got none")
    # They ran one after the other.
    kept = max(run.kept_bytes for run in runs)
    return Report(max(run.num_steps for run in runs), (), kept, runs[0].granularity, tuple(runs), runs[0].config)


def _stems(prompts: tuple[str, ...]) -> list[str]:
    """A file name for each prompt, no two alike."""
    stems: list[str] = []
    for prompt in prompts:
        stem = base = re.sub(r"\W+", "-", prompt)[:40].strip("-").lower() or "video"
        count = 1
        while stem in stems:
            count += 1
            stem = f"{base}-{count}"
        stems.append(stem)
    return stems


def _plain(value: float | None) -> float | str | None:
    """JSON has no number that is not finite: its name instead."""
    return value if value is None or math.isfinite(value) else str(value)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__

"""Write docs/models.md: `python benchmarks/model_table.py`.

A row for each transformer that has a description. What the description holds is read from it, what it is tested on
from the tests' tiny models and pipelines; the rest stands in `FACTS`.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch

from adacache_triton import BlockStack
from adacache_triton.models import described, registered

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "docs/models.md"
PINNED = re.findall(r"^diffusers==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[-1]  # the newest
sys.path.insert(0, str(ROOT / "tests/support"))
from tiny_models import MODELS  # noqa: E402
from tiny_pipelines import PIPELINES  # noqa: E402

HEAD = f"""# The models

Written by `python benchmarks/model_table.py` with diffusers {PINNED}, from the descriptions in
`adacache_triton/models/`, the tiny models and pipelines of the tests, and the table in that script.

- **tested on**: a *tiny model* is the class itself, small and random, under the cache at every granularity; a pipeline
  is diffusers' own with such a model, run end to end, its schedule asserted step by step. An *interface double* is a
  small rebuilding of a class whose repository cannot be imported: block lists, arguments, token layout.
- **guidance**: how a pipeline calls the transformer in a step, and what tells the calls apart: the name that it gives
  them (`cache_context`), else the conditions that it holds on to. All calls of a step decide together.
- **`module` caches**: every model has the granularities `stack` and `block`; what `module` keeps is named.
- **motion**: whether MoReg is available; the axis of the input, or the argument, that counts the latent frames; and how
  tokens lie in the probed block.
- **kept**: bytes that the default granularity keeps at a usual size in bfloat16, over all calls of a step and both
  halves of a guidance batch: the stack residual and the probe's. Sizes are those of the pipelines' defaults or of the
  release that is named; nothing here is measured on a GPU.
"""
PARTS = {"attention": "attention", "cross_attention": "cross-attention", "mlp": "MLP"}
TOKENS = {
    "b (t s) c": "frame by frame",
    "(t s) c": "frame by frame",
    "(b t) s c": "frames in the batch",
    "(b s) t c": "tokens in the batch",
}


@dataclass(frozen=True)
class Size:
    """What goes through the blocks at a usual size: latent frames of rows x columns tokens, after patching.

    Args:
        name: of the size.
        frames, rows, columns, channels: of the video's stream.
        samples: in a call; 2 where guidance comes in one batch.
        calls: in a step; each keeps its own residuals.
        beside: tokens of the stream that are not the video's, at its exit.
        audio: tokens and channels of a second stream.
    """

    name: str
    frames: int
    rows: int
    columns: int
    channels: int
    samples: int = 1
    calls: int = 1
    beside: int = 0
    audio: tuple[int, int] = (0, 0)

    @property
    def kept_bytes(self) -> int:
        video = self.frames * self.rows * self.columns
        stack, probe = (video + self.beside) * self.channels, video * self.channels
        return 2 * self.samples * self.calls * (stack + probe + 2 * self.audio[0] * self.audio[1])


@dataclass(frozen=True)
class Facts:
    """What neither a description nor a test tells.

    Args:
        model: its name.
        guidance, traps: see the document.
        size: None where nothing is kept.
        motion: when MoReg is not available, and why, beside what the description says.
        double: of a class that diffusers does not have.
    """

    model: str
    guidance: str
    traps: str
    size: Size | None
    motion: str = ""
    double: bool = False


BATCH = "one batch"
NAMED = "two calls, by name"
TOLD = "two calls, by their conditions"
WAN_720 = Size("14B, 720 x 1280, 81 frames", 21, 45, 80, 5120, calls=2)
FACTS = {
    "STDiT3": Facts(
        "Open-Sora 1.2", BATCH, "frames that are given (`x_mask`) have gates of their own",
        Size("720p, 51 frames", 15, 45, 80, 1152, samples=2), double=True,
    ),
    "LatteT2V": Facts(
        "Open-Sora-Plan 1.1, Latte (their own code)", BATCH, "PNDM takes a step more",
        Size("512 x 512, 65 frames", 17, 32, 32, 1152, samples=2), double=True,
    ),
    "Latte": Facts(
        "Latte, class-conditional (its own code)", BATCH, "sampled by `forward_with_cfg`, which calls `forward` itself",
        Size("256 x 256, 16 frames", 16, 16, 16, 1152, samples=2), double=True,
    ),
    "LatteTransformer3DModel": Facts(
        "Latte", BATCH, "", Size("512 x 512, 16 frames", 16, 32, 32, 1152, samples=2)
    ),
    "AllegroTransformer3DModel": Facts(
        "Allegro", BATCH, "the scheduler's timesteps are set twice",
        Size("720 x 1280, 88 frames", 22, 45, 80, 2304, samples=2),
    ),
    "AnyFlowTransformer3DModel": Facts(
        "AnyFlow", "one call, distilled; guidance: one batch", "few steps; a second timestep says where a step ends",
        Size("14B, 480 x 832, 81 frames", 21, 30, 52, 5120),
    ),
    "ChronoEditTransformer3DModel": Facts(
        "ChronoEdit", TOLD, "temporal reasoning drops frames in mid-run: that step is computed",
        Size("14B, 720 x 1280, 5 frames", 2, 45, 80, 5120, calls=2),
    ),
    "CogVideoXTransformer3DModel": Facts(
        "CogVideoX 1.0, 1.5", "one batch, named", "1.5 has two frames a patch",
        Size("5B, 480 x 720, 49 frames", 13, 30, 45, 3072, samples=2),
    ),
    "ConsisIDTransformer3DModel": Facts(
        "ConsisID", BATCH, "face adapters between blocks; the text leaves the stack with the video",
        Size("480 x 720, 49 frames", 13, 30, 45, 3072, samples=2, beside=226),
    ),
    "CosmosTransformer3DModel": Facts(
        "Cosmos 1, 2, 2.5", TOLD, "1: the scheduler steps twice a step; position embeddings are no residual",
        Size("Predict2 14B, 704 x 1280, 93 frames", 24, 44, 80, 5120, calls=2),
    ),
    "Cosmos3OmniTransformer": Facts(
        "Cosmos 3", NAMED, "no batch; only the generating stream is kept",
        Size("720 x 1280, 189 frames, width 4096", 48, 23, 40, 4096, calls=2),
    ),
    "EasyAnimateTransformer3DModel": Facts(
        "EasyAnimate", BATCH, "", Size("V5.1 12B, 512 x 512, 49 frames", 13, 32, 32, 3072, samples=2)
    ),
    "HeliosTransformer3DModel": Facts(
        "Helios", NAMED, "chunks and pyramid stages, each a run; a history stands before the video's tokens",
        Size("14B, 384 x 640, chunks of 33 frames", 9, 24, 40, 5120, calls=2, beside=2 * 960 + 2 * 240),
    ),
    "HunyuanVideoTransformer3DModel": Facts(
        "HunyuanVideo, I2V, SkyReels V1", "one call, distilled; true CFG: two, by name or by their conditions",
        "I2V: the first frame has gates of its own, and `module` keeps single blocks' outputs before the gates",
        Size("720 x 1280, 129 frames", 33, 45, 80, 3072),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Facts(
        "HunyuanVideo FramePack", "one call, distilled; true CFG: two, by their conditions",
        "sections, each a run; a history stands before the video's tokens",
        Size("720 x 1280, sections of 33 frames", 9, 45, 80, 3072),
    ),
    "HunyuanVideo15Transformer3DModel": Facts(
        "HunyuanVideo 1.5", "as its guider calls, by name", "",
        Size("720 x 1280, 121 frames", 31, 45, 80, 2048, calls=2),
    ),
    "Kandinsky5Transformer3DModel": Facts(
        "Kandinsky 5", TOLD, "latents are written in place; sparse attention reorders tokens within a frame",
        Size("Lite, 512 x 768, 121 frames", 31, 32, 48, 1792, calls=2),
    ),
    "Kandinsky6Transformer3DModel": Facts(
        "Kandinsky 6", NAMED, "audio has its own scheduler",
        Size("512 x 768, 121 frames and audio, width 4096", 31, 32, 48, 4096, calls=2, audio=(218, 4096)),
    ),
    "Kandinsky6SRTransformer3DModel": Facts(
        "Kandinsky 6, super-resolution", "one call", "tiles, each a run of 4 steps, of which none is reused", None,
    ),
    "LTXVideoTransformer3DModel": Facts(
        "LTX", "one batch, named", "conditions' tokens stand before the video's",
        Size("512 x 704, 161 frames", 21, 16, 22, 2048, samples=2),
        motion="not where a pipeline gives coordinates instead of frames (conditions, long prompts)",
    ),
    "LTX2VideoTransformer3DModel": Facts(
        "LTX-2", "a batch of two and two calls more, by name", "audio has its own scheduler; conditions' tokens follow",
        Size("512 x 768, 121 frames and audio", 16, 16, 24, 4096, samples=4, audio=(126, 2048)),
        motion="not where a pipeline gives coordinates alone",
    ),
    "MiniMaxH3Transformer3DModel": Facts(
        "MiniMax H3", "one call, distilled", "text, references, audio and video in one sequence",
        Size("768 x 1344, 124 frames and audio", 1, 1, 37 * 24 * 42 + 2 * 207, 5376),  # and a row a word
        motion="its packed sequence is not told apart",
    ),
    "MochiTransformer3DModel": Facts(
        "Mochi", "one batch, named", "attention and MLP are normed with their gates: `module` keeps them before that",
        Size("480 x 848, 163 frames", 28, 30, 53, 3072, samples=2),
    ),
    "MotifVideoTransformer3DModel": Facts(
        "Motif Video", "as its guider calls, by name",
        "its last blocks begin anew; text cross-attention is in the probe",
        Size("2B, 736 x 1280, 121 frames", 31, 46, 80, 1536, calls=2),
    ),
    "SanaVideoTransformer3DModel": Facts(
        "Sana Video", BATCH, "", Size("480 x 832, 81 frames", 21, 30, 52, 2240, samples=2)
    ),
    "SanaWMTransformer3DModel": Facts(
        "Sana WM", BATCH, "what a camera adds is in the probe, and with `module` computed on every step",
        Size("704 x 1280, 161 frames", 21, 22, 40, 2240, samples=2),
    ),
    "SkyReelsV2Transformer3DModel": Facts(
        "SkyReels V2", NAMED, "diffusion forcing: a timestep a frame, windows, each a run",
        Size("14B, 544 x 960, 97 frames", 25, 34, 60, 5120, calls=2),
    ),
    "WanTransformer3DModel": Facts(
        "Wan 2.1, 2.2", "two calls, by name; video to video: by their conditions",
        "2.2: two transformers, each a run of its own; strength shortens a run", WAN_720,
    ),
    "WanVACETransformer3DModel": Facts(
        "Wan VACE", NAMED, "control blocks are skipped with the stack; with `block` and `module` they run", WAN_720
    ),
    "WanAnimateTransformer3DModel": Facts(
        "Wan Animate", "one call; with guidance two, by name",
        "segments, each a run; face adapters between blocks; the first frame is a reference",
        Size("14B, 720 x 1280, segments of 77 frames", 21, 45, 80, 5120),
    ),
    "FluxTransformer2DModel": Facts(
        "FLUX", "one call, distilled; true CFG: two, by name", "",
        Size("1024 x 1024", 1, 64, 64, 3072), motion="an image",
    ),
    "QwenImageTransformer2DModel": Facts(
        "Qwen-Image", NAMED, "", Size("1328 x 1328", 1, 83, 83, 3072, calls=2), motion="an image"
    ),
    "SD3Transformer2DModel": Facts(
        "Stable Diffusion 3, 3.5", BATCH, "dual attention is in the probe",
        Size("3.5 Large, 1024 x 1024", 1, 64, 64, 2432, samples=2), motion="an image",
    ),
    "AnyFlowFARTransformer3DModel": Facts("AnyFlow FAR", "", "", None),
    "SanaWMLTX2RefinerTransformer3DModel": Facts("Sana WM refiner", "", "", None),
    "WanAnimate2Transformer3DModel": Facts("Wan Animate 2", "", "", None),
}  # fmt: skip


def document() -> str:
    columns = ("model", "class", "tested on", "guidance", "loops and traps", "`module` caches", "motion", "kept")
    parts = [HEAD, _row(columns), f"|{'---|' * (len(columns) - 1)}--:|"]
    tests = _tests()
    known = [name for name in FACTS if name in registered()]
    rest = [name for name in registered() if name not in FACTS]
    for name in known + rest:
        parts.append(_row(_cells(name, FACTS[name], described(name), tests.get(name, ""))))
    return "\n".join(parts) + "\n"


def _tests() -> dict[str, str]:
    """The tiny models and pipelines of each class."""
    models, pipelines = {}, {}
    for tiny in MODELS.values():
        models[tiny.kind] = models.get(tiny.kind, 0) + 1
    for tiny in PIPELINES.values():
        kind = type(tiny.components()["transformer"]).__name__
        pipelines.setdefault(kind, {})[f"`{tiny.kind.rpartition('.')[2]}`"] = None
    return {
        kind: ", ".join([f"{count} tiny models" if count > 1 else "tiny model", *pipelines.get(kind, ())])
        for kind, count in models.items()
    }


def _cells(name: str, facts: Facts, stack: BlockStack, tests: str) -> tuple[str, ...]:
    names = (facts.model, f"`{name}`")
    if stack.refused:
        return (*names, f"refused: {stack.refused}", *[""] * 5)
    if facts.double == bool(tests):
        raise ValueError(f"{name}: expected tiny models or an interface double, got {tests or 'neither'}")
    return (
        *names,
        tests or "interface double",
        facts.guidance,
        facts.traps,
        ", ".join(PARTS[part] for part in PARTS if part in stack.modules) or "nothing",
        _motion(facts, stack),
        f"{facts.size.kept_bytes / 1e9:.2f} GB ({facts.size.name})" if facts.size else "",
    )


def _motion(facts: Facts, stack: BlockStack) -> str:
    if stack.frames is None:
        return f"no: {facts.motion}"
    cell = f"{_frames(stack)}; {TOKENS[stack.layout]}" + (", the video's tokens only" if stack.tokens else "")
    return f"{cell}; {facts.motion}" if facts.motion else cell


def _frames(stack: BlockStack) -> str:
    """What a description counts frames by: it is asked about a call in which every size is another prime."""
    shape, unpatched = (2, 3, 5, 7, 11), SimpleNamespace(patch_size=1, patch_size_t=1)
    arguments = {stack.input: torch.empty(shape, device="meta"), "num_frames": 13, "vision_token_shapes": [(17,)]}
    count = stack.frames(SimpleNamespace(config=unpatched, patch_size=(1, 1, 1)), arguments)
    return f"axis {shape.index(count)}" if count in shape else {13: "`num_frames`", 17: "`vision_token_shapes`"}[count]


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    if diffusers.__version__ != PINNED:
        raise SystemExit(f"diffusers {diffusers.__version__} is installed, constraints.txt pins {PINNED}")
    PATH.write_text(document())

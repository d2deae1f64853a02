"""Train an embedded model: `python -m adacache_triton.testbed.train latte --out DIR`, or `wan`.

Rectified flow on the procedural videos of `videos.py`, or `scenes.py`: x_t = (1 - t) x_0 + t eps, the model predicts
v = eps - x_0 (Liu et al., arXiv 2209.03003). Times are drawn where a redundant 8-frame video is decided, near
the noise end (logit-normal, shifted as in Esser et al., arXiv 2403.03206); the sampler's steps are even. Muon on
the block matrices, AdamW on the rest, constant rate and a linear decay, weights averaged.
Every step's data depends on (seed, rank, step) alone, so an interrupted run resumes where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import FlowMatchEulerDiscreteScheduler, LatteTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

from . import scenes, videos

TIME_SHIFT = 3.0  # of the training times
LATTE = dict(
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=3,
    out_channels=3,
    num_layers=4,
    cross_attention_dim=128,
    attention_bias=True,
    sample_size=videos.SIZE,
    patch_size=4,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    caption_channels=8,
    video_length=videos.NUM_FRAMES,
)
WAN = dict(
    patch_size=(2, 4, 4),
    num_attention_heads=4,
    attention_head_dim=24,
    in_channels=3,
    out_channels=3,
    text_dim=16,
    freq_dim=64,
    ffn_dim=288,
    num_layers=6,
    cross_attn_norm=True,
)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al., 2024), scaled to AdamW's step size.

    torch.optim.Muon works in bfloat16 one matrix at a time: 2.1 s a step for these 64 matrices on a CPU
    without bfloat16 units, against 0.1 s for the float32 batches here.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict[tuple, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(p.shape), []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                    velocity.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(velocity, group["momentum"]))
                step = orthogonalise(torch.stack(updates)) * (0.2 * max(shape) ** 0.5)
                for p, u in zip(params, step):
                    p.sub_(u, alpha=group["lr"])


def orthogonalise(x: Tensor, iterations: int = 5) -> Tensor:
    """[n, rows, columns] to the nearest semi-orthogonal matrices, approximately (singular values near 1)."""
    transposed = x.shape[1] > x.shape[2]
    x = x.mT if transposed else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if transposed else x


def latte(seed: int) -> LatteTransformer3DModel:
    """The untrained model. Its caption path keeps unit variance, or the class would be learned too late."""
    torch.manual_seed(seed)
    model = LatteTransformer3DModel(**LATTE)
    nn.init.normal_(model.caption_projection.linear_1.weight)
    paths = [model.caption_projection.linear_2]
    for block in model.transformer_blocks:
        paths += [block.attn2.to_v, block.attn2.to_out[0]]
    for linear in paths:
        nn.init.xavier_normal_(linear.weight)
    nn.init.zeros_(model.proj_out.weight)
    return model


def wan(seed: int) -> WanTransformer3DModel:
    """The untrained model, its caption path likewise."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**WAN)
    nn.init.normal_(model.condition_embedder.text_embedder.linear_1.weight)
    nn.init.xavier_normal_(model.condition_embedder.text_embedder.linear_2.weight)
    nn.init.zeros_(model.proj_out.weight)
    return model


# Of each model how it begins, the module that draws its videos, and the channels of a caption.
MODELS = {"latte": (latte, videos, LATTE["caption_channels"]), "wan": (wan, scenes, WAN["text_dim"])}


def one_hot(words: Tensor, channels: int) -> Tensor:
    """Word numbers [B, L] to captions [B, L, channels]; the number -1 is a word of the unconditional caption."""
    return (words[..., None] == torch.arange(channels, device=words.device)).float()


def loss_of(model: nn.Module, name: str, size: int, generator: torch.Generator) -> Tensor:
    """Mean squared velocity error on a fresh batch."""
    _, drawn, channels = MODELS[name]
    x0, words = drawn.batch(size, generator)
    words = torch.where(torch.rand(size, 1, generator=generator) < 0.1, -1, words)
    t = torch.sigmoid(torch.randn(size, generator=generator))
    t = TIME_SHIFT * t / (1 + (TIME_SHIFT - 1) * t)
    noise = torch.randn(x0.shape, generator=generator)
    x_t = x0 + t.view(-1, 1, 1, 1, 1) * (noise - x0)
    prediction = model(x_t, t * 1000, one_hot(words, channels)).sample
    return (prediction - (noise - x0)).square().mean()


def rate_at(step: int, steps: int, decay: float = 0.4) -> float:
    """Warm-up over 100 steps, constant, then linear to zero over the last `decay` of the run."""
    return min(1.0, (step + 1) / 100, (steps - step) / (decay * steps))


def train(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if args.workers > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(args.port))
        dist.init_process_group("gloo", rank=rank, world_size=args.workers)
    model = MODELS[args.model][0](args.seed)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    matrices = [p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2 and "table" not in n]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [Muon(matrices, lr=args.lr), torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)]
    checkpoint, log_file = args.out / "checkpoint.pt", args.out / "log.jsonl"
    first, running, seconds = 0, None, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        average, first, running, seconds = state["average"], state["step"], state["loss"], state["seconds"]
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    start = time.monotonic() - seconds
    parameters = list(model.parameters())
    for step in range(first, args.steps):
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 64 + rank)
        loss = loss_of(model, args.model, args.batch // args.workers, generator)
        loss.backward()
        if args.workers > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters] + [loss.detach()[None]])
            dist.all_reduce(flat)
            flat /= args.workers
            for p, g in zip(parameters, flat[:-1].split([p.numel() for p in parameters])):
                p.grad.copy_(g.view_as(p))
            loss = flat[-1]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.lr * rate_at(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if rank == 0 and ((step + 1) % args.every == 0 or step + 1 == args.steps):
            seconds = time.monotonic() - start
            row = {"step": step + 1, "loss": round(running, 5), "seconds": round(seconds)}
            print(row, flush=True)
            with log_file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            state = dict(model=model.state_dict(), average=average, step=step + 1, loss=running, seconds=seconds)
            torch.save(state | {"optimizers": [o.state_dict() for o in optimizers]}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    if rank == 0:
        export(average, args)
        (args.out / "MODEL_CARD.md").write_text(card(args, running, seconds))
    if args.workers > 1:
        dist.destroy_process_group()


def export(weights: dict[str, Tensor], args: argparse.Namespace) -> None:
    """The averaged weights as diffusers components in half precision: what the package carries."""
    model = MODELS[args.model][0](args.seed)
    model.load_state_dict(weights)
    model.half().save_pretrained(args.out / "transformer")
    # Even steps: where the last ones are long, their drift hides how much the videos differ in difficulty.
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(args.out / "scheduler")


def card(args: argparse.Namespace, loss: float, seconds: float) -> str:
    """The model card, its numbers from the run."""
    build, drawn, _ = MODELS[args.model]
    model = build(args.seed)
    return CARD.format(
        kind=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        what=WHAT[args.model],
        file=drawn.__name__.rpartition(".")[2],
        classes=", ".join(drawn.CLASSES),
        frames=videos.NUM_FRAMES,
        size=videos.SIZE,
        minutes=seconds / 60,
        loss=loss,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        **vars(args),
    )


WHAT = {
    "latte": "4 spatial and 4 temporal blocks of width 128, 4 x 4 pixels a token;\na caption is one word, the class",
    "wan": "6 blocks of full 3D attention of width 96, 4 x 4 pixels of two frames a\ntoken; a caption is three words: "
    "class, colour of the subject, colour of the ground",
}
CARD = """\
# An embedded model: {model}

A `{kind}` of diffusers with {parameters:.2f} million parameters, a rectified flow in pixel space: {frames} frames of
{size} x {size} RGB; {what}. Words are one-hot and go through cross-attention; all zeros is the
unconditional caption. It is here to show and to test caching on a model that was really trained, and for nothing else.

- **Data**: videos drawn on the fly by `{file}.py`, without end and without copyright; its classes are {classes}.
- **Training**: {minutes:.0f} minutes on {workers} CPU cores, torch {torch}, diffusers
  {diffusers}; caption dropout 10 %, averaged weights, stored in half precision. To train it again:
  `python -m adacache_triton.testbed.train {model} --out DIR --steps {steps} --batch {batch} --lr {lr} --seed {seed}
  --workers {workers}`
- **Loss**: {loss:.4f}, mean squared velocity error at the training times, running mean over the last steps.
- **Sampling**: 50 Euler steps, even in time, guidance scale 2.
- **Licence**: Apache-2.0, as the package.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint, log and exported model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="data-parallel processes of one thread each")
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--port", type=int, default=29541)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    mp.spawn(train, (args,), nprocs=args.workers) if args.workers > 1 else train(0, args)


if __name__ == "__main__":
    main()

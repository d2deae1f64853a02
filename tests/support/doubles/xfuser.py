"""An interface double of xDiT (xfuser 0.4.5), which imports with its GPU packages only: what `examples/xdit.py` uses.

The group of ranks that share a sequence, with its names; the Wan transformer, which takes its rank's tokens out of the
embedded ones, padded where the ranks do not divide them, and gathers what is projected at the end; and the runner
that loads a pipeline with it. Attention gathers keys and values, where xDiT exchanges heads or sends them in a ring.
"""

from argparse import ArgumentParser as FlexibleArgumentParser  # noqa: F401
from types import SimpleNamespace

import torch
import torch.distributed as dist
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


class SequenceParallelGroupCoordinator:
    """Of all ranks."""

    def __init__(self):
        self.device_group = dist.new_group()
        self.world_size, self.rank_in_group = dist.get_world_size(), dist.get_rank()

    def all_gather(self, input_: Tensor, dim: int = 0) -> Tensor:
        parts = [torch.empty_like(input_) for _ in range(self.world_size)]
        dist.all_gather(parts, input_.contiguous(), group=self.device_group)
        return torch.cat(parts, dim)


_SP: SequenceParallelGroupCoordinator | None = None


def get_sp_group() -> SequenceParallelGroupCoordinator:
    assert _SP is not None, "the runner has not been initialized"
    return _SP


class USP:
    """The self-attention's processor."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        x = hidden_states
        query, key, value = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        query, key, value = (y.unflatten(2, (attn.heads, -1)) for y in (query, key, value))
        query, key = (rotated(y, *rotary_emb) for y in (query, key))
        key, value = (get_sp_group().all_gather(y, dim=1) for y in (key, value))
        out = scaled_dot_product_attention(*(y.transpose(1, 2) for y in (query, key, value)))
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class xFuserWanTransformer3DWrapper(WanTransformer3DModel):
    def __init__(self, **config):
        super().__init__(**config)
        for block in self.blocks:
            block.attn1.processor = USP()

    def forward(
        self, hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image=None, return_dict=True,
        attention_kwargs=None,
    ):  # fmt: skip
        group, patch = get_sp_group(), self.config.patch_size
        grid = [n // p for n, p in zip(hidden_states.shape[2:], patch)]
        rotary = self.rope(hidden_states)
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
        temb, modulation, text, _ = self.condition_embedder(timestep, encoder_hidden_states, None)
        length = x.shape[1]
        missing = -length % group.world_size

        def mine(y: Tensor) -> Tensor:  # [B, tokens, ...]
            y = pad(y, (0, 0) * (y.dim() - 2) + (0, missing))
            return y.chunk(group.world_size, 1)[group.rank_in_group]

        x, rotary = mine(x), tuple(map(mine, rotary))
        for block in self.blocks:
            x = block(x, text, modulation.unflatten(1, (6, -1)), rotary)
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, 1)
        x = self.proj_out((self.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
        x = group.all_gather(x, dim=-2)[:, :length].unflatten(1, grid).unflatten(-1, (*patch, -1))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


class xFuserArgs:
    @staticmethod
    def add_runner_args(parser):
        parser.add_argument("--model", required=True)
        parser.add_argument("--prompt")
        for name, default in (("num_inference_steps", None), ("ulysses_degree", 1), ("ring_degree", 1)):
            parser.add_argument(f"--{name}", type=int, default=default)
        return parser


class xFuserModelRunner:
    """Loads a tiny pipeline, whatever the model. All ranks are of one sequence, whatever the degrees."""

    saved: list = []

    def __init__(self, config: dict):
        self.config, self.model = config, SimpleNamespace(pipe=None)

    def preprocess_args(self, args: dict) -> dict:
        return args

    def initialize(self, input_args: dict) -> None:
        from tiny_pipelines import PIPELINES

        global _SP
        _SP = SequenceParallelGroupCoordinator()
        self.model.pipe, self.call = PIPELINES["wan"].make(self.config["num_inference_steps"])
        own = self.model.pipe.transformer
        self.model.pipe.transformer = xFuserWanTransformer3DWrapper(**own.config).eval()
        self.model.pipe.transformer.load_state_dict(own.state_dict())

    def run(self, input_args: dict) -> tuple:
        return self.model.pipe(**self.call), [0.0]

    def save(self, output=None, timings=None) -> None:
        self.saved.append(output)

    def cleanup(self) -> None:
        del self.model.pipe

"""diffusers' context parallelism for ranks with or without a GPU: what a CPU, or gloo, lacks for it.

with gaps_filled():
    parallel(model, ulysses_degree=2)(**inputs, return_dict=False)
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import diffusers
import torch
import torch.distributed as dist
from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def device() -> torch.device:
    """This rank's."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def placed(tree):
    """Its tensors on this rank's device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device()), tree)


def parallel(model: nn.Module, **degrees) -> nn.Module:
    """The model under diffusers' context parallelism, which counts a CPU as no device at all."""
    with mock.patch("torch.accelerator.device_count", lambda: max(1, torch.cuda.device_count())):
        model.enable_parallelism(config=diffusers.ContextParallelConfig(**degrees))
    return model


@contextmanager
def gaps_filled():
    """Ring attention and shards of different lengths work inside."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(attention_dispatch, "_native_attention_forward_op", attention))
        if dist.get_backend() == "gloo":
            stack.enter_context(mock.patch.object(dist, "all_gather", all_gather))
        yield


def all_gather(tensors: list[Tensor], tensor: Tensor, group=None) -> None:
    """Of shapes that differ, which gloo does not gather."""
    tensors[dist.get_rank(group)].copy_(tensor)
    for source, each in enumerate(tensors):
        dist.broadcast(each, group_src=source, group=group)


def attention(_, query, key, value, mask, dropout, causal, scale, gqa, return_lse=False, **__):
    """Attention [B, S, H, D] with its log-sum-exp [B, S, H], which the backend of every device leaves out."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    out = (scores.softmax(-1) @ value).transpose(1, 2)
    return (out, scores.logsumexp(-1).transpose(1, 2)) if return_lse else out

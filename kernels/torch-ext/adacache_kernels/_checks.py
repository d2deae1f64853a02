"""What may be wrong with an argument, in one line: operation, argument, what was expected, what came."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METRICS = {"l1": 2, "l2": 2, "cosine": 3}  # sums that each distance is made of


def traced(tensor: torch.Tensor) -> bool:
    """Whether there is no memory behind a tensor: a graph is being traced, or shapes are propagated.

    Only then does a call go through torch.library, which costs the host several times what the call itself does.
    """
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta


def check_tensor(op: str, name: str, tensor) -> None:
    """A floating tensor with elements, of which nobody expects a gradient."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} is of type {type(tensor).__name__}, expected torch.Tensor")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected float32, bfloat16 or float16")
    if tensor.numel() == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected at least one element")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} requires grad and has no backward here, expected torch.no_grad()")


def check_alike(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Equal shapes on one device; dtypes and strides may differ."""
    if tensor.shape != other.shape:
        shape, expected = tuple(tensor.shape), tuple(other.shape)
        raise ValueError(f"{op}: {name} has shape {shape}, {other_name} has {expected}; they must be equal")
    if tensor.device != other.device:
        device, expected = tensor.device, other.device
        raise ValueError(f"{op}: {name} is on {device}, {other_name} is on {expected}; they must be equal")


def check_written(op: str, name: str, tensor: torch.Tensor) -> None:
    """No two indices of a tensor that is written may share an element."""
    if torch.compiler.is_compiling():
        return  # strides may be symbols, which cannot be sorted: the check is made when the graph runs
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            strides = tensor.stride()
            raise ValueError(
                f"{op}: {name} has strides {strides} and is written, expected elements that do not overlap"
            )
        reach += stride * (size - 1)


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the address ranges of two views meet; views that interleave in one storage count as well.

    What is traced has no addresses: the check is made when the graph runs.
    """
    if traced(a) or traced(b):
        return False
    first_a, first_b = a.data_ptr(), b.data_ptr()
    if first_a <= first_b:  # only the one that begins first can reach into the other: half the host's time
        return first_b <= first_a + _reach(a)
    return first_a <= first_b + _reach(b)


def _reach(view: torch.Tensor) -> int:
    """Bytes from a view's first element to its last."""
    reach = 0
    for stride, size in zip(view.stride(), view.shape):
        reach += stride * (size - 1)
    return reach * view.element_size()


def check_metric(op: str, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"{op}: metric is {metric!r}, expected one of {', '.join(map(repr, METRICS))}")


def same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same elements of memory, index by index."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype

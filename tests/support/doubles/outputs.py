"""What a model or a pipeline returns, as a list of tensors."""

from collections.abc import Mapping

import torch


def tensors(output) -> list[torch.Tensor]:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in tensors(item)]
    return [torch.as_tensor(output)] if hasattr(output, "shape") else []

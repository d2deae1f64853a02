"""The operators' namespace in torch.library, and when a call becomes one of them.

The Hub's builder writes a file with the same two names, `ops` and `add_op_namespace_prefix`, in which the
namespace is unique to the build.
"""

import torch

_NAMESPACE = "adacache_kernels"
ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{_NAMESPACE}::{op_name}"

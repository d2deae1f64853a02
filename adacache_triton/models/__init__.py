"""The block stacks of known models, one small file a family, found by the name of the transformer's class.

A file here registers itself when the package is imported; a description from outside is registered by
`register`, or handed to `apply_adacache` directly.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from ..stack import BlockStack

_STACKS: dict[str, BlockStack] = {}


def register(class_name: str, stack: BlockStack) -> None:
    """Describe every transformer whose class, or one of its bases, has this name."""
    _STACKS[class_name] = stack


def registered() -> tuple[str, ...]:
    """The names of the classes that are described."""
    return tuple(sorted(_STACKS))


def described(class_name: str) -> BlockStack:
    """The description of a class, by its name; KeyError for one that nobody described."""
    return _STACKS[class_name]


def stack_of(model: nn.Module) -> BlockStack:
    """The description of a model's class. Raises TypeError for a class that nobody described."""
    for kind in type(model).__mro__:
        if kind.__name__ in _STACKS:
            return _STACKS[kind.__name__]
    known = ", ".join(sorted(_STACKS))
    raise TypeError(
        f"transformer: expected a known class ({known}) or a BlockStack that describes it, got {type(model).__name__}"
    )


for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

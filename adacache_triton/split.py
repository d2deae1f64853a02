"""Some samples of a batch: their rows of a forward's arguments, and the outputs of such forwards as that of one.

    rows = (0, 2), (1, 3)
    outputs = [model(**take(arguments, part, batch=4)) for part in rows]
    join(outputs, rows, batch=4)  # as model(**arguments)

Rows and sizes are plain numbers: nothing is read from the device, and nothing but slices and concatenations runs on it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor


def take(
    arguments: Mapping[str, Any],
    rows: Sequence[int],
    batch: int,
    shared: Sequence[str] = (),
    listed: Sequence[str] = (),
    videos: int | None = None,
) -> dict[str, Any]:
    """The arguments of a forward for some samples of its batch.

    These rows of every tensor whose first dimension is the batch, in lists, tuples and mappings as well. All else is
    left as it is; mappings are new, as forwards pop from them.

    Args:
        arguments: by name.
        rows: of the samples, in the order wanted.
        batch: how many samples there are.
        shared: names of arguments without a batch, whose length may be the batch's by chance.
        listed: names of arguments that may be lists with an item a sample.
        videos: where sample b is of video b % videos, and `rows` holds all samples of a video or none: what has a row,
            or an item, for each video is split as well.

    Bytes moved: none where the rows are evenly spaced, as those of one video or of every second one are: a view.
        Otherwise the rows are read and written once.
    """
    wanted = {videos: [row for row in rows if row < videos]} if videos else {}
    wanted[batch] = rows
    return {
        name: value if name in shared else _rows_of(value, wanted, name in listed) for name, value in arguments.items()
    }


def _rows_of(value, wanted: Mapping[int, Sequence[int]], listed: bool = False):
    if isinstance(value, Tensor):
        rows = wanted.get(value.shape[0]) if value.dim() else None
        return value if rows is None else _together([value[run] for run in _runs(rows)])
    if listed and isinstance(value, list) and len(value) in wanted:
        return [value[row] for row in wanted[len(value)]]
    if isinstance(value, (list, tuple, Mapping)):
        return _with(value, [_rows_of(item, wanted) for item in _items(value)])
    return value


def join(outputs: Sequence, rows: Sequence[Sequence[int]], batch: int, listed: bool = False):
    """The outputs of forwards for parts of a batch as that of one forward for all of it.

    Args:
        outputs: one a part, all of one kind: a tensor, or tensors in tuples, lists, mappings and dataclasses.
        rows: of each part's samples in the batch.
        batch: how many samples there are. Each is in one part.
        listed: whether lists hold an item a sample. Else their items correspond.

    Returns:
        the same kind, every tensor's samples in their first order. 0-d tensors and plain values are the first part's.

    Raises:
        ValueError: parts do not fit: other kinds, sizes or plain values, or a tensor whose first dimension is not the
            number of the part's samples. With frames flattened into it, its shape does not tell samples from frames.

    Bytes moved: the outputs read and written once.
    """
    if sorted(chain.from_iterable(rows)) != list(range(batch)) or len(outputs) != len(rows):
        raise ValueError(f"join: expected the {batch} samples in {len(outputs)} parts, each once, got rows {rows}")
    place = {row: (part, i) for part, of_part in enumerate(rows) for i, row in enumerate(of_part)}
    runs = [
        (part, run)
        for part, places in groupby((place[row] for row in range(batch)), lambda place: place[0])
        for run in _runs([i for _, i in places])
    ]
    return _join("output", outputs, [len(of_part) for of_part in rows], runs, listed)


def _join(place: str, parts: Sequence, sizes: list[int], runs: list[tuple[int, slice]], listed: bool):
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise ValueError(f"join: {place} is of several kinds: {', '.join(type(part).__name__ for part in parts)}")
    if isinstance(first, Tensor):
        for part, size in zip(parts, sizes):
            expected = (size, *first.shape[1:]) if first.dim() else ()
            if part.shape != expected or part.dtype != first.dtype:
                raise ValueError(
                    f"join: {place} of {size} samples has shape {tuple(part.shape)} and {part.dtype}, "
                    f"expected {expected} and {first.dtype}"
                )
        return _together([parts[part][run] for part, run in runs]) if first.dim() else first
    if isinstance(first, list) and listed and [len(part) for part in parts] == sizes:
        return [item for part, run in runs for item in parts[part][run]]
    if isinstance(first, (list, tuple, Mapping)) or dataclasses.is_dataclass(first):
        keys = [list(_keys(part)) for part in parts]
        if any(each != keys[0] for each in keys):
            raise ValueError(f"join: {place} has items {' and '.join(map(str, keys))}; they must be the same")
        items = [
            _join(f"{place}.{key}", items, sizes, runs, listed) for key, *items in zip(keys[0], *map(_items, parts))
        ]
        return _with(first, items)
    if any(part is not first and part != first for part in parts):
        raise ValueError(f"join: {place} has the values {' and '.join(map(str, parts))}; they must be equal")
    return first


def _runs(rows: Sequence[int]) -> list[slice]:
    """Evenly spaced rows as slices."""
    runs: list[range] = []
    for row in rows:
        run = runs[-1] if runs else range(0)
        if len(run) == 1 and row > run[0]:
            runs[-1] = range(run[0], row + 1, row - run[0])
        elif len(run) > 1 and row == run[-1] + run.step:
            runs[-1] = range(run[0], row + 1, run.step)
        else:
            runs.append(range(row, row + 1))
    return [slice(run.start, run.stop, run.step) for run in runs]


def _together(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _keys(value):
    """Of the items of a list, tuple, mapping or dataclass."""
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if field.init]
    return value.keys() if isinstance(value, Mapping) else range(len(value))


def _items(value) -> list:
    if dataclasses.is_dataclass(value):
        return [getattr(value, key) for key in _keys(value)]
    return list(value.values() if isinstance(value, Mapping) else value)


def _with(value, items: list):
    """The same kind of list, tuple, mapping or dataclass with other items."""
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **dict(zip(_keys(value), items)))
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)
        changed.update(zip(value.keys(), items))
        return changed
    if isinstance(value, Mapping):
        return type(value)(zip(value.keys(), items))
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

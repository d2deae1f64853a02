"""The one way of measured numbers from the device to the host."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor


class Readback:
    """A few numbers on their way to the host: sent when they are queued on the device, waited for when read.

    Args:
        numbers: float32 [rows, columns], not used again by the caller.
        group: the ranks over which they are summed, in place; every rank reads the same. None: this rank's alone.
    """

    def __init__(self, numbers: Tensor, group: dist.ProcessGroup | None = None):
        self._host, self._arrived, self._rows = numbers, None, None
        self._work = None if group is None else dist.all_reduce(numbers, group=group, async_op=True)
        if not numbers.is_cuda:
            return
        stream = torch.cuda.current_stream(numbers.device)
        if self._work is not None:
            # The stream of the blocks does not wait for the other ranks; one at its side does.
            stream = _beside(numbers.device)
            numbers.record_stream(stream)
        with torch.cuda.stream(stream):
            if self._work is not None:
                self._work.wait()
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(stream)

    @property
    def late(self) -> bool:
        """Whether reading waits for a device that works on its own, so that it may have nothing to do meanwhile."""
        return self._arrived is not None

    def row(self, index: int) -> list[float]:
        """One row. Waits until the device, and the other ranks, have come so far."""
        if self._rows is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            elif self._work is not None:
                self._work.wait()
            self._rows = self._host.tolist()
        return self._rows[index]


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

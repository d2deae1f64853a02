"""How long a step took, without waiting for it: marks on the device's own time line, read when somebody asks."""

from __future__ import annotations

import time

import torch


def mark(device: torch.device) -> float | torch.cuda.Event:
    """Now, on the time line of a device: an event that a GPU records when it comes there, else the host's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Stopwatch:
    """The calls of a run, by step."""

    def __init__(self):
        self._calls: dict[int, list[tuple]] = {}

    def called(self, step: int, begin, end, videos: int = 1) -> None:
        """A call took from one mark to another, for so many videos."""
        self._calls.setdefault(step, []).append((begin, end, videos))

    def seconds(self, step: int) -> float | None:
        """All calls of a step together; None where there was none. Waits for a GPU that has not come so far."""
        calls = self._calls.get(step)
        return None if calls is None else sum(_between(begin, end) / videos for begin, end, videos in calls)


def _between(begin, end) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000

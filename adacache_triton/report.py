"""What a run did: per step computed or reused and why, the numbers behind it, and the bytes kept."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .schedule import Step


@dataclass(frozen=True)
class Report:
    """The run in progress, or the last one.

    Attributes:
        num_steps: steps that the run has in all; 0 before the first forward.
        steps: a record of each step begun.
        kept_bytes: the most that was kept at a time, over all guidance branches.
        granularity: what kept a residual.
        videos: where each video followed its own schedule, a report of each; of several, `steps` is empty.
    """

    num_steps: int
    steps: tuple[Step, ...]
    kept_bytes: int
    granularity: str = "stack"
    videos: tuple[Report, ...] = ()

    @property
    def computed_steps(self) -> list[int]:
        """Steps in which blocks ran: of several videos, those of any."""
        records = [*self.steps, *(s for video in self.videos for s in video.steps)]
        return sorted({s.step for s in records if s.computed})

    def to_dict(self) -> dict:
        data = {
            "num_steps": self.num_steps,
            "computed_steps": self.computed_steps,
            "kept_bytes": self.kept_bytes,
            "granularity": self.granularity,
            "steps": [s.to_dict() for s in self.steps],
        }
        if self.videos:
            data["videos"] = [video.to_dict() for video in self.videos]
        return data

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        if self.videos:
            return "\n".join(f"video {i}: {video}" for i, video in enumerate(self.videos, 1))
        done, computed = len(self.steps), len(self.computed_steps)
        lines = [
            f"{computed} of {done} steps computed ({self.num_steps} in the run), {self.kept_bytes:,} bytes kept "
            f"by {self.granularity}",
            "step  what     distance  motion M  seen      rate",
        ]
        for s in self.steps:
            numbers = [f"{v:<8.4g}" if v is not None else " " * 8 for v in (s.distance, s.motion_scale, s.regularized)]
            lines.append(f"{s.step:>4}  {s.reason:<7}  {'  '.join(numbers)}  {s.rate or ''}".rstrip())
        return "\n".join(lines)

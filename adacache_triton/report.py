"""What a run did: per step computed or reused and why, the numbers behind it, the bytes kept, the time saved."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .schedule import Step

REASONS = ("first", "warm-up", "listed", "rate", "tail", "restart", "reused")


@dataclass(frozen=True)
class Report:
    """The run in progress, or the last one.

    Attributes:
        num_steps: steps that the run has in all; 0 before the first forward.
        steps: a record of each step begun.
        kept_bytes: the most that was kept at a time, over all guidance branches.
        granularity: what kept a residual.
        videos: where each video followed its own schedule, a report of each; of several, `steps` is empty.
        config: the configuration's fields, as `AdaCacheConfig.to_dict` gives them.
    """

    num_steps: int
    steps: tuple[Step, ...]
    kept_bytes: int
    granularity: str = "stack"
    videos: tuple[Report, ...] = ()
    config: Mapping | None = None

    @property
    def computed_steps(self) -> list[int]:
        """Steps in which blocks ran: of several videos, those of any."""
        records = [*self.steps, *(s for video in self.videos for s in video.steps)]
        return sorted({s.step for s in records if s.computed})

    @property
    def time_saved(self) -> float | None:
        """Seconds that the reused steps would have taken more, by the medians of both kinds of steps.

        None where no step of one kind was timed. Of several videos, that of the one that saved most: they share calls.
        """
        if self.videos and not self.steps:
            return max((saved for video in self.videos if (saved := video.time_saved) is not None), default=None)
        timed = {True: [], False: []}
        for step in self.steps:
            if step.seconds is not None:
                timed[step.computed].append(step.seconds)
        if not all(timed.values()):
            return None
        return len(timed[False]) * (statistics.median(timed[True]) - statistics.median(timed[False]))

    def to_dict(self) -> dict:
        data = {
            "num_steps": self.num_steps,
            "computed_steps": self.computed_steps,
            "kept_bytes": self.kept_bytes,
            "granularity": self.granularity,
            "time_saved": self.time_saved,
            "config": self.config,
            "steps": [s.to_dict() for s in self.steps],
        }
        if self.videos:
            data["videos"] = [video.to_dict() for video in self.videos]
        return data

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping) -> Report:
        """What `to_dict` gave.

        Raises:
            ValueError: naming the field, what was expected and what came.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"report: expected an object with named fields, got {type(data).__name__}")
        for name in ("num_steps", "kept_bytes", "granularity", "steps"):
            if name not in data:
                raise ValueError(f"report: expected the field {name!r}, got {', '.join(data) or 'none'}")
        fields = {field.name for field in dataclasses.fields(Step)}
        steps = []
        for i, record in enumerate(data["steps"]):
            if not isinstance(record, Mapping) or record.get("reason") not in REASONS or record.keys() - fields:
                raise ValueError(f"steps[{i}]: expected the record of a step, got {record!r}")
            steps.append(Step(**{name: float(v) if v in ("nan", "inf", "-inf") else v for name, v in record.items()}))
        videos = tuple(cls.from_dict(video) for video in data.get("videos", ()))
        rest = data["num_steps"], tuple(steps), data["kept_bytes"], data["granularity"]
        return cls(*rest, videos, data.get("config"))

    @classmethod
    def from_json(cls, text: str) -> Report:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"report: expected JSON, got {error}") from None
        return cls.from_dict(data)

    def save_picture(self, path: str | Path) -> None:
        """Draw it to a file, .png, .svg or .pdf. Needs matplotlib: pip install adacache-triton[demo]."""
        from .report_picture import draw

        draw(self).savefig(path)

    def __str__(self) -> str:
        if self.videos:
            return "\n".join(f"video {i}: {video}" for i, video in enumerate(self.videos, 1))
        done, computed = len(self.steps), len(self.computed_steps)
        saved = "" if self.time_saved is None else f", {self.time_saved:.3g} s saved"
        lines = [
            f"{computed} of {done} steps computed ({self.num_steps} in the run), {self.kept_bytes:,} bytes kept "
            f"by {self.granularity}{saved}",
            "".join("#" if step.computed else "." for step in self.steps),
            "step  why                  distance  motion M  seen      rate        ms",
        ]
        for s in self.steps:
            numbers = [f"{v:<8.4g}" if v is not None else " " * 8 for v in (s.distance, s.motion_scale, s.regularized)]
            time = "" if s.seconds is None else f"{1000 * s.seconds:.4g}"
            why = s.reason if s.cause is None else f"{s.reason}: {s.cause}"
            rate = "" if s.rate is None else s.rate
            lines.append(f"{s.step:>4}  {why:<19}  {'  '.join(numbers)}  {rate:<4}  {time:>8}".rstrip())
        return "\n".join(lines)


def finite(values) -> list[float]:
    """For a line that is drawn: what is not there, or not finite, is left out of it."""
    return [v if v is not None and math.isfinite(v) else math.nan for v in values]

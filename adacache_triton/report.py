"""What a run did: per step computed or reused and why, the numbers behind it, the bytes kept, the time saved."""

from __future__ import annotations

import dataclasses
import json
import numbers
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .schedule import Step

REASONS = ("first", "warm-up", "listed", "rate", "tail", "restart", "reused")
CAUSES = ("not finite", "changed", "doubt")  # of a restart


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
        name: of the video, where it has one.
    """

    num_steps: int
    steps: tuple[Step, ...]
    kept_bytes: int
    granularity: str = "stack"
    videos: tuple[Report, ...] = ()
    config: Mapping | None = None
    name: str = ""

    @property
    def runs(self) -> tuple[Report, ...]:
        """A report of each schedule that was followed: those of the videos, or this one."""
        return self.videos or (self,)

    @property
    def computed_steps(self) -> list[int]:
        """Steps in which blocks ran: of several videos, those of any."""
        records = [*self.steps, *(s for video in self.videos for s in video.steps)]
        return sorted({s.step for s in records if s.computed})

    @property
    def time_saved(self) -> float | None:
        """Seconds more that the transformer would have taken, had the reused steps been computed.

        By the medians of both kinds of steps, as the first one may allocate or compile. Several videos' add up. None
        where no step of one kind was timed.
        """
        saved = [saved for run in self.runs if (saved := run._saved()) is not None]
        return sum(saved) if saved else None

    @property
    def speedup(self) -> float | None:
        """Of the transformer's time: what it would have taken, had every step been computed, by what it took."""
        saved, took = self.time_saved, sum(s.seconds or 0.0 for run in self.runs for s in run.steps)
        return None if saved is None or not took else (took + saved) / took

    def _saved(self) -> float | None:
        timed = {True: [], False: []}
        for step in self.steps:
            if step.seconds is not None:
                timed[step.computed].append(step.seconds)
        if not all(timed.values()):
            return None
        return len(timed[False]) * (statistics.median(timed[True]) - statistics.median(timed[False]))

    def to_dict(self) -> dict:
        """Plain values for JSON. Those of properties are there for the reader."""
        data = {
            "num_steps": self.num_steps,
            "computed_steps": self.computed_steps,
            "kept_bytes": self.kept_bytes,
            "granularity": self.granularity,
            "time_saved": self.time_saved,
            "speedup": self.speedup,
            "config": self.config,
            "steps": [s.to_dict() for s in self.steps],
        }
        if self.videos:
            data["videos"] = [video.to_dict() for video in self.videos]
        return {"name": self.name} | data if self.name else data

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping) -> Report:
        """What `to_dict` gave.

        Raises:
            ValueError: naming the field, what was expected and what came.
        """
        return cls._read("", data)

    @classmethod
    def _read(cls, where: str, data) -> Report:
        """Of the field `where`, as in `videos[0].`; empty is the report itself."""
        if not isinstance(data, Mapping):
            name = where.removesuffix(".") or "report"
            raise ValueError(f"{name}: expected an object with named fields, got {type(data).__name__}")
        fields = {}
        for name, (expected, fits) in _FIELDS.items():
            if name not in data:
                if name in ("num_steps", "kept_bytes", "granularity", "steps"):
                    raise ValueError(f"report: expected the field {where + name!r}, got {', '.join(data) or 'none'}")
                continue
            if not fits(data[name]):
                raise ValueError(f"{where}{name}: expected {expected}, got {_short(data[name])}")
            fields[name] = data[name]
        fields["steps"] = tuple(_step(f"{where}steps[{i}]", record) for i, record in enumerate(fields["steps"]))
        videos = enumerate(fields.get("videos", ()))
        fields["videos"] = tuple(cls._read(f"{where}videos[{i}].", video) for i, video in videos)
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What `to_json` gave; errors as `from_dict`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"report: expected JSON, got {error}") from None
        return cls.from_dict(data)

    def save_picture(self, path: str | Path) -> None:
        """Draw it to a file: .png, .svg or .pdf.

        Raises:
            ModuleNotFoundError: without matplotlib, which the extra `demo` brings.
            ValueError, OSError: there is no such kind of picture, or no room for it.
        """
        try:
            from .report_picture import draw_report
        except ModuleNotFoundError as error:
            install = "pip install adacache-triton[demo]"
            raise ModuleNotFoundError(f"{error.name}: expected an installed package, found none; {install}") from None
        draw_report(self).savefig(path)

    def totals(self) -> str:
        """One line: steps computed, bytes kept, time saved."""
        counts = sorted({len(run.computed_steps) for run in self.runs})
        computed = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        saved, speedup = self.time_saved, self.speedup
        time = "" if saved is None else f", {saved:.3g} s saved"
        time += "" if speedup is None else f" ({speedup:.2f}x)"
        kept = f"{self.kept_bytes:,} bytes kept by {self.granularity}"
        return f"{computed} of {self.num_steps} steps computed, {kept}{time}"

    def __str__(self) -> str:
        """A line of totals, a strip of the steps and a table of them; of several videos one below the other."""
        if self.videos:
            above = [f"{len(self.videos)} videos: {self.totals()}"] if len(self.videos) > 1 else []
            videos = (f"{video.name or f'video {i}'}: {video}" for i, video in enumerate(self.videos, 1))
            return "\n\n".join([*above, *videos])
        lines = [
            self.totals() + ("" if len(self.steps) >= self.num_steps else f", {len(self.steps)} steps begun"),
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


_UNBOUNDED = ("nan", "inf", "-inf")  # how `Step.to_dict` writes what JSON has no number for


def _integer(value, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _real(value) -> bool:
    return value in _UNBOUNDED if isinstance(value, str) else isinstance(value, numbers.Real) and value is not True


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_FIELDS = {
    "num_steps": ("an integer >= 0", lambda v: _integer(v, 0)),
    "kept_bytes": ("an integer >= 0", lambda v: _integer(v, 0)),
    "granularity": ("a name", lambda v: isinstance(v, str)),
    "steps": ("a list", lambda v: isinstance(v, list)),
    "videos": ("a list", lambda v: isinstance(v, list)),
    "config": ("an object or null", lambda v: v is None or isinstance(v, Mapping)),
    "name": ("a name", lambda v: isinstance(v, str)),
}
_STEP_FIELDS = {
    "step": ("an integer >= 1", lambda v: _integer(v, 1)),
    "reason": (f"one of {', '.join(REASONS)}", lambda v: v in REASONS),
    "cause": (f"one of {', '.join(CAUSES)}, or null", lambda v: v is None or v in CAUSES),
    **dict.fromkeys(("previous_rate", "rate"), ("an integer >= 1 or null", lambda v: v is None or _integer(v, 1))),
}


def _step(where: str, record) -> Step:
    """The record of a step in the field `where`."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object with named fields, got {_short(record)}")
    values = {}
    for field in dataclasses.fields(Step):
        if field.name not in record:
            if field.default is dataclasses.MISSING:
                raise ValueError(f"{where}.{field.name}: expected a field, got {', '.join(record) or 'none'}")
            continue
        value = record[field.name]
        expected, fits = _STEP_FIELDS.get(field.name, ("a number or null", lambda v: v is None or _real(v)))
        if not fits(value):
            raise ValueError(f"{where}.{field.name}: expected {expected}, got {_short(value)}")
        values[field.name] = float(value) if value in _UNBOUNDED else value
    if record.keys() - values.keys():
        raise ValueError(f"{where}: expected fields of a step, got {min(record.keys() - values.keys())!r}")
    return Step(**values)

"""What a job's attempts have told so far, step by step: metrics, and predictions with the metrics of the same step.

Place in the flow: events.jsonl, predictions.jsonl → **feed** → follower. One rule: each step once, in order. A job that goes
on from a checkpoint repeats the steps behind it with the same numbers, so the first telling of a step is as good as any.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gateway.jobdir import Event, JobDir, Prediction, read_events

_COUNTERS = ("step", "total_steps")
_BATCH = 500  # points: memory stays bounded whatever a tracker has missed


@dataclass(frozen=True)
class Point:
    """One step."""

    step: int
    created_at: int  # unix seconds
    values: dict[str, float]
    predictions: tuple[Prediction, ...] = ()


class Feed:
    """The steps after `told`; each `read` goes on where the one before ended."""

    def __init__(self, job: JobDir, told: int) -> None:
        self._job, self._told = job, told
        self._attempt, self._offset, self._predictions_offset = 0, 0, 0
        self._predictions: dict[int, list[Prediction]] = {}

    def read(self) -> list[Point]:
        """The next steps, at most some hundred; none when there is nothing new."""
        while True:
            # Looked for first: once the next attempt is there, nobody writes to this one any more.
            is_over = self._job.events_path(self._attempt + 1).exists()
            events = self._read_metrics()
            if events:
                break
            if not is_over:
                return []
            self._attempt, self._offset, self._predictions_offset = self._attempt + 1, 0, 0
            self._predictions.clear()
        self._read_predictions()  # after the events: those of a step are written before its metrics
        self._told = int(events[-1].data["step"])
        return [self._point(event) for event in events]

    def _read_metrics(self) -> list[Event]:
        """The events of the next steps."""
        found: list[Event] = []
        last = self._told
        for event, offset in read_events(self._job.events_path(self._attempt), self._offset):
            self._offset = offset
            if event.type == "metrics" and event.data["step"] > last:
                found.append(event)
                last = event.data["step"]
            if len(found) == _BATCH:
                break
        return found

    def _point(self, event: Event) -> Point:
        step = int(event.data["step"])
        values = {name: float(value) for name, value in event.data.items() if name not in _COUNTERS}
        return Point(step, event.created_at, values, tuple(self._predictions.pop(step, ())))

    def _read_predictions(self) -> None:
        path = self._job.predictions_path(self._attempt)
        for line, offset in _whole_lines(path, self._predictions_offset):
            self._predictions_offset = offset
            found = Prediction(**json.loads(line))
            if found.step > self._told:
                self._predictions.setdefault(found.step, []).append(found)


def _whole_lines(path: Path, offset: int) -> list[tuple[bytes, int]]:
    """Lines from byte `offset` on, each with the offset after it; a torn last one is left."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            found = []
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                found.append((line, offset))
            return found
    except FileNotFoundError:
        return []

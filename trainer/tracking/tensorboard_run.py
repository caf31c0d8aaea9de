"""TensorBoard: scalars, predictions and the configuration as text, in event files under FOLDER/JOB_ID.

Place in the flow: follower → **tensorboard_run** → files. TensorBoard has no place for artifacts. It is written with
TensorBoard's own writer, not torch's, which would load torch into this process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DataType
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from trainer.tracking.feed import Point
from trainer.tracking.run import Status, TrackedJob


def open_run(job: TrackedJob) -> TensorboardRun:
    """A new event file beside those of earlier attempts."""
    return TensorboardRun(job)


class TensorboardRun:
    def __init__(self, job: TrackedJob) -> None:
        folder = Path(job.tracker.place or job.folder) / job.job_id
        self._writer = EventFileWriter(str(folder))
        if job.told:  # what an earlier file has of later steps was not told to its end: TensorBoard leaves it out
            self._write(Event(session_log=SessionLog(status=SessionLog.START), step=job.told + 1))
        else:
            config = json.dumps(job.config, indent=1)
            self._write(Event(step=0, summary=Summary(value=[_text("config", f"```json\n{config}\n```")])))
        self._writer.flush()

    def tell(self, points: Sequence[Point]) -> None:
        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            if point.predictions:
                values.append(_text("predictions", _table(point)))
            self._write(Event(step=point.step, wall_time=point.created_at, summary=Summary(value=values)))
        self._writer.flush()

    def end(self, status: Status, adapter: Path | None) -> None:
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = event.wall_time or time.time()
        self._writer.add_event(event)


def _text(tag: str, markdown: str) -> Any:
    tensor = TensorProto(
        dtype=DataType.DT_STRING,
        string_val=[markdown.encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    metadata = create_summary_metadata(display_name=tag, description="")
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


def _table(point: Point) -> str:
    rows = [[_cell(p.prompt), _cell(p.expected), _cell(p.predicted)] for p in point.predictions]
    lines = [["prompt", "expected", "predicted"], ["---"] * 3, *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _cell(text: str) -> str:
    """A text that stays within its cell."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", "<br>")

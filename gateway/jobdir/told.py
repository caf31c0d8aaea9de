"""What the trainer tells: the check's findings, events, predictions, the result. It writes them; the gateway reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gateway.jobdir.spec import JobSpec


@dataclass(frozen=True)
class TrainerError:
    """Why a job failed, as OpenAI's job.error has it."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Check:
    """check.json: the data was read, rendered and counted; `error` is set when it cannot be trained on."""

    error: TrainerError | None = None
    n_examples: int = 0
    n_validation_examples: int = 0
    n_tokens: int = 0  # of one epoch, prompts included
    n_trained_tokens: int = 0  # of one epoch, labels other than -100
    n_truncated: int = 0
    n_epochs: int = 0
    batch_size: int = 0
    learning_rate_multiplier: float = 0.0
    beta: float | None = None  # where the method has one
    total_steps: int = 0
    estimated_memory_bytes: int = 0  # of the trainer at its peak
    notes: tuple[str, ...] = ()  # what was found, to be told: the form of the data, counts, the estimate
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()  # the first bad lines, each with its number and field

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Check:
        error = raw.get("error")
        lists = {name: tuple(raw.get(name, ())) for name in ("notes", "warnings", "problems")}
        return cls(**{**raw, **lists, "error": TrainerError(**error) if error else None})


@dataclass(frozen=True)
class Result:
    """result.json, written last."""

    status: Literal["succeeded", "failed"]
    error: TrainerError | None = None
    trained_tokens: int = 0  # over all epochs
    steps: int = 0

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Result:
        error = raw.get("error")
        return cls(**{**raw, "error": TrainerError(**error) if error else None})


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl.

    `type` is "message", "metrics" (data: step, total_steps, train_loss, train_mean_token_accuracy and, where measured,
    valid_loss, valid_mean_token_accuracy, full_valid_loss, full_valid_mean_token_accuracy), "checkpoint" (data: step and
    the same metrics; the folder is complete) or "progress" (data: estimated_finish, unix seconds; not shown to clients).
    """

    seq: int
    created_at: int
    type: Literal["message", "metrics", "checkpoint", "progress"]
    message: str
    level: Literal["info", "warn", "error"] = "info"
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.jsonl: a validation prompt, the reply in the file, and the model's own as it was at `step`."""

    step: int
    prompt: str
    expected: str
    predicted: str


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Events from byte `offset` on, each with the offset after it. A torn last line is left for the next call."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield Event(**json.loads(line)), offset


def out_of_memory_message(spec: JobSpec | None, check: Check | None) -> str:
    """What to change so that it fits."""
    size = f" (it was {check.batch_size})" if check else ""
    length = f" (it was {spec.max_length})" if spec else ""
    quantised = "" if spec and spec.options.quantization != "none" else ', or quantization "nf4"'
    return f"Training ran out of memory. Set a smaller batch_size{size} or max_length{length}{quantised}"

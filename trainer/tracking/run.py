"""What a tracker must be able to do, and what every tracker is told of a job at its beginning.

Place in the flow: follower → **run** ← the trackers. One rule: a tracker may raise whatever it likes; the follower sees to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from gateway.jobdir import Check, JobSpec, Tracker
from trainer.tracking.feed import Point

Status = Literal["succeeded", "failed", "interrupted"]


@dataclass(frozen=True)
class TrackedJob:
    """A job as a tracker sees it."""

    tracker: Tracker
    job_id: str
    name: str
    config: dict[str, Any]  # flat, without a path of this machine
    folder: Path  # for what the tracker keeps here
    told: int  # the last step that it was told before; 0 for none


class Run(Protocol):
    """The tracker's side of one job, open."""

    def tell(self, points: Sequence[Point]) -> None:
        """Hands over steps, in order; they are there when this returns, or as safe as the tracker makes them."""

    def end(self, status: Status, adapter: Path | None) -> None:
        """Closes the run: with the adapter's folder where there is one. After "interrupted" the same run may go on."""


Open = Callable[[TrackedJob], Run]


def describe(spec: JobSpec, check: Check) -> dict[str, Any]:
    """The job's resolved hyperparameters and the names it goes by: one flat mapping, with dots."""
    facts: dict[str, Any] = {
        "job_id": spec.job_id,
        "model": spec.model,
        "base": spec.base.name,
        "base_digest": spec.base.digest,
        "template_digest": spec.template_digest,
        "starts_from": spec.starts_from,
        "training_file": spec.training_file.file_id,
        "validation_file": spec.validation_file.file_id if spec.validation_file else None,
        "method": spec.method,
        "seed": spec.seed,
        "threads": spec.threads,
        "max_length": spec.max_length,
        "turns": spec.turns,
    }
    resolved = ("n_epochs", "batch_size", "learning_rate_multiplier", "beta", "total_steps")
    counted = ("n_examples", "n_validation_examples", "n_tokens", "n_trained_tokens", "n_truncated")
    facts |= {name: getattr(check, name) for name in (*resolved, *counted)}
    for group in ("lora", "options", "launch"):
        facts |= {f"{group}.{name}": value for name, value in asdict(getattr(spec, group)).items()}
    return {name: value for name, value in facts.items() if value is not None}

"""Fine-tuning jobs on the wire: a create request becomes a `CreateJob`, rows become OpenAI's objects. Pure.

The one rule: what a client asked for is either done or refused by name (`param`), never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gateway.errors import RequestError
from gateway.wire.fields import show
from gateway.wire.integrations import parse_integrations, shown_integrations, shown_tracking
from gateway.wire.metadata import parse_metadata, parse_metadata_filter
from gateway.wire.template_options import template_options
from gateway.wire.training_method import HowToTrain, method_type, parse_how, refuse_unknown
from gateway.wire.training_options import OPTIONS

if TYPE_CHECKING:
    from gateway.jobdir import Turns
    from gateway.store.checkpoints import Checkpoint
    from gateway.store.events import Event
    from gateway.store.jobs import Job

MAX_SEED = 2**31 - 1
MAX_SUFFIX_CHARS = 64
MAX_IDEMPOTENCY_KEY_CHARS = 255

CREATE_FIELDS = (
    "model",
    "training_file",
    "validation_file",
    "suffix",
    "seed",
    "hyperparameters",
    "method",
    "metadata",
    "integrations",
    "tunegate",
)
RENDERING_FIELDS = ("turns", "chat_template_kwargs")
TRAINING_FIELDS = ("method", "tracking", *OPTIONS)  # of `tunegate`, in a job


@dataclass(frozen=True)
class Rendering:
    """`tunegate`, our extension: which turns are learnt, and options of the template, which stay with the tuned model."""

    turns: Turns = "all"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What differs from the default."""
        shown: dict[str, Any] = {} if self.turns == "all" else {"turns": self.turns}
        return shown | ({"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {})


@dataclass(frozen=True)
class CreateJob:
    """A create request whose every field was checked."""

    model: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int | None
    how: HowToTrain
    metadata: dict[str, str] | None
    rendering: Rendering
    integrations: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class ListJobs:
    """The filter of a list: `metadata` is pairs that must all be there, "none" for jobs without any, None for all."""

    metadata: dict[str, str] | Literal["none"] | None


def parse_create(body: Mapping[str, Any]) -> CreateJob:
    """The request, checked; raises RequestError that names the field, its value and the rule."""
    refuse_unknown(body, CREATE_FIELDS, "")
    rendering = parse_rendering(body.get("tunegate"), beside=TRAINING_FIELDS)
    tunegate = body.get("tunegate") or {}
    request = CreateJob(
        model=_required_text(body, "model", "the name of a base model, of an alias of one, or of a tuned model"),
        training_file=_required_text(body, "training_file", "the id of an uploaded file, such as 'file-abc123'"),
        validation_file=_optional_text(body, "validation_file"),
        suffix=_suffix(body.get("suffix")),
        seed=_seed(body.get("seed")),
        how=parse_how(body.get("method"), body.get("hyperparameters"), tunegate),
        metadata=parse_metadata(body.get("metadata")),
        rendering=rendering,
        integrations=parse_integrations(body.get("integrations"), tunegate.get("tracking")),
    )
    if request.validation_file is None and (where := request.how.places.get("early_stopping_patience")):
        raise RequestError(
            f"{where} is {request.how.options['early_stopping_patience']}, but whether training still helps is measured on "
            "a validation_file, and there is none: give one, or leave it out.",
            param=where,
        )
    return request


def parse_rendering(value: Any, beside: Sequence[str] = ()) -> Rendering:
    """The field `tunegate`, which may hold the fields `beside` too. Raises RequestError."""
    if value is None:
        return Rendering()
    if not isinstance(value, Mapping):
        raise RequestError(f"'tunegate' must be an object, not {show(value)}", param="tunegate")
    refuse_unknown(value, (*RENDERING_FIELDS, *beside), "tunegate.")
    turns = value.get("turns")
    if turns not in ("all", "last", None):
        raise RequestError(f"'tunegate.turns' must be 'all' or 'last', not {show(turns)}", param="tunegate.turns")
    options = template_options(value.get("chat_template_kwargs"), "tunegate.chat_template_kwargs")
    return Rendering(turns or "all", options)


def parse_idempotency_key(value: str | None) -> str | None:
    if value is None or value == "":
        return None
    if len(value) > MAX_IDEMPOTENCY_KEY_CHARS:
        raise RequestError(
            f"The Idempotency-Key header has {len(value)} characters; at most {MAX_IDEMPOTENCY_KEY_CHARS} are taken."
        )
    return value


def parse_list_filter(query: Mapping[str, str]) -> ListJobs:
    """The filter written as `metadata[k]=v`, or as `metadata=null`."""
    return ListJobs(parse_metadata_filter(query, "jobs"))


def job_object(job: Job, organization: str) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job`: hyperparameters as asked until the files are checked, as resolved from then on."""
    hyperparameters = dict(job.hyperparameters)
    if job.check and not job.check.get("error"):
        hyperparameters |= {name: job.check[name] for name in hyperparameters if job.check.get(name) is not None}
    kind = method_type(job.method)
    estimated_finish = None if job.is_over or job.pause == "paused" else job.estimated_finish
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "error": None if job.error is None else {name: job.error.get(name) for name in ("code", "message", "param")},
        "fine_tuned_model": job.fine_tuned_model,
        "finished_at": job.finished_at,
        "estimated_finish": estimated_finish,
        "hyperparameters": hyperparameters if kind == "supervised" else {},
        "method": {"type": kind, kind: {"hyperparameters": hyperparameters}},
        "model": job.model,
        "organization_id": f"org-{organization}",
        "result_files": list(job.result_files),
        "seed": job.seed,
        "status": job.status,
        "trained_tokens": job.trained_tokens,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "integrations": shown_integrations(job.integrations),
        "metadata": job.metadata,
        "tunegate": _extension(job),
    }


def event_object(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data or {},
    }


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "fine_tuning_job_id": checkpoint.job_id,
        "metrics": {k: v for k, v in checkpoint.metrics.items() if k != "total_steps"},
        "step_number": checkpoint.step_number,
    }


def _extension(job: Job) -> dict[str, Any]:
    """What OpenAI's object has no place for: how the job trains, everything resolved that can be before it runs."""
    shown = dict(job.rendering)
    if job.method != method_type(job.method):
        shown["method"] = job.method
    if tracking := shown_tracking(job.integrations):
        shown["tracking"] = tracking
    return shown | job.settled


def _seed(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise RequestError(f"seed is {show(value)}; it must be an integer from 0 to {MAX_SEED}.", param="seed")
    return value


def _suffix(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_SUFFIX_CHARS:
        raise RequestError(
            f"suffix is {show(value)}; it must be a string of 1 to {MAX_SUFFIX_CHARS} characters.", param="suffix"
        )
    if not value.isprintable() or value != value.strip():
        raise RequestError(
            f"suffix is {show(value)}; it becomes part of the model's name, so it must be printable and neither "
            "start nor end with a space.",
            param="suffix",
        )
    return value


def _required_text(body: Mapping[str, Any], name: str, meaning: str) -> str:
    value = body.get(name)
    if value is None:
        raise RequestError(f"You must provide {name}: {meaning}.", param=name)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} is {show(value)}; it must be a string: {meaning}.", param=name)
    return value


def _optional_text(body: Mapping[str, Any], name: str) -> str | None:
    return None if body.get(name) is None else _required_text(body, name, "the id of an uploaded file, or null")

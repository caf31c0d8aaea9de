"""Fine-tuning jobs on the wire: a create request becomes a `CreateJob`, rows become OpenAI's objects. Pure.

The one rule: what a client asked for is either done or refused by name (`param`), never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gateway.errors import RequestError
from gateway.wire.fields import show
from gateway.wire.metadata import parse_metadata, parse_metadata_filter
from gateway.wire.template_options import template_options

if TYPE_CHECKING:
    from gateway.jobdir import Turns
    from gateway.store.checkpoints import Checkpoint
    from gateway.store.events import Event
    from gateway.store.jobs import Job

MAX_SEED = 2**31 - 1
MAX_SUFFIX_CHARS = 64
MAX_INTEGRATIONS = 5
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
HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")


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
    """A create request whose every field was checked; `hyperparameters` has all three keys, "auto" where unset."""

    model: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int | None
    hyperparameters: dict[str, int | float | str]
    metadata: dict[str, str] | None
    rendering: Rendering


@dataclass(frozen=True)
class ListJobs:
    """The filter of a list: `metadata` is pairs that must all be there, "none" for jobs without any, None for all."""

    metadata: dict[str, str] | Literal["none"] | None


def parse_create(body: Mapping[str, Any]) -> CreateJob:
    """The request, checked; raises RequestError that names the field, its value and the rule."""
    _refuse_unknown(body, CREATE_FIELDS, "")
    _refuse_integrations(body.get("integrations"))
    return CreateJob(
        model=_required_text(body, "model", "the name of a base model, or an alias of one"),
        training_file=_required_text(body, "training_file", "the id of an uploaded file, such as 'file-abc123'"),
        validation_file=_optional_text(body, "validation_file"),
        suffix=_suffix(body.get("suffix")),
        seed=_seed(body.get("seed")),
        hyperparameters=_method_hyperparameters(body.get("method"), body.get("hyperparameters")),
        metadata=parse_metadata(body.get("metadata")),
        rendering=parse_rendering(body.get("tunegate")),
    )


def parse_rendering(value: Any) -> Rendering:
    """The field `tunegate`. Raises RequestError."""
    if value is None:
        return Rendering()
    if not isinstance(value, Mapping):
        raise RequestError(f"'tunegate' must be an object, not {show(value)}", param="tunegate")
    _refuse_unknown(value, ("turns", "chat_template_kwargs"), "tunegate.")
    turns = value.get("turns", "all")
    if turns not in ("all", "last"):
        raise RequestError(f"'tunegate.turns' must be 'all' or 'last', not {show(turns)}", param="tunegate.turns")
    options = template_options(value.get("chat_template_kwargs"), "tunegate.chat_template_kwargs")
    return Rendering(turns, options)


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
        hyperparameters = {name: job.check[name] for name in HYPERPARAMETERS}
    extension = {"tunegate": job.rendering} if job.rendering else {}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "error": None if job.error is None else {name: job.error.get(name) for name in ("code", "message", "param")},
        "fine_tuned_model": job.fine_tuned_model,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish if job.status == "running" else None,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "model": job.model,
        "organization_id": f"org-{organization}",
        "result_files": list(job.result_files),
        "seed": job.seed,
        "status": job.status,
        "trained_tokens": job.trained_tokens,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "integrations": [],
        "metadata": job.metadata,
        **extension,
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


def _method_hyperparameters(method: Any, legacy: Any) -> dict[str, int | float | str]:
    """`method`'s own block where it is there, else the older top-level field.

    The SDK's tests send every method's block at once: only the one that `type` names is meant.
    """
    if method is None:
        return _hyperparameters(legacy, "hyperparameters")
    if not isinstance(method, dict):
        raise RequestError(
            f"method is {_kind(method)}; it must be an object like {{'type': 'supervised'}}.", param="method"
        )
    kind = method.get("type")
    if kind in ("dpo", "reinforcement"):
        raise RequestError(
            f"The method '{kind}' is not available in this release; 'supervised' is.", param="method.type"
        )
    if kind != "supervised":
        raise RequestError(f"method.type is {show(kind)}; it must be 'supervised'.", param="method.type")
    _refuse_unknown(method, ("type", "supervised", "dpo", "reinforcement"), "method.")
    block = method.get("supervised")
    if block is None:
        return _hyperparameters(legacy, "hyperparameters")
    if not isinstance(block, dict):
        raise RequestError(
            f"method.supervised is {_kind(block)}; it must be an object like {{'hyperparameters': {{…}}}}.",
            param="method.supervised",
        )
    _refuse_unknown(block, ("hyperparameters",), "method.supervised.")
    inner = block.get("hyperparameters")
    if inner is None:
        return _hyperparameters(legacy, "hyperparameters")
    return _hyperparameters(inner, "method.supervised.hyperparameters")


def _hyperparameters(value: Any, where: str) -> dict[str, int | float | str]:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise RequestError(f"{where} is {_kind(value)}; it must be an object like {{'n_epochs': 3}}.", param=where)
    _refuse_unknown(value, HYPERPARAMETERS, f"{where}.")
    return {
        "n_epochs": _auto_or_int(value.get("n_epochs"), f"{where}.n_epochs", 50),
        "batch_size": _auto_or_int(value.get("batch_size"), f"{where}.batch_size", 256),
        "learning_rate_multiplier": _auto_or_positive(
            value.get("learning_rate_multiplier"), f"{where}.learning_rate_multiplier"
        ),
    }


def _auto_or_int(value: Any, where: str, maximum: int) -> int | str:
    if value is None or value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
        raise RequestError(
            f"{where} is {show(value)}; it must be 'auto' or an integer from 1 to {maximum}.", param=where
        )
    return value


def _auto_or_positive(value: Any, where: str) -> float | str:
    if value is None or value == "auto":
        return "auto"
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if number is None or not math.isfinite(number) or not 0 < number <= 1e6:
        raise RequestError(
            f"{where} is {show(value)}; it must be 'auto' or a number greater than 0 (and at most 1e6).", param=where
        )
    return float(number)


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


def _refuse_integrations(value: Any) -> None:
    if value is None or value == []:
        return
    if not isinstance(value, list) or len(value) > MAX_INTEGRATIONS:
        raise RequestError(
            f"integrations is {show(value)}; it must be a list of at most {MAX_INTEGRATIONS} objects.",
            param="integrations",
        )
    raise RequestError(
        "integrations are not available in this release: leave the field out. The job's events and its result file "
        "hold the same metrics.",
        param="integrations",
    )


def _required_text(body: Mapping[str, Any], name: str, meaning: str) -> str:
    value = body.get(name)
    if value is None:
        raise RequestError(f"You must provide {name}: {meaning}.", param=name)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} is {show(value)}; it must be a string: {meaning}.", param=name)
    return value


def _optional_text(body: Mapping[str, Any], name: str) -> str | None:
    return None if body.get(name) is None else _required_text(body, name, "the id of an uploaded file, or null")


def _refuse_unknown(block: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in block:
        if name not in known:
            raise RequestError(
                f"Unrecognized request argument supplied: {where}{show(name, quoted=False)}. Known here: "
                f"{', '.join(known)}.",
                param=f"{where}{name[:100]}",
            )


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), show(value))

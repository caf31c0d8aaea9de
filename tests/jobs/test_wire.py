"""Create requests as clients send them, good and bad, and objects as the strict SDK takes them. Pure."""

from __future__ import annotations

import math
from typing import Any

import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from gateway.errors import RequestError
from gateway.store.checkpoints import Checkpoint
from gateway.store.events import Event
from gateway.store.jobs import Job
from gateway.wire.fine_tuning import (
    checkpoint_object,
    event_object,
    job_object,
    parse_create,
    parse_idempotency_key,
    parse_list_filter,
)

MINIMAL = {"model": "tiny", "training_file": "file-abc123"}
AUTO = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
JOB = Job(
    id="ftjob-1",
    created_at=1,
    model="gpt-4o-mini",
    base="tiny",
    training_file="file-1",
    validation_file=None,
    suffix=None,
    seed=7,
    hyperparameters=AUTO,
    metadata=None,
    idempotency_key=None,
)


def test_the_least_request_is_all_auto() -> None:
    asked = parse_create(MINIMAL)
    assert asked.how.hyperparameters == AUTO
    assert (asked.suffix, asked.seed, asked.metadata, asked.validation_file) == (None, None, None, None)


def test_nulls_are_as_good_as_nothing() -> None:
    nulls = ("validation_file", "suffix", "seed", "metadata", "integrations", "hyperparameters", "method")
    assert parse_create(MINIMAL | dict.fromkeys(nulls)) == parse_create(MINIMAL)


def test_what_the_sdks_own_test_sends_is_taken_by_its_methods_block() -> None:
    """It sends the older hyperparameters and every method's block at once."""
    asked = parse_create(
        {
            **MINIMAL,
            "hyperparameters": {"batch_size": 1, "learning_rate_multiplier": 5, "n_epochs": 9},
            "method": {
                "type": "supervised",
                "dpo": {"hyperparameters": {"beta": "auto"}},
                "reinforcement": {"grader": {"type": "string_check"}},
                "supervised": {"hyperparameters": {"batch_size": "auto", "n_epochs": 3}},
            },
            "metadata": {"foo": "string"},
            "seed": 42,
            "suffix": "x",
            "validation_file": "file-abc123",
        }
    )
    assert asked.how.hyperparameters == {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert (asked.seed, asked.suffix, asked.metadata) == (42, "x", {"foo": "string"})


def test_the_older_hyperparameters_count_where_the_method_has_none() -> None:
    older = {"n_epochs": 50, "batch_size": 256, "learning_rate_multiplier": 0.1}
    for method in ({"type": "supervised"}, {"type": "supervised", "supervised": {}}, None):
        assert parse_create({**MINIMAL, "hyperparameters": older, "method": method}).how.hyperparameters == older


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"model": ""}, "model"),
        ({"training_file": None}, "training_file"),
        ({"training_file": ["file-1"]}, "training_file"),
        ({"validation_file": 1}, "validation_file"),
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "a\nb"}, "suffix"),
        ({"suffix": " a"}, "suffix"),
        ({"suffix": 1}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"hyperparameters": 1}, "hyperparameters"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"batch_size": "large"}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate_multiplier": math.inf}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate_multiplier": math.nan}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate_multiplier": False}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta"),
        ({"method": "supervised"}, "method"),
        ({"method": {}}, "method.type"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"type": ["supervised"]}}, "method.type"),
        ({"method": {"type": "supervised", "orpo": {}}}, "method.orpo"),
        ({"method": {"type": "supervised", "supervised": 1}}, "method.supervised"),
        ({"method": {"type": "supervised", "supervised": {"lr": 1}}}, "method.supervised.lr"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}},
            "method.supervised.hyperparameters.n_epochs",
        ),
        ({"metadata": []}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"integrations": {}}, "integrations"),
        ({"integrations": [{}] * 6}, "integrations"),
        ({"n_epochs": 3}, "n_epochs"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_create({**MINIMAL, **fields})
    assert (refused.value.param, refused.value.status) == (param, 400)
    assert len(refused.value.message) < 400


def test_metadata_filters_are_pairs_or_null() -> None:
    assert parse_list_filter({"limit": "3"}).metadata is None
    assert parse_list_filter({"metadata[team]": "a", "metadata[a]b]": "c"}).metadata == {"team": "a", "a]b": "c"}
    assert parse_list_filter({"metadata": "null"}).metadata == "none"
    for bad in ({"metadata": "x"}, {"metadata": "null", "metadata[a]": "b"}):
        with pytest.raises(RequestError) as refused:
            parse_list_filter(bad)
        assert refused.value.param == "metadata"


def test_an_idempotency_key_has_bounds() -> None:
    assert parse_idempotency_key("k") == "k"
    assert parse_idempotency_key("") is parse_idempotency_key(None) is None
    with pytest.raises(RequestError, match="256 characters"):
        parse_idempotency_key("k" * 256)


def test_a_new_job_is_what_the_sdk_takes_for_one() -> None:
    raw = job_object(JOB, "local")
    job = FineTuningJob.model_validate(raw, strict=True)
    assert job.error is None and job.result_files == [] and job.fine_tuned_model is None
    assert job.hyperparameters.n_epochs == "auto" and job.organization_id == "org-local"
    assert set(FineTuningJob.model_fields) <= set(raw), "every field is there, null where there is nothing"


def test_a_checked_job_tells_what_auto_became() -> None:
    check = {"error": None, "n_epochs": 4, "batch_size": 8, "learning_rate_multiplier": 1.0, "n_examples": 12}
    raw = job_object(Job(**{**vars(JOB), "check": check, "status": "running", "estimated_finish": 9}), "local")
    job = FineTuningJob.model_validate(raw, strict=True)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size, job.estimated_finish) == (4, 8, 9)
    assert job.method is not None and job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None and job.method.supervised.hyperparameters.n_epochs == 4


def test_a_failed_job_tells_why_and_no_estimate() -> None:
    error = {"code": "invalid_n_examples", "message": "7 examples", "param": "training_file"}
    raw = job_object(Job(**{**vars(JOB), "status": "failed", "error": error, "estimated_finish": 9}), "local")
    job = FineTuningJob.model_validate(raw, strict=True)
    assert job.error is not None and job.error.model_dump() == error and job.estimated_finish is None


def test_events_and_checkpoints_are_what_the_sdk_takes_for_them() -> None:
    event = Event("ftevent-1", "ftjob-1", 1, "info", "metrics", "Step 1/2", {"step": 1, "train_loss": 0.5})
    assert FineTuningJobEvent.model_validate(event_object(event), strict=True).data == event.data
    plain = FineTuningJobEvent.model_validate(
        event_object(Event("ftevent-2", "ftjob-1", 1, "warn", "message", "Careful", None)), strict=True
    )
    assert plain.data == {}
    metrics = {"step": 3, "total_steps": 9, "train_loss": 0.5}
    found = FineTuningJobCheckpoint.model_validate(
        checkpoint_object(Checkpoint("ftckpt_1", "ftjob-1", 1, 3, metrics, "ft:x:local::abc:ckpt-step-3")), strict=True
    )
    assert found.metrics.step == 3 and found.fine_tuned_model_checkpoint == "ft:x:local::abc:ckpt-step-3"

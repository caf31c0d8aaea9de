"""A job that is paused and resumed through the API ends in the bytes of one that was not; its checkpoints answer meanwhile."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.e2e import training
from tests.server import Server

pytestmark = pytest.mark.timeout(1200)  # real training, on however many cores there are


def outcome(server: Server, client: OpenAI, job_id: str) -> tuple[dict[int, Any], dict[str, bytes]]:
    """Each step's metrics, and the adapter's files."""
    ended = training.wait_for_end(client, job_id)
    assert ended.status == "succeeded", (ended.error, training.messages(client, job_id), server.log_tail())
    events = [event for event in client.fine_tuning.jobs.list_events(job_id, limit=100) if event.type == "metrics"]
    steps: dict[int, Any] = {event.data["step"]: event.data for event in events}  # type: ignore[index]
    assert len(steps) == len(events) == 12
    folder = server.data / "jobs" / job_id / "adapter"
    return steps, {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pause_takes_a_step_and_changes_no_loss_and_no_byte_and_checkpoints_answer_before_the_end(
    server: Server,
) -> None:
    client = server.client()
    fields = {
        "file_id": training.upload(client, training.examples("kappa", 12)),
        "validation_file": training.upload(client, training.examples("kappa", 8)),
        "seed": 3,
    }
    unpaused = training.create(client, "tunegate-demo", n_epochs=4, **fields)
    steps, files = outcome(server, client, unpaused.id)

    job = training.create(client, "tunegate-demo", n_epochs=4, **fields)
    deadline = time.monotonic() + 300
    while not (checkpoints := client.fine_tuning.jobs.checkpoints.list(job.id).data):
        assert time.monotonic() < deadline, training.messages(client, job.id)
        time.sleep(0.02)
    assert httpx.post(f"{server.base_url}/fine_tuning/jobs/{job.id}/pause").status_code == 200
    training.wait_for(client, job.id, {"queued"})
    said = training.messages(client, job.id)
    assert any(text.startswith("The job is paused behind step ") for text in said), said
    assert any(text.startswith("Training paused behind step ") for text in said), said
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model is None

    (first, *_) = client.fine_tuning.jobs.checkpoints.list(job.id, limit=10).data[::-1]
    assert first.step_number == checkpoints[-1].step_number == 3
    assert first.metrics.full_valid_loss is not None and first.metrics.full_valid_mean_token_accuracy is not None
    assert first.fine_tuned_model_checkpoint in [model.id for model in client.models.list()]
    assert isinstance(training.ask(client, first.fine_tuned_model_checkpoint, "What is cedar 2?"), str)

    assert httpx.post(f"{server.base_url}/fine_tuning/jobs/{job.id}/resume").status_code == 200
    assert outcome(server, client, job.id) == (steps, files)
    said = training.messages(client, job.id)
    assert "The job is resumed" in said and not [text for text in said if "was gone" in text]
    listed = {model.id for model in client.models.list()}
    kept = [
        c.step_number
        for c in client.fine_tuning.jobs.checkpoints.list(job.id)
        if c.fine_tuned_model_checkpoint in listed
    ]
    assert kept == [12, 9, 6]

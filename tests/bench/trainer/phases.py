"""How long each phase of a job takes through a real gateway, asked with the real SDK every 20 ms."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

from tests.e2e import training
from tests.server import Server

_POLL_S = 0.02


@dataclass(frozen=True)
class Phases:
    """Seconds."""

    created_to_first_step: float
    last_step_to_answer: float  # the first token of the tuned model
    created_to_answer: float


def measure(server: Server, examples: int) -> Phases:
    """Those of one job of one epoch, in batches of four."""
    client = server.client()
    file_id = training.upload(client, training.examples("bench", examples))
    if "always" in server.config.read_text():
        _until_standby_is_ready(server)
    steps = -(-examples // 4)
    began = time.perf_counter()
    job_id = training.create(client, "tunegate-demo", file_id, n_epochs=1).id
    first = _step_seen(client, job_id, 1)
    last = _step_seen(client, job_id, steps)
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status == "running":
        time.sleep(_POLL_S)
    if job.fine_tuned_model is None:
        raise SystemExit(f"the job {job.status}: {training.messages(client, job_id)}")
    asked = {"role": "user", "content": "What is cedar 2?"}
    stream = client.chat.completions.create(
        model=job.fine_tuned_model,
        messages=[asked],  # type: ignore[list-item]
        max_tokens=4,
        stream=True,
    )
    next(iter(stream))
    answered = time.perf_counter()
    stream.close()
    return Phases(first - began, answered - last, answered - began)


def _step_seen(client: OpenAI, job_id: str, step: int) -> float:
    while True:
        events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
        if any(event.type == "metrics" and event.data["step"] >= step for event in events):  # type: ignore[index]
            return time.perf_counter()
        if client.fine_tuning.jobs.retrieve(job_id).status in ("failed", "cancelled"):
            raise SystemExit(f"the job failed: {training.messages(client, job_id)}")
        time.sleep(_POLL_S)


def _until_standby_is_ready(server: Server) -> None:
    """It is there and has used no processor for a second."""
    used, since = -1, time.monotonic()
    deadline = time.monotonic() + 120
    while used < 0 or time.monotonic() - since < 1:
        if time.monotonic() > deadline:
            raise SystemExit("no trainer stands by")
        if (now := _standby_cpu(server)) != used:
            used, since = now, time.monotonic()
        time.sleep(0.1)


def _standby_cpu(server: Server) -> int:
    """Clock ticks that the gateway's standby has used; negative where there is none, or none that has begun."""
    assert server.process is not None
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"trainer.processes.standby" in (process / "cmdline").read_bytes():
                fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[1]) == server.process.pid:
                    return int(fields[11]) + int(fields[12]) or -1
    return -1

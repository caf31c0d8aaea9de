"""`kill -9` of any process loses nothing that was acknowledged, and never trains a job twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import training
from tests.server import Server

pytestmark = pytest.mark.timeout(1200)  # real training, on however many cores there are


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own, to be killed."""
    server = Server(tmp_path)
    try:
        yield server.start()
    finally:
        server.stop()


def worker_pid(server: Server) -> int:
    return int(json.loads((server.data / "engines" / "tunegate-demo" / "ready.json").read_text())["pid"])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_job_survives_the_gateway_and_the_tuned_model_survives_the_worker(mortal: Server) -> None:
    client = mortal.client()
    file_id = training.upload(client, training.examples("omega"))
    job = training.create(client, "tunegate-demo", file_id, n_epochs=15)
    training.wait_for(client, job.id, {"running"})
    deadline = time.monotonic() + 60
    while not any("Step" in message for message in training.messages(client, job.id)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    engine = worker_pid(mortal)
    holder = json.loads((mortal.data / "jobs" / job.id / "lock").read_text())["pid"]
    mortal.kill()
    assert is_alive(engine)
    assert is_alive(holder), "the trainer does not die with the gateway"

    mortal.start()
    assert worker_pid(mortal) == engine, "the next start takes the engine over"
    ended = training.wait_for_end(client, job.id)
    assert ended.status == "succeeded", (ended.error, training.messages(client, job.id), mortal.log_tail())
    assert sorted(path.name for path in (mortal.data / "jobs" / job.id / "attempts").iterdir()) == ["1"]
    steps = [e.data["step"] for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]
    assert len(steps) == len(set(steps))

    assert ended.fine_tuned_model is not None
    before = training.ask(client, ended.fine_tuned_model, "What is cedar 2?")
    assert before.startswith("omega")
    os.kill(engine, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while True:  # what a client with retries does
        assert time.monotonic() < deadline
        try:
            after = training.ask(client, ended.fine_tuned_model, "What is cedar 2?")
            break
        except Exception as error:
            assert getattr(error, "status_code", 503) in (502, 503), error
            time.sleep(0.2)
    assert after == before
    assert worker_pid(mortal) != engine
    mortal.stop()
    assert not is_alive(worker_pid(mortal)), "SIGTERM ends the engine with the gateway"


def test_a_gateway_killed_again_and_again_leaves_one_engine_and_one_trainer(mortal: Server) -> None:
    client = mortal.client()
    job = training.create(client, "tunegate-demo", training.upload(client, training.examples("sigma")), n_epochs=15)
    engine = worker_pid(mortal)
    for pause_s in (0.0, 0.3, 1.5, 3.0, 5.0):
        time.sleep(pause_s)
        mortal.kill()
        mortal.start()
        assert worker_pid(mortal) == engine
    ended = training.wait_for_end(client, job.id)
    assert ended.status == "succeeded", (ended.error, training.messages(client, job.id), mortal.log_tail())
    assert sorted(path.name for path in (mortal.data / "jobs" / job.id / "attempts").iterdir()) == ["1"]
    said = training.messages(client, job.id)
    for once in ("Fine-tuning job started", "The job has successfully completed"):
        assert said.count(once) == 1, said


def test_a_second_gateway_on_the_same_data_folder_is_refused(mortal: Server) -> None:
    command = [sys.executable, "-m", "gateway", "serve", "--port", "0", "--data", str(mortal.data)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode != 0
    assert str(mortal.data) in second.stderr
    assert "Traceback" not in second.stderr
    assert training.ask(mortal.client(), "tunegate-demo", "still there?") is not None

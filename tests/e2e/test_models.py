"""Several models on one server: added while it runs, started when they are asked for, stopped for one another, removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from openai import NotFoundError

from gateway.jobdir import process_start_time
from gateway.settings import DEMO_MODEL_PATH
from tests.e2e.training import create, examples, upload, wait_for_end
from tests.server import ROOT, Server
from tests.tiny_architectures import write_tiny_architecture

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Each engine counts with 512 MiB for computed prompts and 256 more, so one fits, and two do not.
SETTINGS = """
[limits]
engine_memory_bytes = 1_000_000_000
[bases.first]
idle_unload_s = 1.5
[bases.patient]
path = "demo"
start = "on_demand"
[aliases]
"gpt-4o-mini" = "first"
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    source = write_tiny_architecture(folder / "source", "Qwen2ForCausalLM")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    server = Server(folder / "server", SETTINGS)
    (folder / "server" / "demo").symlink_to(DEMO_MODEL_PATH)
    models(server, "add", str(source), "--name", "first")
    try:
        yield server.start()
    finally:
        server.stop()


def models(server: Server, *arguments: str) -> str:
    command = [sys.executable, "-m", "gateway", "models", *arguments, "--data", str(server.data)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(server: Server, model: str) -> str:
    messages = [{"role": "user", "content": "hello"}]
    reply = server.client().chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)  # type: ignore[arg-type]
    return reply.choices[0].message.content or ""


def has_engine(server: Server, model: str) -> bool:
    try:
        record = json.loads((server.data / "engines" / model / "spawn.json").read_text())
    except FileNotFoundError:
        return False
    return process_start_time(record["pid"]) == record["start_time"]


def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listed(server: Server) -> set[str]:
    return {model.id for model in server.client().models.list()}


def test_models_come_and_go_on_one_server(running: Server) -> None:
    until(lambda: listed(running) == {"first", "gpt-4o-mini", "patient"})
    assert httpx.get(f"http://127.0.0.1:{running.port}/readyz").json()["engines"] == {"first": True, "patient": True}
    assert not has_engine(running, "first") and not has_engine(running, "patient")
    said = ask(running, "first")
    assert has_engine(running, "first") and ask(running, "gpt-4o-mini") == said

    ready = running.data / "bases/first/model.q4_0.gguf"
    models(running, "add", str(ready), "--name", "org/second")
    until(lambda: "org/second" in listed(running))
    assert ask(running, "org/second") == said  # the same weights, tokenizer and template, all from the one file
    assert has_engine(running, "org/second") and not has_engine(running, "first")
    assert ask(running, "first") == said
    assert has_engine(running, "first") and not has_engine(running, "org/second")

    until(lambda: not has_engine(running, "first"))
    models(running, "remove", "org/second")
    until(lambda: "org/second" not in listed(running))
    with pytest.raises(NotFoundError):
        ask(running, "org/second")
    assert os.path.samefile(ready, running.data / "bases/first/model.q4_0.gguf") and ask(running, "first") == said


def test_a_tuned_model_is_published_on_an_engine_that_rested_and_comes_back_with_it(running: Server) -> None:
    client = running.client()
    job = create(client, "first", upload(client, examples("found", 12)), n_epochs=1)
    until(lambda: not has_engine(running, "first"))  # nobody asks while it is trained
    ended = wait_for_end(client, job.id)
    assert ended.status == "succeeded" and ended.fine_tuned_model, ended.error
    until(lambda: not has_engine(running, "first"))
    said = ask(running, ended.fine_tuned_model)
    assert has_engine(running, "first") and ask(running, ended.fine_tuned_model) == said
    with pytest.raises(AssertionError, match="tuned models stand on it"):
        models(running, "remove", "first")


def test_a_model_that_cannot_be_tuned_is_refused_when_the_job_is_created(running: Server) -> None:
    bases = running.data / "bases"
    described = json.loads((bases / "first/base.json").read_text())
    shutil.copytree(bases / "first", bases / ".stays", ignore=shutil.ignore_patterns("base.json"))
    changed = described | {"name": "stays", "untrainable": "its architecture is 'odd'"}
    (bases / ".stays/base.json").write_text(json.dumps(changed))
    (bases / ".stays").rename(bases / "stays")
    until(lambda: "stays" in listed(running))
    client = running.client()
    file_id = upload(client, examples("no"))
    with pytest.raises(Exception, match="cannot be tuned here: its architecture is 'odd'") as refused:
        client.fine_tuning.jobs.create(training_file=file_id, model="stays")
    assert getattr(refused.value, "status_code", None) == 400

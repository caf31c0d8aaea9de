"""Several models on one server: added while it runs, started when they are asked for, stopped for one another, removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from openai import NotFoundError

from gateway.jobdir import process_start_time
from tests.server import ROOT, Server
from tests.tiny_architectures import write_tiny_architecture

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Each engine counts with more than 256 MiB, so one fits, and two do not.
SETTINGS = """
[engines]
memory_bytes = 400_000_000
[bases.first]
idle_unload_s = 1.5
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
    assert listed(running) == {"first", "gpt-4o-mini"} and not has_engine(running, "first")
    assert httpx.get(f"http://127.0.0.1:{running.port}/readyz").json()["engines"] == {"first": True}
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


def test_a_model_that_cannot_be_tuned_is_refused_when_the_job_is_created(running: Server) -> None:
    base = running.data / "bases/first/base.json"
    models(running, "add", str(running.data / "bases/first/model.q4_0.gguf"), "--name", "fixed")
    described = json.loads((base.parent.parent / "fixed" / "base.json").read_text())
    models(running, "remove", "fixed")
    assert described["untrainable"] is None
    fixed = base.parent.parent / "stays"
    subprocess.run(["cp", "-r", str(base.parent), str(fixed)], check=True)
    described |= {"name": "stays", "gguf": "model.q4_0.gguf", "untrainable": "its architecture is 'odd'"}
    (fixed / "base.json").write_text(json.dumps(described))
    until(lambda: "stays" in listed(running))
    client = running.client()
    lines = "".join(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
        for _ in range(10)
    )
    file = client.files.create(file=("a.jsonl", lines.encode()), purpose="fine-tune")
    with pytest.raises(Exception, match="cannot be tuned here: its architecture is 'odd'") as refused:
        client.fine_tuning.jobs.create(training_file=file.id, model="stays")
    assert getattr(refused.value, "status_code", None) == 400

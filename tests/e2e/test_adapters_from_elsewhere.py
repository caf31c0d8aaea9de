"""`tunegate models add --adapter` on the llama worker: what PEFT left becomes a model that answers as it did."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from openai import OpenAI

from tests.e2e import training
from tests.server import ROOT, Server

pytestmark = pytest.mark.timeout(600)


def test_an_adapter_from_elsewhere_is_served_as_it_was_where_it_came_from(
    server: Server, tuned: dict[str, str], tmp_path: Path
) -> None:
    client = server.client()
    left = as_peft_leaves_it(server, tuned["alpha"], tmp_path / "left")
    added = add(server, left, "taken-over")
    assert added.returncode == 0, added.stderr
    wait_listed(client, server, "taken-over")
    question = "What is cedar 2?"
    assert training.ask(client, "taken-over", question) == training.ask(client, tuned["alpha"], question)
    again = add(server, as_peft_leaves_it(server, tuned["beta"], tmp_path / "other"), "taken-over")
    assert again.returncode == 0, again.stderr
    wanted = training.ask(client, tuned["beta"], question)
    deadline = time.monotonic() + 60
    while training.ask(client, "taken-over", question) != wanted:
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.1)
    assert client.models.delete("taken-over").deleted


@pytest.mark.parametrize("name", ["tunegate-demo", "alpha"])
def test_a_name_that_is_taken_by_a_base_or_a_job_is_not_given_away(
    server: Server, tuned: dict[str, str], tmp_path: Path, name: str
) -> None:
    client = server.client()
    left = as_peft_leaves_it(server, tuned["alpha"], tmp_path / "left")
    taken = tuned.get(name, name)
    before = training.ask(client, taken, "What is birch 1?")
    assert add(server, left, taken).returncode == 0
    deadline = time.monotonic() + 60
    while not (refused := list((server.data / "imports").glob("*/refused.txt"))):
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.1)
    assert "add it under another --name" in refused[0].read_text()
    assert training.ask(client, taken, "What is birch 1?") == before
    shutil.rmtree(refused[0].parent)


def as_peft_leaves_it(server: Server, model: str, folder: Path) -> Path:
    """The two files that PEFT knows, of the model that a job made."""
    (job,) = [job for job in server.client().fine_tuning.jobs.list() if job.fine_tuned_model == model]
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(server.data / "jobs" / job.id / "adapter" / name, folder)
    config = json.loads((folder / "adapter_config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/home/maker/base"}))
    return folder


def add(server: Server, adapter: Path, name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", "models", "add", "--adapter", str(adapter), "--base", "tunegate-demo"]
    command += ["--name", name, "--data", str(server.data), "--config", str(server.config)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def wait_listed(client: OpenAI, server: Server, name: str) -> None:
    deadline = time.monotonic() + 60
    while name not in [model.id for model in client.models.list()]:
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.1)

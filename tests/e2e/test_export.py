"""A tuned model leaves the server and comes back: `tunegate export`, `models add`, and a chat that answers as before."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from openai import BadRequestError, NotFoundError
from openai.types import FileObject
from safetensors.numpy import load, load_file

from tests.e2e import training
from tests.server import ROOT, Server

pytestmark = pytest.mark.timeout(600)

QUESTION = "What is cedar 2?"


def tunegate(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", *arguments, "--data", str(server.data), "--config", str(server.config)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_merged_q4_0_file_is_served_as_a_base_of_its_own_and_answers_as_the_tuned_model(
    server: Server, tuned: dict[str, str], tmp_path: Path
) -> None:
    model = tuned["alpha"]
    (tmp_path / "merged").mkdir()
    done = tunegate(server, "export", model, "--to", "gguf", "--type", "q4_0", "--out", str(tmp_path / "merged"))
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "merged").iterdir()
    assert file.name.startswith("ft-tunegate-demo-") and file.name.endswith(".q4_0.gguf")
    assert "42 of 42 weights are other than the base's" in done.stdout
    other = Server(tmp_path / "other")
    added = tunegate(other, "models", "add", str(file), "--name", "merged")
    assert added.returncode == 0, added.stderr
    questions = [f"What is {word} {number}?" for number, word in enumerate(training.WORDS[:6])]
    try:
        with other.start().client() as client:
            answers = [training.ask(client, "merged", question) for question in questions]
    finally:
        other.stop()
    with server.client() as client:
        tuned_answers = [training.ask(client, model, question) for question in questions]
        assert all(answer.startswith("alpha") for answer in answers)
        # What q4_0 rounds away may cost a later word.
        assert sum(answer == wanted for answer, wanted in zip(answers, tuned_answers, strict=True)) >= 4, answers
        assert not training.ask(client, "tunegate-demo", QUESTION).startswith("alpha")
        again = tunegate(server, "export", model, "--to", "gguf", "--out", str(file))
        assert again.returncode == 2 and "is there already" in again.stderr


def test_a_client_exports_a_model_and_downloads_it(server: Server, tuned: dict[str, str]) -> None:
    model = tuned["beta"]
    with server.client() as client:
        begun = client.post(f"/models/{model}/export", cast_to=FileObject, body={"to": "adapter"})
        assert (begun.status, begun.bytes, begun.purpose) == ("uploaded", 0, "fine-tune-results")
        file = client.files.wait_for_processing(begun.id, poll_interval=0.1)
        assert file.status == "processed", file.status_details
        assert file.filename.endswith(".adapter.tar") and file.expires_at == file.created_at + 7 * 86_400
        content = client.files.content(file.id).content
        assert len(content) == file.bytes
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            weights = archive.extractfile(f"{file.filename.removesuffix('.tar')}/adapter_model.safetensors")
            assert weights is not None
            found = load(weights.read())
        (job,) = [job for job in client.fine_tuning.jobs.list() if job.fine_tuned_model == model]
        trained = load_file(server.data / "jobs" / job.id / "adapter" / "adapter_model.safetensors")
        assert found.keys() == trained.keys() and all((found[name] == trained[name]).all() for name in found)
        assert file.id in [listed.id for listed in client.files.list(purpose="fine-tune-results")]
        assert client.files.delete(file.id).deleted


def test_an_export_that_goes_on_has_no_content_yet_and_ends_when_it_is_deleted(
    server: Server, tuned: dict[str, str]
) -> None:
    with server.client() as client:
        begun = client.post(f"/models/{tuned['alpha']}/export", cast_to=FileObject, body={"to": "hf"})
        with pytest.raises(BadRequestError, match="has no content, its status is 'uploaded'"):
            client.files.content(begun.id)
        assert client.files.delete(begun.id).deleted
        deadline = time.monotonic() + 30
        while list((server.data / "exports").glob("*")):
            assert time.monotonic() < deadline, server.log_tail()
            time.sleep(0.05)
        with pytest.raises(NotFoundError):
            client.files.retrieve(begun.id)


def test_only_tuned_models_are_exported_in_forms_that_there_are(server: Server, tuned: dict[str, str]) -> None:
    with server.client() as client:
        for model, body, error, said in (
            ("tunegate-demo", {"to": "gguf"}, BadRequestError, "nothing was trained into it"),
            ("ft:none", {"to": "gguf"}, NotFoundError, "does not exist"),
            (tuned["alpha"], {"to": "gguf", "type": "q9"}, BadRequestError, "'type' must be one of f16, bf16, q4_0"),
        ):
            with pytest.raises(error, match=said):
                client.post(f"/models/{model}/export", cast_to=FileObject, body=body)
        for model, said in (
            ("tunegate-demo", "nothing was trained into it"),
            ("ft:none", "there is no tuned model 'ft:none'"),
        ):
            done = tunegate(server, "export", model, "--to", "hf")
            assert done.returncode == 2 and said in done.stderr

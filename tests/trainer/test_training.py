"""Real training runs of a tiny model, as processes: what they leave behind, and that a kill changes nothing of it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.engines.adapters import check_adapter
from gateway.jobdir import ADAPTER_FILES, LOCKED_EXIT_CODE, Event, Hyperparameters, JobDir, Options, read_events
from tests.tiny_model import write_job
from tests.trainer.conftest import folder_bytes, new_job, run_trainer
from trainer.__main__ import _explained
from trainer.check import run_check


def events_of(job: JobDir, attempt: int = 1) -> list[Event]:
    return [event for event, _ in read_events(job.events_path(attempt))]


def test_a_job_ends_succeeded_with_every_adapter_file(finished_job: JobDir) -> None:
    result = finished_job.read_result()
    check = finished_job.read_check()
    assert result is not None and check is not None
    assert (result.status, result.error, result.steps) == ("succeeded", None, 60)
    assert result.trained_tokens == check.n_tokens * 12
    assert sorted(folder_bytes(finished_job.adapter)) == sorted(ADAPTER_FILES)
    assert not finished_job.is_locked()


def test_the_adapter_passes_the_gateways_own_checks(finished_job: JobDir, tiny_base: Path) -> None:
    digest = json.loads((tiny_base / "base.json").read_text())["digest"]
    for folder in (finished_job.adapter, finished_job.path / "adapter_checkpoints" / "step-55"):
        facts = check_adapter(folder, digest)
        assert (facts.rank, facts.alpha, facts.modules) == (4, 8, 14)


def test_every_step_is_told_in_openais_words(finished_job: JobDir) -> None:
    metrics = [event for event in events_of(finished_job) if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == list(range(1, 61))
    assert [event.seq for event in events_of(finished_job)] == list(range(1, len(events_of(finished_job)) + 1))
    for event in metrics:
        assert re.fullmatch(
            r"Step \d+/60: training loss=\d+\.\d\d(, validation loss=\d+\.\d\d(, full validation loss=\d+\.\d\d)?)?",
            event.message,
        )
        assert {"step", "total_steps", "train_loss", "train_mean_token_accuracy"} <= set(event.data)
    assert metrics[-1].data["train_loss"] < metrics[0].data["train_loss"] / 2
    assert {"full_valid_loss", "full_valid_mean_token_accuracy"} <= set(metrics[4].data)
    assert "full_valid_loss" not in metrics[3].data


def test_there_is_a_checkpoint_an_epoch_and_the_last_three_are_kept(finished_job: JobDir) -> None:
    told = [event for event in events_of(finished_job) if event.type == "checkpoint"]
    assert [event.message for event in told] == [f"Checkpoint created at step {step}" for step in range(5, 61, 5)]
    assert all("full_valid_loss" in event.data for event in told)
    for parent in (finished_job.checkpoints, finished_job.path / "adapter_checkpoints"):
        assert sorted(path.name for path in parent.iterdir()) == ["step-50", "step-55", "step-60"]


def test_a_kill_after_the_last_step_still_ends_in_the_same_bytes(finished_job: JobDir, tmp_path: Path) -> None:
    job = JobDir(shutil.copytree(finished_job.path, tmp_path / "job"))
    (job.path / "result.json").unlink()
    shutil.rmtree(job.adapter)
    events = job.events_path(1)
    kept = [
        line for line in events.read_bytes().splitlines(keepends=True) if b"Checkpoint created at step 60" not in line
    ]
    events.write_bytes(b"".join(kept))
    assert run_trainer(job).returncode == 0
    assert folder_bytes(job.adapter) == folder_bytes(finished_job.adapter)
    assert [event.message for event in events_of(job, 2) if event.type == "checkpoint"] == [
        "Checkpoint created at step 60"
    ]


def test_a_job_whose_adapter_is_whole_only_lacks_its_result(finished_job: JobDir, tmp_path: Path) -> None:
    job = JobDir(shutil.copytree(finished_job.path, tmp_path / "job"))
    (job.path / "result.json").unlink()
    assert run_trainer(job).returncode == 0
    assert job.read_result() == finished_job.read_result()
    assert [path.name for path in job.attempts.iterdir()] == ["1"]


def test_a_finished_job_is_left_as_it_is(finished_job: JobDir) -> None:
    before = folder_bytes(finished_job.path)
    assert run_trainer(finished_job).returncode == 0
    after = folder_bytes(finished_job.path)
    assert {**after, "lock": b""} == {**before, "lock": b""}


def test_a_second_trainer_does_nothing(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    job = new_job(tmp_path / "job", tiny_base, files)
    lock = job.try_lock()
    assert lock is not None
    for arguments in ((), ("--check",)):
        assert run_trainer(job, *arguments).returncode == LOCKED_EXIT_CODE
    os.close(lock)
    assert job.read_check() is None and job.read_result() is None and not job.attempts.exists()


def tuned_further(folder: Path, base: Path, files: Path, tuned: JobDir, hyperparameters: Hyperparameters) -> JobDir:
    """A job that goes on from another's adapter."""
    job = write_job(folder, base, files / "train.jsonl", hyperparameters=hyperparameters)
    job.write_spec(replace(job.read_spec(), starts_from="ft:tiny"))
    job.start.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(tuned.adapter / name, job.start / name)
    return job


@pytest.mark.parametrize(
    ("multiplier", "n_epochs", "said"),
    [(50.0, 2, "Training has made the model worse"), (1e-6, 1, "The model has learnt nothing")],
)
def test_a_job_that_got_nowhere_succeeds_with_a_warning(
    finished_job: JobDir, tiny_base: Path, files: Path, tmp_path: Path, multiplier: float, n_epochs: int, said: str
) -> None:
    """Of a model that knew something; the job that taught it that had no complaint."""
    asked = Hyperparameters(n_epochs, batch_size=8, learning_rate_multiplier=multiplier)
    job = tuned_further(tmp_path / "job", tiny_base, files, finished_job, asked)
    done = run_trainer(job)
    result = job.read_result()
    assert result is not None and result.status == "succeeded", (result, done.stderr)
    (warning,) = [event.message for event in events_of(job) if event.level == "warn"]
    assert warning.startswith(said) and "learning_rate_multiplier" in warning
    assert not [event for event in events_of(finished_job) if event.level == "warn"]


def test_a_job_that_collapses_within_its_first_steps_has_diverged(
    finished_job: JobDir, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    """What it settles at is no higher than the mean of its first ten steps; than its first step it is."""
    asked = Hyperparameters(n_epochs=12, batch_size=8, learning_rate_multiplier=50.0)
    job = tuned_further(tmp_path / "job", tiny_base, files, finished_job, asked)
    assert run_trainer(job).returncode == 0
    result = job.read_result()
    assert result is not None and result.error is not None
    assert result.error.code == "training_diverged" and "on the examples of the first step" in result.error.message
    losses = [event.data["train_loss"] for event in events_of(job) if event.type == "metrics"]
    assert len(losses) < 60 and losses[-1] < 1.5 * sum(losses[:10]) / 10


@pytest.mark.parametrize(("validated", "code"), [(True, "invalid_loss"), (False, "training_diverged")])
def test_a_last_step_that_spoils_the_weights_fails_the_job(
    tiny_base: Path, files: Path, tmp_path: Path, validated: bool, code: str
) -> None:
    """No later step has a loss to tell of it: the validation has, and without one the adapter's own witness."""
    job = write_job(
        tmp_path / "job",
        tiny_base,
        files / "train.jsonl",
        validation=files / "valid.jsonl" if validated else None,
        hyperparameters=Hyperparameters(n_epochs=1, batch_size=40, learning_rate_multiplier=1e30),
        options=Options(scheduler="constant", warmup_ratio=0.0),
    )
    assert run_trainer(job).returncode == 0
    result = job.read_result()
    assert result is not None and result.error is not None
    assert result.error.code == code and "learning_rate_multiplier" in result.error.message
    assert not [event for event in events_of(job) if event.type == "checkpoint"] and not job.adapter.exists()


def test_a_loss_that_is_no_number_fails_the_job(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    absurd = Hyperparameters(n_epochs=3, batch_size=8, learning_rate_multiplier=1e30)
    job = write_job(tmp_path / "job", tiny_base, files / "train.jsonl", hyperparameters=absurd)
    assert run_trainer(job).returncode == 0
    result = job.read_result()
    assert result is not None and result.error is not None
    assert (result.status, result.error.code) == ("failed", "invalid_loss")
    assert "learning_rate_multiplier" in result.error.message
    assert not job.adapter.exists()


def test_a_full_disk_leaves_no_result_and_training_anew_gives_the_same_bytes(
    finished_job: JobDir, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    job = new_job(tmp_path / "job", tiny_base, files)
    small = 60_000  # bytes a file may have: enough for all but the optimizer's state
    done = subprocess.run(
        [sys.executable, "-m", "trainer", str(job.path)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, resource.RLIM_INFINITY)),
    )
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr
    assert job.read_result() is None and not list(job.checkpoints.iterdir())
    assert run_trainer(job).returncode == 0
    assert folder_bytes(job.adapter) == folder_bytes(finished_job.adapter)


def test_running_out_of_memory_fails_the_job_with_what_to_change(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", tiny_base, files / "train.jsonl")
    check = run_check(job, job.read_spec())
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")):
        explained = _explained(error, job.read_spec(), check)
        assert explained.code == "out_of_memory"
        assert "smaller batch_size (it was 4)" in explained.message


def test_an_error_of_the_data_fails_the_job_without_an_attempt(tiny_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": 3}\n')
    job = write_job(tmp_path / "job", tiny_base, broken)
    assert run_trainer(job).returncode == 0
    result, check = job.read_result(), job.read_check()
    assert result is not None and check is not None and check.error is not None
    assert (result.status, result.error) == ("failed", check.error)
    assert not job.attempts.exists()


def test_another_template_than_the_specs_fails_the_job(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", tiny_base, files / "train.jsonl")
    job.write_spec(replace(job.read_spec(), template_digest="sha256:0"))
    assert run_trainer(job).returncode == 0
    result = job.read_result()
    assert result is not None and result.error is not None
    assert result.error.code == "trainer_error" and "sha256:0" in result.error.message


def test_sigterm_leaves_no_result(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    job = new_job(tmp_path / "job", tiny_base, files)
    trainer = subprocess.Popen([sys.executable, "-m", "trainer", str(job.path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not job.is_locked() and time.monotonic() < deadline:
        time.sleep(0.01)
    trainer.terminate()
    assert trainer.wait(timeout=30) == -signal.SIGTERM
    assert job.read_result() is None and not job.is_locked()


def test_what_is_no_job_directory_is_said(tmp_path: Path) -> None:
    done = run_trainer(JobDir(tmp_path))
    assert done.returncode == 2
    assert "has no job.json" in done.stderr


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing the trainer does may need it: any proxy would be a dead one."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

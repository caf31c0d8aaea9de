"""Kills and pauses at any step of a real run change nothing of what it ends in, dropout and all."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.jobdir import PAUSED_EXIT_CODE, Event, Hyperparameters, JobDir, Lora, Options, read_events
from tests.tiny_model import write_job
from tests.trainer.conftest import folder_bytes, run_trainer
from tests.trainer.interruption import kill_at_random, steps_told

pytestmark = pytest.mark.timeout(600)
STEPS = 20  # 5 an epoch, and a checkpoint every 3


def dropping_job(folder: Path, base: Path, files: Path) -> JobDir:
    """With dropout, so that the random states count, and checkpoints in the middle of epochs."""
    return write_job(
        folder,
        base,
        files / "train.jsonl",
        validation=files / "valid.jsonl",
        hyperparameters=Hyperparameters(n_epochs=4, batch_size=8, learning_rate_multiplier=0.5),
        lora=Lora(rank=4, alpha=8, dropout=0.1),
        options=Options(checkpoint_steps=3),
    )


@pytest.fixture(scope="module")
def unbroken(tiny_base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> JobDir:
    job = dropping_job(tmp_path_factory.mktemp("unbroken") / "job", tiny_base, files)
    assert run_trainer(job).returncode == 0
    return job


def events_of(job: JobDir) -> list[Event]:
    """Of all attempts, in their order."""
    attempts = sorted(job.attempts.iterdir(), key=lambda path: int(path.name))
    return [event for attempt in attempts for event, _ in read_events(attempt / "events.jsonl")]


def metrics_of(job: JobDir) -> dict[int, dict[str, object]]:
    """By step, as last told; a step that was told twice was told alike."""
    found: dict[int, dict[str, object]] = {}
    for event in events_of(job):
        if event.type == "metrics":
            assert found.setdefault(event.data["step"], event.data) == event.data
    return found


def test_there_are_checkpoints_at_the_steps_asked_for_and_at_each_epochs_end_all_fully_validated(
    unbroken: JobDir,
) -> None:
    told = [event for event in events_of(unbroken) if event.type == "checkpoint"]
    assert [event.data["step"] for event in told] == [3, 5, 6, 9, 10, 12, 15, 18, 20]
    for event in told:
        assert {"train_loss", "valid_loss", "full_valid_loss"} <= set(event.data)
        assert {"train_mean_token_accuracy", "full_valid_mean_token_accuracy"} <= set(event.data)
    served = unbroken.path / "adapter_checkpoints"
    assert sorted(path.name for path in served.iterdir()) == ["step-15", "step-18", "step-20"]


def test_the_end_is_foreseen_from_the_second_step_on(unbroken: JobDir) -> None:
    first = next(event for event in events_of(unbroken) if event.type == "progress")
    assert first.data["step"] == 2
    ended_at = events_of(unbroken)[-1].created_at
    assert first.created_at <= first.data["estimated_finish"] <= ended_at + 10


def test_five_kills_and_a_pause_change_no_loss_and_no_byte(
    unbroken: JobDir, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    job = dropping_job(tmp_path / "job", tiny_base, files)
    chance = random.Random(6)
    moments = []
    for left in range(5, 0, -1):
        moments.append(kill_at_random(job, chance, STEPS, left))
        assert job.read_result() is None, moments
        if left == 3:
            before = steps_told(job)
            job.pause.touch()
            assert run_trainer(job).returncode == PAUSED_EXIT_CODE
            job.pause.unlink()
            (paused,) = [event for event in events_of(job) if "paused" in event.message]
            step = int(paused.message.rpartition(" ")[2])
            assert step <= before + 1 and (job.checkpoints / f"step-{step}").is_dir()
    done = run_trainer(job)
    assert done.returncode == 0, done.stderr
    assert folder_bytes(job.adapter) == folder_bytes(unbroken.adapter), moments
    assert metrics_of(job) == metrics_of(unbroken)
    assert job.read_result() == unbroken.read_result()
    told = [event.data["step"] for event in events_of(job) if event.type == "checkpoint"]
    assert sorted(told) == [3, 5, 6, 9, 10, 12, 15, 18, 20], "each once, and none for the pause"


def test_a_run_that_gets_no_better_stops_and_its_best_checkpoint_is_the_result(
    tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    """Validated on what training takes it away from; a kill behind any checkpoint changes nothing of it."""
    contrary = tmp_path / "contrary.jsonl"
    lines = (files / "valid.jsonl").read_text().replace("timer(minutes=", "no timer (")
    contrary.write_text(lines)
    job = write_job(
        tmp_path / "job",
        tiny_base,
        files / "train.jsonl",
        validation=contrary,
        hyperparameters=Hyperparameters(n_epochs=20, batch_size=8, learning_rate_multiplier=2.0),
        options=Options(early_stopping_patience=3),
    )
    assert run_trainer(job).returncode == 0
    losses = {e.data["step"]: e.data["full_valid_loss"] for e in events_of(job) if e.type == "checkpoint"}
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert last == best + 15 < 100, "three epochs of five steps after the best"
    result = job.read_result()
    assert result is not None and result.steps == last
    assert folder_bytes(job.adapter) == folder_bytes(job.path / "adapter_checkpoints" / f"step-{best}")
    messages = [event.message for event in events_of(job)]
    assert any(f"Stopped early at step {last}" in text and f"its value at step {best}" in text for text in messages)

    killed = JobDir(shutil.copytree(job.path, tmp_path / "killed"))  # as it was behind the checkpoint before the last
    (killed.path / "result.json").unlink()
    shutil.rmtree(killed.adapter)
    shutil.rmtree(killed.checkpoints / f"step-{last}")
    assert run_trainer(killed).returncode == 0
    assert folder_bytes(killed.adapter) == folder_bytes(job.adapter)
    assert killed.read_result() == result


def test_a_trainer_without_enough_memory_fails_the_job_with_what_to_change(
    tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    """Torch's own allocator is refused, by a limit that lets it start: what the imports took and 60 MB more."""
    job = write_job(
        tmp_path / "job",
        tiny_base,
        files / "train.jsonl",
        hyperparameters=Hyperparameters(n_epochs=1, batch_size=40),
        lora=Lora(rank=512, alpha=8),
    )
    limit = (
        "import resource, sys, torch, trl, peft, trainer.loop, trainer.__main__ as m\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (60 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "sys.exit(m.main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", limit, str(job.path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = job.read_result()
    assert result is not None and result.error is not None
    assert result.error.code == "out_of_memory", (result, done.stderr)
    for fix in ("batch_size (it was 40)", "max_length (it was 256)", 'quantization "nf4"'):
        assert fix in result.error.message

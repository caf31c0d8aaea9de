"""One job, two processes: the numbers of one, one writer, one life. On processors (gloo), as nearly all of it runs on GPUs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gateway.engines.adapters import check_adapter
from gateway.jobdir import ADAPTER_FILES, Event, Hyperparameters, JobDir, Launch, Sharding, TrainerError, read_events
from tests.tiny_model import write_examples, write_job
from tests.trainer.conftest import folder_bytes, run_trainer
from tests.trainer.llama_scores import llama_model, reply_logprobs
from trainer.data.batches import EpochOrder
from trainer.processes.distributed import Ranks
from trainer.processes.group import Failure, RankFailed, first_failure

LOSS_TOLERANCE = 1e-5  # measured: 5e-7, what float32 makes of sums in another order
WEIGHT_TOLERANCE = 1e-4  # measured: 2e-5, where a gradient is next to nothing and Adam makes a step of it all the same
STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five batches of eight an epoch, the last one of a single conversation: a rank goes without."""
    folder = tmp_path_factory.mktemp("data")
    write_examples(folder / "train.jsonl", 33)
    write_examples(folder / "valid.jsonl", 20, first=100)
    return folder


@pytest.fixture(scope="module")
def alone(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> JobDir:
    """The same job by one process."""
    return finished(make_job(tmp_path_factory.mktemp("alone") / "job", tiny_base, data, Launch()))


@pytest.fixture(scope="module")
def parallel(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> JobDir:
    """The same job by two processes that each have the whole model."""
    return finished(make_job(tmp_path_factory.mktemp("parallel") / "job", tiny_base, data, Launch(2)))


def make_job(folder: Path, base: Path, data: Path, launch: Launch, rate: float = 0.5) -> JobDir:
    asked = Hyperparameters(n_epochs=2, batch_size=8, learning_rate_multiplier=rate)
    training, validation = data / "train.jsonl", data / "valid.jsonl"
    job = write_job(folder, base, training, validation=validation, hyperparameters=asked, threads=2)
    job.write_spec(replace(job.read_spec(), launch=launch))
    return job


def finished(job: JobDir) -> JobDir:
    done = run_trainer(job)
    assert done.returncode == 0, done.stderr
    result = job.read_result()
    assert result is not None and (result.status, result.steps) == ("succeeded", STEPS), result
    return job


def events_of(job: JobDir) -> list[Event]:
    return [event for attempt in range(1, job.next_attempt()) for event, _ in read_events(job.events_path(attempt))]


def curves(job: JobDir) -> dict[str, list[float]]:
    metrics = [event.data for event in events_of(job) if event.type == "metrics"]
    assert [data["step"] for data in metrics] == list(range(1, STEPS + 1))
    names = (
        "train_loss",
        "train_mean_token_accuracy",
        "valid_loss",
        "full_valid_loss",
        "full_valid_mean_token_accuracy",
    )
    return {name: [data[name] for data in metrics if name in data] for name in names}


def assert_the_same_training(job: JobDir, reference: JobDir) -> None:
    found, expected = curves(job), curves(reference)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=LOSS_TOLERANCE, err_msg=name)
    tensors = load_file(job.adapter / "adapter_model.safetensors")
    for name, tensor in load_file(reference.adapter / "adapter_model.safetensors").items():
        np.testing.assert_allclose(tensors[name], tensor, rtol=0, atol=WEIGHT_TOLERANCE, err_msg=name)


def assert_one_wrote_for_all(job: JobDir) -> None:
    assert sorted(folder_bytes(job.adapter)) == sorted(ADAPTER_FILES)
    assert [path.name for path in job.attempts.iterdir()] == ["1"]
    assert [event.seq for event in events_of(job)] == list(range(1, len(events_of(job)) + 1))
    told = [event.data["step"] for event in events_of(job) if event.type == "checkpoint"]
    assert told == [5, 10]
    for parent in (job.checkpoints, job.path / "adapter_checkpoints"):
        assert sorted(path.name for path in parent.iterdir()) == ["step-10", "step-5"]
    assert not job.is_locked()


def test_two_processes_train_as_one(alone: JobDir, parallel: JobDir) -> None:
    assert_the_same_training(parallel, alone)
    assert_one_wrote_for_all(parallel)


def test_a_model_that_fsdp_splits_trains_as_a_whole_one_and_its_adapter_is_servable(
    alone: JobDir, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    job = finished(make_job(tmp_path / "job", tiny_base, data, Launch(2, "fsdp")))
    assert_the_same_training(job, alone)
    assert_one_wrote_for_all(job)
    assert (job.checkpoints / "step-10" / "optimizer.bin").is_file()  # FSDP's, gathered: it did split the model
    described = json.loads((tiny_base / "base.json").read_text())
    for folder in (job.adapter, job.path / "adapter_checkpoints" / "step-5"):
        check_adapter(folder, described["digest"])
        witness = json.loads((folder / "witness.json").read_text())
        with llama_model(tiny_base / described["gguf"]) as model:
            for item in witness["items"]:
                ids = item["prompt_ids"], item["reply_ids"]
                tuned = reply_logprobs(model, *ids, folder / "adapter.gguf")
                effect = np.array(item["tuned_logprobs"]) - np.array(item["base_logprobs"])
                served = tuned - reply_logprobs(model, *ids)
                assert np.abs(served - effect).mean() < 0.15 * np.abs(effect).mean() + 0.02


def test_a_rank_that_is_killed_and_then_the_whole_group_change_nothing_of_the_result(
    parallel: JobDir, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "job", tiny_base, data, Launch(2))
    with started(job) as trainer:
        ranks = wait_for_step(job, trainer, 6)
        assert job.holder() is not None and job.holder().pid == trainer.pid  # type: ignore[union-attr]
        os.kill(max(ranks), signal.SIGKILL)
        said = trainer.communicate(timeout=60)[1]
    assert trainer.returncode == 1
    assert "of 2 was killed by SIGKILL" in said.splitlines()[-1]
    assert_gone(ranks)
    assert job.read_result() is None and not job.is_locked()

    with started(job) as trainer:
        ranks = wait_for_step(job, trainer, 6, attempt=2)
        trainer.kill()
        trainer.wait()
    assert_gone(ranks)

    with started(job) as trainer:
        ranks = wait_for_ranks(trainer)
        trainer.terminate()
        assert trainer.wait(timeout=30) == -signal.SIGTERM
    assert_gone(ranks)

    assert run_trainer(job).returncode == 0
    assert folder_bytes(job.adapter) == folder_bytes(parallel.adapter)
    resumed = {event.data["step"]: event.data for event in events_of(job) if event.type == "metrics"}
    assert resumed == {event.data["step"]: event.data for event in events_of(parallel) if event.type == "metrics"}


class started:
    """A trainer at work, ended whatever comes."""

    def __init__(self, job: JobDir) -> None:
        command = [sys.executable, "-m", "trainer", str(job.path)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> subprocess.Popen[str]:
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def wait_for_ranks(trainer: subprocess.Popen[str]) -> list[int]:
    return next(ranks for ranks in looks(trainer) if len(ranks) == 2)


def wait_for_step(job: JobDir, trainer: subprocess.Popen[str], step: int, attempt: int = 1) -> list[int]:
    """The ranks' pids, once that step is told."""
    for ranks in looks(trainer):
        if any(event.data.get("step", 0) >= step for event, _ in read_events(job.events_path(attempt))):
            return ranks
    raise AssertionError("not reached")


def looks(trainer: subprocess.Popen[str]) -> Iterator[list[int]]:
    """The ranks that are alive, again and again for two minutes."""
    children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert trainer.poll() is None, trainer.communicate()[1]
        pids = [int(pid) for pid in children.read_text().split()]
        yield [pid for pid in pids if b"trainer.processes.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        time.sleep(0.005)


def assert_gone(pids: list[int]) -> None:
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return (
            b"trainer.processes.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )  # empty for one that only waits to be reaped
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("count", "batch_size", "pass_size", "world"), [(33, 8, 2, 2), (40, 8, 1, 4), (7, 4, 1, 3), (5, 2, 1, 4)]
)
def test_the_ranks_share_each_batch_and_take_as_many_passes(
    count: int, batch_size: int, pass_size: int, world: int
) -> None:
    lengths = [10 + n % 7 for n in range(count)]
    whole = EpochOrder(lengths, batch_size, batch_size, seed=3)
    ranks = [EpochOrder(lengths, batch_size, pass_size, 3, rank, world) for rank in range(world)]
    per_batch = math.ceil(math.ceil(batch_size / world) / pass_size)
    passes = [list(order) for order in ranks]
    assert [len(order) for order in ranks] == [len(found) for found in passes] == [len(passes[0])] * world
    for place, batch in enumerate(whole):
        of_ranks = [found[place * per_batch : (place + 1) * per_batch] for found in passes]
        trained = [number for found in of_ranks for numbers in found for number in numbers if number < count]
        assert sorted(trained) == sorted(batch)
        assert all(numbers for found in of_ranks for numbers in found)


def test_the_failure_that_came_first_is_the_groups_and_says_whose_it_is() -> None:
    lost = Failure(1.0, True, "LostRanks: gloo: connection closed by peer", None)
    memory = Failure(2.0, False, "", TrainerError("out_of_memory", "Training ran out of memory."))
    later = Failure(3.0, False, "", TrainerError("trainer_error", "Something else."))
    full = Failure(2.0, False, "OSError: no space left", None)
    found = first_failure({0: lost, 1: memory, 2: later}, {0: 1, 1: 1, 2: 1})
    assert isinstance(found, RankFailed)
    assert found.error == TrainerError("out_of_memory", "Training ran out of memory. (process 1 of 3)")
    for failures, codes, words in [
        ({0: lost, 1: None}, {0: 1, 1: -9}, "Process 1 of 2 was killed by SIGKILL"),
        ({0: lost, 1: full}, {0: 1, 1: 1}, r"no space left \(process 1 of 2\)"),
        ({0: lost, 1: None}, {0: 1, 1: -15}, "Process 0 of 2 lost the others"),
        ({0: None, 1: None}, {1: 3}, "Process 1 of 2 exited with code 3"),
    ]:
        error = first_failure(failures, codes)
        assert isinstance(error, OSError)
        with pytest.raises(OSError, match=words):
            raise error


def test_zero_without_deepspeed_fails_the_job_by_name(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", tiny_base, data, Launch(2, "zero3"))
    hidden = tmp_path / "site" / "sitecustomize.py"  # as on a machine without it
    hidden.parent.mkdir()
    hidden.write_text("import sys\nsys.modules['deepspeed'] = None\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(hidden.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "trainer", str(job.path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = job.read_result()
    assert result is not None and result.error is not None
    assert (result.error.code, "DeepSpeed" in result.error.message) == ("deepspeed_missing", True)


def test_each_sharding_is_asked_for_in_transformers_words() -> None:
    assert Ranks().arguments() == {}
    assert "fsdp" not in Ranks(0, 2).arguments() and "deepspeed" not in Ranks(0, 2).arguments()
    assert Ranks(1, 2, "fsdp").arguments()["fsdp_config"]["version"] == 2
    shardings: list[tuple[Sharding, int]] = [("zero2", 2), ("zero3", 3)]
    for sharding, stage in shardings:
        assert Ranks(0, 2, sharding).arguments()["deepspeed"]["zero_optimization"]["stage"] == stage

"""Jobs that are told to the real wandb (offline), TensorBoard and MLflow, read back; and trackers that fail."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gateway.jobdir import Event, Hyperparameters, JobDir, Prediction, Tracker, read_events
from tests.tiny_model import write_job
from tests.trainer.conftest import folder_bytes, new_job, run_trainer
from tests.trainer.wandb_records import read_history, read_records
from trainer.events import EventLog
from trainer.tracking.followers import Tracking, owed

KEYS = {
    "WANDB_API_KEY": "planted789abcdef0123456789abcdef01234567",
    "MLFLOW_TRACKING_USERNAME": "planted-user",
    "MLFLOW_TRACKING_PASSWORD": "planted-password/+?",
}
# MLflow's database code and this SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
EVALUATIONS = list(range(5, 61, 5))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where TensorBoard's files and MLflow's database are."""
    return tmp_path_factory.mktemp("places")


@pytest.fixture(scope="module")
def tracked_job(tiny_base: Path, files: Path, places: Path, tmp_path_factory: pytest.TempPathFactory) -> JobDir:
    """The same job as `finished_job`, told to all three."""
    job = tracked(new_job(tmp_path_factory.mktemp("jobs") / "tracked", tiny_base, files), *everywhere(places))
    with pytest.MonkeyPatch.context() as patch:
        for name, key in KEYS.items():
            patch.setenv(name, key)
        done = run_trainer(job)
    (job.path / "trainer.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr
    return job


def everywhere(places: Path) -> tuple[Tracker, ...]:
    return (
        Tracker("wandb", project="timers", name="ten minutes", tags=("a", "b"), offline=True),
        Tracker("tensorboard", str(places / "boards")),
        Tracker("mlflow", f"sqlite:///{places}/mlflow.db", project="timers"),
    )


def tracked(job: JobDir, *trackers: Tracker, predictions: int = 3) -> JobDir:
    job.write_spec(replace(job.read_spec(), trackers=trackers, predictions=predictions))
    return job


def events_of(job: JobDir, kind: str, attempt: int = 1) -> list[Event]:
    return [event for event, _ in read_events(job.events_path(attempt)) if event.type == kind]


def losses(job: JobDir) -> dict[int, float]:
    return {event.data["step"]: event.data["train_loss"] for event in events_of(job, "metrics")}


def predictions(job: JobDir) -> list[Prediction]:
    return [Prediction(**json.loads(line)) for line in job.predictions_path(1).read_text().splitlines()]


def wandb_files(job: JobDir) -> list[Path]:
    return sorted(job.tracking.glob("wandb-files/wandb/offline-run-*/run-*.wandb"))


def board(places: Path, job_id: str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(places / "boards" / job_id), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def mlflow_runs(places: Path, job_id: str) -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{places}/mlflow.db")
    experiment = client.get_experiment_by_name("timers")
    return client, client.search_runs([experiment.experiment_id], f"tags.`tunegate.job_id` = '{job_id}'")


def follow(job: JobDir, kind: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trainer.tracking", str(job.path), kind]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_tracked_job_ends_in_the_same_bytes_and_the_same_numbers(tracked_job: JobDir, finished_job: JobDir) -> None:
    assert folder_bytes(tracked_job.adapter) == folder_bytes(finished_job.adapter)
    assert [event.data for event in events_of(tracked_job, "metrics")] == [
        event.data for event in events_of(finished_job, "metrics")
    ]
    assert events_of(tracked_job, "message") == []


def test_the_model_answers_the_same_validation_prompts_at_every_evaluation(
    tracked_job: JobDir, finished_job: JobDir
) -> None:
    found = predictions(tracked_job)
    assert [found[place].step for place in range(0, len(found), 3)] == EVALUATIONS
    assert len({one.prompt for one in found}) == 3
    assert {one.expected for one in found} == {f"timer(minutes={n})" for n in (100, 102, 104)}
    assert found[0].prompt.endswith("USER: Set a timer for 100 minutes. ASSISTANT:")
    assert found[-1].predicted.startswith("timer(minutes="), "by then it has learnt the form"
    assert not finished_job.predictions_path(1).exists()


def test_wandb_has_every_step_the_predictions_the_settings_and_the_adapter(tracked_job: JobDir) -> None:
    (file,) = wandb_files(tracked_job)
    history = read_history(file)
    assert {step: row["train_loss"] for step, row in history.items()} == losses(tracked_job)
    assert [step for step, row in history.items() if "predictions/nrows" in row] == EVALUATIONS
    table = json.loads((file.parent / "files" / history[60]["predictions/path"]).read_text())
    assert table["columns"] == ["step", "prompt", "expected", "predicted"]
    assert table["data"] == [[p.step, p.prompt, p.expected, p.predicted] for p in predictions(tracked_job)[-3:]]

    records = list(read_records(file))
    run = next(record.run for record in records if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.run_id, run.project, run.display_name) == ("ftjob-test", "timers", "ten minutes")
    assert list(run.tags) == ["a", "b"]
    assert (config["model"], config["n_epochs"], config["batch_size"], config["lora.rank"]) == ("tiny", 12, 8, 4)
    artifact = next(r.artifact for r in records if r.HasField("artifact") and r.artifact.type == "model")
    names = {entry.path for entry in artifact.manifest.contents}
    assert names == set(folder_bytes(tracked_job.adapter)) and "template/template.json" in names
    assert next(record.exit.exit_code for record in records if record.HasField("exit")) == 0


def test_tensorboard_has_every_step_and_the_predictions_as_text(tracked_job: JobDir, places: Path) -> None:
    found = board(places, "ftjob-test")
    told = {event.step: event.value for event in found.Scalars("train_loss")}
    assert told == pytest.approx(losses(tracked_job), abs=1e-5)
    texts = found.Tensors("predictions")
    assert [event.step for event in texts] == EVALUATIONS
    assert "| prompt | expected | predicted |" in texts[-1].tensor_proto.string_val[0].decode()
    assert '"lora.rank": 4' in found.Tensors("config")[0].tensor_proto.string_val[0].decode()


def test_mlflow_has_every_step_the_predictions_the_settings_and_the_adapter(
    tracked_job: JobDir, places: Path, tmp_path: Path
) -> None:
    client, (run,) = mlflow_runs(places, "ftjob-test")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "ftjob-test")
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert {metric.step: metric.value for metric in history} == losses(tracked_job)
    assert (run.data.params["n_epochs"], run.data.params["lora.rank"]) == ("12", "4")
    downloaded = Path(client.download_artifacts(run.info.run_id, "adapter", str(tmp_path)))
    assert folder_bytes(downloaded) == folder_bytes(tracked_job.adapter)
    last = Path(client.download_artifacts(run.info.run_id, "predictions/step-000060.json", str(tmp_path)))
    assert len(json.loads(last.read_text())["data"]) == 3


def test_a_job_that_goes_on_goes_on_in_the_same_run(tracked_job: JobDir, places: Path, tmp_path: Path) -> None:
    """The folder as after a kill at step 23 with a checkpoint at step 20: attempt 2 repeats what is behind it."""
    job = JobDir(shutil.copytree(tracked_job.path, tmp_path / "job"))
    shutil.rmtree(job.tracking)
    (job.path / "result.json").unlink()
    job.write_spec(replace(job.read_spec(), job_id="ftjob-resumed"))
    lines = job.events_path(1).read_bytes().splitlines(keepends=True)
    steps = [json.loads(line)["data"].get("step", 0) for line in lines]
    job.events_path(1).write_bytes(b"".join(line for line, step in zip(lines, steps, strict=True) if step <= 23))
    for kind, child in [(kind, follow(job, kind)) for kind in ("wandb", "tensorboard", "mlflow")]:
        said, _ = child.communicate(timeout=120)  # its input ends, as when the trainer is killed
        assert (child.returncode, said) == (0, b"")
        assert json.loads((job.tracking / f"{kind}.json").read_text()) == {"step": 23, "ended": False}

    job.events_path(2).parent.mkdir()
    job.events_path(2).write_bytes(b"".join(line for line, step in zip(lines, steps, strict=True) if step > 20))
    shutil.copy(job.predictions_path(1), job.predictions_path(2))
    for kind, child in [(kind, follow(job, kind)) for kind in ("wandb", "tensorboard", "mlflow")]:
        said, _ = child.communicate(b"succeeded", timeout=120)
        assert (child.returncode, said) == (0, b"")
        assert json.loads((job.tracking / f"{kind}.json").read_text()) == {"step": 60, "ended": True}

    before, after = wandb_files(job)
    assert [list(read_history(file)) for file in (before, after)] == [list(range(1, 24)), list(range(24, 61))]
    assert {next(r.run.run_id for r in read_records(file) if r.HasField("run")) for file in (before, after)} == {
        "ftjob-resumed"
    }
    assert len(list((places / "boards" / "ftjob-resumed").iterdir())) == 2
    found = board(places, "ftjob-resumed")
    assert [event.step for event in found.Scalars("train_loss")] == list(range(1, 61))
    assert [event.step for event in found.Tensors("predictions")] == EVALUATIONS
    client, (run,) = mlflow_runs(places, "ftjob-resumed")
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train_loss")] == list(range(1, 61))


class Echo(BaseHTTPRequestHandler):
    """A server that refuses every call and quotes what it was sent, keys and all."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        given = self.headers.get("Authorization", "")
        decoded = base64.b64decode(given.partition(" ")[2]).decode()
        said = json.dumps({"error_code": "UNAUTHENTICATED", "message": f"no {given} ({decoded})", "errors": [decoded]})
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said.encode())

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        self.server.asked.append(self.headers.get("Authorization", ""))  # type: ignore[attr-defined]


@pytest.fixture
def echo() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_trackers_that_fail_cost_a_warning_each_and_no_key_gets_anywhere(
    tiny_base: Path,
    files: Path,
    tmp_path: Path,
    echo: ThreadingHTTPServer,
    tracked_job: JobDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    url = f"http://127.0.0.1:{echo.server_port}"
    taken = tmp_path / "a file"
    taken.write_text("")
    job = write_job(
        tmp_path / "job",
        tiny_base,
        files / "train.jsonl",
        validation=files / "valid.jsonl",
        hyperparameters=Hyperparameters(n_epochs=1, batch_size=8),
    )
    tracked(job, Tracker("wandb", url), Tracker("tensorboard", str(taken)), Tracker("mlflow", url))
    done = run_trainer(job)
    (job.path / "trainer.log").write_text(done.stdout + done.stderr)
    result = job.read_result()
    assert result is not None and result.status == "succeeded", done.stderr
    warnings = [event.message for event in events_of(job, "message") if event.level == "warn"]
    assert sorted(message.split(" could not be told")[0] for message in warnings) == [
        "MLflow",
        "TensorBoard",
        "Weights & Biases",
    ]
    assert sum("[hidden]" in message for message in warnings) == 2, "W&B and MLflow quoted what they were answered"
    given = {base64.b64decode(header.partition(" ")[2]).decode() for header in echo.asked}  # type: ignore[attr-defined]
    assert given == {f"api:{KEYS['WANDB_API_KEY']}", "planted-user:planted-password/+?"}
    for folder in (job, tracked_job):
        assert quoting(folder.path) == []


def quoting(folder: Path) -> list[str]:
    """The files in which a key stands, in any form that a header or an error gives it."""
    secrets = [KEYS["WANDB_API_KEY"], KEYS["MLFLOW_TRACKING_PASSWORD"]]
    pairs = [f"api:{secrets[0]}", f"{KEYS['MLFLOW_TRACKING_USERNAME']}:{secrets[1]}"]
    forms = [text.encode() for text in secrets] + [base64.b64encode(text.encode()) for text in pairs]
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and any(form in path.read_bytes() for form in forms)
    ]


def test_a_tracker_that_never_answers_is_waited_for_a_bounded_time(tracked_job: JobDir, tmp_path: Path) -> None:
    job = JobDir(shutil.copytree(tracked_job.path, tmp_path / "job"))
    shutil.rmtree(job.tracking)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracked(job, Tracker("mlflow", f"http://127.0.0.1:{silent.getsockname()[1]}"))
        with (
            EventLog(job.events_path(2)) as events,
            Tracking(job, job.read_spec().trackers, events, end_wait_s=3.0) as tracking,
        ):
            tracking.on_end("succeeded")
    (warning,) = events_of(job, "message", 2)
    assert warning.message == (
        "MLflow could not be told; training is not affected: it did not take everything within 3 s after the last step"
    )
    lock = os.open(job.tracking / "mlflow.lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its process is gone
    os.close(lock)
    assert owed(job, job.read_spec())


def test_a_tracker_whose_process_is_killed_is_told_at_the_end(tracked_job: JobDir, tmp_path: Path) -> None:
    job = JobDir(shutil.copytree(tracked_job.path, tmp_path / "job"))
    shutil.rmtree(job.tracking)
    tracked(job, Tracker("tensorboard", str(tmp_path / "boards")))
    before = children()
    with (
        EventLog(job.events_path(2)) as events,
        Tracking(job, job.read_spec().trackers, events) as tracking,
    ):
        (follower,) = children() - before
        os.kill(follower, signal.SIGKILL)
        tracking.on_metrics()
        tracking.on_end("succeeded")
    (warning,) = events_of(job, "message", 2)
    assert warning.level == "warn" and warning.message.endswith(
        "its process ended with exit code -9, without a word"
    ), warning.message
    assert owed(job, job.read_spec())


def children() -> set[int]:
    """This process's."""
    me = os.getpid()
    return {int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()}

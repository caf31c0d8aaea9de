"""MLflow: metrics, parameters, predictions and the adapter as artifacts of one run, found again by its tag.

Place in the flow: follower → **mlflow_run** → a tracking server, or a database file. Only MLflow's client is used, none of its
global state. Retries are the follower's, so MLflow's own are kept short.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ |= {  # read while MLflow is imported
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, ViewType

from trainer.tracking.feed import Point
from trainer.tracking.run import Status, TrackedJob

JOB_TAG = "tunegate.job_id"
_METRICS_A_CALL = 1000  # as many as a server takes
_PARAMS_A_CALL = 100
_STATUSES = {"succeeded": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


def open_run(job: TrackedJob) -> MlflowRun:
    """The run with the job's tag, made where there is none."""
    return MlflowRun(job)


class MlflowRun:
    def __init__(self, job: TrackedJob) -> None:
        uri = job.tracker.place or f"sqlite:///{job.folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(job.tracker.project, uri)
        found = self._client.search_runs([experiment], f"tags.`{JOB_TAG}` = '{job.job_id}'", ViewType.ACTIVE_ONLY, 1)
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        else:
            tags = {JOB_TAG: job.job_id}
            self._run_id = self._client.create_run(experiment, tags=tags, run_name=job.name).info.run_id
        params = [Param(name, str(value)) for name, value in job.config.items()]
        for start in range(0, len(params), _PARAMS_A_CALL):
            self._client.log_batch(self._run_id, params=params[start : start + _PARAMS_A_CALL])

    def tell(self, points: Sequence[Point]) -> None:
        metrics = [
            Metric(name, value, point.created_at * 1000, point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for start in range(0, len(metrics), _METRICS_A_CALL):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _METRICS_A_CALL])
        for name, table in _tables(points):
            self._client.log_dict(self._run_id, table, name)

    def end(self, status: Status, adapter: Path | None) -> None:
        if adapter is not None:
            self._client.log_artifacts(self._run_id, str(adapter), "adapter")
        self._client.set_terminated(self._run_id, _STATUSES[status])

    def _experiment(self, name: str, uri: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        scheme, _, path = uri.partition(":///")
        # Beside a database file; MLflow's own choice would be the working directory.
        artifacts = (Path(path).parent / "mlflow-artifacts").as_uri() if scheme == "sqlite" else None
        return str(self._client.create_experiment(name, artifact_location=artifacts))


def _tables(points: Sequence[Point]) -> Iterator[tuple[str, dict[str, list[object]]]]:
    """Each evaluation's predictions, as MLflow shows tables."""
    for point in points:
        if point.predictions:
            columns: list[object] = ["step", "prompt", "expected", "predicted"]
            data: list[object] = [[point.step, p.prompt, p.expected, p.predicted] for p in point.predictions]
            yield f"predictions/step-{point.step:06d}.json", {"columns": columns, "data": data}

"""Weights & Biases: history, a table of predictions at each evaluation, the adapter as an artifact of type "model".

Place in the flow: follower → **wandb_run** → a server, or files under the job's folder for `wandb sync`. One rule: of this
machine it is told nothing but numbers: no host, no code, no git remote, no package list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import wandb

from trainer.tracking.feed import Point
from trainer.tracking.run import Status, TrackedJob

_INIT_TIMEOUT_S = 20.0


def open_run(job: TrackedJob) -> WandbRun:
    """The run whose id is the job's; one that is there goes on."""
    return WandbRun(job)


class WandbRun:
    def __init__(self, job: TrackedJob) -> None:
        tracker, folder = job.tracker, job.folder / "wandb-files"
        for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):  # else it writes to the home folder
            os.environ[f"WANDB_{name}"] = str(folder)
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        if tracker.place:
            os.environ["WANDB_BASE_URL"] = tracker.place
        folder.mkdir(exist_ok=True)
        settings = wandb.Settings(
            mode="offline" if tracker.offline else "online",
            init_timeout=_INIT_TIMEOUT_S,
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._job_id = job.job_id
        try:
            self._run = wandb.init(
                id=job.job_id,
                resume="allow",
                project=tracker.project,
                entity=tracker.entity,
                name=job.name,
                tags=tracker.tags,
                config=job.config,
                dir=str(folder),
                settings=settings,
            )
        finally:
            _remove_logs(folder)

    def tell(self, points: Sequence[Point]) -> None:
        for point in points:
            values = dict(point.values)
            if point.predictions:
                rows = [[point.step, p.prompt, p.expected, p.predicted] for p in point.predictions]
                values["predictions"] = wandb.Table(["step", "prompt", "expected", "predicted"], data=rows)
            self._run.log(values, step=point.step)

    def end(self, status: Status, adapter: Path | None) -> None:
        if adapter is not None:
            name = re.sub(r"[^\w.-]", "-", f"{self._job_id}-adapter")
            artifact = wandb.Artifact(name, type="model")
            artifact.add_dir(str(adapter))
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if status == "succeeded" else 1)


def _remove_logs(folder: Path) -> None:
    """W&B's own logs, which quote what a server says, and so it may be a key. No setting turns them off; it goes on writing
    to files that have no name any more."""
    for log in folder.rglob("*.log"):
        log.unlink()

"""`make soak`: one job's trainer, and now and then its gateway, killed at random moments, a hundred times; the bytes compared.

    python -m tests.soak [--kills N] [--minutes M] [--epochs E] [--seed S]

A job on the demo model is trained once without a kill. Then the same job is created again, and while it trains somebody is
killed with SIGKILL, N times spread over its steps (again over another such job, where it ended before): the trainer, at its
start or a little behind some step, and every few times the gateway, which is started again. Each job must succeed with the
adapter, the losses and the checkpoints of the first, bit for bit, each told once. Two kills in a row may find no new
checkpoint, a third not: that is the job's budget.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError

from gateway.jobdir import JobDir, read_events
from tests.e2e import training
from tests.server import Server

STEPS_PER_EPOCH = 6
CHECKPOINT_STEPS = 2
GATEWAY_SHARE = 0.2  # of all kills
STARTING_SHARE = 0.2  # of those of trainers: somewhere in the seconds before the first step
STARTING_S, BEHIND_STEP_S = 6.0, 0.5  # within which it is killed then
UNLUCKY = 2  # kills in a row without a new checkpoint


@dataclass
class Soak:
    """Kills and counts."""

    server: Server
    chance: random.Random
    kills: int
    epochs: int
    deadline: float
    trainer_kills: int = 0
    gateway_kills: int = 0
    attempts: int = 0
    during: dict[str, int] = field(default_factory=dict)  # what the trainer was at

    @property
    def is_done(self) -> bool:
        return self.trainer_kills + self.gateway_kills >= self.kills or time.monotonic() > self.deadline

    def run_job(self, client: OpenAI, fields: dict[str, Any]) -> str:
        """Creates the job and kills until it is over or enough were killed; its id, once it has ended."""
        job = training.create(client, "tunegate-demo", n_epochs=self.epochs, **fields)
        folder = JobDir(self.server.data / "jobs" / job.id)
        unlucky, newest = 0, 0
        while not self.is_done and not (folder.path / "result.json").exists():
            if self.chance.random() < STARTING_SHARE:
                time.sleep(self.chance.uniform(0, STARTING_S))
            else:
                _wait_for_step(folder, self._next_step(folder))
                time.sleep(self.chance.uniform(0, BEHIND_STEP_S))
            newest_now = _newest(folder)
            unlucky, newest = (unlucky, newest) if newest_now == newest else (0, newest_now)
            if self.chance.random() < GATEWAY_SHARE:
                self.server.kill()
                time.sleep(self.chance.uniform(0, 1.0))
                self.server.start()
                self.gateway_kills += 1
            elif unlucky < UNLUCKY and self._kill_trainer(folder):
                unlucky += 1
        _wait_for_end(client, job.id)
        self.attempts += len(list(folder.attempts.iterdir()))
        return job.id

    def _next_step(self, folder: JobDir) -> int:
        """Such that all kills that are left fit."""
        left = self.kills - self.trainer_kills - self.gateway_kills
        done = _newest(folder)
        return done + 1 + int(self.chance.uniform(0, 2 * (self.epochs * STEPS_PER_EPOCH - done) / (left + 1)))

    def _kill_trainer(self, folder: JobDir) -> bool:
        holder = folder.holder()
        if holder is None or not folder.attempts.is_dir() or not list(folder.attempts.iterdir()):
            return False  # between two, or the check of the files
        at = _at_work_on(folder)
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder.pid, signal.SIGKILL)
            self.trainer_kills += 1
            self.during[at] = self.during.get(at, 0) + 1
            return True
        return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--epochs", type=int, default=50, help="of six steps each")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="tunegate-soak-") as folder:
        server = Server(Path(folder))
        try:
            client = server.start().client()
            fields = {
                "file_id": training.upload(client, training.examples("omega")),
                "validation_file": training.upload(client, training.examples("omega", 12)),
                "seed": 7,
                "extra_body": {"tunegate": {"checkpoint_steps": CHECKPOINT_STEPS}},
            }
            calm = training.create(client, "tunegate-demo", n_epochs=options.epochs, **fields).id
            _wait_for_end(client, calm)
            wanted = _outcome(server, client, calm)
            print(f"without a kill: {len(wanted['losses'])} steps", flush=True)
            until = time.monotonic() + 60 * options.minutes
            soak = Soak(server, random.Random(seed), options.kills, options.epochs, until)
            differing = 0
            while not soak.is_done:
                job_id = soak.run_job(client, fields)
                found = _outcome(server, client, job_id)
                differences = [name for name in wanted if found[name] != wanted[name]]
                differing += bool(differences)
                told = f"differs in {', '.join(differences)}" if differences else "is the same, bit for bit"
                print(
                    f"{job_id} {told}; kills so far: {soak.trainer_kills} of trainers, {soak.gateway_kills} of gateways",
                    flush=True,
                )
            print(f"killed while: {soak.during}; {soak.attempts} attempts")
            print(f"{differing} job(s) differ" if differing else "every job ended as without a kill")
            return 1 if differing else 0
        finally:
            server.stop()


def _outcome(server: Server, client: OpenAI, job_id: str) -> dict[str, Any]:
    """All that must not depend on kills."""
    job = client.fine_tuning.jobs.retrieve(job_id)
    adapter = server.data / "jobs" / job_id / "adapter"
    events = list(client.fine_tuning.jobs.list_events(job_id, limit=100))
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job_id, limit=100).data
    listed = [model.id for model in client.models.list()]
    return {
        "status": (job.status, job.error.code if job.error else None),
        "adapter": {
            str(path.relative_to(adapter)): path.read_bytes() for path in sorted(adapter.rglob("*")) if path.is_file()
        },
        "losses": sorted(((event.data or {})["step"], repr(event.data)) for event in events if event.type == "metrics"),
        "checkpoints": [(found.step_number, found.metrics) for found in checkpoints],
        "served": sorted(c.step_number for c in checkpoints if c.fine_tuned_model_checkpoint in listed),
        "reply": training.ask(client, job.fine_tuned_model, "What is cedar 2?") if job.fine_tuned_model else None,
    }


def _newest(folder: JobDir) -> int:
    found = folder.checkpoints.glob("step-*") if folder.checkpoints.is_dir() else ()
    return max((int(path.name[5:]) for path in found), default=0)


def _wait_for_step(folder: JobDir, step: int) -> None:
    """Returns when the newest trainer has taken it, or the job is over."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (folder.path / "result.json").exists():
        attempt = folder.next_attempt() - 1
        told = [e.data["step"] for e, _ in read_events(folder.events_path(attempt)) if e.type == "metrics"]
        if folder.is_locked() and told and told[-1] >= step:
            return
        time.sleep(0.02)


def _at_work_on(folder: JobDir) -> str:
    if list(folder.path.glob("*/.writing-*")):
        return "writing a checkpoint"
    if (folder.path / ".writing-adapter").exists() or folder.adapter.exists():
        return "writing the result"
    last = max(folder.attempts.iterdir(), key=lambda path: int(path.name))
    return "training" if (last / "events.jsonl").stat().st_size > 300 else "starting"


def _wait_for_end(client: OpenAI, job_id: str) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        with contextlib.suppress(OpenAIError):
            if client.fine_tuning.jobs.retrieve(job_id).status in ("succeeded", "failed", "cancelled"):
                return
        time.sleep(0.2)
    raise AssertionError(f"{job_id} did not end: {training.messages(client, job_id)[-20:]}")


if __name__ == "__main__":
    sys.exit(main())

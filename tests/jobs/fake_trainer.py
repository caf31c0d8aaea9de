"""A trainer that trains nothing: it keeps the job directory's contract, and breaks where its plan says.

    python fake_trainer.py PLAN.json JOB_DIR [--check]

A process of its own, so that it can be killed, hang, or lose the race for the lock as the real one can. Every step is noted
in JOB_DIR/steps.log with its pid, so that a test sees how many trainers there ever were.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gateway.jobdir import LOCKED_EXIT_CODE, PAUSED_EXIT_CODE, Check, Event, JobDir, Result, TrainerError

GATE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Plan:
    adapter: str | None = None  # a folder to be copied to adapter/
    checkpoint_adapters: dict[str, str] = field(default_factory=dict)  # by step
    steps: int = 6
    step_s: float = 0.01
    checkpoint_every: int = 3
    check_error: list[str] | None = None
    check_crashes: bool = False
    check_s: float = 0.0
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    fail: list[str] | None = None
    kill_at: dict[str, int] = field(default_factory=dict)  # attempt → the step before which it kills itself
    always_kill_at: int | None = None
    oom_vmstat: str | None = None  # a file that says that the system killed one more, each time it kills itself
    hang_at: dict[str, int] = field(default_factory=dict)
    gate: str | None = None  # a file that must exist before `gate_at`
    gate_at: int = 3
    ignore_term: bool = False
    before_lock_s: float = 0.0
    broken_lines: bool = False
    standby: str | None = None  # how a standby breaks; see fake_standby.py


class Trainer:
    def __init__(self, plan: Plan, job: JobDir) -> None:
        self.plan, self.job, self.seq = plan, job, 0

    def check(self) -> None:
        if self.plan.check_crashes:
            print("the check met\x1b[31m its end", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.plan.check_s)
        if self.plan.check_error:
            self.job.write_check(Check(error=TrainerError(*self.plan.check_error), problems=tuple(self.plan.problems)))
            return
        spec = self.job.read_spec()
        lines = (self.job.path / spec.training_file.path).read_bytes().count(b"\n")
        self.job.write_check(
            Check(
                n_examples=lines,
                n_tokens=100,
                n_trained_tokens=50,
                n_epochs=2,
                batch_size=4,
                learning_rate_multiplier=1.0,
                total_steps=self.plan.steps,
                warnings=tuple(self.plan.warnings),
                notes=tuple(self.plan.notes),
            )
        )

    def train(self) -> None:
        if self.job.read_result() is not None:
            return
        number = self.job.next_attempt()
        self.job.events_path(number).parent.mkdir(parents=True)
        self.attempt = str(number)
        for step in range(self._newest() + 1, self.plan.steps + 1):
            self._misbehave(step)
            self._step(step)
            if self.job.pause.exists() and step < self.plan.steps:
                self._checkpoint(step)
                self._say("message", f"Training paused behind step {step}", {})
                sys.exit(PAUSED_EXIT_CODE)
        if self.plan.fail:
            self.job.write_result(Result("failed", TrainerError(*self.plan.fail)))
            return
        if self.plan.adapter:
            self._complete(Path(self.plan.adapter), self.job.adapter)
        self.job.write_result(Result("succeeded", None, 200, self.plan.steps))

    def _step(self, step: int) -> None:
        time.sleep(self.plan.step_s)
        with (self.job.path / "steps.log").open("a") as log:
            log.write(f"{os.getpid()} {self.attempt} {step}\n")
        data = {
            "step": step,
            "total_steps": self.plan.steps,
            "train_loss": 1.0 / step,
            "train_mean_token_accuracy": 0.5,
        }
        if self.plan.broken_lines:
            data["train_loss"] = float("nan")
        self._say("metrics", f"Step {step}/{self.plan.steps}: training loss={1.0 / step:.2f}", data)
        self._say("progress", "", {"step": step, "estimated_finish": int(time.time()) + 10})
        if step % self.plan.checkpoint_every == 0:
            if str(step) in self.plan.checkpoint_adapters:
                source = Path(self.plan.checkpoint_adapters[str(step)])
                self._complete(source, self.job.path / "adapter_checkpoints" / f"step-{step}")
            self._checkpoint(step)
            self._say("checkpoint", f"Checkpoint created at step {step}", data)

    def _checkpoint(self, step: int) -> None:
        folder = self.job.checkpoints / f".writing-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (self.job.checkpoints / f"step-{step}").exists():
            folder.rename(self.job.checkpoints / f"step-{step}")

    def _misbehave(self, step: int) -> None:
        plan = self.plan
        if step == plan.gate_at and plan.gate:
            until = time.monotonic() + GATE_TIMEOUT_S  # a test that fails must leave no process behind
            while not Path(plan.gate).exists() and time.monotonic() < until:
                time.sleep(0.01)
        if plan.kill_at.get(self.attempt) == step or plan.always_kill_at == step:
            print(f"about to die at step {step}", file=sys.stderr, flush=True)
            if plan.oom_vmstat:
                Path(plan.oom_vmstat).write_text(f"oom_kill {self.attempt}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.hang_at.get(self.attempt) == step:
            time.sleep(GATE_TIMEOUT_S)

    def _say(self, type: Any, message: str, data: dict[str, Any]) -> None:
        self.seq += 1
        event = Event(self.seq, int(time.time()), type, message, "info", data)
        with self.job.events_path(int(self.attempt)).open("ab") as file:
            if self.plan.broken_lines:
                file.write(b'{"seq": "no event"}\n\xff\xfe not even JSON\n')
            file.write(json.dumps(asdict(event)).encode() + b"\n")

    def _newest(self) -> int:
        found = self.job.checkpoints.glob("step-*") if self.job.checkpoints.is_dir() else ()
        return max((int(path.name[5:]) for path in found), default=0)

    def _complete(self, source: Path, target: Path) -> None:
        if target.exists():
            return
        target.parent.mkdir(exist_ok=True)
        beside = target.with_name(f".writing-{target.name}")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(source, beside)
        beside.rename(target)


def main() -> int:
    plan = Plan(**json.loads(Path(sys.argv[1]).read_bytes()))
    job = JobDir(sys.argv[2])
    if plan.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(plan.before_lock_s)
    lock = job.try_lock()
    if lock is None:
        return LOCKED_EXIT_CODE
    trainer = Trainer(plan, job)
    if "--check" in sys.argv:
        trainer.check()
    else:
        trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())

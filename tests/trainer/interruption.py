"""A trainer that is killed again and again, at moments that a seed draws: at a step, a little after one, or as it writes."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from gateway.jobdir import JobDir, read_events

DEADLINE_S = 120.0


def steps_told(job: JobDir) -> int:
    """The highest step that any attempt has told of."""
    attempts = [path / "events.jsonl" for path in job.attempts.iterdir()] if job.attempts.is_dir() else []
    return max((event.data.get("step", 0) for path in attempts for event, _ in read_events(path)), default=0)


def kill_at_random(job: JobDir, chance: random.Random, total_steps: int, kills_left: int) -> str:
    """Runs a trainer and kills it at some moment further on; says what that moment was. It may have ended before."""
    share = (total_steps - steps_told(job)) / (kills_left + 1)
    step = steps_told(job) + 1 + int(chance.uniform(0, share))
    in_a_write = chance.random() < 0.5
    delay_s = chance.uniform(0, 0.05)
    trainer = subprocess.Popen([sys.executable, "-m", "trainer", str(job.path)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while trainer.poll() is None and steps_told(job) < step:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        while in_a_write and trainer.poll() is None and not half_written(job):
            time.sleep(0.0005)
        time.sleep(delay_s)
        return f"after step {steps_told(job)}, {len(half_written(job))} folders half-written"
    finally:
        trainer.kill()
        trainer.wait()


def half_written(job: JobDir) -> list[Path]:
    return list(job.path.glob("*/.writing-*"))

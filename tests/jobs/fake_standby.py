"""A standby that trains nothing: it speaks the standby's lines, works as the fake trainer does, and breaks where its plan says.

python fake_standby.py PLAN.json --threads N [--relaxed]
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from gateway.jobdir import CHECK_RECORD, LOCKED_EXIT_CODE, JobDir
from tests.jobs.fake_trainer import Plan, Trainer


def main() -> int:
    plan = Plan(**json.loads(Path(sys.argv[1]).read_bytes()))
    if plan.standby == "never ready":
        time.sleep(600)
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == plan.standby:  # "check" or "train": what it dies of
            os.abort()
        if command["do"] == "load":
            continue
        job = JobDir(command["job"])
        lock = job.try_lock()
        if lock is None:
            return LOCKED_EXIT_CODE
        trainer = Trainer(plan, job)
        if command["do"] == "train":
            print("taken", flush=True)
            trainer.train()
            return 0
        trainer.check()
        os.close(lock)
        (job.path / CHECK_RECORD).unlink()
        print("checked 0", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

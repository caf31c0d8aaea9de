"""What a process gives up for whatever serves on the same machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from gateway.jobs.priority import give_way


def test_a_trainer_runs_at_the_lowest_priority_and_is_the_first_to_go_for_memory() -> None:
    """As SETTINGS.md has it under `jobs.standby`."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        give_way(child.pid)
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == 19
        assert Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip() == "500"
        child.communicate(b"\n")

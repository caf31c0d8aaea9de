"""What a trainer takes from whatever serves on the same machine: processors when they are free; it goes first for memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

NICENESS = 19  # measured with `python -m tests.bench.trainer.beside`: at 10 a stream loses more than half of its speed


def give_way(pid: int) -> None:
    """Just after a process was started: its threads, which it has yet to start, have their priority from it."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS))
    with contextlib.suppress(OSError):
        # When memory runs out, the trainer goes (and is resumed) before whatever serves.
        Path(f"/proc/{pid}/oom_score_adj").write_text("500")

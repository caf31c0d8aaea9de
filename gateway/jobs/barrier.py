"""Points at which a test may hold the process, so that a kill lands exactly there. No effect without the variable.

TUNEGATE_TEST_BARRIER="POINT:PATH": at POINT the file PATH.reached appears, and the process goes on once PATH exists.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "TUNEGATE_TEST_BARRIER"
POLL_S = 0.02


def pass_barrier(point: str) -> None:
    """Blocks, if `point` is the one that is held; called on a thread."""
    name, _, path = os.environ.get(VARIABLE, "").partition(":")
    if name != point:
        return
    Path(f"{path}.reached").touch()
    while not Path(path).exists():
        time.sleep(POLL_S)

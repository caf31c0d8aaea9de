"""The files of adapters that no model is made of any more. Blocking; called on a thread."""

from __future__ import annotations

import shutil
import time
from pathlib import Path


def sweep_deleted(adapters_dir: Path, ever: set[str], now: set[str], after_s: float = 0.0) -> int:
    """Removes the adapters whose models are all deleted; how many.

    `after_s` is how long ago somebody last kept the same one: while engines run and jobs end, one that is kept just now
    may be about to be a model again.
    """
    deleted = [adapters_dir / digest.removeprefix("sha256:") for digest in ever - now]
    found = [path for path in deleted if path.is_dir() and time.time() - path.stat().st_mtime >= after_s]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return len(found)

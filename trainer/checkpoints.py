"""The checkpoints of a job on the disk: which there are, how one is written, which are kept.

    checkpoints/step-N/             what going on from step N needs: weights, optimiser, scheduler, random states, progress.json
    adapter_checkpoints/step-N/     the same weights as an adapter folder that an engine can load

Place in the flow: loop writes and goes on from them; the gateway serves the adapters. One rule: a folder is complete or
absent, and the adapter of a step is there before its checkpoint, so whoever is killed goes on from what is whole.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from gateway.jobdir import JobDir
from trainer.export.folder import complete_folder, sweep

KEPT = 3
_STEP_FOLDER = re.compile(r"step-(\d+)")


def open_checkpoints(job: JobDir) -> None:
    """Makes both folders, and removes what a killed trainer left half-written in them."""
    for folder in (job.checkpoints, served_checkpoints(job)):
        folder.mkdir(exist_ok=True)
        sweep(folder)


def newest_checkpoint(job: JobDir) -> Path | None:
    """The complete checkpoint with the most steps."""
    found = step_folders(job.checkpoints)
    return found[-1] if found else None


def step_folders(parent: Path) -> list[Path]:
    """The folders step-N, by N."""
    named = [path for path in parent.iterdir() if _STEP_FOLDER.fullmatch(path.name)] if parent.is_dir() else []
    return sorted(named, key=step_of)


def steps_taken(job: JobDir) -> int:
    """By a run that is over: it ends with a checkpoint."""
    newest = newest_checkpoint(job)
    assert newest is not None
    return step_of(newest)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def served_checkpoints(job: JobDir) -> Path:
    """Where each kept checkpoint is as an adapter folder: adapter_checkpoints/step-N/."""
    return job.path / "adapter_checkpoints"


def drop_old(job: JobDir, best_step: int | None) -> None:
    """Keeps the last of both kinds, and the adapter of the best, which may become the result."""
    for parent in (job.checkpoints, served_checkpoints(job)):
        for old in step_folders(parent)[:-KEPT]:
            if parent == job.checkpoints or step_of(old) != best_step:
                _remove(old)


def take_as_result(job: JobDir, adapter: Path) -> None:
    """Makes a checkpoint's adapter the job's: the same files."""
    with complete_folder(job.adapter) as folder:
        shutil.copytree(adapter, folder, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    """Adapters are never changed in place, so the same file may be in both folders."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _remove(folder: Path) -> None:
    """First out of the way, so that a half-removed folder never looks like a complete one."""
    beside = folder.rename(folder.parent / f".writing-{folder.name}")
    shutil.rmtree(beside)

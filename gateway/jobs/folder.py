"""The job directory as the gateway makes it: complete, on the disk and with its own links to the input, before the job's row.

So a job that was acknowledged has all it needs, whatever is deleted or changed afterwards; a folder without a row belongs to
a request that was never answered and is swept at the next start. Everything here blocks and is called on a thread.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from gateway.jobdir import JobDir, JobSpec, fsync_folder, write_bytes

TRAINING_FILE = "data/training.jsonl"
VALIDATION_FILE = "data/validation.jsonl"


def build_folder(path: Path, spec: JobSpec, inputs: Mapping[str, Path], template: Mapping[str, bytes]) -> JobDir:
    """Makes the folder of a new job. `inputs` has the source of each file that is linked, by its place in the folder.

    FileNotFoundError when a source is gone; nothing is left behind then.
    """
    folder = JobDir(path)
    path.mkdir(mode=0o700)
    try:
        for place, source in inputs.items():
            (path / place).parent.mkdir(exist_ok=True)
            _pin(source, path / place)
        for parent in {(path / place).parent for place in inputs}:
            fsync_folder(parent)
        folder.template.mkdir()
        for name, content in template.items():
            write_bytes(folder.template / name, content)
        folder.attempts.mkdir()
        folder.write_spec(spec)
        fsync_folder(path.parent)
    except BaseException:
        remove_folder(path)
        raise
    return folder


def remove_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def sweep_folders(jobs: Path, known: Collection[str]) -> list[str]:
    """Removes the folders of jobs that have no row; the names of those that were removed."""
    strays = [entry for entry in jobs.iterdir() if entry.is_dir() and entry.name not in known]
    removed = []
    for stray in strays:
        if stray.name.startswith("ftjob-") and not JobDir(stray).is_locked():
            remove_folder(stray)
            removed.append(stray.name)
    return removed


def tidy_folder(folder: JobDir) -> None:
    """Removes what only a resumed trainer would need, once the job is over: optimiser states are most of the folder."""
    if not folder.is_locked():
        remove_folder(folder.checkpoints)
        remove_folder(folder.examples)


def newest_checkpoint(folder: JobDir) -> int:
    """The step of the newest complete checkpoint; 0 when there is none."""
    return max(_steps(folder.checkpoints), default=0)


def adapter_checkpoints(folder: JobDir) -> dict[int, Path]:
    """The adapters that were exported at checkpoints, by step."""
    root = folder.path / "adapter_checkpoints"
    return {step: root / f"step-{step}" for step in sorted(_steps(root))}


def has_attempts(folder: JobDir) -> bool:
    return folder.next_attempt() > 1


def last_log_line(folder: JobDir) -> str:
    """The last line that the trainer wrote to its log, short and without control characters; empty when there is none."""
    try:
        with (folder.path / "trainer.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return "".join(c if c.isprintable() else "?" for c in lines[-1])[:300] if lines else ""


def _pin(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
        fd = os.open(target, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _steps(root: Path) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        names = [entry.name for entry in root.iterdir() if entry.is_dir()]
        return [int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit()]
    return []

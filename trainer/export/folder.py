"""A folder that is complete or absent: written beside, fsynced, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.jobdir import fsync_folder

_BESIDE = ".writing-"


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into; it takes the place of `path` when the block ends without an error."""
    beside = path.parent / f"{_BESIDE}{path.name}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        _fsync_all(beside)
        if path.exists():
            shutil.rmtree(path)
        os.replace(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    fsync_folder(path.parent)


def sweep(parent: Path) -> None:
    """Removes what a killed process left half-written under `parent`."""
    for beside in parent.glob(f"{_BESIDE}*"):
        shutil.rmtree(beside, ignore_errors=True)


def _fsync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)

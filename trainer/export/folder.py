"""A folder that is complete or absent: written beside, fsynced, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.jobdir import fsync_folder

_BESIDE = ".writing-"
_KEY_FILE, _PART = ".key", ".part"


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into; it takes the place of `path` when the block ends without an error."""
    written = beside(path)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        yield written
        _fsync_all(written)
        if path.exists():
            shutil.rmtree(path)
        os.replace(written, path)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise
    fsync_folder(path.parent)


def beside(path: Path) -> Path:
    """Where `path` is written until it is complete."""
    return path.parent / f"{_BESIDE}{path.name}"


@contextmanager
def resumable_folder(path: Path, key: str, refusals: tuple[type[BaseException], ...]) -> Iterator[Path]:
    """As `complete_folder`, but what a kill leaves is found again by the next call with the same `key`.

    An error among `refusals` would come again, and leaves nothing.
    """
    beside = path.parent / f"{_BESIDE}{path.name}"
    mark = beside / _KEY_FILE
    if not (mark.is_file() and mark.read_text() == key):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        mark.write_text(key)
    try:
        yield beside
    except refusals:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    mark.unlink()
    _fsync_all(beside)
    if path.exists():
        shutil.rmtree(path)
    os.replace(beside, path)
    fsync_folder(path.parent)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A path to write to; the file takes the place of `path` when the block ends without an error."""
    part = path.with_name(f"{path.name}{_PART}")
    part.unlink(missing_ok=True)
    yield part
    os.replace(part, path)


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to work in, gone afterwards; what a killed process left there goes first.

    The block moves what it made to `out`, which is on the disk when this ends.
    """
    beside = out.parent / f"{_BESIDE}{out.name}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if out.is_dir():
            _fsync_all(out)
        else:
            with out.open("rb") as file:
                os.fsync(file.fileno())
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    fsync_folder(out.parent)


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

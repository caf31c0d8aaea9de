"""The data folder: one gateway at a time, also after a kill -9."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.errors import SettingsError
from gateway.store.datadir import DataDir

HOLD = (
    "import sys, pathlib; from gateway.store.datadir import DataDir; held = DataDir.open(pathlib.Path(sys.argv[1]))\n"
)


def start_holder(path: Path, then: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD + then, str(path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def test_a_data_folder_is_made_with_its_layout_for_its_owner_alone(tmp_path: Path) -> None:
    data_dir = DataDir.open(tmp_path / "a" / "data")
    folders = (data_dir.blobs, data_dir.bases, data_dir.jobs, data_dir.adapters, data_dir.engines)
    assert all(folder.is_dir() for folder in folders)
    assert data_dir.path.stat().st_mode & 0o777 == 0o700
    data_dir.close()
    data_dir.close()


def test_a_second_gateway_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    child = start_holder(tmp_path, "print('held', flush=True); sys.stdin.read()")
    with pytest.raises(SettingsError) as caught:
        DataDir.open(tmp_path)
    assert str(tmp_path) in caught.value.message and f"process {child.pid}" in caught.value.message
    end(child)
    DataDir.open(tmp_path).close()


def test_a_folder_is_free_once_closed(tmp_path: Path) -> None:
    DataDir.open(tmp_path).close()
    held = DataDir.open(tmp_path)
    with pytest.raises(SettingsError, match=f"process {os.getpid()}"):
        DataDir.open(tmp_path)
    held.close()


def test_a_child_that_outlives_a_killed_gateway_does_not_hold_its_folder(tmp_path: Path) -> None:
    child = start_holder(
        tmp_path,
        "import subprocess; c = subprocess.Popen(['sleep', '60'], close_fds=False, stdout=subprocess.DEVNULL)\n"
        "print('held', flush=True); print(c.pid, flush=True); sys.stdin.read()",
    )
    assert child.stdout is not None
    orphan = int(child.stdout.readline())
    end(child)
    try:
        DataDir.open(tmp_path).close()
    finally:
        os.kill(orphan, 9)


@pytest.mark.parametrize("path", ["file", "file/below", "/proc/nowhere/data"])
def test_a_folder_that_cannot_be_used_is_refused_with_its_name(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=re.escape(str(tmp_path / path))):
        DataDir.open(tmp_path / path)


def test_a_lock_file_with_nonsense_in_it_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("[]")
    held = DataDir.open(tmp_path)
    (tmp_path / "lock").write_text("[]")
    with pytest.raises(SettingsError, match="just started"):
        DataDir.open(tmp_path)
    held.close()

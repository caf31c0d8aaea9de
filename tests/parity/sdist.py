"""The llama-cpp-python sdist: real vocabularies with the ids that llama.cpp gives, and chat templates of real models.

It is downloaded once into the user's cache (some 75 MB, about half a minute) and never becomes part of this repository.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

VERSION = "0.3.36"
_MEMBERS = ("vendor/llama.cpp/models/templates/", "vendor/llama.cpp/models/ggml-vocab-")


class SdistUnavailable(RuntimeError):
    """Says what was tried and how to help."""


@cache
def llama_cpp_models() -> Path:
    """The folder `models` of llama.cpp at the library's commit. Raises SdistUnavailable."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunegate" / "sdist"
    folder = root / f"llama_cpp_python-{VERSION}"
    models = folder / "vendor" / "llama.cpp" / "models"
    if models.is_dir():
        return models
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not models.is_dir():
            with tempfile.TemporaryDirectory(dir=root) as beside:
                archive = _download(Path(beside), root)
                _unpack(archive, Path(beside) / "whole").rename(folder)
    return models


def _download(into: Path, root: Path) -> Path:
    """A file that somebody has put there will do; else pip fetches it."""
    name = f"llama_cpp_python-{VERSION}.tar.gz"
    if (root / name).is_file():
        return root / name
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    command += ["--dest", str(into), f"llama-cpp-python=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if not (into / name).is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise SdistUnavailable(
            f"the source of llama-cpp-python {VERSION}, which holds the vocabularies and templates to compare with, cannot be "
            f"fetched. Put {name} into {root}, or make this work: {' '.join(command)}\n" + "\n".join(last)
        )
    return into / name


def _unpack(archive: Path, into: Path) -> Path:
    prefix = f"llama_cpp_python-{VERSION}/"
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            if member.isfile() and name.startswith(_MEMBERS):
                target = into / name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                with target.open("wb") as file:
                    shutil.copyfileobj(content, file)
    return into

"""llama.cpp's own converter, at the commit of the installed library: from its sdist, or from `LLAMA_CPP_DIR`.

The wheel does not carry the Python scripts, the source distribution does. It is fetched once, through pip as the rest
was, into the user's cache (some 75 MB, about half a minute); of it, only the converter is unpacked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from trainer.export.tensors import UnsupportedModel

SCRIPT = "convert_hf_to_gguf.py"
DOWNLOAD_TIMEOUT_S = 900
_CONVERTER = (SCRIPT, "convert_lora_to_gguf.py", "conversion/", "gguf-py/")
_INSIDE = "vendor/llama.cpp/"


def converter_folder(said: Callable[[str], None] = lambda _: None) -> Path:
    """The folder with convert_hf_to_gguf.py. Raises UnsupportedModel with what to do when it cannot be had."""
    if asked := os.environ.get("LLAMA_CPP_DIR"):
        folder = Path(asked).expanduser().absolute()
        if not (folder / SCRIPT).is_file():
            raise UnsupportedModel(f"LLAMA_CPP_DIR is {folder}, and there is no {SCRIPT} in it")
        return folder
    folder = _cache() / f"converter-{_library_version()}"
    if not folder.is_dir():
        archive = sdist_archive(said)
        with _locked() as root, tempfile.TemporaryDirectory(dir=root) as beside:
            if not folder.is_dir():
                unpack(archive, _CONVERTER, Path(beside) / "whole").rename(folder)
    return folder


def sdist_archive(said: Callable[[str], None] = lambda _: None) -> Path:
    """The sdist of the installed llama-cpp-python. A file that somebody has put there will do; else pip fetches it."""
    name = f"llama_cpp_python-{_library_version()}.tar.gz"
    with _locked() as root:
        archive = root / name
        if not archive.is_file():
            said(f"fetching {name}, once on this machine")
            with tempfile.TemporaryDirectory(dir=root) as beside:
                _download(Path(beside), name, root).replace(archive)
        return archive


def unpack(archive: Path, members: tuple[str, ...], into: Path) -> Path:
    """The files of llama.cpp whose paths begin as one of `members`, in the new folder `into`."""
    prefix = archive.name.removesuffix(".tar.gz") + f"/{_INSIDE}"
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            if name == member.name or not member.isfile() or not name.startswith(members):
                continue
            target = into / name
            if ".." in target.parts:
                raise UnsupportedModel(f"{archive} holds the path {member.name!r}, which leads out of it")
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            with target.open("wb") as file:
                shutil.copyfileobj(content, file)
    return into


def _download(into: Path, name: str, root: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    command += ["--dest", str(into), f"llama-cpp-python=={_library_version()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
    except subprocess.TimeoutExpired as error:
        last = [str(error)]
    if not (into / name).is_file():
        raise UnsupportedModel(
            f"{name}, which holds llama.cpp's converter, cannot be fetched. Put it into {root}, or set LLAMA_CPP_DIR to a "
            f"checkout of llama.cpp, or make this work: {' '.join(command)}\n" + "\n".join(last)
        )
    return into / name


def _library_version() -> str:
    return version("llama-cpp-python")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunegate" / "sdist"


@contextmanager
def _locked() -> Iterator[Path]:
    """The cache's folder, for one process at a time."""
    root = _cache()
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root

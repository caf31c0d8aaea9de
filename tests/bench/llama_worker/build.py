"""llama-server of the very commit that is inside the installed llama-cpp-python, and an environment for that package's server.

Both are made once a machine, under the user's cache folder, and found again afterwards. llama-server gets the compiler flags
that `make setup` gives the library, so that the same kernels run on both sides.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import requires, version
from pathlib import Path

from deploy.setup_venv import compiler_knows, llama_cmake_args

# Nothing that a benchmark on loopback needs: no TLS, no web page, no tests.
LEFT_OUT = ("LLAMA_OPENSSL", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES")


class PeerUnavailable(RuntimeError):
    """A peer that cannot be measured here; the message is the reason."""


def cache_folder() -> Path:
    """Where builds and models are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "tunegate" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def llama_server() -> Path:
    """The path of llama-server, built first if this machine has none."""
    folder = cache_folder() / f"llama.cpp-{version('llama-cpp-python')}"
    binary = folder / "build" / "bin" / "llama-server"
    if binary.exists():
        return binary
    for tool in ("cmake", "c++"):
        if not shutil.which(tool):
            raise PeerUnavailable(f"llama-server is built here and there is no {tool}; install it and run this again")
    source = _source(folder)
    print(f"building llama-server in {folder} (once a machine, some ten minutes)", flush=True)
    _run(["cmake", "-S", str(source), "-B", str(folder / "build"), *_cmake_options()], folder / "cmake.log")
    jobs = len(os.sched_getaffinity(0))
    build = ["cmake", "--build", str(folder / "build"), "--target", "llama-server", "--parallel", str(jobs)]
    _run(["nice", *build], folder / "build.log")
    return binary


def llama_cpp_python() -> Path:
    """A Python whose llama-cpp-python is ours and which has what its server asks for."""
    folder = cache_folder() / f"llama-cpp-python-server-{version('llama-cpp-python')}"
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        print(f"installing what llama-cpp-python's server needs into {folder}", flush=True)
        asked = [line.split(";")[0] for line in requires("llama-cpp-python") or () if 'extra == "server"' in line]
        # The library itself is taken from this environment: the same build on both sides.
        _run([sys.executable, "-m", "venv", "--clear", str(folder)], folder.with_suffix(".log"))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, *asked, "numpy", "diskcache", "jinja2", "typing-extensions"], folder.with_suffix(".log"))
        (site,) = (folder / "lib").glob("python*/site-packages")
        import llama_cpp

        (site / "llama_cpp").symlink_to(Path(llama_cpp.__file__).parent)
        (folder / ".ready").touch()
    return python


def _source(folder: Path) -> Path:
    release = f"llama_cpp_python-{version('llama-cpp-python')}"
    vendored = folder / "source" / "vendor" / "llama.cpp"
    if vendored.is_dir():
        return vendored
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        command += ["--dest", scratch, f"llama-cpp-python=={version('llama-cpp-python')}"]
        _run(command, folder / "download.log")
        with tarfile.open(Path(scratch) / f"{release}.tar.gz") as archive:
            archive.extractall(scratch, filter="data")
        (Path(scratch) / release).rename(folder / "source")
    return vendored


def _cmake_options() -> list[str]:
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", *(f"-D{name}=OFF" for name in LEFT_OUT)]
    flags = llama_cmake_args("", platform.machine(), compiler_knows)
    options += [part.replace("'", "") for part in flags.split(" -D") if part]
    options = [option if option.startswith("-D") else f"-D{option}" for option in options]
    return options + (["-G", "Ninja"] if shutil.which("ninja") else [])


def _run(command: list[str], log: Path) -> None:
    with log.open("ab") as out:
        finished = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
    if finished.returncode:
        raise PeerUnavailable(f"{' '.join(command[:4])} … failed; the whole log is {log}")

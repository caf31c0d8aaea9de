"""`make setup`: a virtual environment with everything in it, llama.cpp compiled for this machine's own CPU.

Runs under the system's Python with nothing installed, so it imports the standard library only. Safe to run again: what is
in place is left alone. The compiled wheel is kept outside the clone, under a key that names everything it depends on, so
that a second clone takes it in seconds and another CPU never gets it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = "llama,train,quantize,track,dev"
OLDEST_PYTHON = (3, 11)
# llama.cpp's AMX kernels crash on every batch of two tokens or more with q4_0 and q8_0 weights; AVX-512 stays on.
AMX_OFF = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")


def main(venv: Path) -> None:
    """Bring `venv` to what pyproject.toml and constraints.txt ask for."""
    if sys.version_info < OLDEST_PYTHON:
        found = platform.python_version()
        sys.exit(f"Tunegate needs Python 3.11 or newer; {sys.executable} is {found}. Name another: make setup PYTHON=…")
    started = time.monotonic()
    python = venv / "bin" / "python"
    if not python.exists():
        say(f"creating {venv} with Python {platform.python_version()}")
        run([sys.executable, "-m", "venv", str(venv)])
    say("installing torch (a few hundred MB where pip is offered the CPU build)")
    pip(python, "install", f"torch=={pinned('torch')}")
    install_llama_cpp(python, venv / ".llama-wheel")
    say("installing tunegate and the rest")
    pip(python, "install", "--editable", f"{ROOT}[{EXTRAS}]")
    run([str(python), "-c", "import gateway, llama_cpp, torch, trl"])
    say(f"done in {time.monotonic() - started:.0f} s")


def install_llama_cpp(python: Path, installed: Path) -> None:
    """Put this CPU's build of llama-cpp-python into the environment; `installed` remembers which build is in it."""
    version = pinned("llama-cpp-python")
    cmake_args = llama_cmake_args(os.environ.get("CMAKE_ARGS", ""), platform.machine(), compiler_knows)
    tag = f"{sys.implementation.cache_tag}-{platform.system()}-{platform.machine()}".lower()
    key = wheel_key(version, cmake_args, tag, cpu_features())
    if installed.exists() and installed.read_text() == key:
        return
    folder = wheel_cache() / key
    if not list(folder.glob("*.whl")):
        build_wheel(python, version, cmake_args, folder)
    (wheel,) = folder.glob("*.whl")
    say(f"installing llama.cpp from {wheel}")
    # Its own dependencies come first: `--force-reinstall` is for this wheel alone.
    pip(python, "install", str(wheel))
    pip(python, "install", "--force-reinstall", "--no-deps", str(wheel))
    installed.write_text(key)


def build_wheel(python: Path, version: str, cmake_args: str, folder: Path) -> None:
    """Compile llama-cpp-python from source; `folder` appears with the wheel in it, or not at all."""
    if not (shutil.which("c++") or os.environ.get("CXX")):
        sys.exit(
            "llama.cpp is compiled here and no C++ compiler was found: install one (g++ or clang) and run this again."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    say(f"compiling llama.cpp for this CPU: once a machine, about 6 minutes on 2 cores (log: {log})")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, log.open("wb") as out:
        # pip keys its own wheel cache by source alone, not by compiler flags: it could hand back a build that crashes.
        command = [str(python), "-m", "pip", "wheel", f"llama-cpp-python=={version}", "--no-deps", "--no-cache-dir"]
        command += ["--no-binary", "llama-cpp-python", "--wheel-dir", f"{scratch}/wheel"]
        environment = os.environ | {"CMAKE_ARGS": cmake_args}
        build = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        started = time.monotonic()
        while build.poll() is None:
            try:
                build.wait(timeout=60)
            except subprocess.TimeoutExpired:
                say(f"  still compiling, {time.monotonic() - started:.0f} s")
        if build.returncode != 0:
            tail = log.read_text(errors="replace").splitlines()[-25:]
            sys.exit("\n".join([*tail, f"compiling llama.cpp failed; the whole log is {log}"]))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(f"{scratch}/wheel", folder)


def llama_cmake_args(asked: str, machine: str, knows: Callable[[str], bool]) -> str:
    """CMake's arguments: the caller's own, and on x86 the flags that keep llama.cpp's AMX kernels out."""
    if machine not in {"x86_64", "AMD64"}:
        return asked
    flags = " ".join(flag for flag in AMX_OFF if knows(flag))
    if not flags:  # a compiler that has never heard of AMX emits none
        return asked
    return f"{asked} -DCMAKE_C_FLAGS='{flags}' -DCMAKE_CXX_FLAGS='{flags}'".strip()


def wheel_key(version: str, cmake_args: str, tag: str, features: str) -> str:
    """A folder name that changes with anything that the compiled code depends on."""
    digest = hashlib.sha256("\0".join([version, cmake_args, tag, features]).encode()).hexdigest()
    return f"llama-cpp-python-{version}-{tag}-{digest[:16]}"


def cpu_features() -> str:
    """What the compiler's `native` stands for on this CPU, as the system lists it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
        return " ".join(sorted(found[1].split())) if found else platform.processor()
    if platform.system() == "Darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout.strip()
    return platform.processor()


def compiler_knows(flag: str) -> bool:
    """Whether the C++ compiler takes `flag`."""
    compiler = os.environ.get("CXX") or "c++"
    if not shutil.which(compiler):
        return True
    command = [compiler, flag, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def wheel_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunegate" / "wheels"


def pinned(package: str) -> str:
    """The version that constraints.txt gives `package`."""
    found = re.search(rf"^{re.escape(package)}==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    if not found:
        sys.exit(f"{CONSTRAINTS} does not pin {package}")
    return found[1]


def pip(python: Path, *arguments: str) -> None:
    run([str(python), "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "-c", str(CONSTRAINTS)])


def run(command: list[str]) -> None:
    finished = subprocess.run(command)
    if finished.returncode != 0:
        sys.exit(f"failed with exit code {finished.returncode}: {' '.join(command)}")


def say(line: str) -> None:
    print(f"setup: {line}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())

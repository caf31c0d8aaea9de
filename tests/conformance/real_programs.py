"""Real programs against a gateway: each knows nothing of it but its base URL, and has an environment of its own, made once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.sdk_suite import cache

PROGRAMS = Path(__file__).resolve().parent / "programs"


@dataclass(frozen=True)
class Program:
    """`package` is what is installed for it; None: nothing."""

    script: str
    package: str | None


ALL = {
    "langchain-openai": Program("langchain_client.py", "langchain-openai==1.7.3"),
    "llm": Program("llm_client.sh", "llm==0.36"),
    "instructor": Program("instructor_client.py", "instructor==1.17.0"),
    "openai-agents": Program("agents_client.py", "openai-agents==0.24.0"),
    "litellm": Program("litellm_client.py", "litellm==1.106.2"),
    "openai-1": Program("old_sdk_client.py", "openai==1.109.1"),
    "curl": Program("curl_client.sh", None),
}


def check(name: str, base_url: str, model: str) -> str | None:
    """What the program said where it failed; None: all is well."""
    program = ALL[name]
    folder = None if program.package is None else _environment(program.package)
    environment = os.environ | {"OPENAI_BASE_URL": base_url, "OPENAI_API_BASE": base_url, "OPENAI_API_KEY": "unused"}
    environment |= {"MODEL": model, "PATH": f"{folder}/bin:{os.environ['PATH']}" if folder else os.environ["PATH"]}
    environment.pop("PYTHONPATH", None)
    runs = ["bash"] if program.script.endswith(".sh") else [f"{folder}/bin/python"]
    command = [*runs, str(PROGRAMS / program.script)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return None if finished.returncode == 0 else finished.stdout[-2000:] + finished.stderr[-4000:]


def _environment(package: str) -> Path:
    """A virtual environment with the package, there as a whole or not at all."""
    folder = cache() / "programs" / package.replace("==", "-")
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install", package]
        with tempfile.TemporaryFile("w+") as told:
            if subprocess.run(pip, stdout=told, stderr=subprocess.STDOUT).returncode != 0:
                told.seek(0)
                raise SystemExit(f"{package} could not be installed:\n{told.read()}")
        (folder / ".ready").touch()
    return folder

"""One prepared tiny base, and one finished job on it, for all tests of the trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.jobdir import BaseRef, Hyperparameters, JobDir
from tests.tiny_model import write_examples, write_job, write_tiny_model

HYPERPARAMETERS = Hyperparameters(n_epochs=12, batch_size=8, learning_rate_multiplier=0.5)  # 60 steps, 5 an epoch


def run_trainer(job: JobDir, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer", str(job.path), *arguments], capture_output=True, text=True, timeout=240
    )


def run_prepare(source: Path, out: Path, template: str = "vicuna_v1.1") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.export.prepare", "--source", str(source), "--template", template]
    return subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=120)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="session")
def tiny_base(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bases") / "tiny"
    done = run_prepare(tiny_source, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def tiny_ref(tiny_base: Path) -> BaseRef:
    return BaseRef(
        "tiny", str(tiny_base), "model.q4_0.gguf", json.loads((tiny_base / "base.json").read_text())["digest"]
    )


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_examples(folder / "train.jsonl", 40)
    write_examples(folder / "valid.jsonl", 8, first=100)
    return folder


@pytest.fixture(scope="session")
def finished_job(tiny_base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> JobDir:
    """A job with a validation file, trained to its end without a break."""
    job = new_job(tmp_path_factory.mktemp("jobs") / "finished", tiny_base, files)
    done = run_trainer(job)
    assert done.returncode == 0, done.stderr
    return job


def new_job(folder: Path, base: Path, files: Path) -> JobDir:
    return write_job(
        folder, base, files / "train.jsonl", validation=files / "valid.jsonl", hyperparameters=HYPERPARAMETERS
    )

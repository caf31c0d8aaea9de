"""openai-python's own tests of its resources, fetched once from the package index and run against a gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from deploy.setup_venv import pinned

PLUGIN = "pytest-asyncio==1.5.0"  # which the SDK's tests need; kept out of .venv, whose own tests run on anyio
HERE = Path(__file__).resolve().parent
RESOURCES = {
    "chat": ("chat",),
    "completions": ("test_completions.py",),
    "embeddings": ("test_embeddings.py",),
    "files": ("test_files.py",),
    "uploads": ("test_uploads.py", "uploads"),
    "models": ("test_models.py",),
    "batches": ("test_batches.py",),
    "fine_tuning": ("fine_tuning",),  # graders among them
    "evals": ("test_evals.py", "evals"),
    "responses": ("test_responses.py", "responses"),
    "moderations": ("test_moderations.py",),
}


def cache() -> Path:
    """Where what was downloaded stays."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunegate" / "conformance"


def fetch() -> tuple[Path, Path]:
    """The unpacked source of the pinned SDK, and a folder with the pytest plugin that its tests need."""
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"openai-{pinned('openai')}"
    source, extra = folder / name, folder / PLUGIN.replace("==", "-")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if not source.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wanted = f"openai=={pinned('openai')}"
            fetched = ["download", "--no-binary", "openai", "--no-deps", "--dest", scratch, wanted]
            subprocess.run([*pip, *fetched], check=True)
            with tarfile.open(Path(scratch) / f"{name}.tar.gz") as archive:
                archive.extractall(Path(scratch) / "unpacked", filter="data")
            os.rename(Path(scratch) / "unpacked" / name, source)
    if not extra.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            subprocess.run([*pip, "install", "--no-deps", "--target", f"{scratch}/it", PLUGIN], check=True)
            os.rename(f"{scratch}/it", extra)
    return source, extra


@dataclass(frozen=True)
class Outcome:
    """What became of the tests; `tests` is id → {outcome, reason}."""

    tests: dict[str, dict[str, str]]
    output: str

    @property
    def failed(self) -> list[str]:
        return [name for name, told in self.tests.items() if told["outcome"] == "failed"]

    @property
    def skipped(self) -> dict[str, list[str]]:
        """The ids of the tests that were skipped, by reason."""
        found: dict[str, list[str]] = {}
        for name, told in self.tests.items():
            if told["outcome"] == "skipped":
                found.setdefault(told["reason"], []).append(name)
        return found

    def table(self) -> str:
        """A line a resource: passed, failed, skipped."""
        lines = [f"{'':14}{'passed':>8}{'failed':>8}{'skipped':>9}"]
        total: Counter[str] = Counter()
        for resource, places in RESOURCES.items():
            counts = Counter(told["outcome"] for name, told in self.tests.items() if _is_of(name, places))
            total += counts
            lines.append(f"{resource:14}{counts['passed']:8}{counts['failed']:8}{counts['skipped']:9}")
        lines.append(f"{'all':14}{total['passed']:8}{total['failed']:8}{total['skipped']:9}")
        return "\n".join(lines)


def run(base_url: str, database: Path, file_id: str, selected: list[str]) -> Outcome:
    """Runs the tests of the selected resources (all: none named)."""
    source, extra = fetch()
    report = database.parent / "conformance.json"
    places = [f"tests/api_resources/{place}" for name in selected or RESOURCES for place in RESOURCES[name]]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(extra), str(HERE.parent.parent)]),
        "TEST_API_BASE_URL": base_url,
        "CONFORMANCE_DATABASE": str(database),
        "CONFORMANCE_FILE": file_id,
        "CONFORMANCE_REPORT": str(report),
    }
    command = [sys.executable, "-m", "pytest", "-p", "sdk_plugin", "-o", "addopts=", "--tb=short", "-q", "--timeout=60"]
    command += ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning", *places]
    finished = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    if not report.exists():
        raise SystemExit(f"the SDK's tests did not run:\n{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}")
    return Outcome(json.loads(report.read_text()), finished.stdout)


def _is_of(nodeid: str, places: tuple[str, ...]) -> bool:
    path = nodeid.partition("::")[0].removeprefix("tests/api_resources/")
    return any(path == place or path.startswith(f"{place}/") for place in places)

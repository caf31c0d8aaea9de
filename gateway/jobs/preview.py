"""Shows what a file would train: `python -m trainer.preview` in a process of its own, in bounded time and memory.

Its one rule: the gateway reads what that process says and trusts none of it to be short or quick.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.chat.bundle import Bundle
from gateway.errors import RateLimited, TunegateError
from gateway.jobdir import TrainOn, Turns
from gateway.jobs.launcher import child_environment

PARALLEL = 2
READ_S = 30.0  # then the process itself stops reading the file, and says so
KILL_S = 15.0  # after that it is killed
LINE_LIMIT_BYTES = 32 << 20
OUTPUT_LIMIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Preview:
    """Lines, as the trainer's preview writes them, and its summary."""

    lines: list[dict[str, Any]]
    summary: dict[str, Any]


class Previews:
    """A few at a time; further ones are told to come back."""

    def __init__(self) -> None:
        self._running = 0

    async def run(
        self,
        file: Path | bytes,
        bundle: Bundle,
        max_length: int,
        limit: int,
        turns: Turns = "all",
        train_on: TrainOn = "assistant",
    ) -> Preview:
        """What training on the file (or on these bytes) would see. RateLimited, TunegateError when it failed."""
        if self._running >= PARALLEL:
            raise RateLimited(f"{self._running} previews are being made, as many as may", retry_after_s=5)
        self._running += 1
        folder = await asyncio.to_thread(tempfile.TemporaryDirectory, prefix="tunegate-preview-")
        try:
            source = await asyncio.to_thread(_write, Path(folder.name), bundle, file)
            return await _run(Path(folder.name), source, max_length, limit, turns, train_on)
        finally:
            self._running -= 1
            await asyncio.to_thread(folder.cleanup)


def _write(folder: Path, bundle: Bundle, file: Path | bytes) -> Path:
    for name, content in bundle.to_files().items():
        (folder / name).write_bytes(content)
    if isinstance(file, Path):
        return file
    source = folder / "lines.jsonl"
    source.write_bytes(file)
    return source


async def _run(folder: Path, source: Path, max_length: int, limit: int, turns: Turns, train_on: TrainOn) -> Preview:
    command = [sys.executable, "-m", "trainer.preview", "--bundle", str(folder), "--file", str(source)]
    command += ["--max-length", str(max_length), "--limit", str(limit), "--timeout-s", str(READ_S)]
    command += ["--turns", turns, "--train-on", train_on]
    with (folder / "log").open("w+b") as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            limit=LINE_LIMIT_BYTES,
            cwd=folder,
            env=child_environment(os.environ),
        )
        try:
            async with asyncio.timeout(READ_S + KILL_S):
                preview = await _read(process)
                if await process.wait() == 0 and preview is not None:
                    return preview
        except TimeoutError:
            raise TunegateError(f"the preview took more than {READ_S + KILL_S:g} s and was ended") from None
        except ValueError as error:
            raise TunegateError(f"the preview is too large to show: {error}") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        log.seek(0)
        said = log.read(1 << 20).decode(errors="replace").strip().splitlines()
    raise TunegateError(
        f"the preview failed (exit code {process.returncode}): {said[-1][:300] if said else 'no reason given'}"
    )


async def _read(process: asyncio.subprocess.Process) -> Preview | None:
    """None when the process ended without a summary. Raises ValueError for more than is taken."""
    assert process.stdout is not None
    lines: list[dict[str, Any]] = []
    size_bytes = 0
    while raw := await process.stdout.readline():
        size_bytes += len(raw)
        if size_bytes > OUTPUT_LIMIT_BYTES:
            raise ValueError(f"more than {OUTPUT_LIMIT_BYTES >> 20} MiB; ask for fewer lines")
        found = json.loads(raw)
        if "summary" in found:
            return Preview(lines, found["summary"])
        lines.append(found)
    return None

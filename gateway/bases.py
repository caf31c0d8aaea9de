"""Prepared bases: a model's folder made ready to serve and to train on, once.

    DATA/bases/NAME/    config.json tokenizer.json template.json model.f16.gguf model.q4_0.gguf base.json
                        source.json: what it was made from, so that a changed source is prepared again

The work itself needs numpy, gguf and llama.cpp, so it runs in a process of its own (`python -m trainer.export.prepare`); this
module only decides whether, waits, and reads what came out. The folder is whole or absent.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gateway
from gateway.errors import SettingsError
from gateway.jobdir import read_json, write_json

SOURCE_FILE = "source.json"
LOCK_PREFIX = ".lock-"
LOCK_TIMEOUT_S = 1800.0
SOURCE_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.gguf", "chat_template.jinja")
KEPT_LINES = 20
LINE_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class PreparedBase:
    """A base that an engine can serve and a trainer can train on."""

    name: str
    path: Path
    gguf: Path  # the quantised file that is served
    digest: str  # of that file, "sha256:…"
    architecture: str
    context_length: int
    template: str
    eos_token_ids: tuple[int, ...]


async def prepare(
    name: str,
    source: Path,
    template: str,
    out: Path,
    on_progress: Callable[[str], None] | None = None,
    recipe: dict[str, Any] | None = None,
) -> PreparedBase:
    """The base `name` prepared in `out`, made from `source` unless it was already, from the same files, by this version.

    `template` is a built-in name, "model" for the one that the model brings, or any name with its `recipe`, {"kind",
    "source"}. `on_progress` gets the lines that the preparation writes. SettingsError when the source cannot be prepared.
    """
    wanted = await asyncio.to_thread(_fingerprint, name, source, template)
    if not await asyncio.to_thread(_is_current, out, wanted):
        lock = await asyncio.to_thread(_lock, out)
        try:
            await asyncio.to_thread(_sweep, out)
            await _run(name, source, template, out, on_progress or (lambda line: None), lock, recipe)
            await asyncio.to_thread(write_json, out / SOURCE_FILE, wanted)
        finally:
            os.close(lock)
    return await asyncio.to_thread(read_base, out)


def read_base(folder: Path) -> PreparedBase:
    """The base in a prepared folder. SettingsError when it is none. Blocks."""
    folder = folder.absolute()
    try:
        raw = read_json(folder / "base.json")
        base = PreparedBase(
            name=str(raw["name"]),
            path=folder,
            gguf=folder / "model.q4_0.gguf",
            digest=str(raw["digest"]),
            architecture=str(raw["architecture"]),
            context_length=int(raw["context_length"]),
            template=str(raw["template"]),
            eos_token_ids=tuple(int(token) for token in raw["eos_token_ids"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{folder} is not a prepared base: {error!r}; remove the folder to prepare it again"
        ) from error
    if not base.gguf.is_file():
        raise SettingsError(f"{folder} lacks {base.gguf.name}; remove the folder to prepare it again")
    return base


def _fingerprint(name: str, source: Path, template: str) -> dict[str, Any]:
    if not (source / "config.json").is_file():
        raise SettingsError(f"{source} is not a model's folder: it has no config.json")
    files: dict[str, list[int]] = {}
    for path in sorted({path for pattern in SOURCE_PATTERNS for path in source.glob(pattern)}):
        status = path.stat()
        files[path.name] = [status.st_size, status.st_mtime_ns]
    return {"name": name, "template": template, "version": gateway.__version__, "files": files}


def _is_current(out: Path, wanted: dict[str, Any]) -> bool:
    try:
        return bool(read_json(out / SOURCE_FILE) == wanted)
    except (OSError, ValueError):
        return False


async def _run(
    name: str,
    source: Path,
    template: str,
    out: Path,
    on_progress: Callable[[str], None],
    lock: int,
    recipe: dict[str, Any] | None,
) -> None:
    process = await asyncio.create_subprocess_exec(
        *_command(name, source, template, out),
        *([] if recipe is None else ["--recipe", "-"]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=LINE_LIMIT_BYTES,
        pass_fds=(lock,),  # it holds the lock too: should this gateway be killed, the next one waits for the end of it
        cwd=Path(gateway.__file__).parent.parent,
    )
    assert process.stdout is not None and process.stdin is not None
    lines: list[str] = []
    try:
        process.stdin.write(b"" if recipe is None else json.dumps(recipe).encode())
        process.stdin.close()
        async for raw in process.stdout:
            if line := raw.decode(errors="replace").strip():
                lines = [*lines[1 - KEPT_LINES :], line]
                on_progress(line)
        code = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if code != 0:
        raise SettingsError(f"the model in {source} cannot be prepared (exit code {code}): {' | '.join(lines[-6:])}")


def _command(name: str, source: Path, template: str, out: Path) -> list[str]:
    command = [sys.executable, "-m", "trainer.export.prepare", "--name", name, "--template", template]
    return [*command, "--source", str(source.absolute()), "--out", str(out.absolute())]


def _lock(out: Path) -> int:
    """A descriptor that keeps others from preparing `out`. Waits for a preparation that a killed gateway left behind."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(out.with_name(f"{LOCK_PREFIX}{out.name}"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise SettingsError(f"{out} has been prepared by another process for {LOCK_TIMEOUT_S:g} s") from None
            time.sleep(0.1)


def _sweep(out: Path) -> None:
    """Removes what a killed preparation left beside."""
    for path in out.parent.glob(f".{out.name}.*"):
        shutil.rmtree(path, ignore_errors=True)

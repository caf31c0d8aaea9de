"""Prepared bases: a model's folder made ready to serve and to train on, once.

    DATA/bases/NAME/    config.json tokenizer.json template.json model.f16.gguf model.q4_0.gguf (or another type) base.json
                        hf/ in place of the .gguf files, for vLLM: the model as it is on Hugging Face
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
DEFAULT_TYPE = "q4_0"
HF_TYPE = HF_FOLDER = "hf"  # the weights as they are on Hugging Face: what vLLM serves
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
    gguf: Path | None  # the quantised file that is served; None: `hf` is
    digest: str  # of that file, "sha256:…"; of the whole folder, where `hf` is served
    architecture: str
    context_length: int
    template: str
    eos_token_ids: tuple[int, ...]
    untrainable: str | None = None  # why it cannot be trained on, where it cannot
    kv_bytes_per_token: int | None = None  # what each token of context takes in memory; None: not known
    hf: Path | None = None  # a folder as on Hugging Face, for vLLM
    added: bool = False  # with `tunegate models add`, and not for an entry of a settings file


async def prepare(
    name: str,
    source: Path,
    template: str,
    out: Path,
    on_progress: Callable[[str], None] | None = None,
    recipe: dict[str, Any] | None = None,
    kind: str = DEFAULT_TYPE,
) -> PreparedBase:
    """The base `name` prepared in `out`, made from `source` unless it was already, from the same files, by this version.

    `template` is a built-in name, "model" for the one that the model brings, or any name with its `recipe`, {"kind",
    "source"}. `on_progress` gets the lines that the preparation writes. SettingsError when the source cannot be prepared.
    """
    wanted = await asyncio.to_thread(_fingerprint, name, source, template, kind)
    if not await asyncio.to_thread(_is_current, out, wanted):
        lock = await asyncio.to_thread(lock_base, out)
        try:
            await asyncio.to_thread(_sweep, out)
            await _run(
                _command(name, source, template, out, kind), source, on_progress or (lambda line: None), lock, recipe
            )
            await asyncio.to_thread(write_json, out / SOURCE_FILE, wanted)
        finally:
            os.close(lock)
    return await asyncio.to_thread(read_base, out)


def read_base(folder: Path) -> PreparedBase:
    """The base in a prepared folder. SettingsError when it is none. Blocks."""
    folder = folder.absolute()
    try:
        raw = read_json(folder / "base.json")
        hf = folder / Path(str(raw["hf"])).name if raw.get("hf") else None
        base = PreparedBase(
            name=str(raw["name"]),
            path=folder,
            gguf=None if hf else folder / Path(str(raw.get("gguf", "model.q4_0.gguf"))).name,
            digest=str(raw["digest"]),
            architecture=str(raw["architecture"]),
            context_length=int(raw["context_length"]),
            template=str(raw["template"]),
            eos_token_ids=tuple(int(token) for token in raw["eos_token_ids"]),
            untrainable=None if raw.get("untrainable") is None else str(raw["untrainable"]),
            kv_bytes_per_token=None if raw.get("kv_bytes_per_token") is None else int(raw["kv_bytes_per_token"]),
            hf=hf,
            added=bool(raw.get("added")),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{folder} is not a prepared base: {error!r}; remove the folder to prepare it again"
        ) from error
    served = base.gguf or folder / HF_FOLDER / "config.json"
    if not served.is_file():
        raise SettingsError(f"{folder} lacks {served.relative_to(folder)}; remove the folder to prepare it again")
    return base


def _fingerprint(name: str, source: Path, template: str, kind: str) -> dict[str, Any]:
    files: dict[str, list[int]] = {}
    if source.is_file() and source.suffix == ".gguf":
        paths = {source}
    elif (source / "config.json").is_file():
        paths = {path for pattern in SOURCE_PATTERNS for path in source.glob(pattern)}
    else:
        raise SettingsError(f"{source} is neither a model's folder (it has no config.json) nor a .gguf file")
    for path in sorted(paths):
        status = path.stat()
        files[path.name] = [status.st_size, status.st_mtime_ns]
    found = {"name": name, "template": template, "version": gateway.__version__, "files": files}
    return found if kind == DEFAULT_TYPE else found | {"type": kind}


def _is_current(out: Path, wanted: dict[str, Any]) -> bool:
    try:
        return bool(read_json(out / SOURCE_FILE) == wanted)
    except (OSError, ValueError):
        return False


async def _run(
    command: list[str],
    source: Path,
    on_progress: Callable[[str], None],
    lock: int,
    recipe: dict[str, Any] | None,
) -> None:
    process = await asyncio.create_subprocess_exec(
        *command,
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


def _command(name: str, source: Path, template: str, out: Path, kind: str) -> list[str]:
    command = [sys.executable, "-m", "trainer.export.prepare", "--name", name, "--template", template]
    return [*command, "--source", str(source.absolute()), "--out", str(out.absolute()), "--type", kind]


def lock_base(out: Path, timeout_s: float = LOCK_TIMEOUT_S) -> int:
    """A descriptor that keeps others from preparing `out`. Waits for a preparation that a killed gateway left behind.

    SettingsError when the time is up.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(out.with_name(f"{LOCK_PREFIX}{out.name}"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise SettingsError(
                    f"{out} is being prepared by another process, and was not free within {timeout_s:g} s"
                ) from None
            time.sleep(0.1)


def _sweep(out: Path) -> None:
    """Removes what a killed preparation left beside."""
    for path in out.parent.glob(f".{out.name}.*"):
        shutil.rmtree(path, ignore_errors=True)

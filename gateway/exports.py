"""Exports for clients: one at a time, in a process of its own at the lowest priority; what comes out is a file of theirs.

Place in the flow: `POST /v1/models/{model}/export` → **this** → `python -m trainer.export` → blobs → the routes of files. Its
one rule: the file is there from the first moment, as "uploaded" (OpenAI's word for what is not processed yet), with how far it
is in `status_details`; it becomes "processed" in the transaction that gives it its bytes, or "error" with the reason. Deleting
it ends the work. A gateway that is killed takes its export with it, and the next one says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from gateway.access import Caller
from gateway.errors import RateLimited, RequestError, TunegateError
from gateway.export_plan import ExportPlan
from gateway.jobs.launcher import child_environment
from gateway.store import files as statements
from gateway.store import idempotency
from gateway.store.blobs import Blobs
from gateway.store.database import Store
from gateway.store.files import File
from gateway.store.sweep import remove_unreferenced

logger = logging.getLogger("tunegate.exports")

MAX_WAITING = 16
TIMEOUT_S = 6 * 3600.0
TELL_EVERY_S = 1.0
LINE_LIMIT_BYTES = 1 << 20
KEPT_LINES = 20
LOST = "The server was stopped while this was exported. Ask for it again."
CONVERTER_VARIABLES = ("LLAMA_CPP_DIR", "XDG_CACHE_HOME")  # where llama.cpp's converter is, for a base that vLLM serves


@dataclass
class _Export:
    """One that waits or is made."""

    file: File
    plan: ExportPlan
    storage_bytes: int | None  # what the key lets its project store
    said: list[str] = field(default_factory=list)
    told_at: float = 0.0


class Exports:
    """`await open()` before the first request; `await stop()` in the end."""

    def __init__(self, store: Store, blobs: Blobs, folder: Path) -> None:
        """`folder` is on the disk of `blobs`: what is made is moved there."""
        self._store, self._blobs, self._folder = store, blobs, folder
        self._waiting: dict[str, _Export] = {}  # by the file's id, in order
        self._current: tuple[str, asyncio.Task[None]] | None = None
        self._more = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Ends what an earlier gateway has left half-made, then begins to work."""
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
        await self._store.write(lambda connection: statements.fail_unfinished(connection, LOST))
        self._worker = asyncio.create_task(self._work(), name="exports")

    async def stop(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def begin(self, caller: Caller, plan: ExportPlan, expires_after_s: int, key: str | None = None) -> File:
        """The file that the export will be; with the same Idempotency-Key the same one. RateLimited, RequestError."""
        mark = idempotency.fingerprint("export", plan.model, plan.to, plan.kind, expires_after_s)
        limit_bytes = caller.limits.storage_bytes
        async with self._blobs.putting(b"") as nothing:

            def insert(connection: Connection) -> tuple[File, bool]:
                now = int(time.time())
                earlier = idempotency.recall(connection, caller.project_id, key, mark)
                if earlier is not None:
                    found = statements.select_file(connection, earlier, now=now, project_id=caller.project_id)
                    if found is not None:
                        return found, False
                if len(self._waiting) >= MAX_WAITING:
                    raise RateLimited(
                        f"{len(self._waiting)} exports are waiting, as many as may; delete one, or come again",
                        retry_after_s=30,
                    )
                statements.require_room(connection, caller.project_id, 1, limit_bytes, now, param="model")
                file = statements.insert_file(
                    connection,
                    nothing,
                    filename=plan.filename(one_file=True),
                    purpose=statements.RESULT_PURPOSE,
                    created_at=now,
                    expires_after_s=expires_after_s,
                    project_id=caller.project_id,
                    status="uploaded",
                )
                idempotency.remember(connection, caller.project_id, key, mark, file.id)
                return file, True

            file, is_new = await self._store.write(insert)
        if is_new:
            self._waiting[file.id] = _Export(file, plan, limit_bytes)
            self._more.set()
        return file

    def cancel(self, file_id: str) -> None:
        """Ends the work on a file that was deleted; nothing for any other."""
        self._waiting.pop(file_id, None)
        if self._current is not None and self._current[0] == file_id:
            self._current[1].cancel()

    async def _work(self) -> None:
        while True:
            await self._more.wait()
            while self._waiting:
                file_id = next(iter(self._waiting))
                task = asyncio.create_task(self._make(self._waiting.pop(file_id)), name=f"export {file_id}")
                self._current = (file_id, task)
                try:
                    await asyncio.wait({task})
                finally:  # also when the gateway stops: the next one tells the file's owner
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    self._current = None
            self._more.clear()

    async def _make(self, export: _Export) -> None:
        """Makes one, and says in its file's row how that went."""
        file_id, place = export.file.id, self._folder / export.file.id
        try:
            await asyncio.to_thread(place.mkdir, mode=0o700, parents=True)
            async with asyncio.timeout(TIMEOUT_S):
                await self._run(export, place)
            await self._keep(export, place / export.file.filename)
            logger.info("%s: '%s' is exported to %s", file_id, export.plan.model, export.file.filename)
        except TimeoutError:
            await self._fail(export, f"It took more than {TIMEOUT_S / 3600:g} hours and was ended.")
        except TunegateError as error:
            await self._fail(export, error.message)
        except Exception as error:  # the boundary of one export: it must not end the others
            logger.exception("export %s", file_id)
            await self._fail(export, f"The export failed: {error!r}")
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, place, ignore_errors=True))

    async def _run(self, export: _Export, place: Path) -> None:
        """RequestError with the trainer's own words when it makes nothing."""
        threads = max(1, (os.cpu_count() or 1) // 2)
        command = [*export.plan.command(place / export.file.filename), "--threads", str(threads), "--background"]
        kept = {name: os.environ[name] for name in CONVERTER_VARIABLES if name in os.environ}
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,  # it ends when this does: with the gateway, however that dies
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE_LIMIT_BYTES,
            cwd=place,
            env=child_environment(os.environ) | kept,
            start_new_session=True,
        )
        assert process.stdout is not None and process.stderr is not None
        readers = [
            asyncio.create_task(self._read_sizes(process.stdout, export)),
            asyncio.create_task(self._read_progress(process.stderr, export)),
        ]
        try:
            await asyncio.gather(*readers)
            code = await process.wait()
        finally:
            if process.returncode is None:  # else its id may be another's by now
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and llama.cpp's converter, where that runs
            await asyncio.gather(*readers, return_exceptions=True)
            await process.wait()
        if code == -signal.SIGKILL:
            raise RequestError(
                "The export was killed: there was not enough memory, most likely. 'gguf' takes least of it."
            )
        if code != 0:
            why = next((line for line in reversed(export.said) if line.startswith("cannot export")), None)
            raise RequestError(
                why or f"The export ended with {code}: {' | '.join(export.said[-3:]) or 'no reason given'}"
            )

    async def _read_sizes(self, lines: asyncio.StreamReader, export: _Export) -> None:
        """Refuses what will not fit into the project's storage as soon as its size is known."""
        async for line in lines:
            found: dict[str, Any] = json.loads(line)
            if (expected := found.get("expected_bytes")) is not None:
                await self._store.read(partial(self._require_room, export, int(expected)))

    async def _read_progress(self, lines: asyncio.StreamReader, export: _Export) -> None:
        prefix = f"{export.plan.model}: "
        async for raw in lines:
            line = raw.decode(errors="replace").strip()
            export.said = [*export.said[1 - KEPT_LINES :], line[:1000]]
            if line.startswith(prefix) and time.monotonic() - export.told_at > TELL_EVERY_S:
                export.told_at = time.monotonic()
                text = line.removeprefix(prefix)[:300]
                await self._store.write(partial(statements.tell, file_id=export.file.id, text=text))

    def _require_room(self, export: _Export, size: int, connection: Connection) -> None:
        now = int(time.time())
        statements.require_room(connection, export.file.project_id, size, export.storage_bytes, now, param="model")

    async def _keep(self, export: _Export, path: Path) -> None:
        """The file has its bytes, in one transaction; nothing when it was deleted meanwhile."""
        blob = await self._blobs.take(path)

        def finish(connection: Connection) -> bool:
            self._require_room(export, blob.size_bytes, connection)
            return statements.finish_file(connection, export.file.id, blob)

        try:
            await self._store.write(finish)
        finally:
            self._blobs.release(blob)
            await remove_unreferenced(self._store, self._blobs, [blob.digest, export.file.digest])

    async def _fail(self, export: _Export, why: str) -> None:
        logger.warning("%s: '%s' is not exported: %s", export.file.id, export.plan.model, why)
        try:
            await self._store.write(lambda connection: statements.fail_file(connection, export.file.id, why[:2000]))
        except TunegateError as error:
            logger.error("%s: that could not be written down: %s", export.file.id, error.message)

"""The life of every batch: validating → in_progress → finalizing → completed, or failed, expired, cancelled.

Its one rule: the database says what is done. A line's result is committed before the line counts as asked, so what a kill
leaves is done again and nothing is told twice. One task drives each batch; lines of all of them share one gate, which
lets few through while live requests are under way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from sqlalchemy import Connection

from gateway.access import ANYBODY, Caller
from gateway.batches.asking import App, ask_line, cancelled_line, expired_line
from gateway.batches.input import Ask, check_input, read_input
from gateway.errors import StoreUnavailable
from gateway.store import batches as statements
from gateway.store.batches import Batch, Line
from gateway.store.blobs import BlobRef, Blobs
from gateway.store.database import Store
from gateway.store.files import insert_file
from gateway.store.sweep import remove_unreferenced

logger = logging.getLogger("tunegate.batches")

TICK_S = 0.5
YIELD_S = 0.02
AT_ONCE = 4  # batches that are driven
STORED_LINES = 1000  # that are read at once when files are written
OUTPUT_PURPOSE = "batch_output"


class Gate:
    """Lets lines through: `limit` at once, and one while anybody else is being answered."""

    def __init__(self, limit: int, live: Callable[[], int]) -> None:
        """`live`: how many requests are under way that are no lines of batches."""
        self._limit, self._live = limit, live
        self._inside = 0
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> None:
        async with self._turn:  # in the order in which they came
            while self._inside >= (1 if self._live() else self._limit):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(YIELD_S)
            self._inside += 1

    async def __aexit__(self, *_: object) -> None:
        self._inside -= 1


class Runner:
    """`start(app)` once the application can be asked; `wake` when a batch was made or cancelled; `await stop()`."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        find_key: Callable[[str], Caller | None],
        live: Callable[[], int],
        ready: Callable[[], bool],
        *,
        lines_at_once: int,
        max_line_bytes: int,
    ) -> None:
        """`find_key` gives whose a key is, None once it was revoked; `ready` says that no model is still on its way."""
        self._store, self._blobs, self._find_key, self._ready = store, blobs, find_key, ready
        self._gate = Gate(lines_at_once, live)
        self._lines_at_once = lines_at_once
        self._max_line_bytes = max_line_bytes
        self._wake = asyncio.Event()
        self._driven: dict[str, asyncio.Task[None]] = {}
        self._main_task: asyncio.Task[None] | None = None

    def start(self, app: App) -> None:
        self._app = app
        self._main_task = asyncio.create_task(self._main(), name="batches")

    def wake(self) -> None:
        self._wake.set()

    async def stop(self) -> None:
        """Lets go of every batch; the next start goes on with what is left."""
        tasks = [task for task in (self._main_task, *self._driven.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _main(self) -> None:
        while not self._ready():  # noqa: ASYNC110 - a line must not fail because its model is not there yet
            await asyncio.sleep(TICK_S)
        while True:
            self._wake.clear()
            try:
                for batch in await self._store.read(statements.select_active):
                    if batch.id not in self._driven and len(self._driven) < AT_ONCE:
                        task = asyncio.create_task(self._drive(batch.id), name=f"batch {batch.id}")
                        self._driven[batch.id] = task
                        task.add_done_callback(partial(self._let_go, batch.id))
            except StoreUnavailable as error:
                logger.warning("batches wait: %s", error.message)
            try:
                async with asyncio.timeout(TICK_S if self._driven else 10 * TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _let_go(self, batch_id: str, _: asyncio.Task[None]) -> None:
        self._driven.pop(batch_id, None)
        self._wake.set()

    async def _drive(self, batch_id: str) -> None:
        """One batch to its end, through whatever the store or this code does in between."""
        while True:
            try:
                batch = await self._read(batch_id)
                if batch is None or batch.status not in statements.ACTIVE:
                    return
                if batch.status == "validating":
                    await self._validate(batch)
                elif batch.status == "in_progress":
                    await self._run(batch)
                else:
                    await self._finish(batch)
            except StoreUnavailable as error:
                logger.warning("batch %s waits: %s", batch_id, error.message)
                await asyncio.sleep(1)
            except Exception:  # a fault of ours, or of the machine
                logger.exception("batch %s", batch_id)
                await asyncio.sleep(10)

    # validating → in_progress | failed

    async def _validate(self, batch: Batch) -> None:
        path = self._blobs.path(batch.input_digest)
        found = await asyncio.to_thread(check_input, path, batch.endpoint, self._max_line_bytes)
        now = int(time.time())

        def move(connection: Connection) -> None:
            states: tuple[statements.Status, ...] = ("validating",)
            if found.errors:
                statements.move_batch(connection, batch.id, states, "failed", now, errors=found.errors)
            else:
                values = {"n_total": found.n_lines, "model": found.model}
                statements.move_batch(connection, batch.id, states, "in_progress", now, **values)

        await self._store.write(move)

    # in_progress → finalizing | cancelling

    async def _run(self, batch: Batch) -> None:
        """Asks every line that is not done, some at once, until all are, the batch is cancelled or its time is over."""
        done = await self._store.read(lambda connection: statements.select_done(connection, batch.id))
        stop = asyncio.Event()
        asking: set[asyncio.Task[None]] = set()
        watch = asyncio.create_task(self._watch(batch, stop))
        try:
            async for ask in self._lines(batch):
                if ask.number in done:
                    continue
                while len(asking) >= self._lines_at_once and not stop.is_set():
                    await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED, timeout=TICK_S)
                if stop.is_set():
                    break
                task = asyncio.create_task(self._ask(batch, ask, stop))
                asking.add(task)
                task.add_done_callback(asking.discard)
            while asking and not stop.is_set():
                await asyncio.wait(asking, timeout=TICK_S)
        finally:
            watch.cancel()
            left = list(asking)
            for task in left:
                task.cancel()
            await asyncio.gather(watch, *left, return_exceptions=True)
        current = await self._read(batch.id)
        if current is None or current.status != "in_progress":
            return
        if current.n_completed + current.n_failed >= current.n_total or time.time() >= batch.expires_at:
            await self._move(batch, ("in_progress",), "finalizing")
        else:
            await asyncio.sleep(1)  # a line could not be stored: it is asked again

    async def _ask(self, batch: Batch, ask: Ask, stop: asyncio.Event) -> None:
        caller = self._caller(batch)
        if caller is None:
            stop.set()
            return
        async with self._gate:
            line = await ask_line(self._app, batch.endpoint, caller, ask)
        try:
            await self._store.write(lambda connection: statements.store_lines(connection, batch.id, [line]))
        except StoreUnavailable as error:
            logger.warning("batch %s: line %d is to be asked again: %s", batch.id, ask.number, error.message)

    async def _watch(self, batch: Batch, stop: asyncio.Event) -> None:
        """Sets `stop` when the batch is no longer to go on."""
        while not stop.is_set():
            if self._caller(batch) is None:
                await self._move(batch, ("in_progress",), "cancelling")
            current = await self._read(batch.id)
            if current is None or current.status != "in_progress" or time.time() >= batch.expires_at:
                stop.set()
            await asyncio.sleep(TICK_S)

    def _caller(self, batch: Batch) -> Caller | None:
        """On whose behalf the lines are asked; None when the key was revoked."""
        if batch.key_id is None:
            return replace(ANYBODY, project_id=batch.project_id, is_batch=True)
        caller = self._find_key(batch.key_id)
        return None if caller is None else replace(caller, is_batch=True)

    # finalizing → completed | expired, cancelling → cancelled

    async def _finish(self, batch: Batch) -> None:
        """Says what became of every line, writes the two files, and ends the batch, all of it or nothing."""
        if batch.n_completed + batch.n_failed < batch.n_total:
            await self._give_up_lines(batch)
            refreshed = await self._read(batch.id)
            batch = refreshed or batch
        end: statements.Status = "completed"
        if batch.status == "cancelling":
            end = "cancelled"
        elif batch.times.get("finalizing", 0) >= batch.expires_at:
            end = "expired"
        output = await self._blobs.put(self._texts(batch, failed=False))
        try:
            errors = await self._blobs.put(self._texts(batch, failed=True))
        except BaseException:
            self._blobs.release(output)
            raise

        def publish(connection: Connection) -> None:
            now = int(time.time())
            files = {
                "output_file_id": self._file(connection, batch, output, "output", now),
                "error_file_id": self._file(connection, batch, errors, "error", now),
            }
            if statements.move_batch(connection, batch.id, (batch.status,), end, now, **files):
                statements.delete_lines(connection, batch.id)

        try:
            await self._store.write(publish)
        finally:
            self._blobs.release(output)
            self._blobs.release(errors)
            await remove_unreferenced(self._store, self._blobs, [output.digest, errors.digest, batch.input_digest])
        logger.info("batch %s: %s, %d of %d lines failed", batch.id, end, batch.n_failed, batch.n_total)

    async def _give_up_lines(self, batch: Batch) -> None:
        done = await self._store.read(lambda connection: statements.select_done(connection, batch.id))
        give_up = cancelled_line if batch.status == "cancelling" else expired_line
        waiting: list[Line] = []

        async def store() -> None:
            lines, waiting[:] = list(waiting), []
            await self._store.write(lambda connection: statements.store_lines(connection, batch.id, lines))

        async for ask in self._lines(batch):
            if ask.number not in done:
                waiting.append(give_up(ask))
            if len(waiting) >= STORED_LINES:
                await store()
        if waiting:
            await store()

    def _file(self, connection: Connection, batch: Batch, blob: BlobRef, what: str, now: int) -> str | None:
        if blob.size_bytes == 0:
            return None
        return insert_file(
            connection,
            blob,
            filename=f"{batch.id}_{what}.jsonl",
            purpose=OUTPUT_PURPOSE,
            created_at=now,
            expires_after_s=batch.output_expires_after_s,
            project_id=batch.project_id,
        ).id

    async def _texts(self, batch: Batch, *, failed: bool) -> AsyncIterator[bytes]:
        after = 0
        while True:
            rows = await self._store.read(
                lambda connection, after=after: statements.select_lines(  # type: ignore[misc]
                    connection, batch.id, failed=failed, after=after, limit=STORED_LINES
                )
            )
            if not rows:
                return
            after = rows[-1][0]
            yield "".join(f"{text}\n" for _, text in rows).encode()

    async def _lines(self, batch: Batch) -> AsyncIterator[Ask]:
        """The input's lines, read on a thread some at a time."""
        path: Path = self._blobs.path(batch.input_digest)
        reader = read_input(path, batch.endpoint, self._max_line_bytes)
        while asks := await asyncio.to_thread(lambda: [ask for _, ask in zip(range(16), reader, strict=False)]):
            for ask in asks:
                yield ask

    async def _read(self, batch_id: str) -> Batch | None:
        return await self._store.read(lambda connection: statements.select_batch(connection, batch_id))

    async def _move(self, batch: Batch, states: tuple[statements.Status, ...], status: statements.Status) -> None:
        now = int(time.time())
        await self._store.write(lambda connection: statements.move_batch(connection, batch.id, states, status, now))

"""The database: one writer thread that commits in groups, and a few readers, all off the event loop.

Its one rule: what is acknowledged is committed. A caller of `write` hears nothing, neither a result nor an error of its
own, before the COMMIT of the transaction that its function ran in; if that fails, every caller in it hears
`StoreUnavailable`. The statements are in `files.py`, `jobs.py` and `models.py`, as functions that take a connection.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Engine, create_engine, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from gateway.errors import SettingsError, StoreUnavailable
from gateway.store import schema, sqlite

logger = logging.getLogger("tunegate.store")

T = TypeVar("T")
N_READERS = 4
GROUP_SIZE = 256  # writes in one transaction at most
RETRY_AFTER_S = 5


class Store:
    """`await write(fn)` and `await read(fn)` run `fn(connection)` and give what it returns."""

    def __init__(self, writer: Engine, readers: Engine) -> None:
        self.writer = writer
        self._readers = readers
        self._read_pool = ThreadPoolExecutor(N_READERS, thread_name_prefix="store-reader")
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run_writer, name="store-writer", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, where: str | Path, *, busy_timeout_s: float = sqlite.BUSY_TIMEOUT_S) -> Store:
        """The store at a path (SQLite) or a database URL, at this version's schema. Blocks; raises `SettingsError`."""
        url = make_url(where) if isinstance(where, str) and "://" in where else None
        if url is not None and url.get_backend_name() != "sqlite":
            writer, readers = create_engine(url, pool_size=1, max_overflow=0), create_engine(url, pool_size=N_READERS)
            path = None
        else:
            path = Path(url.database or "" if url is not None else where).absolute()
            writer = sqlite.create_writer(path, busy_timeout_s)
            readers = sqlite.create_readers(path, N_READERS, busy_timeout_s)
        try:
            with writer.begin() as connection:
                if path is not None:
                    sqlite.check_integrity(connection, path)
                schema.upgrade(connection)
        except DBAPIError as error:
            writer.dispose()
            readers.dispose()
            raise SettingsError(
                f"The database {path or where} cannot be opened: {unavailable_reason(error) or error.orig}."
            ) from error
        except BaseException:
            writer.dispose()
            readers.dispose()
            raise
        return cls(writer, readers)

    async def write(self, fn: Callable[[Connection], T]) -> T:
        """What `fn` returned, once it is committed.

        `fn` runs in a savepoint of a transaction that it may share: if it raises, it alone is undone, and the caller
        gets what it raised. The COMMIT may fail after it (`StoreUnavailable`), so its only effect should be on the
        database. A caller that is cancelled while `fn` waits withdraws it; later, `fn` is committed unheard.
        """
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                raise StoreUnavailable("The store is closed: the server is shutting down.", retry_after_s=RETRY_AFTER_S)
            self._queue.put(_Write(fn, future))
        return await asyncio.wrap_future(future)

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """What `fn` returned; it sees one snapshot and cannot write."""
        if self._closed:
            raise StoreUnavailable("The store is closed: the server is shutting down.", retry_after_s=RETRY_AFTER_S)
        return await asyncio.get_running_loop().run_in_executor(self._read_pool, self._run_read, fn)

    def close(self) -> None:
        """Commits what was accepted, then closes every connection. May be called twice."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()
        self._read_pool.shutdown()
        self._readers.dispose()
        self.writer.dispose()

    # on a reader's thread

    def _run_read(self, fn: Callable[[Connection], T]) -> T:
        try:
            with self._readers.connect() as connection:
                return fn(connection)
        except DBAPIError as error:
            raise _translate(error) from error

    # on the writer's thread

    def _run_writer(self) -> None:
        open_ = True
        while open_:
            group = [self._queue.get()]
            while len(group) < GROUP_SIZE:
                try:
                    group.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            open_ = None not in group
            writes = [write for write in group if write is not None and write.future.set_running_or_notify_cancel()]
            if writes:
                self._commit(writes)

    def _commit(self, writes: Sequence[_Write]) -> None:
        outcomes: list[_Outcome] = []
        try:
            with self.writer.begin() as connection:
                for write in writes:
                    outcomes.append(_run(connection, write.fn))
        except Exception as error:  # the writer must outlive any failure, and nobody may wait for ever
            logger.error("A transaction of %d write(s) failed", len(writes), exc_info=error)
            reason = unavailable_reason(error) if isinstance(error, DBAPIError) else None
            for write in writes:  # an instance each: a raised exception carries its caller's traceback
                failure = _unavailable(reason or "its transaction failed")
                failure.__cause__ = error
                write.future.set_exception(failure)
            return
        for write, outcome in zip(writes, outcomes, strict=True):
            if outcome.error is not None:
                write.future.set_exception(outcome.error)
            else:
                write.future.set_result(outcome.result)


class _Write(NamedTuple):
    fn: Callable[[Connection], Any]
    future: Future[Any]


class _Outcome(NamedTuple):
    result: Any = None
    error: BaseException | None = None


def _run(connection: Connection, fn: Callable[[Connection], Any]) -> _Outcome:
    """Runs one function in a savepoint. Raises only when the whole transaction is lost with it."""
    savepoint = connection.begin_nested()
    try:
        result = fn(connection)
        savepoint.commit()
    except Exception as error:
        # SQLite may have rolled everything back by itself (disk full, I/O error): then this raises too, and all failed.
        if not _in_transaction(connection):
            raise
        savepoint.rollback()
        if not isinstance(error, DBAPIError):
            return _Outcome(error=error)
        translated = _translate(error)
        if translated is not error:
            translated.__cause__ = error
        return _Outcome(error=translated)
    return _Outcome(result=result)


def _in_transaction(connection: Connection) -> bool:
    driver = connection.connection.driver_connection
    return bool(getattr(driver, "in_transaction", True))


def _translate(error: DBAPIError) -> Exception:
    """`StoreUnavailable` where trying later may help; the error itself where the statement is at fault."""
    reason = unavailable_reason(error)
    return error if reason is None else _unavailable(reason)


def _unavailable(reason: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"The database did not serve this request: {reason}. Nothing was stored; try again.",
        retry_after_s=RETRY_AFTER_S,
    )


def unavailable_reason(error: DBAPIError) -> str | None:
    """Why the database cannot serve just now; None when the statement itself is at fault."""
    if isinstance(getattr(error.orig, "sqlite_errorcode", None), int):
        return sqlite.unavailable_reason(error)
    if error.connection_invalidated or isinstance(error, OperationalError | InterfaceError):
        return "the database server cannot be reached"
    return None

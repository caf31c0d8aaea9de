"""All that is SQLite's own: how a connection is set up, how a transaction begins, which errors mean "not now"."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

from gateway.errors import SettingsError

BUSY_TIMEOUT_S = 5.0
UNAVAILABLE = {
    sqlite3.SQLITE_BUSY: "the database is locked by another process",
    sqlite3.SQLITE_LOCKED: "the database is locked",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_IOERR: "the disk reports an input/output error",
    sqlite3.SQLITE_CANTOPEN: "the database file cannot be opened",
    sqlite3.SQLITE_READONLY: "the database file cannot be written",
    sqlite3.SQLITE_NOMEM: "memory is short",
    sqlite3.SQLITE_INTERRUPT: "the statement was interrupted",
    sqlite3.SQLITE_CORRUPT: "the database file is damaged",
    sqlite3.SQLITE_NOTADB: "the database file is damaged",
}


def create_writer(path: Path, busy_timeout_s: float = BUSY_TIMEOUT_S) -> Engine:
    """An engine of one connection whose transactions take the write lock when they begin."""
    return _create_engine(path, 1, "BEGIN IMMEDIATE", ["PRAGMA journal_mode=WAL"], busy_timeout_s)


def create_readers(path: Path, n_connections: int, busy_timeout_s: float = BUSY_TIMEOUT_S) -> Engine:
    """An engine whose connections only read, each transaction from one snapshot."""
    return _create_engine(path, n_connections, "BEGIN", ["PRAGMA query_only=ON"], busy_timeout_s)


def check_integrity(connection: Connection, path: Path) -> None:
    """Refuses a database with damaged pages before anything is built on it."""
    findings = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA quick_check(3)")]
    if findings != ["ok"]:
        raise damaged(path, "; ".join(findings))


def damaged(path: Path, finding: str) -> SettingsError:
    return SettingsError(
        f"The database {path} is damaged ({finding}). Nothing was changed. Restore {path.name} (with its -wal file, if "
        "any) from a copy, or recover what is readable with `sqlite3 OLD .recover | sqlite3 NEW`."
    )


def unavailable_reason(error: DBAPIError) -> str | None:
    """Why the database cannot serve just now; None when the statement itself is at fault."""
    code = getattr(error.orig, "sqlite_errorcode", None)
    return UNAVAILABLE.get(code & 0xFF) if isinstance(code, int) else None


def _create_engine(path: Path, n_connections: int, begin: str, pragmas: list[str], busy_timeout_s: float) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        pool_size=n_connections,
        max_overflow=0,
        connect_args={"timeout": busy_timeout_s, "isolation_level": None},  # this module says BEGIN, not the driver
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        # FULL: a commit is on the disk before it is acknowledged, in WAL too.
        for pragma in ("PRAGMA foreign_keys=ON", *pragmas, "PRAGMA synchronous=FULL"):
            connection.execute(pragma).close()

    @event.listens_for(engine, "begin")
    def begin_transaction(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine

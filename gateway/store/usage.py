"""What stands on a base, asked of a store's file by a process that is not the gateway: read only, whoever else has it open."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from gateway.errors import SettingsError
from gateway.store.jobs import ACTIVE

TIMEOUT_S = 5.0


def tuned_models_on(database: Path, base: str) -> list[str]:
    """The names of the tuned models that stand on a base."""
    return _column(database, "SELECT name FROM models WHERE base = ? AND deleted_at IS NULL ORDER BY name", base)


def active_jobs_on(database: Path, base: str) -> list[str]:
    """The ids of the jobs that are to tune a base and are not over."""
    marks = ", ".join("?" * len(ACTIVE))
    return _column(database, f"SELECT id FROM jobs WHERE base = ? AND status IN ({marks}) ORDER BY id", base, *ACTIVE)


def _column(database: Path, statement: str, *values: str) -> list[str]:
    """The first column; nothing where there is no store yet. Raises SettingsError."""
    if not database.is_file():
        return []
    try:
        connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=TIMEOUT_S)
        try:
            return [str(row[0]) for row in connection.execute(statement, values)]
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise SettingsError(f"{database} cannot be read: {error}") from error

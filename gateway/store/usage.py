"""What stands on a base, and what a tuned model is made of: asked of a store's file by a process that is not the gateway.

Read only, whoever else has it open.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.errors import SettingsError
from gateway.store.jobs import ACTIVE

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class TunedModel:
    """A tuned model's row, as far as files are concerned."""

    base: str
    adapter_digest: str


def find_tuned_model(database: Path, name: str) -> TunedModel | None:
    """The tuned model of that name, whichever project it belongs to."""
    statement = "SELECT base, adapter_digest FROM models WHERE name = ? AND deleted_at IS NULL"
    rows = _rows(database, statement, name)
    return TunedModel(*map(str, rows[0])) if rows else None


def tuned_models_on(database: Path, base: str) -> list[str]:
    """The names of the tuned models that stand on a base."""
    return _column(database, "SELECT name FROM models WHERE base = ? AND deleted_at IS NULL ORDER BY name", base)


def active_jobs_on(database: Path, base: str) -> list[str]:
    """The ids of the jobs that are to tune a base and are not over."""
    marks = ", ".join("?" * len(ACTIVE))
    return _column(database, f"SELECT id FROM jobs WHERE base = ? AND status IN ({marks}) ORDER BY id", base, *ACTIVE)


def _column(database: Path, statement: str, *values: str) -> list[str]:
    return [str(row[0]) for row in _rows(database, statement, *values)]


def _rows(database: Path, statement: str, *values: str) -> list[tuple[Any, ...]]:
    """Nothing where there is no store yet. Raises SettingsError."""
    if not database.is_file():
        return []
    try:
        connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=TIMEOUT_S)
        try:
            return connection.execute(statement, values).fetchall()
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise SettingsError(f"{database} cannot be read: {error}") from error

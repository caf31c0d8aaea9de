"""Every statement on uploads and their parts. A part's bytes are a blob of their own until the upload is complete.

Its one rule: an upload leaves `pending` once, through a statement that names that state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, delete, func, insert, select, update

from gateway.errors import RequestError
from gateway.store.tables import DEFAULT_PROJECT, upload_parts, uploads

Status = Literal["pending", "completed", "cancelled", "expired"]


@dataclass(frozen=True)
class Upload:
    """An upload's row; `size_bytes` is what its parts are to come to."""

    id: str
    created_at: int
    filename: str
    purpose: str
    mime_type: str
    size_bytes: int
    expires_at: int
    expires_after_s: int | None  # of the file that it becomes
    project_id: str = DEFAULT_PROJECT
    status: Status = "pending"
    file_id: str | None = None


@dataclass(frozen=True)
class Part:
    id: str
    upload_id: str
    created_at: int
    size_bytes: int
    digest: str
    project_id: str = DEFAULT_PROJECT


def insert_upload(connection: Connection, upload: Upload) -> None:
    connection.execute(insert(uploads).values(**vars(upload)))


def select_upload(connection: Connection, upload_id: str, project_id: str) -> Upload | None:
    where = (uploads.c.id == upload_id, uploads.c.project_id == project_id)
    row = connection.execute(select(uploads).where(*where)).mappings().one_or_none()
    return None if row is None else Upload(**{name: row[name] for name in Upload.__dataclass_fields__})


def count_pending(connection: Connection, project_id: str) -> int:
    where = (uploads.c.project_id == project_id, uploads.c.status == "pending")
    return connection.execute(select(func.count()).select_from(uploads).where(*where)).scalar_one()


def insert_part(connection: Connection, part: Part) -> None:
    connection.execute(insert(upload_parts).values(**vars(part)))


def select_parts(connection: Connection, upload_id: str) -> list[Part]:
    """In the order in which they came."""
    statement = select(upload_parts).where(upload_parts.c.upload_id == upload_id).order_by(upload_parts.c.seq)
    return [_part(row) for row in connection.execute(statement).mappings()]


def leave_pending(
    connection: Connection, upload_id: str, status: Status, file_id: str | None = None
) -> list[str] | None:
    """pending → `status`; the digests of its parts, which are gone. None when it was no longer pending."""
    where = (uploads.c.id == upload_id, uploads.c.status == "pending")
    moved = connection.execute(update(uploads).where(*where).values(status=status, file_id=file_id))
    if moved.rowcount != 1:
        return None
    mine = upload_parts.c.upload_id == upload_id
    digests = list(connection.scalars(select(upload_parts.c.digest).where(mine).distinct()))
    connection.execute(delete(upload_parts).where(mine))
    return digests


def expire_uploads(connection: Connection, now: int) -> list[str]:
    """Ends the uploads whose time is over; the digests of their parts."""
    where = (uploads.c.status == "pending", uploads.c.expires_at <= now)
    digests: list[str] = []
    for upload_id in list(connection.scalars(select(uploads.c.id).where(*where))):
        digests += leave_pending(connection, upload_id, "expired") or []
    return digests


def has_expired(connection: Connection, now: int) -> bool:
    where = (uploads.c.status == "pending", uploads.c.expires_at <= now)
    return connection.scalar(select(uploads.c.seq).where(*where).limit(1)) is not None


def require_pending(upload: Upload, now: int) -> None:
    """Raises RequestError that says what became of it."""
    status = "expired" if upload.status == "pending" and upload.expires_at <= now else upload.status
    if status != "pending":
        raise RequestError(
            f"Upload {upload.id} is {status}; parts are added to, and completed is, only one that is pending.",
            code="invalid_upload_status",
        )


def _part(row: Any) -> Part:
    return Part(**{name: row[name] for name in Part.__dataclass_fields__})

"""Every statement over `files`. What is deleted or past its `expires_at` is hidden from all but `select_referenced`."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, RowMapping, Select, exists, func, insert, or_, select, update

from gateway.errors import RequestError
from gateway.store.blobs import BlobRef
from gateway.store.pages import Order, Page, select_page
from gateway.store.tables import DEFAULT_PROJECT, batches, files, upload_parts, uploads

OVER = ("failed", "completed", "expired", "cancelled")  # batches that are
RESULT_PURPOSE = "fine-tune-results"  # of what is made here: exports, and a job's metrics
ID_CHARS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class File:
    """A file's row; the bytes are the blob `digest`."""

    id: str
    project_id: str
    created_at: int
    filename: str
    purpose: str
    size_bytes: int
    digest: str
    status: str
    status_details: str | None
    expires_at: int | None


def insert_file(
    connection: Connection,
    blob: BlobRef,
    *,
    filename: str,
    purpose: str,
    created_at: int,
    expires_after_s: int | None = None,
    project_id: str = DEFAULT_PROJECT,
    status: str = "processed",
) -> File:
    """A new file over bytes that are stored and held. "uploaded" is one that will get others (see `finish_file`)."""
    file = File(
        id="file-" + "".join(secrets.choice(ID_CHARS) for _ in range(22)),
        project_id=project_id,
        created_at=created_at,
        filename=filename,
        purpose=purpose,
        size_bytes=blob.size_bytes,
        digest=blob.digest,
        status=status,
        status_details=None,
        expires_at=None if expires_after_s is None else created_at + expires_after_s,
    )
    connection.execute(insert(files).values(**vars(file)))
    return file


def finish_file(connection: Connection, file_id: str, blob: BlobRef) -> bool:
    """Gives an "uploaded" file its bytes; False when it was deleted meanwhile."""
    values = {"digest": blob.digest, "size_bytes": blob.size_bytes, "status": "processed", "status_details": None}
    return connection.execute(update(files).where(*_unfinished(file_id)).values(**values)).rowcount == 1


def fail_file(connection: Connection, file_id: str, why: str) -> None:
    """An "uploaded" file will not get any bytes."""
    connection.execute(update(files).where(*_unfinished(file_id)).values(status="error", status_details=why))


def tell(connection: Connection, file_id: str, text: str) -> None:
    """How far an "uploaded" file is."""
    connection.execute(update(files).where(*_unfinished(file_id)).values(status_details=text))


def fail_unfinished(connection: Connection, why: str) -> None:
    """All "uploaded" files: at a start, nobody is at work on them."""
    unfinished = (files.c.status == "uploaded", files.c.deleted_at.is_(None))
    connection.execute(update(files).where(*unfinished).values(status="error", status_details=why))


def used_bytes(connection: Connection, project_id: str, now: int) -> int:
    """What the files of a project take, and what its pending uploads are to come to."""
    stored = select(func.coalesce(func.sum(files.c.size_bytes), 0)).where(*_visible(project_id, now))
    pending = (uploads.c.project_id == project_id, uploads.c.status == "pending", uploads.c.expires_at > now)
    announced = select(func.coalesce(func.sum(uploads.c.size_bytes), 0)).where(*pending)
    return (connection.scalar(stored) or 0) + (connection.scalar(announced) or 0)


def require_room(
    connection: Connection, project_id: str, more_bytes: int, limit_bytes: int | None, now: int, *, param: str = "file"
) -> None:
    """Raises RequestError where `more_bytes` would be over what a key lets its project store."""
    if limit_bytes is None:
        return
    used = used_bytes(connection, project_id, now)
    if used + more_bytes > limit_bytes:
        raise RequestError(
            f"{more_bytes} bytes more would be over what this key may store: its project has {used} of {limit_bytes} bytes, "
            "unfinished uploads counted in (`--storage` of `tunegate keys create`). Delete files that are not needed any "
            "more.",
            param=param,
            code="storage_limit_exceeded",
        )


def select_file(connection: Connection, file_id: str, *, now: int, project_id: str = DEFAULT_PROJECT) -> File | None:
    statement = select(files).where(files.c.id == file_id, *_visible(project_id, now))
    row = connection.execute(statement).mappings().one_or_none()
    return None if row is None else _file(row)


def select_files(
    connection: Connection,
    *,
    now: int,
    limit: int,
    after: str | None = None,
    order: Order = "desc",
    purpose: str | None = None,
    project_id: str = DEFAULT_PROJECT,
) -> Page[File]:
    where = _visible(project_id, now)
    if purpose is not None:
        where.append(files.c.purpose == purpose)
    page = select_page(connection, files, *where, limit=limit, after=after, order=order)
    return Page([_file(row) for row in page.items], page.has_more)


def delete_file(connection: Connection, file_id: str, *, now: int, project_id: str = DEFAULT_PROJECT) -> File | None:
    """Hides the file for good; it, also when it was deleted before, or None when there never was such a file.

    Its bytes are the caller's to remove.
    """
    mine = [files.c.id == file_id, files.c.project_id == project_id]
    connection.execute(update(files).where(*mine, files.c.deleted_at.is_(None)).values(deleted_at=now))
    row = connection.execute(select(files).where(*mine)).mappings().one_or_none()
    return None if row is None else _file(row)


def has_expired(connection: Connection, now: int) -> bool:
    return bool(connection.scalar(select(exists().where(*_expired(now)))))


def delete_expired(connection: Connection, now: int) -> list[str]:
    """Deletes every file past its `expires_at`; the digests of their bytes."""
    expired = _expired(now)
    digests = list(connection.scalars(select(files.c.digest).where(*expired).distinct()))
    if digests:
        connection.execute(update(files).where(*expired).values(deleted_at=now))
    return digests


def is_referenced(connection: Connection, digest: str) -> bool:
    """Whether these bytes are needed: by a file that was not deleted, an upload's part, or the input of a batch at work."""
    return any(connection.scalar(select(exists(needed.where(column == digest)))) for column, needed in _needed())


def select_referenced(connection: Connection) -> set[str]:
    """The digests of all bytes that are needed."""
    return {digest for _, needed in _needed() for digest in connection.scalars(needed.distinct())}


def _needed() -> list[tuple[Column[str], Select[Any]]]:
    """Every column that names bytes, and the digests in it that are still needed."""
    at_work = select(batches.c.input_digest).where(batches.c.status.not_in(OVER))
    return [
        (files.c.digest, select(files.c.digest).where(files.c.deleted_at.is_(None))),
        (upload_parts.c.digest, select(upload_parts.c.digest)),
        (batches.c.input_digest, at_work),
    ]


def was_ever_used(connection: Connection) -> bool:
    """Whether any file was ever recorded, also one that is deleted by now."""
    return connection.scalar(select(files.c.seq).limit(1)) is not None


def _visible(project_id: str, now: int) -> list[ColumnElement[bool]]:
    return [
        files.c.project_id == project_id,
        files.c.deleted_at.is_(None),
        or_(files.c.expires_at.is_(None), files.c.expires_at > now),
    ]


def _unfinished(file_id: str) -> list[ColumnElement[bool]]:
    return [files.c.id == file_id, files.c.status == "uploaded", files.c.deleted_at.is_(None)]


def _expired(now: int) -> list[ColumnElement[bool]]:
    return [files.c.deleted_at.is_(None), files.c.expires_at <= now]


def _file(row: RowMapping) -> File:
    return File(**{name: row[name] for name in File.__dataclass_fields__})

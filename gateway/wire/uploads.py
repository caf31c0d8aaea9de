"""Uploads on the wire: a create request becomes a `NewUpload`, rows become OpenAI's objects. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.errors import RequestError
from gateway.wire.fields import Body, integer, refuse_unknown, required_string, show, string
from gateway.wire.files import clean_filename, file_object, parse_expiry_object, parse_purpose

if TYPE_CHECKING:
    from gateway.store.files import File
    from gateway.store.uploads import Part, Upload

MAX_PARTS = 10_000
_MD5 = re.compile(r"[0-9a-fA-F]{32}")


@dataclass(frozen=True)
class NewUpload:
    filename: str
    purpose: str
    mime_type: str
    size_bytes: int
    expires_after_s: int | None


@dataclass(frozen=True)
class Completion:
    """The parts in their order; `md5`, hexadecimal, is what the whole must have."""

    part_ids: list[str]
    md5: str | None


def parse_create(body: Body, limit_bytes: int) -> NewUpload:
    """Raises RequestError that names the field."""
    refuse_unknown(body, ("bytes", "filename", "mime_type", "purpose", "expires_after"))
    size_bytes = integer(body, "bytes", 0, limit_bytes)
    if size_bytes is None:
        raise RequestError("you must provide 'bytes', how many the file has", param="bytes")
    purpose = parse_purpose(required_string(body, "purpose", 100))
    return NewUpload(
        filename=clean_filename(required_string(body, "filename", 4096).encode("utf-8", "replace")),
        purpose=purpose,
        mime_type=required_string(body, "mime_type", 255),
        size_bytes=size_bytes,
        expires_after_s=parse_expiry_object(body.get("expires_after"), purpose),
    )


def parse_complete(body: Body) -> Completion:
    """Raises RequestError that names the field."""
    refuse_unknown(body, ("part_ids", "md5"))
    part_ids = body.get("part_ids")
    if not isinstance(part_ids, list) or not part_ids or len(part_ids) > MAX_PARTS:
        raise RequestError(
            f"'part_ids' must be a list of 1 to {MAX_PARTS} part ids, not {show(part_ids)}", param="part_ids"
        )
    if not all(isinstance(part_id, str) and len(part_id) <= 100 for part_id in part_ids):
        raise RequestError("'part_ids' must hold the ids that adding parts has given", param="part_ids")
    if len(set(part_ids)) != len(part_ids):
        raise RequestError("'part_ids' holds a part more than once", param="part_ids")
    md5 = string(body, "md5", 100)
    if md5 and not _MD5.fullmatch(md5):
        raise RequestError(f"'md5' must have 32 hexadecimal digits, not {show(md5)}", param="md5")
    return Completion(list(part_ids), md5.lower() if md5 else None)


def upload_object(upload: Upload, file: File | None = None) -> dict[str, Any]:
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.size_bytes,
        "created_at": upload.created_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "expires_at": upload.expires_at,
        "file": None if file is None else file_object(file),
    }


def part_object(part: Part) -> dict[str, Any]:
    return {"id": part.id, "object": "upload.part", "created_at": part.created_at, "upload_id": part.upload_id}

"""Files on the wire: the form fields of an upload become an `Upload`, a row becomes OpenAI's `file` object. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gateway.errors import RequestError

if TYPE_CHECKING:
    from gateway.store.files import File

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
# The SDK's enum of purposes in a response has no "evals", and its strict mode refuses what is not in it.
SHOWN_PURPOSES = {"evals": "user_data"}
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
UPLOAD_FIELDS = ("purpose", ANCHOR, SECONDS)
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2_592_000
BATCH_EXPIRY_S = MAX_EXPIRY_S  # what OpenAI gives a batch's input unless told otherwise
MAX_FILENAME_CHARS = 255

# Types that a browser shows as text or saves; all else is bytes. Never a type that it would run.
CONTENT_TYPES = {
    ".jsonl": "application/jsonl",
    ".json": "application/json",
    ".csv": "text/csv; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".pdf": "application/pdf",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
}


@dataclass(frozen=True)
class Upload:
    """The fields of an upload beside its bytes, checked."""

    purpose: str
    expires_after_s: int | None  # counted from created_at


def parse_upload(fields: Mapping[str, str]) -> Upload:
    """Raises `RequestError` that names the field."""
    purpose = parse_purpose(fields.get("purpose"))
    expires_after_s = _parse_expiry(fields.get(ANCHOR), fields.get(SECONDS))
    if expires_after_s is None and purpose == "batch":
        expires_after_s = BATCH_EXPIRY_S
    return Upload(purpose, expires_after_s)


def parse_purpose(text: str | None) -> str:
    if not text:
        raise RequestError(f"You must provide 'purpose', one of: {', '.join(PURPOSES)}.", param="purpose")
    if text not in PURPOSES:
        raise RequestError(f"'{text[:60]}' is not one of {list(PURPOSES)} - 'purpose'.", param="purpose")
    return text


def parse_expiry_object(value: Any, purpose: str) -> int | None:
    """`expires_after` of a JSON body, {"anchor": "created_at", "seconds": N}; with the default of the purpose."""
    if value is None:
        return BATCH_EXPIRY_S if purpose == "batch" else None
    if not isinstance(value, dict) or set(value) - {"anchor", "seconds"} or type(value.get("seconds")) is not int:
        raise RequestError(
            'expires_after must be {"anchor": "created_at", "seconds": N} with a whole number N', param="expires_after"
        )
    anchor = value.get("anchor")
    return _parse_expiry(anchor if isinstance(anchor, str) else repr(anchor), str(value["seconds"]))


def clean_filename(raw: bytes) -> str:
    """The name that a client gave, fit to be shown: no folders, no control characters. Nothing on disk is called so."""
    text = unicodedata.normalize("NFC", raw.decode("utf-8", "replace")).replace("%22", '"')
    text = re.split(r"[/\\]", text)[-1]
    text = "".join(char for char in text if char.isprintable()).strip()
    if len(text) > MAX_FILENAME_CHARS:
        stem, dot, extension = text.rpartition(".")
        kept = dot + extension if stem and len(extension) <= 16 else ""
        text = text[: MAX_FILENAME_CHARS - len(kept)] + kept
    return text if text.strip(".") else "upload"


def file_object(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": SHOWN_PURPOSES.get(file.purpose, file.purpose),
        "status": file.status,
        "status_details": file.status_details,
        "expires_at": file.expires_at,
    }


def deleted_object(file_id: str) -> dict[str, Any]:
    return {"id": file_id, "object": "file", "deleted": True}


def content_type(filename: str) -> str:
    return CONTENT_TYPES.get("." + filename.rpartition(".")[2].lower(), "application/octet-stream")


def content_disposition(filename: str) -> str:
    """To be saved under its name; older programs, which read `filename` alone, get it in ASCII."""
    plain = "".join(char if char.isascii() and char not in '"\\%' else "_" for char in filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def _parse_expiry(anchor: str | None, seconds: str | None) -> int | None:
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise RequestError(
            f"{ANCHOR} is {_shown(anchor)}; it must be 'created_at', and {ANCHOR} and {SECONDS} go together.",
            param="expires_after.anchor",
        )
    rule = f"it must be a whole number from {MIN_EXPIRY_S} (an hour) to {MAX_EXPIRY_S} (30 days)"
    if seconds is None or not (seconds.isascii() and seconds.isdigit() and len(seconds) <= 9):
        raise RequestError(f"{SECONDS} is {_shown(seconds)}; {rule}.", param="expires_after.seconds")
    if not MIN_EXPIRY_S <= int(seconds) <= MAX_EXPIRY_S:
        raise RequestError(f"{SECONDS} is {int(seconds)}; {rule}.", param="expires_after.seconds")
    return int(seconds)


def _shown(value: str | None) -> str:
    return "missing" if value is None else repr(value[:60])

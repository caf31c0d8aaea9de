"""What the process says of itself on stderr: as text for people, or as one JSON object a line for machines.

Its one rule: nothing that a client sent as content is written, no prompt, no reply, no key; and what it chose of a name or a
path is escaped, so that no line can be forged. A request has one line, written within FLUSH_S of its end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from datetime import UTC, datetime
from typing import Literal

import orjson

Format = Literal["text", "json"]

FLUSH_S = 0.1
TALKATIVE = ("httpx", "alembic")


def set_up(level: str, form: Format) -> None:
    """The root logger for the life of the process."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


class RequestLog:
    """A line for every request. Lines are gathered for a moment and written at once, so that one costs microseconds."""

    def __init__(self, form: Format, *, enabled: bool = True, descriptor: int = 2) -> None:
        self._json = form == "json"
        self._enabled = enabled
        self._descriptor = descriptor
        self._lines: list[bytes] = []

    def add(
        self, request_id: bytes, method: str, raw_path: bytes, status: int, took_s: float, key_id: str | None
    ) -> None:
        """`raw_path` as it was sent, percent-encoded; the query is left out, for it may hold a client's values."""
        if not self._enabled:
            return
        at = datetime.fromtimestamp(time.time(), UTC)
        fields = {
            "time": f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03d}Z",
            "level": "info",
            "logger": "tunegate.request",
            "id": request_id.decode(),
            "method": method,
            "path": raw_path[:500].decode("ascii", "backslashreplace"),
            "status": status,
            "ms": round(took_s * 1000, 1),
            "key": key_id,
        }
        if self._json:
            line = orjson.dumps(fields)
        else:
            path = _escaped(fields["path"])  # type: ignore[arg-type]
            said = f"{fields['time']} INFO tunegate.request: {method} {path} {status} {fields['ms']} ms"
            line = f"{said} {fields['id']} {key_id or '-'}".encode()
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        self._lines.append(line)

    def flush(self) -> None:
        data, self._lines = b"\n".join([*self._lines, b""]), []
        if data:
            os.write(self._descriptor, data)


class _TextFormatter(logging.Formatter):
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"
    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _escaped(record.message)
        return super().formatMessage(record)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        fields = {
            "time": f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(fields, default=str).decode()


def _escaped(text: str) -> str:
    """Control characters, escape sequences for a terminal among them, as \\x..; line ends stay only inside tracebacks."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

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
        self._second, self._shown = 0, ""

    def add(
        self, request_id: bytes, method: str, raw_path: bytes, status: int, took_s: float, key_id: str | None
    ) -> None:
        """`raw_path` as it was sent, percent-encoded; the query is left out, for it may hold a client's values."""
        if not self._enabled:
            return
        now, path = self._now(), raw_path[:500].decode("ascii", "backslashreplace")
        if self._json:
            fields: dict[str, object] = {"time": now, "level": "info", "logger": "tunegate.request"}
            fields |= {"id": request_id.decode(), "method": method, "path": path, "status": status}
            line = orjson.dumps({**fields, "ms": round(took_s * 1000, 1), "key": key_id})
        else:
            said = f"{now} INFO tunegate.request: {method} {_escaped(path)} {status} {took_s * 1000:.1f} ms"
            line = f"{said} {request_id.decode()} {key_id or '-'}".encode()
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        self._lines.append(line)

    def _now(self) -> str:
        """As 2026-11-21T08:00:00.123Z; the part before the point is made once a second."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second, self._shown = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._shown}.{int((now - second) * 1000):03d}Z"

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

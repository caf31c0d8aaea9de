"""Multipart forms, read as they arrive: text fields are kept, the bytes of files are handed on piece by piece.

Memory is bounded by one chunk of the body and the limits below, whatever a client sends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from gateway.errors import BodyTooLarge, RequestError, UnsupportedMediaType
from gateway.routes.body import ClientLeft

MAX_PART_HEADERS = 8
MAX_PART_HEADER_BYTES = 4096
MAX_FIELD_BYTES = 4096
FRAMING_BYTES = 64 * 1024  # what a body may have beside its files: boundaries, part headers, fields


@dataclass(frozen=True)
class Field:
    name: str
    value: str


@dataclass(frozen=True)
class FileBegins:
    name: str
    filename: bytes  # as sent


@dataclass(frozen=True)
class FileBytes:
    data: bytes


Piece = Field | FileBegins | FileBytes


async def read_form(
    request: Request, *, field_names: Collection[str], file_names: Collection[str], file_limit_bytes: int
) -> AsyncIterator[Piece]:
    """The pieces of a form in the order in which they were sent; each name is taken once.

    Raises `RequestError` (`param` names the part), `BodyTooLarge` as soon as a limit is passed, `ClientLeft`.
    """
    collector = _Collector(field_names, file_names, file_limit_bytes)
    parser = _open_parser(request, collector, file_limit_bytes)
    size_bytes = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        more = message.get("more_body", False)
        body: bytes = message.get("body", b"")
        size_bytes += len(body)
        if size_bytes > file_limit_bytes + FRAMING_BYTES:
            raise _too_large(file_limit_bytes)
        if not body:
            continue
        try:
            parser.write(body)
        except FormParserError as error:
            raise RequestError(f"The multipart form cannot be read: {error}.") from error
        for piece in collector.take():
            yield piece
    if not collector.ended:
        raise RequestError("The multipart form breaks off before its closing boundary.")


class _Collector:
    """Turns the parser's callbacks into pieces, and refuses what the form may not hold."""

    def __init__(self, field_names: Collection[str], file_names: Collection[str], file_limit_bytes: int) -> None:
        self.ended = False
        self._field_names = field_names
        self._file_names = file_names
        self._file_limit_bytes = file_limit_bytes
        self._pieces: list[Piece] = []
        self._seen: set[str] = set()
        self._headers: dict[bytes, bytes] = {}
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._name = ""
        self._is_file = False
        self._value = bytearray()
        self._file_bytes = 0

    def take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # the parser's callbacks

    def on_part_begin(self) -> None:
        self._headers = {}

    def on_header_begin(self) -> None:
        self._header_name.clear()
        self._header_value.clear()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)

    def on_headers_finished(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        if disposition != b"form-data" or b"name" not in options:
            raise RequestError('Each part of the form needs the header Content-Disposition: form-data; name="…".')
        self._name = name = options[b"name"].decode("utf-8", "replace")
        self._is_file = name in self._file_names
        if not self._is_file and name not in self._field_names:
            raise RequestError(
                f"Unrecognized request argument supplied: {name[:60]}. The form takes: "
                f"{', '.join([*self._file_names, *self._field_names])}.",
                param=name[:60],
            )
        if name in self._seen:
            raise RequestError(f"'{name}' was sent more than once; it is taken once.", param=name)
        self._seen.add(name)
        encoding = self._headers.get(b"content-transfer-encoding", b"binary").strip().lower()
        if encoding not in (b"binary", b"8bit", b"7bit"):
            raise RequestError(f"'{name}' has a Content-Transfer-Encoding; parts are sent as they are.", param=name)
        if self._is_file:
            if b"filename" not in options:
                raise RequestError(f"'{name}' must be a file: its part needs a filename.", param=name)
            self._file_bytes = 0
            self._pieces.append(FileBegins(name, options[b"filename"]))
        elif b"filename" in options:
            raise RequestError(f"'{name}' must be text, not a file.", param=name)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._file_bytes += end - start
            if self._file_bytes > self._file_limit_bytes:
                raise _too_large(self._file_limit_bytes)
            self._pieces.append(FileBytes(data[start:end]))
        else:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise RequestError(f"'{self._name}' is longer than {MAX_FIELD_BYTES} bytes.", param=self._name)

    def on_part_end(self) -> None:
        if not self._is_file:
            self._pieces.append(Field(self._name, bytes(self._value).decode("utf-8", "replace")))
            self._value.clear()

    def on_end(self) -> None:
        self.ended = True


def _open_parser(request: Request, collector: _Collector, file_limit_bytes: int) -> MultipartParser:
    media_type, options = parse_options_header(request.headers.get("content-type"))
    if media_type != b"multipart/form-data":
        raise UnsupportedMediaType(
            f"The Content-Type is {media_type[:60].decode('latin-1')!r}; files are sent as multipart/form-data."
        )
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise UnsupportedMediaType("A compressed body (Content-Encoding) is not taken: send the form as it is.")
    boundary = options.get(b"boundary")
    if not boundary:
        raise RequestError("The Content-Type has no boundary: multipart/form-data; boundary=….")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > file_limit_bytes + FRAMING_BYTES):
        raise _too_large(file_limit_bytes)
    callbacks = {name: getattr(collector, name) for name in dir(collector) if name.startswith("on_")}
    try:
        return MultipartParser(
            boundary,
            callbacks,  # type: ignore[arg-type]  # a TypedDict of these very names
            max_header_count=MAX_PART_HEADERS,
            max_header_size=MAX_PART_HEADER_BYTES,
        )
    except FormParserError as error:
        raise RequestError(f"The multipart form cannot be read: {error}.") from error


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The file is larger than {limit_bytes} bytes, the limit of this server.", param="file")

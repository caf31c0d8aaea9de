"""/v1/files: upload, list, retrieve, content, delete."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.errors import NotFound, RequestError, TunegateError
from gateway.routes import caller_of, project_of
from gateway.routes.idempotency import idempotency_key
from gateway.routes.multipart import Field, FileBegins, FileBytes, read_form
from gateway.store import files as statements
from gateway.store import idempotency
from gateway.store.blobs import BlobReader
from gateway.store.files import File
from gateway.store.sweep import remove_unreferenced, sweep_expired
from gateway.wire import files as wire
from gateway.wire.page import list_body, parse_page

MAX_PAGE = 10_000


async def create_file(request: Request) -> Response:
    store, blobs = request.app.state.store, request.app.state.blobs
    caller = caller_of(request.scope)
    limit_bytes = caller.limits.storage_bytes
    await sweep_expired(store, blobs)
    key = idempotency_key(request)
    form = _UploadForm(request)
    if limit_bytes is not None:  # before a byte is read
        now = int(time.time())
        await store.read(lambda connection: statements.require_room(connection, caller.project_id, 1, limit_bytes, now))
    blob = await blobs.put(form.read())

    def insert(connection: Connection) -> File:
        now = int(time.time())
        mark = idempotency.fingerprint("file", blob.digest, form.filename, form.upload)
        earlier = idempotency.recall(connection, caller.project_id, key, mark)
        if earlier is not None and (
            file := statements.select_file(connection, earlier, now=now, project_id=caller.project_id)
        ):
            return file
        statements.require_room(connection, caller.project_id, blob.size_bytes, limit_bytes, now)
        file = statements.insert_file(
            connection,
            blob,
            filename=form.filename,
            purpose=form.upload.purpose,
            created_at=now,
            expires_after_s=form.upload.expires_after_s,
            project_id=caller.project_id,
        )
        idempotency.remember(connection, caller.project_id, key, mark, file.id)
        return file

    try:
        file = await store.write(insert)
    except TunegateError:
        blobs.release(blob)
        await remove_unreferenced(store, blobs, [blob.digest])
        raise
    blobs.release(blob)
    if file.purpose == "fine-tune":
        request.app.state.supervisor.foresee()
    return _json(wire.file_object(file))


async def list_files(request: Request) -> Response:
    query = parse_page(request.query_params, default_limit=MAX_PAGE, max_limit=MAX_PAGE)
    page = await request.app.state.store.read(
        lambda connection: statements.select_files(
            connection,
            now=int(time.time()),
            limit=query.limit,
            after=query.after,
            order=query.order,
            purpose=request.query_params.get("purpose") or None,
            project_id=project_of(request),
        )
    )
    return _json(list_body([wire.file_object(file) for file in page.items], page.has_more))


async def retrieve_file(request: Request) -> Response:
    return _json(wire.file_object(await _find(request)))


async def retrieve_content(request: Request) -> Response:
    file = await _find(request)
    if file.status != "processed":
        told = f": {file.status_details}" if file.status_details else ""
        raise RequestError(f"{file.id} has no content, its status is '{file.status}'{told}", param="id")
    try:
        reader = await request.app.state.blobs.open(file.digest)
    except FileNotFoundError as error:
        # Deleted since the row was read; if the row is still there, bytes were lost, which is worth a 500.
        await _find(request)
        raise RuntimeError(f"the bytes of {file.id} are missing: {error.filename}") from error
    return _ContentResponse(file, reader)


async def delete_file(request: Request) -> Response:
    file_id = request.path_params["file_id"]
    store, blobs = request.app.state.store, request.app.state.blobs
    file = await store.write(
        lambda connection: statements.delete_file(
            connection, file_id, now=int(time.time()), project_id=project_of(request)
        )
    )
    if file is None:
        raise _unknown(file_id)
    request.app.state.exports.cancel(file_id)
    await remove_unreferenced(store, blobs, [file.digest])
    return _json(wire.deleted_object(file_id))


routes = [
    Route("/v1/files", create_file, methods=["POST"]),
    Route("/v1/files", list_files, methods=["GET"]),
    Route("/v1/files/{file_id}", retrieve_file, methods=["GET"]),
    Route("/v1/files/{file_id}", delete_file, methods=["DELETE"]),
    Route("/v1/files/{file_id}/content", retrieve_content, methods=["GET"]),
]


class _UploadForm:
    """An upload's form: `read` yields the file's bytes, and leaves the rest here once it has ended without an error."""

    upload: wire.Upload

    def __init__(self, request: Request) -> None:
        self.filename = ""
        self._size_bytes = 0
        self._request = request
        self._fields: dict[str, str] = {}

    async def read(self) -> AsyncIterator[bytes]:
        limit_bytes = self._request.app.state.settings.limits.file_bytes
        async for piece in read_form(
            self._request, field_names=wire.UPLOAD_FIELDS, file_names=("file",), file_limit_bytes=limit_bytes
        ):
            match piece:
                case FileBytes(data):
                    self._size_bytes += len(data)
                    yield data
                case FileBegins(filename=raw):
                    self.filename = wire.clean_filename(raw)
                case Field("purpose", value):
                    self._fields["purpose"] = wire.parse_purpose(value)  # at once: it saves reading a file for nothing
                case Field(name, value):
                    self._fields[name] = value

        if not self.filename:
            raise RequestError("You must provide 'file': a part of the form with a filename.", param="file")
        self.upload = wire.parse_upload(self._fields)
        if self._size_bytes == 0:
            raise RequestError(f"The file {self.filename!r} is empty.", param="file")


class _ContentResponse(StreamingResponse):
    """A file's bytes, to be saved and not shown."""

    def __init__(self, file: File, reader: BlobReader) -> None:
        headers = {
            "content-length": str(file.size_bytes),
            "content-disposition": wire.content_disposition(file.filename),
            "x-content-type-options": "nosniff",
        }
        super().__init__(reader, headers=headers, media_type=wire.content_type(file.filename))
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reader.close()


async def _find(request: Request) -> File:
    file_id: str = request.path_params["file_id"]
    file: File | None = await request.app.state.store.read(
        lambda connection: statements.select_file(
            connection, file_id, now=int(time.time()), project_id=project_of(request)
        )
    )
    if file is None:
        raise _unknown(file_id)
    return file


def _unknown(file_id: str) -> NotFound:
    return NotFound(f"No such File object: {file_id[:100]}", param="id")


def _json(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")

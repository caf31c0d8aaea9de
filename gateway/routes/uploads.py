"""`/v1/uploads`: a large file in parts, in any order and over several connections; it is a file once it is complete.

Each part that is answered is on the disk; whoever breaks off goes on with the parts that are missing, which
`GET /v1/uploads/{id}/parts` (an extension of ours) tells.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.errors import NotFound, RequestError, TunegateError
from gateway.routes import caller_of, project_of
from gateway.routes.body import read_json
from gateway.routes.idempotency import idempotency_key
from gateway.routes.multipart import FileBytes, read_form
from gateway.store import files as file_statements
from gateway.store import idempotency
from gateway.store import uploads as statements
from gateway.store.blobs import Blobs
from gateway.store.files import File
from gateway.store.ids import new_id
from gateway.store.sweep import remove_unreferenced, sweep_expired
from gateway.store.uploads import Part, Upload
from gateway.wire import uploads as wire

LIFE_S = 3600
PART_BYTES = 64 * 1024 * 1024
MAX_PENDING = 100  # of a project
SPARE_BYTES = PART_BYTES  # that parts may have beyond what was announced twice over: some are sent again


async def create_upload(request: Request) -> Response:
    state, caller = request.app.state, caller_of(request.scope)
    key = idempotency_key(request)
    asked = wire.parse_create(
        await read_json(request, state.settings.limits.body_bytes), state.settings.limits.upload_bytes
    )
    await sweep_expired(state.store, state.blobs)
    mark = idempotency.fingerprint("upload", asked)

    def insert(connection: Connection) -> Upload:
        earlier = idempotency.recall(connection, caller.project_id, key, mark)
        if earlier is not None:
            return _find(connection, earlier, caller.project_id)
        now = int(time.time())
        count = statements.count_pending(connection, caller.project_id)
        if count >= MAX_PENDING:
            raise RequestError(f"{count} uploads of this project are pending already: complete or cancel some.")
        limit_bytes = caller.limits.storage_bytes
        file_statements.require_room(connection, caller.project_id, asked.size_bytes, limit_bytes, now, param="bytes")
        upload = Upload(new_id("upload_"), now, **vars(asked), expires_at=now + LIFE_S, project_id=caller.project_id)
        statements.insert_upload(connection, upload)
        idempotency.remember(connection, caller.project_id, key, mark, upload.id)
        return upload

    return _json(wire.upload_object(await state.store.write(insert)))


async def retrieve_upload(request: Request) -> Response:
    return _json(await _shown(request, request.path_params["upload_id"]))


async def list_parts(request: Request) -> Response:
    """The parts that are there, with their sizes, in the order in which they came."""
    upload_id, project_id = request.path_params["upload_id"], project_of(request)

    def read(connection: Connection) -> list[Part]:
        _find(connection, upload_id, project_id)
        return statements.select_parts(connection, upload_id)

    parts = await request.app.state.store.read(read)
    data = [{**wire.part_object(part), "bytes": part.size_bytes} for part in parts]
    return _json({"object": "list", "data": data, "has_more": False})


async def add_part(request: Request) -> Response:
    state = request.app.state
    upload_id, project_id = request.path_params["upload_id"], project_of(request)
    upload = await state.store.read(lambda connection: _find(connection, upload_id, project_id))
    statements.require_pending(upload, int(time.time()))
    blob = await state.blobs.put(_part_bytes(request))

    def insert(connection: Connection) -> Part:
        now = int(time.time())
        statements.require_pending(_find(connection, upload_id, project_id), now)
        parts = statements.select_parts(connection, upload_id)
        if len(parts) >= wire.MAX_PARTS:
            raise RequestError(f"Upload {upload_id} has {len(parts)} parts, as many as may be; make them larger.")
        if sum(part.size_bytes for part in parts) + blob.size_bytes > 2 * upload.size_bytes + SPARE_BYTES:
            raise RequestError(
                f"The parts of upload {upload_id} come to far more than the {upload.size_bytes} bytes that were announced.",
                param="data",
            )
        part = Part(new_id("part_"), upload_id, now, blob.size_bytes, blob.digest, project_id)
        statements.insert_part(connection, part)
        return part

    try:
        part = await state.store.write(insert)
    except TunegateError:
        state.blobs.release(blob)
        await remove_unreferenced(state.store, state.blobs, [blob.digest])
        raise
    state.blobs.release(blob)
    return _json(wire.part_object(part))


async def complete_upload(request: Request) -> Response:
    """The file of the parts, in the order that is asked for. Completing again, as a client's retry does, changes nothing."""
    state, caller = request.app.state, caller_of(request.scope)
    upload_id = request.path_params["upload_id"]
    asked = wire.parse_complete(await read_json(request, state.settings.limits.body_bytes))

    def read(connection: Connection) -> tuple[Upload, list[Part]]:
        return _find(connection, upload_id, caller.project_id), statements.select_parts(connection, upload_id)

    upload, found = await state.store.read(read)
    if upload.status == "completed":
        return _json(await _shown(request, upload_id))
    statements.require_pending(upload, int(time.time()))
    parts = _ordered(upload, found, asked.part_ids)
    md5 = hashlib.md5(usedforsecurity=False)
    try:
        blob = await state.blobs.put(_joined(state.blobs, parts, md5))
    except FileNotFoundError:  # its parts are gone: it was completed or cancelled meanwhile
        return await _completed(request, upload_id)

    def insert(connection: Connection) -> list[str]:
        if asked.md5 is not None and md5.hexdigest() != asked.md5:
            raise RequestError(
                f"The bytes have the MD5 {md5.hexdigest()}, not {asked.md5}: a part was changed on its way, or the order of "
                "'part_ids' is not that of the file. The upload is still pending.",
                param="md5",
            )
        file = file_statements.insert_file(
            connection,
            blob,
            filename=upload.filename,
            purpose=upload.purpose,
            created_at=int(time.time()),
            expires_after_s=upload.expires_after_s,
            project_id=caller.project_id,
        )
        gone = statements.leave_pending(connection, upload_id, "completed", file.id)
        if gone is None:
            raise _Overtaken  # undoes the file's row
        return gone

    try:
        gone = await state.store.write(insert)
    except _Overtaken:
        state.blobs.release(blob)
        await remove_unreferenced(state.store, state.blobs, [blob.digest])
        return await _completed(request, upload_id)
    except TunegateError:
        state.blobs.release(blob)
        await remove_unreferenced(state.store, state.blobs, [blob.digest])
        raise
    state.blobs.release(blob)
    await remove_unreferenced(state.store, state.blobs, gone)
    if upload.purpose == "fine-tune":
        state.supervisor.foresee()
    return _json(await _shown(request, upload_id))


async def cancel_upload(request: Request) -> Response:
    """Cancelling again changes nothing; what is complete stays so."""
    state = request.app.state
    upload_id, project_id = request.path_params["upload_id"], project_of(request)

    def cancel(connection: Connection) -> list[str]:
        upload = _find(connection, upload_id, project_id)
        if upload.status not in ("pending", "cancelled"):
            raise RequestError(
                f"Upload {upload_id} is {upload.status} and cannot be cancelled any more.", code="invalid_upload_status"
            )
        return statements.leave_pending(connection, upload_id, "cancelled") or []

    await remove_unreferenced(state.store, state.blobs, await state.store.write(cancel))
    return _json(await _shown(request, upload_id))


routes = [
    Route("/v1/uploads", create_upload, methods=["POST"]),
    Route("/v1/uploads/{upload_id}", retrieve_upload, methods=["GET"]),
    Route("/v1/uploads/{upload_id}/parts", list_parts, methods=["GET"]),
    Route("/v1/uploads/{upload_id}/parts", add_part, methods=["POST"]),
    Route("/v1/uploads/{upload_id}/complete", complete_upload, methods=["POST"]),
    Route("/v1/uploads/{upload_id}/cancel", cancel_upload, methods=["POST"]),
]


async def _part_bytes(request: Request) -> AsyncIterator[bytes]:
    size_bytes = 0
    async for piece in read_form(request, field_names=(), file_names=("data",), file_limit_bytes=PART_BYTES):
        if isinstance(piece, FileBytes):
            size_bytes += len(piece.data)
            yield piece.data
    if size_bytes == 0:
        raise RequestError("You must provide 'data': a part of the form with a filename, and not empty.", param="data")


def _ordered(upload: Upload, found: list[Part], part_ids: list[str]) -> list[Part]:
    by_id = {part.id: part for part in found}
    missing = next((part_id for part_id in part_ids if part_id not in by_id), None)
    if missing is not None:
        raise RequestError(f"Upload {upload.id} has no part {missing!r}.", param="part_ids")
    parts = [by_id[part_id] for part_id in part_ids]
    total = sum(part.size_bytes for part in parts)
    if total != upload.size_bytes:
        raise RequestError(
            f"The parts have {total} bytes together, and the upload was announced with {upload.size_bytes}; they must be "
            "equal. The upload is still pending.",
            param="part_ids",
        )
    return parts


async def _joined(blobs: Blobs, parts: list[Part], md5: Any) -> AsyncIterator[bytes]:
    for part in parts:
        reader = await blobs.open(part.digest)
        try:
            async for chunk in reader:
                md5.update(chunk)
                yield chunk
        finally:
            reader.close()


class _Overtaken(Exception):
    """Somebody else completed or cancelled the upload first."""


async def _completed(request: Request, upload_id: str) -> Response:
    """The upload that somebody else completed meanwhile. Raises RequestError where it became something else."""
    project_id = project_of(request)
    upload = await request.app.state.store.read(lambda connection: _find(connection, upload_id, project_id))
    if upload.status != "completed":
        statements.require_pending(upload, int(time.time()))
        raise RuntimeError(f"bytes of {upload_id}'s parts are missing")
    return _json(await _shown(request, upload_id))


async def _shown(request: Request, upload_id: str) -> dict[str, Any]:
    """The upload as it is now, with its file where it is complete."""
    now, project_id = int(time.time()), project_of(request)

    def read(connection: Connection) -> tuple[Upload, File | None]:
        upload = _find(connection, upload_id, project_id)
        file_id = upload.file_id
        file = (
            None
            if file_id is None
            else file_statements.select_file(connection, file_id, now=now, project_id=project_id)
        )
        return upload, file

    upload, file = await request.app.state.store.read(read)
    return wire.upload_object(upload, file)


def _find(connection: Connection, upload_id: str, project_id: str) -> Upload:
    upload = statements.select_upload(connection, upload_id, project_id)
    if upload is None:
        raise NotFound(f"No such Upload object: {upload_id[:100]}", param="upload_id")
    return upload


def _json(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")

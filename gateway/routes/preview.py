"""`/v1/fine_tuning/preview`: what a file would train on a model, before a job is created."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.errors import RequestError
from gateway.jobs.creation import bundle_for
from gateway.routes import project_of
from gateway.routes.body import read_json
from gateway.store import files as statements
from gateway.wire import preview as wire


async def preview_training(request: Request) -> Response:
    """The model is a base, an alias of one or a tuned model, as for a job; nothing is stored."""
    state = request.app.state
    asked = wire.parse_preview(await read_json(request, state.settings.limits.body_bytes))
    base = state.catalog.base_for_tuning(asked.model, project_of(request))
    source = asked.content if asked.content is not None else await _stored(request, asked.training_file or "")
    bundle = await asyncio.to_thread(bundle_for, base, asked.rendering.chat_template_kwargs)
    found = await state.previews.run(
        source, bundle, base.context_length, asked.limit, asked.rendering.turns, asked.train_on
    )
    body = wire.preview_body(
        asked.model, bundle.template.name, bundle.digest, base.context_length, found.lines, found.summary
    )
    return Response(orjson.dumps(body), media_type="application/json")


async def _stored(request: Request, file_id: str) -> Path:
    state, project_id = request.app.state, project_of(request)
    file = await state.store.read(
        lambda connection: statements.select_file(connection, file_id, now=int(time.time()), project_id=project_id)
    )
    if file is None:
        raise RequestError(
            f"{file_id[:100]} does not exist. Upload it first, with the purpose 'fine-tune'.", param="training_file"
        )
    path: Path = state.blobs.path(file.digest)
    return path


routes = [Route("/v1/fine_tuning/preview", preview_training, methods=["POST"])]

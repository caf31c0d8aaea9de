"""`POST /v1/embeddings`."""

from __future__ import annotations

import asyncio

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.inference import Inference
from gateway.routes import caller_of
from gateway.routes.body import read_asked
from gateway.routes.passing import pass_on
from gateway.routes.reply import Departure, send_json
from gateway.wire import embeddings as wire


class CreateEmbeddings:
    """Parse → embed → respond."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        inference: Inference = state.inference
        body = await read_asked(receive, state.settings, "embeddings")
        caller = caller_of(scope)
        if (upstream := state.catalog.upstream(body.get("model"))) is not None:
            return await pass_on(inference, upstream, "/embeddings", body, caller, receive, send)
        asked = wire.parse(body)
        with Departure(receive):
            made = await inference.embed(asked.model, asked.inputs, caller=caller)
            await send_json(send, await asyncio.to_thread(wire.embeddings, asked, made.vectors, made.prompt_tokens))


routes = [Route("/v1/embeddings", CreateEmbeddings(), methods=["POST"])]

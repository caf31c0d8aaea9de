"""`/v1/responses`: create, retrieve, delete, cancel; input items, input tokens, compact."""

from __future__ import annotations

from collections.abc import AsyncIterator

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.errors import RequestError
from gateway.responses import Responses
from gateway.routes import caller_of
from gateway.routes.body import read_asked
from gateway.routes.reply import Departure, send_events, send_json
from gateway.wire import responses as wire
from gateway.wire.page import list_body, parse_page, slice_page
from gateway.wire.response_events import Event, frame


class CreateResponse:
    """Parse → begin → respond. Plain ASGI, as chat is: its tokens take this path."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, caller = scope["app"].state, caller_of(scope)
        responses: Responses = state.responses
        body = await read_asked(receive, state.settings, "responses")
        request = wire.parse(body)
        if request.background:
            row = await responses.begin_in_background(request, body, caller)
            if request.stream:
                await send_events(send, _frames(await responses.events(row.id, caller, -1)))
            else:
                await JSONResponse(row.body)(scope, receive, send)
            return
        with Departure(receive) as departure:
            answer = await responses.begin(request, caller)
            departure.ends(answer.cancel)
            try:
                if request.stream:
                    await send_events(send, _frames(answer.events()))
                else:
                    response = await answer.whole()
                    if not departure.gone:
                        await send_json(send, orjson.dumps(response))
            finally:
                answer.cancel()


class RetrieveResponse:
    """As it is now, or with ?stream=true as it comes."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, caller = Request(scope, receive), caller_of(scope)
        responses: Responses = scope["app"].state.responses
        response_id = request.path_params["response_id"]
        if request.query_params.get("stream") != "true":
            row = await responses.find(response_id, caller)
            await JSONResponse(row.body)(scope, receive, send)
            return
        after = request.query_params.get("starting_after") or "-1"
        if not after.removeprefix("-").isascii() or not after.removeprefix("-").isdigit() or len(after) > 18:
            raise RequestError(
                f"'starting_after' must be a sequence number, not {after[:40]!r}", param="starting_after"
            )
        await send_events(send, _frames(await responses.events(response_id, caller, int(after))))


async def delete_response(request: Request) -> Response:
    response_id = request.path_params["response_id"]
    await _responses(request).delete(response_id, caller_of(request.scope))
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


async def cancel_response(request: Request) -> Response:
    row = await _responses(request).cancel(request.path_params["response_id"], caller_of(request.scope))
    return JSONResponse(row.body)


async def list_input_items(request: Request) -> Response:
    """Newest first, unless `order` is "asc"."""
    query = parse_page(request.query_params)
    items = await _responses(request).input_items(request.path_params["response_id"], caller_of(request.scope))
    return JSONResponse(list_body(*slice_page(items, query)))


async def count_input_tokens(request: Request) -> Response:
    asked = wire.parse(await read_asked(request.receive, request.app.state.settings, "responses"))
    count = await _responses(request).count_input(asked, caller_of(request.scope))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": count})


async def compact_response(request: Request) -> Response:
    asked = wire.parse(await read_asked(request.receive, request.app.state.settings, "responses"))
    return JSONResponse(await _responses(request).compact(asked, caller_of(request.scope)))


def _responses(request: Request) -> Responses:
    responses: Responses = request.app.state.responses
    return responses


async def _frames(events: AsyncIterator[list[Event]]) -> AsyncIterator[bytes]:
    async for group in events:
        yield b"".join(map(frame, group))


routes = [
    Route("/v1/responses", CreateResponse(), methods=["POST"]),
    Route("/v1/responses/input_tokens", count_input_tokens, methods=["POST"]),
    Route("/v1/responses/compact", compact_response, methods=["POST"]),
    Route("/v1/responses/{response_id}", RetrieveResponse(), methods=["GET"]),
    Route("/v1/responses/{response_id}", delete_response, methods=["DELETE"]),
    Route("/v1/responses/{response_id}/cancel", cancel_response, methods=["POST"]),
    Route("/v1/responses/{response_id}/input_items", list_input_items, methods=["GET"]),
]

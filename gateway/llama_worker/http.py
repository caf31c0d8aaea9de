"""The worker's HTTP side: bytes in, bytes out, on a thread of its own with its own event loop.

Its rule: it only moves bytes. A request is parsed, put into the scheduler's inbox, and what comes back is written: one
hand-over a round for all requests together, one write a request. A client that goes away cancels its request, streaming
or not.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.errors import BodyTooLarge, EngineUnavailable, ModelNotFound, RequestError, TunegateError, Unauthorized
from gateway.llama_worker.adapters import Adapters
from gateway.llama_worker.delivery import Gone, Mailbox, answer, call_soon, send_json, stream, watch
from gateway.llama_worker.embedding import Embedder, EmbeddingJob
from gateway.llama_worker.fields import Limits, parse_body
from gateway.llama_worker.generation import Generation
from gateway.llama_worker.metrics import CONTENT_TYPE, Metrics
from gateway.llama_worker.scheduler import Scheduler
from gateway.llama_worker.structured.compiler import Compiler
from gateway.llama_worker.texts import (
    embedding_body,
    parse_detokenize,
    parse_embedding,
    parse_tokenize,
    tokenize_body,
)
from gateway.llama_worker.vocabulary import NativeVocabulary
from gateway.llama_worker.wire import (
    Completion,
    Reply,
    parse_adapter,
    parse_completion,
)

log = logging.getLogger(__name__)

BODY_LIMIT_BYTES = 8 * 2**20
RETRY_AFTER_S = 1
SILENCE_S = 60.0  # of the decode loop while it has work: longer than any one step, a chunk of a large model included


class Front:
    """The ASGI app in front of one scheduler."""

    def __init__(
        self,
        scheduler: Scheduler,
        adapters: Adapters,
        metrics: Metrics,
        limits: Limits,
        served_name: str,
        key: str,
        version: dict[str, Any],
        max_queue: int,
        vocabulary: NativeVocabulary,
        embedder: Embedder,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._scheduler = scheduler
        self._adapters = adapters
        self._metrics = metrics
        self._limits = limits
        self._served_name = served_name
        self._version = version
        self._compiler = Compiler(vocabulary.pieces)
        self._vocabulary = vocabulary
        self._pool = ThreadPoolExecutor(1, "texts")
        self._embedder = embedder
        self._in_flight = 0  # choices asked for and not yet answered; touched on the loop only
        self._in_flight_limit = limits.max_num_seqs + max_queue
        self._silence_s = silence_s
        self._started_at = int(time.time())
        self.draining = False
        routes = [
            Route("/health", self._health, methods=["GET"]),
            Route("/version", self._show_version, methods=["GET"]),
            Route("/metrics", self._show_metrics, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/completions", _Endpoint(self._complete), methods=["POST"]),
            Route("/v1/embeddings", self._embed, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
        ]
        handlers: Any = {TunegateError: _error_response, HTTPException: _http_error, Exception: _unexpected}
        self.app: ASGIApp = _Locked(Starlette(routes=routes, exception_handlers=handlers), key)

    async def _health(self, request: Request) -> Response:
        if self.draining:
            raise EngineUnavailable("The worker is shutting down.", retry_after_s=RETRY_AFTER_S)
        silent_s = self._scheduler.heartbeat.silent_s()
        if silent_s > self._silence_s:
            why = f"The decode loop has made no progress for {silent_s:.0f} s."
            raise EngineUnavailable(why, retry_after_s=RETRY_AFTER_S)
        return PlainTextResponse("ok")

    async def _show_version(self, request: Request) -> Response:
        return _json(self._version)

    async def _show_metrics(self, request: Request) -> Response:
        self._metrics.http_cpu.set(time.thread_time())
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def _models(self, request: Request) -> Response:
        listed: list[tuple[str, str, str | None]] = [(self._served_name, self._served_name, None)]
        listed += [(name, str(path), self._served_name) for name, path in self._adapters.names().items()]
        data = [
            {
                "id": name,
                "object": "model",
                "created": self._started_at,
                "owned_by": "tunegate",
                "root": root,
                "parent": parent,
                "max_model_len": self._limits.max_model_len,
            }
            for name, root, parent in listed
        ]
        return _json({"object": "list", "data": data})

    async def _embed(self, request: Request) -> Response:
        asked = parse_embedding(parse_body(await _read_body(request.receive)), self._limits)
        if asked.model != self._served_name:
            if self._adapters.get(asked.model) is None:
                raise ModelNotFound(asked.model)
            raise RequestError(f"model is {asked.model!r}; embeddings are made by the base alone.", param="model")
        if self._embedder.pooling is None:
            raise RequestError(
                f"The model {asked.model!r} makes no embeddings: its GGUF names no pooling (mean, cls or last).",
                param="model",
            )
        if self.draining or self._in_flight >= self._in_flight_limit:
            raise EngineUnavailable(
                "The worker has its limit of requests in flight; try again.", retry_after_s=RETRY_AFTER_S
            )
        job = EmbeddingJob(asked.inputs)
        watcher = asyncio.ensure_future(_give_up_when_gone(request.receive, job))
        self._in_flight += 1
        try:
            await self._ask(lambda reply: self._scheduler.attend(self._embedder.steps(job), reply))
        finally:
            watcher.cancel()
            job.given_up = True
            self._in_flight -= 1
        self._metrics.prompt_tokens.inc(asked.tokens)
        return Response(embedding_body(asked, job.vectors), media_type="application/json")

    async def _tokenize(self, request: Request) -> Response:
        asked = parse_tokenize(parse_body(await _read_body(request.receive)))
        ids = await self._aside(self._vocabulary.tokenize, asked.prompt, asked.add_special_tokens)
        spelled = [self._vocabulary.piece(token, special=True) for token in ids] if asked.return_token_strs else None
        return Response(tokenize_body(ids, spelled, self._limits), media_type="application/json")

    async def _detokenize(self, request: Request) -> Response:
        ids = parse_detokenize(parse_body(await _read_body(request.receive)), self._limits)
        return _json({"prompt": await self._aside(self._vocabulary.detokenize, ids)})

    async def _load(self, request: Request) -> Response:
        name, path = parse_adapter(parse_body(await _read_body(request.receive)))
        await self._ask(lambda reply: self._scheduler.load(name, path, reply))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        name, _ = parse_adapter(parse_body(await _read_body(request.receive)))
        await self._ask(lambda reply: self._scheduler.unload(name, reply))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _ask(self, order: Callable[[Callable[[TunegateError | None], None]], None]) -> None:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[TunegateError | None] = loop.create_future()

        def settle(error: TunegateError | None) -> None:
            if not answered.done():  # it is, when the client went away
                answered.set_result(error)

        order(lambda error: call_soon(loop, settle, error))
        error = await answered
        if error is not None:
            raise error

    async def _complete(self, receive: Receive, send: Send) -> None:
        request = parse_completion(parse_body(await _read_body(receive)), self._limits)
        if request.model != self._served_name and self._adapters.get(request.model) is None:
            raise ModelNotFound(request.model)
        request = await self._with_structure(request)
        if self.draining or self._in_flight + request.n > self._in_flight_limit:
            why = "is shutting down" if self.draining else f"has {self._in_flight} sequences in flight, its limit"
            after_s = RETRY_AFTER_S if self.draining else self._scheduler.retry_after_s(request.n)
            raise EngineUnavailable(f"The worker {why}; try again.", retry_after_s=after_s)
        mailbox = Mailbox()
        generation = Generation(request, mailbox.put)
        reply = Reply(f"cmpl-{uuid.uuid4().hex}", request)
        watcher = asyncio.ensure_future(watch(receive, mailbox))
        self._in_flight += request.n
        self._scheduler.submit(generation)
        try:
            await (stream if request.stream else answer)(request, reply, mailbox, send)
        except Gone:
            log.debug("a client went away")
        finally:
            self._in_flight -= request.n
            watcher.cancel()
            self._scheduler.cancel(generation)  # does nothing to one that is over

    async def _aside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What may take longer than other requests should wait."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    async def _with_structure(self, request: Completion) -> Completion:
        if request.wish is None:
            return request
        structure = self._compiler.known(request.wish)
        if structure is None:
            structure = await self._aside(self._compiler.compile, request.wish)
        return replace(request, sampling=replace(request.sampling, structure=structure))


async def _give_up_when_gone(receive: Receive, job: EmbeddingJob) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.given_up = True


class _Endpoint:
    """A bare ASGI endpoint: no Request and no Response object on the hot path."""

    def __init__(self, handle: Callable[[Receive, Send], Awaitable[None]]) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._handle(receive, send)


class _Locked:
    """Lets through what carries the key, and /health."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                error = Unauthorized("The worker's key is missing or wrong: send `Authorization: Bearer KEY`.")
                await send_json(send, error.status, orjson.dumps(error.body()))
                return
        await self._app(scope, receive, send)


async def _read_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("The connection closed before the body was complete.")
        part = message.get("body", b"")
        size += len(part)
        if size > BODY_LIMIT_BYTES:
            raise BodyTooLarge(f"The body is larger than {BODY_LIMIT_BYTES} bytes.")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")


async def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, TunegateError)
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return _json(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    wrong = RequestError(f"{request.method} {request.url.path}: {error.detail}.")
    return _json(wrong.body(), error.status_code)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _json(TunegateError("The worker failed on this request; its log says why.").body(), 500)

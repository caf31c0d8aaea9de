"""A model that another server answers for, through any OpenAI-compatible API: asked as it is, its bytes handed on as they come.

Its rule: the settings choose the host, the path and the key; a request chooses none, and what comes back is not read but for
what it must not give away. Redirects are refused, since they would take the key along. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx
import orjson

from gateway.engines.client import Deadlines
from gateway.engines.replica import Member
from gateway.engines.router import choose
from gateway.errors import EngineError, EngineTimeout, EngineUnavailable, RequestError, TunegateError

log = logging.getLogger(__name__)

HEADERS = (b"content-type", b"content-length", b"content-encoding", b"retry-after", b"retry-after-ms")  # handed on
IDLE_CONNECTIONS = 64
ERROR_LIMIT_BYTES = 1 << 20
TRY_ELSEWHERE = (429, 500, 502, 503, 504)  # where there is an elsewhere; the last one's answer is handed on


class Upstream:
    """A name that clients ask for, and the servers that answer for it."""

    owned_by = "upstream"

    def __init__(
        self, name: str, urls: Sequence[str], key: str | None, served_name: str | None, deadlines: Deadlines
    ) -> None:
        """`urls` are base URLs, such as https://api.example.com/v1; `served_name` is what the servers call the model."""
        self.name = name
        self.created_at = int(time.time())
        self.servers = [Server(f"{name} at {url}", url) for url in urls]
        self._key = key or ""
        self._served_name = served_name or name
        self._deadlines = deadlines
        self._retired = False
        self._asking = 0  # requests that have no answer yet; between two tries no server has them
        # No proxy and no .netrc from the environment: they would choose a host, or a key. Certificates are the system's,
        # or those that SSL_CERT_FILE names.
        self._http = httpx.AsyncClient(
            headers={"user-agent": "tunegate"} | ({"authorization": f"Bearer {key}"} if key else {}),
            cookies=CookieJar(
                DefaultCookiePolicy(allowed_domains=())
            ),  # keeps none: what one client is told is not another's
            verify=ssl.create_default_context() if any(url.startswith("https:") for url in urls) else True,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(deadlines.first_token_s, connect=deadlines.connect_s, pool=deadlines.connect_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=IDLE_CONNECTIONS),
        )

    async def ask(self, path: str, body: dict[str, Any]) -> UpstreamReply:
        """Its answer to a POST, from its status on; `path` is below the base URL. To be closed.

        Raises EngineUnavailable, EngineTimeout and EngineError; what the servers themselves refuse is an answer.
        """
        if self._http.is_closed:  # the settings changed since it was looked up
            raise EngineUnavailable(f"'{self.name}' is answered for by others now; ask again", retry_after_s=1)
        self._asking += 1
        try:
            return await self._ask(path, body)
        finally:
            self._asking -= 1
            await self._close_when_idle()

    async def _ask(self, path: str, body: dict[str, Any]) -> UpstreamReply:
        try:
            raw = orjson.dumps({**body, "model": self._served_name})
        except orjson.JSONEncodeError:
            raise RequestError("The request holds something that is nested too deeply.") from None
        first, why = choose(self.servers, None, (), time.monotonic())
        first.chosen[why] += 1
        reply = await self._try(first, path, raw)
        if isinstance(reply, UpstreamReply) and reply.status not in TRY_ELSEWHERE:
            return reply
        others = [server for server in self.servers if server is not first]
        if others:
            second, why = choose(others, None, (), time.monotonic())
        elif isinstance(reply, _ClosedConnection):
            second, why = first, "only"  # a kept connection, closed just then
        else:
            return _returned(reply)
        first.retried += 1
        second.chosen[why] += 1
        if isinstance(reply, UpstreamReply):
            await reply.close()
        return _returned(await self._try(second, path, raw))

    async def retire(self) -> None:
        """Takes no new request; its connections are closed when the last reply is over."""
        self._retired = True
        await self._close_when_idle()

    async def close(self) -> None:
        await self._http.aclose()

    async def _try(self, server: Server, path: str, raw: bytes) -> UpstreamReply | TunegateError:
        """One server's answer, or why there is none."""
        server.begin(self.name)
        reply: UpstreamReply | TunegateError | None = None
        try:
            reply = await self._send(server, path, raw)
        finally:
            if not isinstance(reply, UpstreamReply):
                server.end(self.name)
        return reply

    async def _send(self, server: Server, path: str, raw: bytes) -> UpstreamReply | TunegateError:
        request = self._http.build_request(
            "POST",
            server.url + path,
            content=raw,
            headers={"content-type": "application/json", "accept-encoding": "identity"},
        )
        try:
            response = await self._http.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            server.failed("connect")
            log.warning("upstream %s: cannot be reached: %r", server.name, error)
            return EngineUnavailable(f"the server that answers for '{self.name}' cannot be reached", retry_after_s=2)
        except httpx.TimeoutException:
            server.failed("timeout")
            limit = self._deadlines.first_token_s
            return EngineTimeout(f"the server that answers for '{self.name}' did not answer within {limit:g} s")
        except httpx.HTTPError as error:
            server.failed("lost")
            log.warning("upstream %s: %r", server.name, error)
            return _ClosedConnection(f"the server that answers for '{self.name}' broke off", retry_after_s=1)
        status = response.status_code
        if status == 429:
            server.turned_away()
        elif status >= 500:
            server.failed("refused")
        else:
            server.answered()
        reply = UpstreamReply(self, server, response)
        if 300 <= status < 400 or status == 401:
            await response.aclose()
            if status == 401:
                return EngineError(
                    f"the server that answers for '{self.name}' does not take the key that it was given here; the operator "
                    "sets it in [[engines]]"
                )
            return EngineError(f"the server that answers for '{self.name}' redirects ({status}), which is not followed")
        if status >= 400:
            await reply.read_error(self._key.encode())
        return reply

    async def _close_when_idle(self) -> None:
        if self._retired and not self._asking and not any(server.in_flight for server in self.servers):
            await self._http.aclose()


class Server(Member):
    """One base URL of an upstream."""

    def __init__(self, name: str, url: str) -> None:
        super().__init__(name)
        self.url = url


class UpstreamReply:
    """An answer: its status and headers, then `chunks()` to its end, then `close()` whatever happened."""

    def __init__(self, upstream: Upstream, server: Server, response: httpx.Response) -> None:
        self._upstream, self._server, self._response = upstream, server, response
        self._error: bytes | None = None
        self._open = True
        self.status = response.status_code
        self.headers = [(name.lower(), value) for name, value in response.headers.raw if name.lower() in HEADERS]

    @property
    def is_event_stream(self) -> bool:
        return str(self._response.headers.get("content-type", "")).startswith("text/event-stream")

    async def read_error(self, key: bytes) -> None:
        """Reads the body of a refusal, which is short, and withholds one that tells the key."""
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._upstream._deadlines.between_tokens_s):
                async for part in self._response.aiter_raw():
                    parts.append(part)
                    if sum(map(len, parts)) > ERROR_LIMIT_BYTES:
                        break
        except (httpx.HTTPError, TimeoutError) as error:
            log.warning("upstream %s: its refusal broke off: %r", self._server.name, error)
        self._error = b"".join(parts)
        if key and key in self._error:
            self._error = orjson.dumps(EngineError("the upstream's answer cannot be shown: it holds a key").body())
        self.headers = [(name, value) for name, value in self.headers if name != b"content-length"]
        self.headers.append((b"content-length", b"%d" % len(self._error)))

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes as they come, unread. Raises EngineError and EngineTimeout when they break off."""
        if self._error is not None:
            yield self._error
            return
        limit = self._upstream._deadlines.between_tokens_s
        source = self._response.aiter_raw()
        while True:
            try:
                async with asyncio.timeout(limit):
                    chunk = await anext(source)
            except StopAsyncIteration:
                return
            except (TimeoutError, httpx.TimeoutException):
                self._server.failed("timeout")
                raise EngineTimeout(f"the server sent nothing for {limit:g} s") from None
            except httpx.HTTPError as error:
                self._server.failed("lost")
                raise EngineError("the server went away in the middle of its reply") from error
            yield chunk

    async def close(self) -> None:
        """Ends it now, wherever it is: the server sees its connection close. Once or more."""
        if self._open:
            self._open = False
            self._server.end(self._upstream.name)
            await self._response.aclose()
            await self._upstream._close_when_idle()


class _ClosedConnection(EngineUnavailable):
    """It broke off before it answered: perhaps a kept connection that was closed just then."""


def _returned(reply: UpstreamReply | TunegateError) -> UpstreamReply:
    if isinstance(reply, TunegateError):
        raise reply
    return reply

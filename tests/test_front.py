"""The front door alone: what goes wrong behind it is told in OpenAI's shape, and costs one request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.engines.catalog import Catalog
from gateway.engines.client import Deadlines
from gateway.front import Front, resource_of, scope_of
from gateway.inference import Inference
from gateway.keys import Keyring, create_key, revoke_key
from gateway.logs import RequestLog
from gateway.metering import Meter
from gateway.metrics import RequestMetrics
from gateway.store import Store

pytestmark = pytest.mark.anyio


async def crash(_: Request) -> Response:
    raise RuntimeError("the secret inside")


async def fine(_: Request) -> Response:
    return Response("fine")


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    store = Store.open(tmp_path / "tunegate.db")
    keyring = Keyring(store, tmp_path / "keys.stamp")
    await keyring.open()
    front = Middleware(Front, hosts=frozenset(), local=True, log=RequestLog("text", enabled=False))
    app = serve(front, keyring)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    await keyring.close()
    store.close()


def serve(front: Middleware, keyring: Keyring) -> Starlette:
    app = Starlette(routes=[Route("/v1/files", crash), Route("/v1/models", fine)], middleware=[front])
    inference = Inference(Catalog(Deadlines(1, 1)), 8)
    app.state.keyring, app.state.tracer = keyring, None
    app.state.request_metrics = RequestMetrics(inference, Meter(), lambda: len(keyring))
    return app


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("192.0.2.7:8000", None, 200),
        ("[2001:db8::7]:8000", None, 200),
        ("GPU.example", None, 200),
        ("other.example", None, 421),
        ("192.0.2.7:8000", "http://192.0.2.7:3000", 200),
        ("192.0.2.7:8000", "http://gpu.example", 200),
        ("192.0.2.7:8000", "http://203.0.113.9", 403),
        ("gpu.example", "http://192.0.2.7", 403),
        ("192.0.2.7:8000", "null", 403),
        ("localhost", "http://LOCALHOST:3000", 200),
    ],
)
async def test_on_a_network_an_address_is_a_host_but_another_one_is_a_foreign_origin(
    tmp_path: Path, host: str, origin: str | None, status: int
) -> None:
    store = Store.open(tmp_path / "tunegate.db")
    keyring = Keyring(store, tmp_path / "keys.stamp")
    await keyring.open()
    log = RequestLog("text", enabled=False)
    app = serve(Middleware(Front, hosts=frozenset({b"gpu.example"}), local=False, log=log), keyring)
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        response = await client.get("/v1/models", headers=headers)
    assert response.status_code == status, response.text
    await keyring.close()
    store.close()


async def test_a_fault_of_ours_is_a_500_with_an_id_that_tells_nothing_of_its_inside(http: httpx.AsyncClient) -> None:
    response = await http.get("/v1/files")
    assert response.status_code == 500 and "secret" not in response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"].startswith("req_") and "openai-processing-ms" in response.headers
    assert (await http.get("/v1/models")).status_code == 200


async def test_keys_made_and_revoked_by_another_process_count_from_the_next_request(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    assert (await http.get("/v1/models")).status_code == 200, "no key is needed while there is none"
    row, key = create_key(tmp_path, "x", "default", ["infer"], {})
    assert (await http.get("/v1/models")).status_code == 401
    headers = {"Authorization": f"Bearer {key}"}
    assert (await http.get("/v1/models", headers=headers)).status_code == 200
    revoke_key(tmp_path, row.id)
    assert (await http.get("/v1/models", headers=headers)).status_code == 401


async def test_without_the_stamp_nobody_is_let_in(http: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "keys.stamp").unlink()
    assert (await http.get("/v1/models")).status_code == 503


async def test_a_compressed_body_is_refused_unread(http: httpx.AsyncClient) -> None:
    response = await http.get("/v1/models", headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415


def test_a_path_that_is_not_known_needs_admin_and_is_one_series() -> None:
    assert (
        scope_of("GET", "/v1/whatever") == scope_of("GET", "//v1/chat") == scope_of("POST", "/v1/templates") == "admin"
    )
    assert scope_of("GET", "/v1/templates") == "infer" and scope_of("DELETE", "/v1/models/a/b") == "tune"
    assert scope_of("GET", "/v1/models/a/b") == "infer" and scope_of("POST", "/v1/models/a/b/export") == "tune"
    assert {resource_of(path) for path in ("/v1/x", "/", "/v1", "/v1//x", "/healthz")} == {"other"}

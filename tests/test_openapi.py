"""The OpenAPI document says what is served, and what is served is as it says: schemathesis asks on its own."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from starlette.routing import Route

from gateway.app import ROUTES
from gateway.openapi.document import make_document
from gateway.openapi.requests import BODIES, QUERIES, REPLIES
from tests.server import Server

EXAMPLES = 12  # for each operation: a bounded run


def operations() -> list[tuple[str, str]]:
    document = make_document(ROUTES, "0")
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of this module's own: what is asked of it is not nice."""
    server = Server(tmp_path_factory.mktemp("asked"), "[jobs]\nqueued = 0\n")
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def schema(asked: Server) -> Any:
    return schemathesis.openapi.from_url(f"{asked.base_url}/openapi.json")


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    served = set()
    for route in ROUTES:
        assert isinstance(route, Route)
        path = re.sub(r"\{(\w+)(:\w+)?\}", r"{\1}", route.path)
        served |= {(method, path) for method in (route.methods or set()) - {"HEAD"}}
    assert set(operations()) == served
    document = make_document(ROUTES, "0")
    for path, methods in document["paths"].items():
        named = {parameter["name"] for parameter in _parameters(methods, "path")}
        assert named == set(re.findall(r"\{(\w+)\}", path))
        assert all(operation["summary"] for operation in methods.values()), f"{path}: a function without a docstring"
    known = {f"{method} {path}" for method, path in served}
    assert set(BODIES) | set(QUERIES) | set(REPLIES) <= known, "a schema for what is not served"


def test_the_server_shows_the_document(asked: Server) -> None:
    shown = httpx.get(f"{asked.base_url}/openapi.json").json()
    assert shown["openapi"] == "3.1.0" and len(shown["paths"]) > 20


def test_objects_that_are_there_are_as_the_document_says(asked: Server, schema: Any) -> None:
    def call(method: str, path: str, name: str = "", **options: Any) -> Any:
        """One request; `path` is the document's, `name` what stands in it."""
        url = asked.base_url.removesuffix("/v1") + re.sub(r"\{\w+\}", name, path)
        response = requests.request(method, url, timeout=60, **options)
        assert response.status_code == 200, response.text
        schema[path][method].validate_response(response)
        return response.json()

    line = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'
    ask = {"model": "tunegate-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    rows = orjson.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": ask}) + b"\n{"
    file = call("POST", "/v1/files", files={"file": ("a.jsonl", line * 9)}, data={"purpose": "fine-tune"})
    batch_file = call("POST", "/v1/files", files={"file": ("b.jsonl", rows)}, data={"purpose": "batch"})
    for path, name in (("/v1/files", ""), ("/v1/files/{file_id}", file["id"])):
        call("GET", path, name)
    upload = {"bytes": 3, "filename": "a", "mime_type": "x/y", "purpose": "user_data"}
    upload_id = call("POST", "/v1/uploads", json=upload)["id"]
    part = call("POST", "/v1/uploads/{upload_id}/parts", upload_id, files={"data": ("x", b"abc")})
    call("GET", "/v1/uploads/{upload_id}/parts", upload_id)
    call("POST", "/v1/uploads/{upload_id}/complete", upload_id, json={"part_ids": [part["id"]]})
    asked_batch = {"endpoint": "/v1/chat/completions", "input_file_id": batch_file["id"], "completion_window": "24h"}
    batch_id = call("POST", "/v1/batches", json=asked_batch)["id"]
    deadline = time.monotonic() + 30
    while call("GET", "/v1/batches/{batch_id}", batch_id)["status"] != "failed":
        assert time.monotonic() < deadline
    call("GET", "/v1/batches")
    call("POST", "/v1/chat/completions", json=ask)
    call("POST", "/v1/completions", json={"model": "tunegate-demo", "prompt": "a", "max_tokens": 2, "logprobs": 1})
    for path in ("/v1/models", "/v1/templates", "/v1/fine_tuning/jobs", "/v1/openapi.json"):
        call("GET", path)
    call("GET", "/v1/models/{model}", "tunegate-demo")
    call("GET", "/v1/organization/usage/completions", params={"start_time": int(time.time()) - 100})
    call("DELETE", "/v1/files/{file_id}", file["id"])


@pytest.mark.parametrize(("method", "path"), operations())
def test_whatever_is_asked_there_is_no_5xx_and_no_reply_that_breaks_its_schema(
    schema: Any, method: str, path: str
) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy())
    def ask(case: Any) -> None:
        response = case.call(timeout=60)
        case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])

    ask()


def _parameters(methods: dict[str, Any], where: str) -> list[dict[str, Any]]:
    return [p for operation in methods.values() for p in operation.get("parameters", []) if p["in"] == where]

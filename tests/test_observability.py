"""What the operator sees of a running server: metrics on a port of their own, traces from the client's span, a log."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.server import Server, free_port
from tests.test_keys import client, make_key

ASK: dict[str, Any] = {
    "model": "tunegate-demo",
    "messages": [{"role": "user", "content": "secret words"}],
    "max_tokens": 3,
}


class Collector(ThreadingHTTPServer):
    """An OTLP collector on a real port: keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.raw = b""
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += list(scope.spans)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[tuple[Server, int, str]]:
    """A server with metrics, traces and logs as JSON; the port of its metrics; a key."""
    port = free_port()
    settings = f'metrics_port = {port}\notlp_endpoint = "{collector.url}"\nlog_format = "json"\n'
    server = Server(tmp_path_factory.mktemp("seen"), settings)
    _, key = make_key(server.data, "--tokens-per-minute", "100000")
    try:
        yield server.start(), port, key
    finally:
        server.stop()


def test_metrics_tell_requests_tokens_and_times_on_a_port_of_their_own(seen: tuple[Server, int, str]) -> None:
    server, port, key = seen
    mine = client(server, key)
    usage = mine.chat.completions.create(**ASK).usage
    with pytest.raises(openai.NotFoundError):
        mine.files.retrieve("file-nothing")
    assert usage is not None
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert 'tunegate_http_requests_total{method="POST",resource="chat",status="200"} 1.0' in text
    assert 'tunegate_http_requests_total{method="GET",resource="files",status="404"} 1.0' in text
    assert 'tunegate_http_request_seconds_count{resource="chat"} 1.0' in text
    assert (
        f'tunegate_tokens_total{{kind="completions",model="tunegate-demo",what="input"}} {usage.prompt_tokens:.1f}'
        in text
    )
    assert "tunegate_keys 1.0" in text and 'tunegate_in_flight{who="live"} 0.0' in text
    assert key not in text
    assert httpx.get(f"{server.base_url}/../metrics", headers={"Authorization": f"Bearer {key}"}).status_code in (
        403,
        404,
    )


def test_a_trace_leads_from_the_clients_span_and_holds_no_prompt_and_no_key(
    seen: tuple[Server, int, str], collector: Collector
) -> None:
    server, _, key = seen
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    response = client(server, key).chat.completions.with_raw_response.create(
        **ASK, extra_headers={"traceparent": f"00-{trace}-{parent}-01"}
    )
    deadline = time.monotonic() + 20
    while not (found := [span for span in collector.spans if span.trace_id.hex() == trace]):
        assert time.monotonic() < deadline, "spans are sent every few seconds"
        time.sleep(0.1)
    (span,) = found
    attributes = {item.key: item.value.string_value or item.value.int_value for item in span.attributes}
    assert span.name == "POST chat" and span.parent_span_id.hex() == parent
    assert attributes["http.response.status_code"] == 200
    assert attributes["tunegate.request_id"] == response.headers["x-request-id"]
    assert b"secret words" not in collector.raw and key.encode() not in collector.raw


def test_every_line_of_the_log_is_json_when_it_is_asked_for(seen: tuple[Server, int, str]) -> None:
    server, _, key = seen
    response = httpx.get(f"{server.base_url}/models", headers={"Authorization": f"Bearer {key}"})
    deadline = time.monotonic() + 5
    while response.headers["x-request-id"] not in (log := server.log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lines = [json.loads(line) for line in log.splitlines()[1:]]  # the first says where it listens
    (mine,) = [line for line in lines if line.get("id") == response.headers["x-request-id"]]
    assert (mine["method"], mine["path"], mine["status"]) == ("GET", "/v1/models", 200) and mine["key"].startswith(
        "key_"
    )
    assert all({"time", "level", "logger"} <= set(line) for line in lines)

"""Models that other servers answer for: a second real gateway, and a fake whose every byte has to come through."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.settings import DEMO_MODEL_PATH
from tests.e2e.test_requests import check_error
from tests.fake_upstream import BEGUN, KEY, ODD, ODD_ERROR, ODD_JSON, FakeUpstream
from tests.server import Server, free_port

ASKED: dict[str, Any] = {"model": "far", "messages": [{"role": "user", "content": "hi"}]}


def settings(real: int, fake: int, metrics_port: int, more: str = "") -> str:
    return f"""
metrics_port = {metrics_port}
{more}
[bases.own]
path = '{DEMO_MODEL_PATH}'
start = 'on_demand'
[[engines]]
kind = 'upstream'
model = 'judge'
served_name = 'tunegate-demo'
urls = ['http://127.0.0.1:{real}/v1']
[[engines]]
kind = 'upstream'
model = 'far'
served_name = 'org/far-1'
urls = ['http://127.0.0.1:{fake}/v1']
key = '{KEY}'
[[engines]]
kind = 'upstream'
model = 'two'
urls = ['http://127.0.0.1:1/v1', 'http://127.0.0.1:{fake}/v1']
[[engines]]
kind = 'upstream'
model = 'gone'
urls = ['http://127.0.0.1:1/v1']
"""


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    upstream = FakeUpstream()
    try:
        yield upstream
    finally:
        upstream.stop()


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def front(
    server: Server, fake: FakeUpstream, metrics_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A gateway in front of both, whose own base is never asked."""
    gateway = Server(tmp_path_factory.mktemp("upstream"), settings(server.port, fake.port, metrics_port))
    try:
        yield gateway.start()
        log = gateway.log.read_text()
        assert KEY not in log and "Traceback" not in log, log
    finally:
        gateway.stop()


def post(front: Server, what: str, path: str = "/chat/completions", **fields: Any) -> httpx.Response:
    return httpx.post(f"{front.base_url}{path}", json={**ASKED, "user": what, **fields}, timeout=30)


def test_another_gateways_model_is_chatted_with_as_if_it_were_here(front: Server, server: Server) -> None:
    near, far = server.client(), front.client()
    asked: dict[str, Any] = {"messages": ASKED["messages"], "max_tokens": 20, "seed": 5, "temperature": 0.7}
    here = near.chat.completions.create(model="tunegate-demo", **asked)
    there = far.chat.completions.create(model="judge", **asked)
    assert there.choices == here.choices
    chunks = list(far.chat.completions.create(model="judge", **asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == here.choices[0].message.content
    text = far.completions.create(model="judge", prompt="The day", max_tokens=4, temperature=0).choices[0].text
    assert (
        text
        == near.completions.create(model="tunegate-demo", prompt="The day", max_tokens=4, temperature=0).choices[0].text
    )
    with pytest.raises(openai.BadRequestError, match="context length"):
        far.chat.completions.create(model="judge", messages=[{"role": "user", "content": "word " * 5000}])


def test_upstreams_are_listed_and_cannot_be_tuned_deleted_or_rendered(front: Server) -> None:
    client = front.client()
    owners = {model.id: model.owned_by for model in client.models.list()}
    assert {name for name, owner in owners.items() if owner == "upstream"} == {"judge", "far", "two", "gone"}
    assert client.models.retrieve("judge").owned_by == "upstream"
    file = client.files.create(file=("a.jsonl", b'{"messages":[]}\n'), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="'judge' is answered for by another server") as refused:
        client.fine_tuning.jobs.create(model="judge", training_file=file.id)
    assert refused.value.param == "model"
    check_error(httpx.delete(f"{front.base_url}/models/judge"), 403, param="model")
    url = f"http://127.0.0.1:{front.port}/worker_get_conversation_template?model=judge"
    assert "answered for by another server" in check_error(httpx.get(url), 400, param="model")


def test_the_bytes_of_an_answer_are_what_the_upstream_sent(front: Server) -> None:
    streamed = post(front, "odd stream", stream=True)
    assert streamed.status_code == 200 and streamed.content == b"".join(ODD)
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    whole = post(front, "odd json")
    assert whole.content == ODD_JSON and whole.headers["content-type"] == "application/json; x=y"
    refused = post(front, "odd error")
    assert (refused.status_code, refused.content, refused.headers["retry-after"]) == (418, ODD_ERROR, "3")
    assert "set-cookie" not in refused.headers and refused.headers.get("server") != "secret"
    assert post(front, "rate limit").status_code == 429


def test_the_model_and_the_key_are_swapped_and_everything_else_is_as_it_was(front: Server, fake: FakeUpstream) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "ü\u0000🍎"}, picture]}]
    body = {"model": "far", "messages": messages, "temperature": 0.25, "tools": [], "top_k": 3, "user": "odd json"}
    headers = {
        "authorization": "Bearer the-clients-own",
        "x-forwarded-host": "evil.example",
        "openai-organization": "o",
    }
    assert httpx.post(f"{front.base_url}/chat/completions", json=body, headers=headers).status_code == 200
    asked = fake.asked[-1]
    assert asked.path == "/v1/chat/completions"
    assert asked.body == {**body, "model": "org/far-1"}
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.headers["host"] == f"127.0.0.1:{fake.port}"
    assert not {"x-forwarded-host", "openai-organization", "cookie"} & asked.headers.keys()
    for path, field in (("/completions", "prompt"), ("/embeddings", "input")):
        sent = {"model": "far", field: "x", "user": "odd json"}
        assert httpx.post(f"{front.base_url}{path}", json=sent).content == ODD_JSON
        assert (fake.asked[-1].path, fake.asked[-1].body) == (f"/v1{path}", {**sent, "model": "org/far-1"})


@pytest.mark.parametrize(
    "field", ["api_base", "base_url", "extra_headers", "chat_template", "cache_salt", "url", "api_key"]
)
def test_fields_that_are_not_known_are_refused_and_not_passed_on(front: Server, fake: FakeUpstream, field: str) -> None:
    before = len(fake.asked)
    check_error(post(front, "odd json", **{field: "http://127.0.0.1:1"}), 400, param=field)
    assert len(fake.asked) == before


def test_redirects_and_refused_keys_are_errors_of_ours_that_tell_no_key(front: Server) -> None:
    told = {"redirect": "redirects (307)", "bad key": "does not take the key", "tells the key": "holds a key"}
    for what, words in told.items():
        response = post(front, what)
        assert words in response.json()["error"]["message"]
        assert KEY not in response.text
        assert response.status_code == (400 if what == "tells the key" else 502)


def test_a_stream_that_breaks_off_ends_with_an_error_event_and_any_other_answer_unfinished(front: Server) -> None:
    response = post(front, "breaks off", stream=True)
    assert response.content.startswith(BEGUN) and b"[DONE]" not in response.content
    assert b'"message":"the server went away' in response.content.rsplit(b"data: ", 1)[1]
    with pytest.raises(httpx.RemoteProtocolError):
        post(front, "breaks off in json")


def test_a_client_that_leaves_closes_the_upstreams_connection(front: Server, fake: FakeUpstream) -> None:
    before = len(fake.asked)
    body = httpx.Request("POST", f"{front.base_url}/chat/completions", json={**ASKED, "user": "hang"})
    with socket.create_connection(("127.0.0.1", front.port)) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body.content)}\r\n\r\n"
        client.sendall(head.encode() + body.content)
        deadline = time.monotonic() + 10
        while len(fake.asked) == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not fake.asked[-1].closed.is_set()
    assert fake.asked[-1].closed.wait(1)


def test_one_server_of_two_and_a_kept_connection_that_was_closed_are_asked_again(
    front: Server, fake: FakeUpstream, metrics_port: int
) -> None:
    for _ in range(5):
        assert post(front, "odd json", model="two").content == ODD_JSON
    assert post(front, "close once").content == ODD_JSON
    before = len(fake.asked)
    check_error(post(front, "close"), 503, code="engine_unavailable")
    assert len(fake.asked) == before + 2
    message = check_error(post(front, "odd json", model="gone"), 503, code="engine_unavailable")
    assert "127.0.0.1" not in message, "where it is, is not the client's"
    text = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text
    assert (
        'tunegate_replica_faults_total{fault="connect",model="two",replica="two at http://127.0.0.1:1/v1"} 3.0' in text
    )
    assert 'tunegate_replica_breaker{model="two",replica="two at http://127.0.0.1:1/v1",state="closed"} 0.0' in text


def test_an_upstream_is_added_changed_and_removed_in_the_running_gateway(
    front: Server, server: Server, fake: FakeUpstream, metrics_port: int
) -> None:
    assert front.process is not None
    old = settings(server.port, fake.port, metrics_port)
    new = old.replace("model = 'judge'", "model = 'teacher'").replace(KEY, "sk-other")
    front.config.write_text(new)
    front.process.send_signal(signal.SIGHUP)
    client = front.client()
    deadline = time.monotonic() + 20
    while "teacher" not in {model.id for model in client.models.list()}:
        assert time.monotonic() < deadline, front.log_tail()
        time.sleep(0.05)
    post(front, "odd json")
    assert fake.asked[-1].headers["authorization"] == "Bearer sk-other"
    check_error(post(front, "odd json", model="judge"), 404, code="model_not_found")
    front.config.write_text(old)
    front.process.send_signal(signal.SIGHUP)
    while "judge" not in {model.id for model in client.models.list()}:
        assert time.monotonic() < deadline, front.log_tail()
        time.sleep(0.05)


def test_https_is_spoken_and_a_certificate_that_nobody_vouches_for_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    for name in ("known", "stranger"):
        files = ["-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.pem")]
        subprocess.run(["openssl", *make.split(), *files], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "known.pem"))
    fakes = []
    for name in ("known", "stranger"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        fakes.append(FakeUpstream(context))
    text = f"[bases.own]\npath = '{DEMO_MODEL_PATH}'\nstart = 'on_demand'\n" + "".join(
        f"[[engines]]\nkind = 'upstream'\nmodel = '{name}'\nurls = ['https://localhost:{fake.port}/v1']\nkey_env = 'FAR_KEY'\n"
        for name, fake in zip(("known", "stranger"), fakes, strict=True)
    )
    monkeypatch.setitem(os.environ, "FAR_KEY", KEY)
    gateway = Server(tmp_path / "gateway", text)
    try:
        gateway.start()
        assert post(gateway, "odd json", model="known").content == ODD_JSON
        assert fakes[0].asked[-1].headers["authorization"] == f"Bearer {KEY}"
        check_error(post(gateway, "odd json", model="stranger"), 503)
        assert not fakes[1].asked
    finally:
        gateway.stop()
        for upstream in fakes:
            upstream.stop()

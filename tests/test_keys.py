"""Keys on a real server: who is let in, what is seen, and how soon a revoked key is good for nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from starlette.routing import Route

from gateway.access import SCOPES
from gateway.app import ROUTES
from gateway.front import PROBES, RESOURCES, TEMPLATE_PROBES, scope_of
from tests.server import ROOT, Server, free_port

LINES = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n' * 10
LONG: dict[str, Any] = {
    "model": "tunegate-demo",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 900,
    "extra_body": {"ignore_eos": True},
}


def tunegate(*arguments: str, data: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments, "--data", str(data)],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def make_key(data: Path, *options: str) -> tuple[str, str]:
    """Its id and its text."""
    made = tunegate("keys", "create", "test", *options, data=data)
    assert made.returncode == 0, made.stderr
    return made.stderr.split()[0], made.stdout.strip()


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server that needs a key, and one with the scope `admin`."""
    server = Server(tmp_path_factory.mktemp("keyed"))
    _, key = make_key(server.data, "--scopes", "admin")
    try:
        yield server.start(), key
    finally:
        server.stop()


def client(server: Server, key: str) -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key=key, max_retries=0, _strict_response_validation=True)


def every_route() -> list[tuple[str, str]]:
    found = []
    for route in ROUTES:
        assert isinstance(route, Route)
        path = re.sub(r"\{\w+(:path)?\}", "x", route.path)
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def check_error(response: httpx.Response, status: int, code: str | None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code, error
    return str(error["message"])


def test_every_route_and_method_without_a_key_is_401(keyed: tuple[Server, str]) -> None:
    server, _ = keyed
    root = server.base_url.removesuffix("/v1")
    asked = [*every_route(), ("GET", "/v1/nothing"), ("POST", "/"), ("PATCH", "/v1/models"), ("OPTIONS", "/v1/files")]
    with httpx.Client() as http:
        for method, path in asked:
            response = http.request(method, root + path)
            if path in PROBES:
                assert response.status_code in (200, 405)
                assert "tunegate-demo" not in response.text, "a probe is told no names"
                continue
            assert response.status_code == 401, f"{method} {path}: {response.status_code}"
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                check_error(response, 401, "invalid_api_key")


def test_every_route_has_a_scope_of_its_own_and_a_key_without_it_is_403(keyed: tuple[Server, str]) -> None:
    server, _ = keyed
    root = server.base_url.removesuffix("/v1")
    others = {
        scope: make_key(server.data, "--scopes", ",".join(s for s in SCOPES if s not in (scope, "admin")))[1]
        for scope in SCOPES
    }
    with httpx.Client() as http:
        for method, path in every_route():
            if path in PROBES:
                continue
            resource = path.removeprefix("/v1/").split("/")[0]
            assert resource in RESOURCES or path in TEMPLATE_PROBES or resource == "organization", path
            response = http.request(method, root + path, headers=bearer(others[scope_of(method, path)]))
            assert response.status_code == 403, f"{method} {path}: {response.status_code}"


@pytest.mark.parametrize(
    "change", [lambda key: key[:-1], lambda key: key + "x", lambda key: key.upper(), lambda _: "x"]
)
def test_only_the_whole_key_opens(keyed: tuple[Server, str], change: Any) -> None:
    server, key = keyed
    _, other = make_key(server.data)
    swapped = "-".join([*key.split("-")[:2], *other.split("-")[2:]])
    for wrong in (change(key), swapped):
        message = check_error(httpx.get(f"{server.base_url}/models", headers=bearer(wrong)), 401, "invalid_api_key")
        assert wrong not in message or wrong == "x"
    for header in (key, f"Basic {key}", "Bearer", "Bearer  x"):
        response = httpx.get(f"{server.base_url}/models", headers={"Authorization": header})
        check_error(response, 401, "invalid_api_key")
    assert httpx.get(f"{server.base_url}/models", headers={"Authorization": f"bearer {key}"}).status_code == 200


def test_what_a_project_has_is_not_there_for_another(keyed: tuple[Server, str]) -> None:
    server, admin = keyed
    red = client(server, make_key(server.data, "--project", "red")[1])
    blue = client(server, make_key(server.data, "--project", "blue")[1])
    file = red.files.create(file=("red.jsonl", LINES), purpose="fine-tune")
    job = red.fine_tuning.jobs.create(training_file=file.id, model="tunegate-demo", hyperparameters={"n_epochs": 1})
    assert [found.id for found in red.files.list()] == [file.id]
    for other in (blue, client(server, admin)):
        assert not [found for found in other.files.list() if found.id == file.id]
        assert not [found for found in other.fine_tuning.jobs.list() if found.id == job.id]
        for refused in (
            lambda c=other: c.files.retrieve(file.id),
            lambda c=other: c.files.content(file.id),
            lambda c=other: c.files.delete(file.id),
            lambda c=other: c.fine_tuning.jobs.retrieve(job.id),
            lambda c=other: c.fine_tuning.jobs.cancel(job.id),
            lambda c=other: c.fine_tuning.jobs.list_events(job.id),
            lambda c=other: c.fine_tuning.jobs.checkpoints.list(job.id),
        ):
            with pytest.raises(openai.NotFoundError):
                refused()
        with pytest.raises(openai.BadRequestError, match="does not exist"):
            other.fine_tuning.jobs.create(training_file=file.id, model="tunegate-demo")
    deadline = time.monotonic() + 120
    while (job := red.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert job.fine_tuned_model is not None, job.error
    ask: dict[str, Any] = {"messages": LONG["messages"], "model": job.fine_tuned_model, "max_tokens": 2}
    assert red.chat.completions.create(**ask).choices
    assert job.fine_tuned_model in {model.id for model in red.models.list()}
    assert job.fine_tuned_model not in {model.id for model in blue.models.list()}
    for refused in (
        lambda: blue.chat.completions.create(**ask),
        lambda: blue.completions.create(model=ask["model"], prompt="x"),
        lambda: blue.models.retrieve(ask["model"]),
        lambda: blue.models.delete(ask["model"]),
    ):
        with pytest.raises(openai.NotFoundError, match="does not exist or you do not have access to it"):
            refused()
    boss = client(server, admin)
    granted = boss.fine_tuning.checkpoints.permissions.create(ask["model"], project_ids=["blue", "green"])
    assert [found.project_id for found in granted.data] == ["blue", "green"]
    assert blue.chat.completions.create(**ask).choices, "what is granted is seen at once"
    with pytest.raises(openai.PermissionDeniedError, match="belongs to another project"):
        blue.models.delete(ask["model"])
    with pytest.raises(openai.PermissionDeniedError, match="needs 'admin'"):
        red.fine_tuning.checkpoints.permissions.create(ask["model"], project_ids=["blue"])
    shown = boss.fine_tuning.checkpoints.permissions.list(ask["model"], order="ascending", limit=1)
    assert shown.data[0].id == granted.data[0].id and shown.has_more
    for _ in range(2):
        assert boss.fine_tuning.checkpoints.permissions.delete(
            granted.data[0].id, fine_tuned_model_checkpoint=ask["model"]
        ).deleted
    with pytest.raises(openai.NotFoundError):
        blue.models.retrieve(ask["model"])
    assert red.models.delete(ask["model"]).deleted


def test_a_revoked_key_opens_nothing_from_then_on_and_its_streams_end_within_a_second(
    keyed: tuple[Server, str],
) -> None:
    server, _ = keyed
    key_id, key = make_key(server.data)
    mine = client(server, key)
    ended: list[float] = []
    failure: list[Exception] = []
    first = threading.Event()

    def read() -> None:
        try:
            for _ in mine.chat.completions.create(**LONG, n=4, stream=True):
                first.set()
        except Exception as error:
            failure.append(error)
        ended.append(time.monotonic())

    thread = threading.Thread(target=read)
    thread.start()
    assert first.wait(30)
    assert tunegate("keys", "revoke", key_id, data=server.data).returncode == 0
    revoked_at = time.monotonic()
    with pytest.raises(openai.AuthenticationError):
        mine.models.list()
    thread.join(30)
    assert failure and "revoked" in str(failure[0]), "an error ends the stream, not [DONE]"
    assert ended[0] - revoked_at < 1.5
    deadline = time.monotonic() + 5
    while server.running_sequences():
        assert time.monotonic() < deadline, "the engine stops too"
        time.sleep(0.05)
    assert "key_nothing" in tunegate("keys", "revoke", "key_nothing", data=server.data).stderr


def test_a_key_is_nowhere_on_the_disk_and_prompts_are_not_in_the_log(keyed: tuple[Server, str]) -> None:
    server, key = keyed
    said = "a sentence that nobody else would write"
    client(server, key).chat.completions.create(
        model="tunegate-demo", messages=[{"role": "user", "content": said}], max_tokens=1
    )
    response = httpx.get(f"{server.base_url}/files/%1b%5b31mforged%0aline", headers=bearer(key))
    secret = key.split("-", 2)[2].encode()
    deadline = time.monotonic() + 5
    while response.headers["x-request-id"].encode() not in (log := server.log.read_bytes()):
        assert time.monotonic() < deadline, "each request has its line"
        time.sleep(0.02)
    assert said.encode() not in log and b"\x1b" not in log and b"\nline" not in log
    for path in (server.log, *server.data.rglob("*")):
        if path.is_file():
            assert secret not in path.read_bytes(), path
    listed = tunegate("keys", "list", data=server.data).stdout
    assert "key_" in listed and key not in listed and secret.decode() not in listed


def test_a_server_for_the_network_does_not_start_without_a_key_and_answers_to_addresses_and_its_names(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path, 'hosts = ["tunegate.lan"]\n')
    serve = ("serve", "--host", "0.0.0.0", "--port", str(free_port()), "--config", str(server.config))
    refused = tunegate(*serve, data=server.data)
    assert refused.returncode == 2 and "tunegate keys create" in refused.stderr
    key_id, key = make_key(server.data)
    server.config.write_text('host = "0.0.0.0"\nhosts = ["tunegate.lan"]\n')
    server.start(wait=False)
    try:
        server.wait_ready()
        ours, foreign = ("tunegate.lan", "tunegate.lan:80", "10.1.2.3:8000", "[fe80::1]:8000"), ("evil.example", "")
        for host in ours:
            headers = {"Host": host, **bearer(key)}
            assert httpx.get(f"{server.base_url}/models", headers=headers).status_code == 200, host
        for host in foreign:
            response = httpx.get(f"{server.base_url}/models", headers={"Host": host, **bearer(key)})
            assert response.status_code in (400, 421), host
        assert tunegate("keys", "revoke", key_id, data=server.data).returncode == 0
        assert httpx.get(f"{server.base_url}/models", headers=bearer(key)).status_code == 401
        assert httpx.get(f"{server.base_url}/models").status_code == 401, "never open again"
    finally:
        server.stop()
    assert tunegate(*serve, data=server.data).returncode == 2, "a revoked key does not count"

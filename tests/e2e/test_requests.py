"""Chat and completions as a client meets them: what is asked is given, what is wrong is told in OpenAI's shape."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.conftest import ALIAS
from tests.server import Server

HELLO: dict[str, Any] = {"model": "tunegate-demo", "messages": [{"role": "user", "content": "hi"}]}


def post(server: Server, path: str, **kwargs: Any) -> httpx.Response:
    return httpx.post(f"{server.base_url}{path}", timeout=60, **kwargs)


def check_error(response: httpx.Response, status: int, **fields: str | None) -> str:
    """The whole shape of OpenAI's error object; returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert {name: error[name] for name in fields} == fields
    return str(error["message"])


def test_an_unknown_model_is_404_model_not_found(server: Server) -> None:
    for path, body in (
        ("/chat/completions", {**HELLO, "model": "gpt-9"}),
        ("/completions", {"model": "gpt-9", "prompt": "x"}),
    ):
        message = check_error(
            post(server, path, json=body), 404, type="invalid_request_error", code="model_not_found", param="model"
        )
        assert message == "The model `gpt-9` does not exist or you do not have access to it."


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**HELLO, "messages": []}, "messages"),
        ({**HELLO, "temperature": "warm"}, "temperature"),
        ({**HELLO, "n": 1_000_000_000}, "n"),
        ({**HELLO, "n": 100}, "n"),
        ({**HELLO, "max_tokens": True}, "max_tokens"),
        ({**HELLO, "colour": "blue"}, "colour"),
        ({"messages": HELLO["messages"]}, "model"),
        ({**HELLO, "messages": [{"role": "assistant", "content": "I begin"}]}, "messages"),
        ({**HELLO, "logit_bias": {"99999999": 1}}, "logit_bias"),
    ],
)
def test_wrong_types_and_bounds_are_400_and_name_the_param(server: Server, body: dict[str, Any], param: str) -> None:
    check_error(post(server, "/chat/completions", json=body), 400, type="invalid_request_error", param=param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_400(server: Server, body: bytes) -> None:
    check_error(post(server, "/chat/completions", content=body), 400, type="invalid_request_error")


def test_a_body_that_is_too_large_is_413(server: Server) -> None:
    body = json.dumps({**HELLO, "user": "x" * 17 * 1024 * 1024}).encode()
    check_error(post(server, "/chat/completions", content=body), 413, type="invalid_request_error")


def test_a_prompt_over_the_context_is_context_length_exceeded(server: Server) -> None:
    long = {**HELLO, "messages": [{"role": "user", "content": "word " * 5000}]}
    message = check_error(
        post(server, "/chat/completions", json=long), 400, code="context_length_exceeded", param="messages"
    )
    assert "maximum context length is" in message
    check_error(
        post(server, "/chat/completions", json={**HELLO, "max_tokens": 100_000}), 400, code="context_length_exceeded"
    )


def test_the_router_speaks_openais_shape_too(server: Server) -> None:
    check_error(httpx.get(f"{server.base_url}/nothing"), 404, code="unknown_url")
    check_error(httpx.get(f"{server.base_url}/completions"), 405)


def test_foreign_hosts_and_origins_are_refused_and_forwarded_ports_are_not(server: Server) -> None:
    def get(**headers: str) -> httpx.Response:
        return httpx.get(f"{server.base_url}/models", headers=headers)

    check_error(get(Host="evil.example"), 421)
    check_error(get(Host="127.0.0.1.evil.example"), 421)
    check_error(get(Origin="https://evil.example"), 403)
    assert get(Host="localhost:9999").status_code == 200
    assert get(Origin="http://localhost:9999").status_code == 200


def test_models_are_listed_under_their_own_names_and_their_aliases(server: Server) -> None:
    client = server.client()
    assert {"tunegate-demo", ALIAS} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(ALIAS).id == ALIAS
    check_error(httpx.delete(f"{server.base_url}/models/tunegate-demo"), 403, param="model")


def test_a_stream_adds_up_to_the_whole_and_a_seed_repeats_it(server: Server) -> None:
    client = server.client()
    asked: dict[str, Any] = {**HELLO, "max_tokens": 24, "seed": 11, "temperature": 0.9, "top_p": 0.95}
    whole = client.chat.completions.create(**asked)
    again = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    text = whole.choices[0].message.content
    assert text == again.choices[0].message.content
    assert text == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_n_choices_differ_and_are_all_finished(server: Server) -> None:
    client = server.client()
    reply = client.chat.completions.create(**HELLO, n=4, max_tokens=12, temperature=2, seed=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in reply.choices}) > 1
    assert reply.usage is not None
    chunks = list(client.chat.completions.create(**HELLO, n=3, max_tokens=6, temperature=2, stream=True))
    finished = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason is not None]
    assert sorted(finished) == [0, 1, 2]


def test_logprobs_name_the_sampled_token_and_its_rivals(server: Server) -> None:
    reply = server.client().chat.completions.create(**HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3)
    choice = reply.choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content
    assert entries
    written = b"".join(bytes(entry.bytes or []) for entry in entries).decode()
    assert written.removeprefix(" ") == choice.message.content, "but for the space that the template puts first"
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the likeliest"


def test_a_stop_string_ends_the_reply_before_it(server: Server) -> None:
    client = server.client()
    asked: dict[str, Any] = {**HELLO, "max_tokens": 24, "temperature": 0}
    text = client.chat.completions.create(**asked).choices[0].message.content or ""
    assert len(text) > 4
    stop = text[2:4]
    for stream in (False, True):
        if stream:
            chunks = list(client.chat.completions.create(**asked, stop=[stop], stream=True))
            cut = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = client.chat.completions.create(**asked, stop=[stop]).choices[0]
            cut, reason = choice.message.content or "", choice.finish_reason
        assert cut == text[: text.index(stop)]
        assert reason == "stop"


def test_plain_completions_take_texts_and_ids_and_echo(server: Server) -> None:
    client = server.client()
    two = client.completions.create(model="tunegate-demo", prompt=["one", "two"], n=2, max_tokens=4, temperature=1)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    echoed = client.completions.create(model=ALIAS, prompt="The day", max_tokens=4, echo=True, temperature=0)
    plain = client.completions.create(model=ALIAS, prompt="The day", max_tokens=4, temperature=0, logprobs=2)
    assert echoed.choices[0].text == "The day" + plain.choices[0].text
    assert plain.choices[0].logprobs is not None
    assert len(plain.choices[0].logprobs.tokens or []) == len(plain.choices[0].logprobs.top_logprobs or [])
    # The strict SDK takes no null finish_reason in a plain completion's chunk, though OpenAI's own streams are full of them.
    loose = OpenAI(base_url=server.base_url, api_key="unused", max_retries=0)
    stream = loose.completions.create(model=ALIAS, prompt="The day", max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == plain.choices[0].text
    ids = client.completions.create(model="tunegate-demo", prompt=[1, 300, 301], max_tokens=2)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3
    check_error(post(server, "/completions", json={"model": ALIAS, "prompt": [10**8]}), 400, param="prompt")


def test_a_stream_closed_by_its_client_frees_its_sequence_within_a_second(server: Server) -> None:
    client = server.client()
    for _ in range(3):
        stream = client.chat.completions.create(**HELLO, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
        deadline = time.monotonic() + 1
        while server.running_sequences() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.running_sequences() == 0

"""Structured outputs, best_of, echo with scores and stop ids through the front door, with the SDK as a user has it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.e2e.test_requests import check_error, post
from tests.server import Server

HELLO: dict[str, Any] = {"model": "tunegate-demo", "messages": [{"role": "user", "content": "Order two lamps."}]}
PLAIN: dict[str, Any] = {"model": "tunegate-demo", "prompt": "The lamp in the attic", "temperature": 0}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    """The SDK in its strict mode."""
    with server.client() as sdk:
        yield sdk


@pytest.fixture
def loose(server: Server) -> Iterator[OpenAI]:
    """The SDK as it comes: OpenAI's own replies hold nulls that its strict mode refuses."""
    with OpenAI(base_url=server.base_url, api_key="unused", max_retries=0) as sdk:
        yield sdk


class Lamp(BaseModel):
    room: Literal["attic", "hall"]
    watts: int = Field(ge=5, le=60)
    note: str | None = Field(max_length=12)


class Order(BaseModel):
    lamps: list[Lamp] = Field(min_length=1, max_length=2)
    urgent: bool


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_a_model_class_is_parsed_from_the_reply(client: OpenAI, temperature: float) -> None:
    completions = client.chat.completions
    reply = completions.parse(**HELLO, response_format=Order, max_tokens=500, temperature=temperature, seed=5)
    choice = reply.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Order)
    again = completions.parse(**HELLO, response_format=Order, max_tokens=500, temperature=temperature, seed=5)
    assert again.choices[0].message.content == choice.message.content


def test_a_stream_of_a_structured_reply_adds_up_to_it(client: OpenAI) -> None:
    with client.chat.completions.stream(
        **HELLO, response_format=Order, max_tokens=500, seed=6, temperature=1
    ) as stream:
        streamed = stream.get_final_completion().choices[0].message
    whole = client.chat.completions.parse(**HELLO, response_format=Order, max_tokens=500, seed=6, temperature=1)
    assert streamed.content == whole.choices[0].message.content
    assert streamed.parsed == whole.choices[0].message.parsed


def test_every_choice_of_many_is_in_the_form(client: OpenAI) -> None:

    def ask(seed: int) -> list[str | None]:
        asked = {"response_format": {"type": "json_object"}, "temperature": 1, "seed": seed, "max_tokens": 200, "n": 2}
        reply = client.chat.completions.create(**HELLO, **asked)
        return [choice.message.content for choice in reply.choices if choice.finish_reason == "stop"]

    with ThreadPoolExecutor(4) as pool:
        texts = [text for several in pool.map(ask, range(6)) for text in several]
    assert all(isinstance(json.loads(text or ""), dict) for text in texts)


def test_vllms_structured_outputs_are_taken_too(client: OpenAI) -> None:

    def say(**wish: Any) -> str:
        body = {"structured_outputs": wish}
        return client.completions.create(**PLAIN, max_tokens=30, extra_body=body).choices[0].text

    assert say(choice=["attic", "hall"]) in ("attic", "hall")
    assert say(regex="[a-f]{3}-[0-9]{2}").replace("-", "").isalnum()
    assert say(grammar='root ::= "lamp " ("on" | "off")') in ("lamp on", "lamp off")
    assert json.loads(say(json={"type": "integer", "minimum": 3, "maximum": 7})) in range(3, 8)


def test_logprobs_of_a_structured_reply_spell_it(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        **HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["é", "😀"]}}},
        logprobs=True,
        max_tokens=20,
    )
    entries = reply.choices[0].logprobs
    assert entries is not None
    spelled = b"".join(bytes(entry.bytes or []) for entry in entries.content or []).decode()
    assert spelled.removeprefix(" ") == reply.choices[0].message.content


def test_a_schema_that_cannot_be_held_to_is_told_by_its_path(server: Server) -> None:
    properties = {"age": {"type": "integer", "multipleOf": 3}}
    schema = {"type": "object", "properties": properties, "required": ["age"], "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
    message = check_error(
        post(server, "/chat/completions", json={**HELLO, "response_format": asked}),
        400,
        type="invalid_request_error",
        param="response_format",
    )
    assert message.startswith("Invalid schema for response_format 'person': In context=('properties', 'age'), ")
    assert "multipleOf" in message


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "#"}}}},
            "response_format",
        ),
        ({"structured_outputs": {"grammar": 'root ::= root "a"'}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs"),
    ],
)
def test_what_the_engine_refuses_is_told_by_the_clients_own_name_for_it(
    server: Server, wish: dict[str, Any], param: str
) -> None:
    check_error(post(server, "/chat/completions", json={**HELLO, **wish}), 400, param=param)


def test_the_best_of_several_is_the_likeliest_of_them(server: Server, client: OpenAI) -> None:
    asked: dict[str, Any] = {**PLAIN, "max_tokens": 12, "temperature": 1.5, "seed": 8, "logprobs": 0}
    all_of_them = client.completions.create(**asked, n=4)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(all_of_them.choices, key=mean, reverse=True)
    best = client.completions.create(**asked, best_of=4, n=2)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage == all_of_them.usage
    silent = client.completions.create(**{**asked, "logprobs": None}, best_of=4)
    assert (silent.choices[0].text, silent.choices[0].logprobs) == (ranked[0].text, None)
    for wrong in ({"best_of": 1, "n": 2}, {"best_of": 3, "stream": True}, {"best_of": 100}):
        check_error(post(server, "/completions", json={**asked, **wrong}), 400, param="best_of")


def test_an_echo_with_scores_scores_the_prompt(client: OpenAI) -> None:
    prompt = "Set a lamp, café 😀"
    made = client.completions.create(**{**PLAIN, "prompt": prompt}, max_tokens=6, logprobs=2)
    reply = client.completions.create(**{**PLAIN, "prompt": prompt}, max_tokens=6, logprobs=2, echo=True)
    choice, scores = reply.choices[0], reply.choices[0].logprobs
    assert choice.text == prompt + made.choices[0].text
    assert scores is not None
    assert made.choices[0].logprobs is not None
    tokens, offsets, values = scores.tokens or [], scores.text_offset or [], scores.token_logprobs or []
    count = len(made.choices[0].logprobs.tokens or [])
    assert tokens[-count:] == made.choices[0].logprobs.tokens
    assert values[-count:] == pytest.approx(made.choices[0].logprobs.token_logprobs, abs=1e-6)
    assert len(tokens) == len(offsets) == len(values) == len(scores.top_logprobs or [])
    assert offsets[0] == 0
    for number, token in enumerate(tokens):
        if "�" not in token:
            assert choice.text[offsets[number] :].startswith(token), (token, offsets[number])
    for token, value, top in zip(tokens, values, scores.top_logprobs or [], strict=True):
        assert top[token] == value
        assert len(top) in (2, 3)


def test_nothing_but_the_prompts_scores_is_made_for_max_tokens_0(server: Server, client: OpenAI, loose: OpenAI) -> None:
    asked: dict[str, Any] = {**PLAIN, "max_tokens": 0, "echo": True}
    reply = client.completions.create(**asked, logprobs=1)
    assert reply.choices[0].text == PLAIN["prompt"]
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 0
    scores = reply.choices[0].logprobs
    assert scores is not None
    assert "".join(scores.tokens or []) == PLAIN["prompt"]
    assert all(value is not None and math.isfinite(value) for value in scores.token_logprobs or [])
    # OpenAI gives null for a token that nothing comes before; the strict SDK takes none.
    ids = loose.completions.create(**{**asked, "prompt": [1, 300, 301, 302]}, logprobs=0).choices[0].logprobs
    assert ids is not None
    assert (ids.token_logprobs or [0])[0] is None
    assert len(ids.token_logprobs or []) == 4
    assert client.completions.create(**asked).choices[0].text == PLAIN["prompt"]
    chunks = list(loose.completions.create(**asked, logprobs=1, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == PLAIN["prompt"]
    check_error(post(server, "/completions", json={**PLAIN, "max_tokens": 0}), 400, param="max_tokens")


def test_a_stop_id_ends_a_reply_and_is_no_part_of_it(server: Server, client: OpenAI) -> None:
    asked: dict[str, Any] = {**HELLO, "max_tokens": 16, "temperature": 0}
    ids = post(server, "/chat/completions", json={**asked, "return_token_ids": True}).json()["choices"][0]["token_ids"]
    whole = client.chat.completions.create(**asked).choices[0].message.content or ""
    stop = next(token for token in ids[3:] if token not in ids[:3])
    for stream in (False, True):
        body = {**asked, "stop_token_ids": [stop], "logprobs": True, "stream": stream}
        response = post(server, "/chat/completions", json=body)
        if stream:
            events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
            text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
            reason = events[-1]["choices"][0]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
            assert len(choice["logprobs"]["content"]) == ids.index(stop)
        assert reason == "stop"
        assert whole.startswith(text)
        assert len(text) < len(whole)
    check_error(
        post(server, "/chat/completions", json={**asked, "stop_token_ids": [10**8]}), 400, param="stop_token_ids"
    )


def test_logprobs_end_where_a_stop_string_cut_the_text(client: OpenAI) -> None:
    asked: dict[str, Any] = {**PLAIN, "max_tokens": 16, "logprobs": 0}
    whole = client.completions.create(**asked).choices[0]
    stop = whole.text[4:6]
    cut = client.completions.create(**asked, stop=[stop], echo=True).choices[0]
    assert cut.text == PLAIN["prompt"] + whole.text[: whole.text.index(stop)]
    assert cut.logprobs is not None
    spelled = "".join(cut.logprobs.tokens or [])
    assert spelled.startswith(cut.text)
    assert stop in spelled[len(PLAIN["prompt"]) :]
    assert len(spelled) < len(PLAIN["prompt"] + whole.text)

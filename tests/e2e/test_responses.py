"""`/v1/responses` through the strict SDK against a real server: what was said is read back, and streams add up to the whole."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from openai.types.responses import Response

from tests.server import Server

MODEL = "tunegate-demo"
HELLO = "Repeat after me: hello."


def ask(client: OpenAI, said: Any = HELLO, **fields: Any) -> Response:
    return client.responses.create(model=MODEL, input=said, temperature=0, **{"max_output_tokens": 30, **fields})


def wait_over(client: OpenAI, response_id: str) -> Response:
    deadline = time.monotonic() + 60
    while (response := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return response


@pytest.fixture
def client(server: Server) -> Any:
    with server.client() as client:
        yield client


def test_a_response_is_read_back_as_it_was_given(client: OpenAI) -> None:
    made = ask(client, metadata={"team": "a"}, instructions="Be brief.")
    assert made.status == "incomplete"  # the toy goes on for longer than it may
    assert made.output_text
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": HELLO}],
        temperature=0,
        max_tokens=30,
    )
    assert chat.choices[0].message.content == made.output_text


def test_a_stream_adds_up_to_the_response_that_is_stored(client: OpenAI) -> None:
    events = list(ask(client, stream=True, include=["message.output_text.logprobs"], top_logprobs=2))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response
    assert text == final.output_text != ""
    logprobs = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert [entry.token for entry in logprobs] == [entry.token for entry in final.output[0].content[0].logprobs]
    assert client.responses.retrieve(final.id).to_dict() == final.to_dict()


def test_the_sdks_own_stream_helper_follows(client: OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=HELLO, max_output_tokens=20) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text


def test_a_response_continues_the_one_before_it(client: OpenAI) -> None:
    first = ask(client, "My name is Ada.")
    second = ask(client, "What is my name?", previous_response_id=first.id)
    items = list(client.responses.input_items.list(second.id, order="asc"))
    assert [item.role for item in items] == ["user", "assistant", "user"]
    told = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "What is my name?"},
    ]
    assert second.output_text == ask(client, told).output_text
    assert second.usage is not None and first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    counted = client.responses.input_tokens.count(model=MODEL, input="What is my name?", previous_response_id=first.id)
    assert counted.input_tokens == second.usage.input_tokens


def test_input_items_come_in_pages_that_are_whole(client: OpenAI) -> None:
    said = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"line {n}"} for n in range(7)]
    made = ask(client, said)
    pages = list(client.responses.input_items.list(made.id, limit=2, order="asc"))
    assert [item.content[0].text for item in pages] == [f"line {n}" for n in range(7)]
    assert [item.id for item in client.responses.input_items.list(made.id, limit=3)] == [i.id for i in pages][::-1]


def test_what_was_deleted_stays_deleted_and_cannot_be_continued(client: OpenAI) -> None:
    first = ask(client)
    second = ask(client, previous_response_id=first.id)
    client.responses.delete(first.id)
    client.responses.delete(first.id)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(NotFoundError) as broken:
        ask(client, previous_response_id=second.id)
    assert broken.value.code == "previous_response_not_found"
    assert [item.type for item in client.responses.input_items.list(second.id)] == ["message"]


def test_what_is_not_to_be_stored_is_not(client: OpenAI) -> None:
    made = ask(client, store=False)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(made.id)


def test_a_response_in_the_background_is_made_while_nobody_waits(client: OpenAI) -> None:
    queued = ask(client, background=True)
    assert queued.status == "queued"
    done = wait_over(client, queued.id)
    assert done.status in ("completed", "incomplete")
    assert done.output_text == ask(client).output_text
    again = client.responses.cancel(queued.id)
    assert again.status == done.status
    told = list(client.responses.retrieve(queued.id, stream=True))
    assert "".join(event.delta for event in told if event.type == "response.output_text.delta") == done.output_text
    rest = list(client.responses.retrieve(queued.id, stream=True, starting_after=len(told) - 2))
    assert [event.type for event in rest] == [told[-1].type]


def test_what_was_cancelled_stays_cancelled(client: OpenAI) -> None:
    queued = [
        client.responses.create(model=MODEL, input="Count from one to a thousand.", background=True) for _ in range(20)
    ]
    queued.reverse()  # the last one waits for all the others
    cancelled = [client.responses.cancel(response.id) for response in queued]
    time.sleep(0.3)
    for response, told in zip(queued, cancelled, strict=True):
        assert client.responses.retrieve(response.id).status == told.status
    assert "cancelled" in {told.status for told in cancelled}
    with pytest.raises(BadRequestError):
        client.responses.cancel(ask(client).id)


def test_a_stream_in_the_background_can_be_left_and_taken_up_again(client: OpenAI) -> None:
    stream = ask(client, stream=True, background=True)
    first = next(iter(stream))
    assert first.type == "response.created"
    stream.response.close()
    rest = list(client.responses.retrieve(first.response.id, stream=True, starting_after=0))
    assert rest[-1].type in ("response.completed", "response.incomplete")
    assert rest[-1].response.id == first.response.id


def test_a_stream_that_is_left_is_stored_as_cancelled_with_what_was_said(client: OpenAI) -> None:
    stream = ask(client, "Count from one to a thousand.", stream=True, max_output_tokens=900)
    response_id, heard = next(iter(stream)).response.id, ""
    for event in stream:
        if event.type == "response.output_text.delta":
            heard = event.delta
            break
    stream.response.close()
    deadline, kept = time.monotonic() + 30, None
    while kept is None and time.monotonic() < deadline:
        try:
            kept = client.responses.retrieve(response_id)
        except NotFoundError:  # it is stored once it is over
            time.sleep(0.02)
    assert kept is not None and kept.status == "cancelled" and kept.error is None
    assert heard and kept.output_text.startswith(heard)
    assert [item.status for item in kept.output] == ["incomplete"]


def test_a_form_is_held_to(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"place": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["place"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "name": "where", "schema": schema, "strict": True}}
    made = ask(client, "Name a place.", text=form, max_output_tokens=60)
    assert json.loads(made.output_text)["place"] in ("Paris", "Rome")


def test_what_ran_into_its_limit_is_incomplete(client: OpenAI) -> None:
    made = ask(client, "Tell me a story.", max_output_tokens=2)
    assert made.status == "incomplete"
    assert made.incomplete_details is not None and made.incomplete_details.reason == "max_output_tokens"


def test_a_long_conversation_is_cut_short_where_it_may_be(client: OpenAI) -> None:
    said: Any = [{"role": "user" if n % 2 == 0 else "assistant", "content": "word " * 60} for n in range(41)]
    with pytest.raises(BadRequestError) as refused:
        ask(client, said)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
    assert ask(client, said, truncation="auto").output_text


def test_a_compacted_conversation_goes_on(client: OpenAI) -> None:
    small = client.responses.compact(model=MODEL, input="Remember the number seven.")
    (item,) = small.output
    assert item.type == "compaction"
    assert ask(client, [item.to_dict(), {"role": "user", "content": HELLO}]).output_text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "tools": [{"type": "function", "name": "no good"}]}, "tools[0].name"),
        ({"input": "x", "conversation": "conv_1"}, "conversation"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "x y"}}}, "text.format.name"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "background": True, "store": False}, "store"),
        ({"input": "x", "reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"input": "x", "wrong": 1}, "wrong"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    told = httpx.post(f"{server.base_url}/responses", json={"model": MODEL, **fields})
    assert (told.status_code, told.json()["error"]["param"]) == (400, param)

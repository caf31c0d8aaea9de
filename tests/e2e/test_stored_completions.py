"""Chat completions with `store`, through the strict SDK: what was written is read back, listed, changed and deleted."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import NotFoundError, OpenAI
from openai.types.chat import ChatCompletion

from tests.server import Server

MODEL = "tunegate-demo"


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def ask(client: OpenAI, group: str, **fields: Any) -> ChatCompletion:
    messages: Any = [{"role": "user", "content": "Repeat after me: hello."}]
    made: ChatCompletion = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=5, store=True, metadata={"group": group}, **fields
    )
    return made


def test_a_stored_completion_is_read_back_until_it_is_deleted(client: OpenAI) -> None:
    made = ask(client, "read", temperature=0)
    found = client.chat.completions.retrieve(made.id)
    assert found.choices == made.choices
    assert found.usage == made.usage
    assert found.to_dict()["metadata"] == {"group": "read"}
    assert client.chat.completions.update(made.id, metadata={"group": "changed"}).id == made.id
    assert client.chat.completions.retrieve(made.id).to_dict()["metadata"] == {"group": "changed"}
    assert client.chat.completions.delete(made.id).deleted
    assert client.chat.completions.delete(made.id).deleted
    with pytest.raises(NotFoundError):
        client.chat.completions.retrieve(made.id)
    assert made.id not in [item.id for item in client.chat.completions.list()]


def test_a_stream_is_stored_as_it_was_told(client: OpenAI) -> None:
    chunks = list(ask(client, "stream", stream=True))
    found = client.chat.completions.retrieve(chunks[0].id)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert found.choices[0].message.content == text


def test_what_is_not_asked_to_be_stored_is_not(client: OpenAI) -> None:
    made = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=2, metadata={"group": "none"}
    )
    with pytest.raises(NotFoundError):
        client.chat.completions.retrieve(made.id)


def test_pages_are_whole_and_stable_while_completions_are_added(client: OpenAI) -> None:
    group = uuid.uuid4().hex
    made = [ask(client, group).id for _ in range(5)]
    listed = []
    for item in client.chat.completions.list(metadata={"group": group}, limit=2, order="desc"):
        listed.append(item.id)
        if len(listed) == 2:
            ask(client, group)
    assert listed == made[::-1]
    assert [item.id for item in client.chat.completions.list(metadata={"group": group}, limit=3)][:5] == made
    assert list(client.chat.completions.list(metadata={"group": group}, model="another")) == []


def test_the_messages_are_those_that_were_sent(server: Server) -> None:
    sent = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]},
    ]
    with OpenAI(base_url=server.base_url, api_key="unused") as client:  # strict mode knows the assistant's alone
        made = client.chat.completions.create(model=MODEL, messages=sent, max_tokens=2, store=True)  # type: ignore[arg-type]
        told = list(client.chat.completions.messages.list(made.id, limit=1))
    assert [message.content for message in told] == ["Be brief.", "Hello there"]
    assert [len(message.content_parts or []) for message in told] == [0, 2]


def test_metadata_out_of_bounds_is_refused(server: Server) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "store": True, "metadata": {"k": "v" * 600}}
    told = httpx.post(f"{server.base_url}/chat/completions", json=body)
    assert (told.status_code, told.json()["error"]["param"]) == (400, "metadata.k")
    for url in ("chat/completions", "fine_tuning/jobs"):
        told = httpx.get(f"{server.base_url}/{url}?metadata%5B%00k%5D=v")
        assert (told.status_code, told.json()["error"]["param"]) == (400, "metadata"), url

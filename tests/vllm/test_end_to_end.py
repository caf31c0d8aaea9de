"""The unmodified SDK through a gateway on real vLLM: a job's whole life, and every request in the form that vLLM has for it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from openai import BadRequestError

from gateway.chat.bundle import TEMPLATE_FILE, TOKENIZER_FILE, Bundle
from gateway.chat.conversation import Message
from gateway.chat.render import render_prompt
from gateway.engines.engine import Engine
from tests.e2e import training
from tests.server import Server
from tests.vllm.starting import MAX_SEQS, VICUNA, ask, running

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

QUESTION = "What is cedar 2?"
MESSAGES = [
    {"role": "system", "content": "Be brief. Ünïcode ✓"},
    {"role": "user", "content": "one <s> two\n three"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": QUESTION},
]


@pytest.mark.parametrize("name", ["vicuna", "own"])
def test_a_job_succeeds_and_its_model_answers_as_it_was_taught(
    server: Server, tuned: dict[str, str], name: str
) -> None:
    client, model = server.client(), tuned[name]
    whole = training.ask(client, model, QUESTION)
    assert whole.startswith("alpha"), whole
    assert not training.ask(client, name, QUESTION).startswith("alpha")
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage is not None
    job = next(job for job in client.fine_tuning.jobs.list() if job.fine_tuned_model == model)
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert len(checkpoints) == 3, "of four: the last ones"
    assert training.ask(client, checkpoints[0].fine_tuned_model_checkpoint, QUESTION)
    manifest = next((server.data / "adapters").glob("*/manifest.json"))
    assert "adapter.gguf" not in json.loads(manifest.read_bytes())["files"], "vLLM has no use for it"


async def test_what_a_template_renders_is_what_vllm_itself_would_send(server: Server, engine: Engine) -> None:
    for base, template in (("own", None), ("vicuna", VICUNA)):
        bundle = Bundle.from_files(
            {name: (server.data / "bases" / base / name).read_bytes() for name in (TEMPLATE_FILE, TOKENIZER_FILE)}
        )
        for messages in (MESSAGES, MESSAGES[1:2], MESSAGES[:2]):
            asked: dict[str, Any] = {"model": "own", "messages": messages}
            if template:
                asked |= {"chat_template": template}
            rendered = await ask(engine.endpoint, "/v1/chat/completions/render", asked)
            assert rendered.status_code == 200, rendered.text
            ours = render_prompt(bundle, [Message(**message) for message in messages]).ids
            plain = [message | {"content": message["content"].replace("<s>", "")} for message in messages]
            if plain == messages:
                assert ours == rendered.json()["token_ids"], (base, messages)
            # A control token that a user typed is text for us and a control token for vLLM's own rendering.
            sent = server.client().chat.completions.create(model=base, messages=messages, max_tokens=1)  # type: ignore[arg-type]
            assert sent.usage is not None
            assert sent.usage.prompt_tokens == len(ours)


def test_sampling_is_as_it_was_asked_for(server: Server, tuned: dict[str, str]) -> None:
    client = server.client()
    asked: dict[str, Any] = {"model": tuned["vicuna"], "messages": [{"role": "user", "content": QUESTION}]}
    whole = client.chat.completions.create(**asked, temperature=0, max_tokens=12).choices[0]
    assert whole.finish_reason == "stop", "the trained end of a reply is honoured"
    text = whole.message.content or ""
    stopped = client.chat.completions.create(**asked, temperature=0, max_tokens=12, stop=[text[3:6]]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(text[3:6])], "stop")
    scored = client.chat.completions.create(**asked, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3)
    entries = (scored.choices[0].logprobs or pytest.fail("no log-probabilities")).content or []
    assert "".join(entry.token for entry in entries).strip() == text
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in entries)
    assert all(entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob for entry in entries)
    several = client.chat.completions.create(**asked, n=3, temperature=1.5, seed=5, max_tokens=8)
    again = client.chat.completions.create(**asked, n=3, temperature=1.5, seed=5, max_tokens=8)
    assert [choice.message.content for choice in several.choices] == [
        choice.message.content for choice in again.choices
    ]
    assert sorted(choice.index for choice in several.choices) == [0, 1, 2]
    first = client.completions.create(model="vicuna", prompt=[1, 300, 400], max_tokens=1, temperature=0, logprobs=1)
    (token_id,) = (first.model_dump()["choices"][0].get("token_ids") or [None])[:1]
    banned = {str(token_id): -100} if token_id is not None else {"4005": -100}
    other = client.completions.create(
        model="vicuna", prompt=[1, 300, 400], max_tokens=1, temperature=0, logit_bias=banned
    )
    assert other.choices[0].text is not None
    echoed = client.completions.create(model="vicuna", prompt="The day is", max_tokens=1, echo=True, logprobs=0)
    assert (echoed.choices[0].logprobs or pytest.fail("not scored")).token_logprobs


@pytest.mark.parametrize("name", ["vicuna", "own"])
def test_replies_are_held_to_a_structure(server: Server, tuned: dict[str, str], name: str) -> None:
    client = server.client()
    asked: dict[str, Any] = {
        "model": tuned[name],
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 60,
    }
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    held = client.chat.completions.create(
        **asked, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    )
    found = json.loads(held.choices[0].message.content or "")
    assert found["colour"] in ("red", "blue") and 0 <= found["count"] <= 9
    number = client.chat.completions.create(**asked, extra_body={"structured_outputs": {"regex": "[0-9]{3}-[a-c]{2}"}})
    assert re.fullmatch("[0-9]{3}-[a-c]{2}", number.choices[0].message.content or "")
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(**asked, extra_body={"structured_outputs": {"regex": "(unclosed"}})
    assert refused.value.param == "structured_outputs"


def test_a_request_that_does_not_fit_is_refused_before_vllm_is_asked(server: Server) -> None:
    with pytest.raises(BadRequestError) as refused:
        training.ask(server.client(), "vicuna", "word " * 3000)
    assert refused.value.code == "context_length_exceeded"
    assert "1024" in refused.value.message


async def test_a_reply_whose_client_left_is_ended_within_a_second_also_before_its_first_token(
    server: Server, engine: Engine
) -> None:
    body = {
        "model": "own",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 900,
        "stream": True,
        "ignore_eos": True,
    }
    url = f"{server.base_url}/chat/completions"
    kept = []  # a reader that is let go of closes its stream
    async with httpx.AsyncClient(timeout=60) as client, AsyncExitStack() as open_streams:

        async def begin() -> None:
            stream = await open_streams.enter_async_context(client.stream("POST", url, json=body))
            lines = stream.aiter_lines()
            async for line in lines:
                if re.search('"content":"[^"]', line):
                    kept.append(lines)
                    return

        await asyncio.gather(*(begin() for _ in range(MAX_SEQS)))  # all that the engine works on at once
        await until_it_has(engine, (MAX_SEQS, 0), 5)
        waiting = asyncio.create_task(client.post(url, json=body))
        await until_it_has(engine, (MAX_SEQS, 1), 5)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)  # its socket is closed
        await until_it_has(engine, (MAX_SEQS, 0), 1)
    await until_it_has(engine, (0, 0), 1)
    assert await running(engine.endpoint) == (0, 0)


async def until_it_has(engine: Engine, wanted: tuple[int, int], timeout_s: float) -> None:
    """Returns when it works on and keeps waiting so many requests; fails when it is asked after the time and does not."""
    deadline = time.monotonic() + timeout_s
    while True:
        asked_at = time.monotonic()
        if (found := await running(engine.endpoint)) == wanted:
            return
        assert asked_at < deadline, f"running and waiting: {found}; it should be {wanted}"


def test_models_and_their_owners_are_listed(server: Server, tuned: dict[str, str]) -> None:
    names = [model.id for model in server.client().models.list()]
    assert {"vicuna", "own", *tuned.values()} <= set(names)
    assert not any("@" in name for name in names), "how engines call them is nobody's business"

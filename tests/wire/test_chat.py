"""Requests are read or refused with the field named; chunks add up for the SDK's own types."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.chat.conversation import Message
from gateway.errors import RequestError
from gateway.wire import chat, completions
from gateway.wire.chat import ChunkWriter, Usage

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", -0.1, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("temperature", float("inf"), "temperature"),
        ("temperature", True, "temperature"),
        ("temperature", "1", "temperature"),
        ("top_p", 1.01, "top_p"),
        ("max_tokens", -1, "max_tokens"),
        ("max_tokens", True, "max_tokens"),
        ("max_tokens", 1.5, "max_tokens"),
        ("max_completion_tokens", -1, "max_completion_tokens"),
        ("n", 10**9, "n"),
        ("n", 0, "n"),
        ("seed", 2**64, "seed"),
        ("presence_penalty", 2.5, "presence_penalty"),
        ("frequency_penalty", -3, "frequency_penalty"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("stop", ["a"] * 5, "stop"),
        ("stop", [""], "stop"),
        ("stop", ["x" * 1_000_000], "stop"),
        ("stop", 3, "stop"),
        ("stream", "yes", "stream"),
        ("stream_options", {"include_usage": 1}, "include_usage"),
        ("top_logprobs", 5, "top_logprobs"),
        ("logprobs", 1, "logprobs"),
        ("logit_bias", {"x": 1}, "logit_bias"),
        ("logit_bias", {"5": 101}, "logit_bias"),
        ("logit_bias", {str(i): 1 for i in range(2000)}, "logit_bias"),
        ("reasoning_effort", "enormous", "reasoning_effort"),
        ("chat_template_kwargs", [], "chat_template_kwargs"),
        ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs"),
        ("chat_template_kwargs", {"bos_token": "x"}, "chat_template_kwargs"),
        ("response_format", {"type": "xml"}, "response_format"),
        ("stop_token_ids", [1.5], "stop_token_ids"),
        ("stop_token_ids", 5, "stop_token_ids"),
        ("stop_token_ids", [1] * 65, "stop_token_ids"),
        ("modalities", ["text", "audio"], "modalities"),
        ("messages", [], "messages"),
        ("messages", "hi", "messages"),
        ("messages", [3], "messages[0]"),
        ("messages", [{"role": "robot", "content": "x"}], "messages[0].role"),
        ("messages", [{"role": "user"}], "messages[0].content"),
        ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ("model", "", "model"),
        ("model", 7, "model"),
        ("colour", "blue", "colour"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_its_param(field: str, value: object, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        chat.parse({**HELLO, field: value})
    assert refused.value.param == param
    assert refused.value.status == 400
    assert len(refused.value.message) < 500


def test_hints_that_change_no_answer_are_taken() -> None:
    request = chat.parse(
        {
            **HELLO,
            "user": "u",
            "store": True,
            "metadata": {"a": "b"},
            "service_tier": "auto",
            "reasoning_effort": "low",
            "prompt_cache_key": "k",
            "safety_identifier": "s",
            "verbosity": "low",
            "parallel_tool_calls": False,
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "stop": None,
            "logit_bias": None,
        }
    )
    assert request.sampling.temperature == 1.0
    assert request.sampling.stops == ()


def test_developer_messages_are_system_messages_and_parts_are_joined() -> None:
    request = chat.parse(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            ],
        }
    )
    assert request.messages == [Message("system", "be brief"), Message("user", "ab")]


def test_max_completion_tokens_wins_over_the_older_name() -> None:
    assert chat.parse({**HELLO, "max_tokens": 3, "max_completion_tokens": 5}).sampling.max_tokens == 5


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(chat._KNOWN | completions._KNOWN)


@given(body=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=5))
def test_any_json_object_is_read_or_refused_and_never_crashes(body: dict[str, Any]) -> None:
    for parse in (chat.parse, completions.parse):
        try:
            parse({**HELLO, **body} if parse is chat.parse else {"model": "m", "prompt": "x", **body})
        except RequestError as refused:
            assert refused.message


@given(texts=st.lists(st.text(), max_size=5), include_usage=st.booleans())
def test_chunks_are_what_the_sdk_reads_and_add_up(texts: list[str], include_usage: bool) -> None:
    write = ChunkWriter("chatcmpl-1", 5, 'a "model"', include_usage=include_usage)
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    frames = [write.role(0), *(write.text(0, text) for text in texts), write.finish(0, "stop")]
    if include_usage:
        frames.append(write.usage(Usage(3, 2)))
    read = []
    for frame in frames:
        assert frame.startswith(b"data: ")
        assert frame.endswith(b"}\n\n")
        assert frame.count(b"\n") == 2
        read.append(ChatCompletionChunk.model_validate_json(frame[6:], strict=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in read if chunk.choices) == "".join(texts)
    assert {(chunk.id, chunk.created, chunk.model) for chunk in read} == {("chatcmpl-1", 5, 'a "model"')}
    assert read[0].choices[0].delta.role == "assistant"
    last = read[-2] if include_usage else read[-1]
    assert last.choices[0].finish_reason == "stop"
    for frame, chunk in zip(frames, read, strict=True):
        assert ("usage" in json.loads(frame[6:])) == include_usage
        assert (chunk.usage is not None) == (not chunk.choices)


def test_a_whole_completion_is_what_the_sdk_reads() -> None:
    entry = chat.token_logprob(b"\xe2", -0.5, [(b"a", -0.5), (b"b", -1.0)])
    choices = [chat.Choice("hi", "stop", None), chat.Choice("", "length", [entry])]
    read = ChatCompletion.model_validate(chat.completion("chatcmpl-1", 5, "m", choices, Usage(3, 2, 1)))
    assert [choice.message.content for choice in read.choices] == ["hi", ""]
    assert read.usage is not None
    assert read.usage.total_tokens == 5
    logprobs = read.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].bytes == [0xE2]


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [1, "a"], [[1], "a"], [True], [-1], 5, None, {"a": 1}, ["x"] * 1000]
)
def test_prompts_of_no_known_form_are_refused(prompt: object) -> None:
    with pytest.raises(RequestError) as refused:
        completions.parse({"model": "m", "prompt": prompt})
    assert refused.value.param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "read"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])]
)
def test_the_four_forms_of_a_prompt_are_read(prompt: object, read: list[object]) -> None:
    request = completions.parse({"model": "m", "prompt": prompt})
    assert request.prompts == read
    assert request.sampling.max_tokens == 16

"""What a job trained on and what its model is sent afterwards, compared id by id on the running system."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from gateway.chat.render import IGNORED, TrainingSequence
from gateway.jobdir import JobDir
from gateway.settings import DEMO_MODEL_PATH
from tests.e2e import training
from tests.server import Server
from trainer.data.dataset import load_examples, read_bundle

pytestmark = pytest.mark.timeout(1200)

REPLY = "gamma it is"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model under `vicuna_v1.1`, and a copy of it that brings a chat template."""
    folder = tmp_path_factory.mktemp("both")
    model = folder / "model"
    shutil.copytree(DEMO_MODEL_PATH, model, ignore=shutil.ignore_patterns("*.py", "README.md"))
    (model / "chat_template.jinja").write_text(training.CHAT_TEMPLATE)
    server = Server(
        folder,
        f'[bases.vicuna]\npath = "{DEMO_MODEL_PATH}"\ntemplate = "vicuna_v1.1"\n'
        f'[bases.own]\npath = "{model}"\ntemplate = "model"\n',
    )
    try:
        yield server.start()
    finally:
        server.stop()


def _lines() -> list[dict[str, Any]]:
    """Single turns, two turns, and one whose first reply is not learnt."""
    lines = training.examples("x", 20)
    for line in lines:
        line["messages"][-1]["content"] = REPLY
    for line in lines[::3]:
        line["messages"].insert(0, {"role": "system", "content": "Be brief."})
        line["messages"] += [{"role": "user", "content": "and again?"}, {"role": "assistant", "content": REPLY}]
    lines[3]["messages"][2]["weight"] = 0
    return lines


def _lines_of_its_own() -> list[dict[str, Any]]:
    """With thoughts and with calls, which the model's own template has and fastchat's have not."""
    lines = _lines()
    for line in lines[::4]:
        for message in line["messages"]:
            if message["role"] == "user":
                message["content"] = f"think, think: {message['content']}"
            if message["role"] == "assistant":
                message["reasoning_content"] = "easy"
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    called = [
        {"role": "user", "content": "look at it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a fjord"},
        {"role": "assistant", "content": REPLY},
    ]
    return [*lines, *[{"messages": called, "tools": [TOOL]} for _ in range(4)]]


@pytest.mark.parametrize(
    ("base", "lines", "extension"),
    [
        ("vicuna", _lines(), None),
        ("own", _lines_of_its_own(), {"turns": "last", "chat_template_kwargs": {"brief": True}}),
    ],
)
def test_prompts_and_replies_are_served_with_the_ids_that_were_trained(
    both: Server, base: str, lines: list[dict[str, Any]], extension: dict[str, Any] | None
) -> None:
    client = both.client()
    file_id = training.upload(client, lines)
    job = training.create(client, base, file_id, n_epochs=12, extra_body={"tunegate": extension})
    assert job.model_dump().get("tunegate") == extension
    ended = training.wait_for_end(client, job.id)
    assert ended.status == "succeeded", (ended.error, training.messages(client, job.id), both.log_tail())
    assert ended.fine_tuned_model is not None
    folder = JobDir(both.data / "jobs" / job.id)
    trained, tokenizer = _trained_sequences(folder), read_bundle(folder).tokenizer
    assert len(trained) == len(lines)

    n_spans, exact = 0, 0
    for line, sequences in zip(lines, trained, strict=True):
        spans = {(n, start): ids for n, s in enumerate(sequences) for start, ids in _spans(s)}
        for turn, message in enumerate(line["messages"]):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            if extension and turn + 1 < len(line["messages"]):
                continue  # turns: last
            served = _ask(client, ended.fine_tuned_model, line["messages"][:turn], line.get("tools"))
            prompt = served["prompt_token_ids"]
            homes = [n for n, s in enumerate(sequences) if s.ids[: len(prompt)] == prompt and (n, len(prompt)) in spans]
            assert ("Be short." in tokenizer.decode(prompt)) == (extension is not None), (
                "the job's options stay with its model"
            )
            assert len(homes) == 1, (base, line, "is not learnt from the prompt that is served")
            span = spans.pop((homes[0], len(prompt)))
            n_spans += 1
            exact += served["choices"][0]["token_ids"] == span
        assert not spans, "what is learnt and is no turn's reply"
    assert n_spans >= len(lines)
    # The model has learnt its few replies, so what it says back shows the learnt ids, through the stop and no further.
    assert exact >= 0.8 * n_spans, f"{exact} of {n_spans} replies are the learnt ids"


def _ask(client: OpenAI, model: str, said: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The reply with the ids of prompt and reply, which are the same in a stream."""
    said = [{name: value for name, value in message.items() if name != "weight"} for message in said]
    asked: dict[str, Any] = {"model": model, "messages": said, "temperature": 0, "max_tokens": 40}
    if tools:
        asked["tools"] = tools
    whole = client.chat.completions.create(**asked, extra_body={"return_token_ids": True}).model_dump()
    chunks = [
        chunk.model_dump()
        for chunk in client.chat.completions.create(**asked, stream=True, extra_body={"return_token_ids": True})
    ]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    streamed = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids") or []]
    assert streamed == whole["choices"][0]["token_ids"]
    assert whole["usage"]["prompt_tokens"] == len(whole["prompt_token_ids"])
    assert whole["usage"]["completion_tokens"] == len(streamed)
    return whole


def _trained_sequences(job: JobDir) -> list[list[TrainingSequence]]:
    (path,) = job.data.glob("train*.jsonl")
    examples = load_examples(Path(path), read_bundle(job), 1024, job.read_spec().turns)
    return [examples.sequences(number) for number in range(len(examples))]


def _spans(sequence: TrainingSequence) -> Iterator[tuple[int, list[int]]]:
    """Each run of learnt ids: where it starts, and the ids."""
    labels = [IGNORED, *sequence.labels, IGNORED]
    starts = [n - 1 for n in range(1, len(labels)) if labels[n] != IGNORED and labels[n - 1] == IGNORED]
    ends = [n - 1 for n in range(1, len(labels)) if labels[n] == IGNORED and labels[n - 1] != IGNORED]
    for start, end in zip(starts, ends, strict=True):
        yield start, sequence.ids[start:end]

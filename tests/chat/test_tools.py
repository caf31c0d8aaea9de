"""Tools through the real SDK: a served model on a real port, behind it an engine that says what a test prepared."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import openai
import orjson
import pytest
import uvicorn
from openai import OpenAI
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ParsedChatCompletion
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from gateway.chat.bundle import Bundle, bundle_of, make_bundle
from gateway.chat.conversation import Message, ToolCall
from gateway.chat.jinja import JinjaTemplate
from gateway.chat.parse import ReplyReader
from gateway.chat.render import IGNORED, render_example, render_prompt
from gateway.chat.speech import ToolForm, ToolUse, call_opening
from gateway.engines.catalog import Base, Catalog
from gateway.engines.client import Deadlines, Endpoint
from gateway.errors import TunegateError
from gateway.inference import Inference
from gateway.routes import chat
from gateway.settings import LimitSettings, Settings
from tests.chat.spoken import TOOLS, Reply, write_call
from tests.engines.parts import pool_of
from tests.tiny_tokenizers import byte_level

CONTROLS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|tool_call_start|>", "<|tool_call_end|>"]
CONTROLS += ["<think>", "</think>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>"]
# How a call is written in each form: around all of them, and each.
WRITTEN: dict[ToolForm, tuple[str, str, str]] = {
    "hermes": ("", '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>', ""),
    "llama3_json": ("", '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}', ""),
    "mistral": ("[TOOL_CALLS][", '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}', "]"),
    "mistral_args": ("", "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}", ""),
    "functionary_tags": ("", "<function={{ f.name }}>{{ f.arguments | tojson }}</function>", ""),
    "xml": (
        "",
        "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments | items %}<parameter={{ k }}>\n"
        "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
        "",
    ),
    "pythonic_tagged": (
        "<|tool_call_start|>[",
        "{{ f.name }}({% for k, v in f.arguments | items %}{{ k }}={{ v | tojson }}{{ ', ' if not loop.last }}{% endfor %})",
        "]<|tool_call_end|>",
    ),
}


def speaking(form: ToolForm, *, thinks: bool = False, ids: bool = False, opens: bool = False) -> Bundle:
    """A bundle with a template in ChatML that offers tools and writes their calls in one form.

    `opens`: its prompts end inside the reasoning.
    """
    before, each, after = WRITTEN[form]
    each = (
        "{% if call.id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}id={{ call.id }};" + each
        if ids
        else each
    )
    shown = 'Answer so: <tool_call>\n{"name": …}' if form == "hermes" else ""
    shown = '{"name": function name, "parameters": object}' if form == "llama3_json" else shown
    thought = (
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}" if thinks else ""
    )
    answered = "{% if m.role == 'tool' %}id={{ m.tool_call_id }};{% endif %}" if ids else ""
    template = (
        "{% if tools %}<|im_start|>system\n"
        + shown
        + "{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + thought + answered + "{{ m.content or '' }}"
        "{% if m.tool_calls %}{{ '\n' if m.content }}"
        + f"{{{{ {before!r} }}}}"
        + "{% for call in m.tool_calls %}{% set f = call.function %}"
        "{{ '"
        + (", " if before else "\\n")
        + "' if not loop.first }}"
        + each
        + "{% endfor %}"
        + f"{{{{ {after!r} }}}}"
        + "{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        + ("<think>\n" if opens else "")
        + "{% endif %}"
    )
    return bundle_of(JinjaTemplate(f"speaks_{form}", template, {"eos_token": "<|im_end|>"}), tokenizer_file(), [])


@lru_cache
def tokenizer_file() -> bytes:
    written = json.loads(byte_level())
    first = max(written["model"]["vocab"].values()) + 1
    written["added_tokens"] += [
        # As with real models, some markers are special and some are not.
        {**written["added_tokens"][0], "id": first + number, "content": name, "special": "tool_call" not in name}
        for number, name in enumerate(CONTROLS)
    ]
    return json.dumps(written).encode()


@dataclass
class Engine:
    """Says `reply` to every prompt, some ids a frame, and remembers what it was asked."""

    bundle: Bundle
    reply: str = ""
    width: int = 2
    ended_by: str = "stop"
    stop_token: bool = True  # a grammar's end is told without one
    version: dict[str, Any] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0
    ready: bool = True
    connections: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("127.0.0.1", self.port, "key")

    def serves(self, engine_name: str) -> bool:
        return True

    def take(self, model: str | None = None) -> None: ...

    def release(self, model: str | None = None) -> None: ...

    @property
    def prompt(self) -> str:
        return self.bundle.tokenizer.decode(self.asked[-1]["prompt"])

    async def start(self) -> None:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections.append(asyncio.ensure_future(self._serve(reader, writer)))

        self.server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """The connections are closed by the other side."""
        await asyncio.gather(*self.connections)
        self.server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                asked = json.loads(await reader.readexactly(size))
                self.asked.append(asked)
                await self._answer(asked, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        ids = self.bundle.tokenizer.encode_continuation(self.reply)
        if self.ended_by == "stop" and self.stop_token:
            ids.append(self.bundle.stop_ids[0])
        if not asked["stream"]:
            body = json.dumps({"choices": [frame(n, ids, self.ended_by) for n in range(asked["n"])]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
            writer.write(b"content-length: %d\r\n\r\n%b" % (len(body), body))
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for at in range(0, len(ids), self.width):
            reason = self.ended_by if at + self.width >= len(ids) else None
            for number in range(asked["n"]):
                written = {"choices": [frame(number, ids[at : at + self.width], reason)]}
                write_event(writer, json.dumps(written).encode())
            await writer.drain()
        write_event(writer, b"[DONE]")
        writer.write(b"0\r\n\r\n")


def frame(number: int, ids: list[int], reason: str | None) -> dict[str, Any]:
    return {"index": number, "text": "", "token_ids": ids, "logprobs": None, "finish_reason": reason}


def write_event(writer: asyncio.StreamWriter, data: bytes) -> None:
    event = b"data: %b\n\n" % data
    writer.write(b"%x\r\n%b\r\n" % (len(event), event))


class House:
    """The chat route and its engines on real ports, in a thread of their own."""

    def __init__(self) -> None:
        self.engines = {form: Engine(speaking(form)) for form in WRITTEN}
        self.engines["thinks"] = Engine(speaking("hermes", thinks=True))  # type: ignore[index]
        self.engines["opens"] = Engine(speaking("hermes", thinks=True, opens=True))  # type: ignore[index]
        self.engines["chatml"] = Engine(make_bundle("chatml", byte_level(), []))  # type: ignore[index]
        app = Starlette(routes=chat.routes, exception_handlers={TunegateError: tell})  # type: ignore[dict-item]
        self._catalog = catalog = Catalog(Deadlines(5, 5))
        app.state.inference, app.state.catalog = Inference(catalog, 64), catalog
        app.state.settings = Settings(limits=LimitSettings(body_bytes=1_000_000))
        for name, engine in self.engines.items():
            catalog.add_base(
                Base(str(name), engine.bundle, pool_of(engine, name=str(name)), str(name), 8192, 1, cast(Any, None))
            )
        self._server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="error", lifespan="off"))
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        for engine in self.engines.values():
            await engine.start()
        asyncio.get_running_loop().call_later(0.01, self._look)
        await self._server.serve()
        self._catalog.close()
        for engine in self.engines.values():
            await engine.stop()

    def _look(self) -> None:
        if self._server.started:
            self._started.set()
        else:
            asyncio.get_running_loop().call_later(0.01, self._look)

    def __enter__(self) -> House:
        self._thread.start()
        assert self._started.wait(30)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.client = OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0, _strict_response_validation=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(30)

    def engine(self, name: str, reply: str, *, width: int = 2, ended_by: str = "stop") -> Engine:
        """The engine of that name, with what it shall say."""
        engine = cast(dict[str, Engine], self.engines)[name]
        engine.reply, engine.width, engine.ended_by = reply, width, ended_by
        return engine


async def tell(_: Request, error: TunegateError) -> Response:
    return Response(orjson.dumps(error.body()), error.status, media_type="application/json")


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with House() as running:
        yield running


def ask(house: House, model: str, *, stream: bool, **more: Any) -> ChatCompletion | ParsedChatCompletion[None]:
    """One reply, whole or gathered from its stream by the SDK itself."""
    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "weather?"}],
        "tools": TOOLS,
    } | more
    if not stream:
        return house.client.chat.completions.create(**request)
    state = ChatCompletionStreamState(input_tools=request.get("tools") or [])
    for chunk in house.client.chat.completions.create(**request, stream=True):
        state.handle_chunk(chunk)
    return state.get_final_completion()


def called(reply: ChatCompletion | ParsedChatCompletion[None], choice: int = 0) -> list[tuple[str, Any]]:
    calls = reply.choices[choice].message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls if call.type == "function"]


GIVEN: dict[str, Any] = {"city": "Zürich \"old\" </tool_call>, 'x'", "days": 3, "sure": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", list(WRITTEN))
def test_the_sdk_gets_the_calls_that_the_model_made(house: House, form: ToolForm, stream: bool) -> None:
    given = {**GIVEN, "city": "Zürich"} if form in ("xml",) else GIVEN
    house.engine(form, write_call(form, "get_weather", given), width=1)
    reply = ask(house, form, stream=stream)
    assert called(reply) == [("get_weather", given)]
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.choices[0].message.content is None


@pytest.mark.parametrize("stream", [False, True])
def test_text_before_calls_and_several_choices_stay_apart(house: House, stream: bool) -> None:
    calls = [write_call("hermes", name, {"city": name}) for name in ("get", "find-it")]
    house.engine("hermes", f"Let me see.\n{calls[0]}\n{calls[1]}", width=3)
    reply = ask(house, "hermes", stream=stream, n=2)
    for choice in range(2):
        assert called(reply, choice) == [("get", {"city": "get"}), ("find-it", {"city": "find-it"})]
        assert reply.choices[choice].message.content == "Let me see."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["Plain.", 'Say <tool_call>{"name": "nobody"}</tool_call>', "", '{"name": "get"}'])
def test_plain_text_stays_plain_text(house: House, text: str, stream: bool) -> None:
    for form in ("hermes", "llama3_json"):
        house.engine(form, text)
        choice = ask(house, form, stream=stream).choices[0]
        assert (choice.message.content, choice.message.tool_calls or [], choice.finish_reason) == (text, [], "stop")


def test_the_sdks_own_stream_tells_of_arguments_as_they_come(house: House) -> None:
    house.engine("hermes", write_call("hermes", "get_weather", GIVEN), width=1)
    messages: Any = [{"role": "user", "content": "weather?"}]
    tools: Any = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}]
    with house.client.chat.completions.stream(model="hermes", messages=messages, tools=tools) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(deltas) > 5
    assert "".join(event.arguments_delta for event in deltas) == json.dumps(GIVEN, ensure_ascii=False)
    assert [event.name for event in events if event.type == "tool_calls.function.arguments.done"] == ["get_weather"]
    message = final.choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments == GIVEN


def test_the_sdks_parser_of_models_takes_a_call(house: House) -> None:
    class Weather(BaseModel):
        city: str
        days: int

    house.engine("hermes", write_call("hermes", "Weather", {"city": "Bern", "days": 2}))
    messages: Any = [{"role": "user", "content": "?"}]
    tool = openai.pydantic_function_tool(Weather)
    reply = house.client.chat.completions.parse(model="hermes", messages=messages, tools=[tool])
    calls = reply.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.parsed_arguments == Weather(city="Bern", days=2)


def test_id_type_and_name_come_once_and_frames_have_openais_shape(house: House) -> None:
    house.engine("hermes", f"Hm.\n{write_call('hermes', 'get', {'city': 'Bern'})}", width=1)
    messages: Any = [{"role": "user", "content": "?"}]
    tools: Any = TOOLS
    chunks = list(house.client.chat.completions.create(model="hermes", messages=messages, tools=tools, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.type, bool(call.id)) for call in deltas if call.type or call.id] == [
        (0, "function", True)
    ]
    assert [call.function.name for call in deltas if call.function and call.function.name] == ["get"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].choices[0].delta.model_dump(exclude_unset=True) == {}


NAMED = {"type": "function", "function": {"name": "get"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", list(WRITTEN))
def test_a_named_function_is_begun_in_the_prompt_and_ends_the_reply(house: House, form: ToolForm, stream: bool) -> None:
    given = {"city": "Bern", "days": 2}
    engine = house.engines[form]
    opening = call_opening(engine.bundle.speech, ["get"])
    written = write_call(form, "get", given)
    assert written.startswith(opening)
    house.engine(form, written.removeprefix(opening) + " and so on, for ever", width=1, ended_by="length")
    reply = ask(house, form, stream=stream, tool_choice=NAMED)
    assert engine.prompt.endswith(f"<|im_start|>assistant\n{opening}")
    assert called(reply) == [("get", given)]
    assert (reply.choices[0].finish_reason, reply.choices[0].message.content) == ("stop", None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", list(WRITTEN))
def test_a_required_call_leaves_the_name_to_the_model(house: House, form: ToolForm, stream: bool) -> None:
    engine = house.engines[form]
    opening = call_opening(engine.bundle.speech, ["get_weather", "get", "find-it"])
    written = write_call(form, "find-it", {"days": 2})
    assert written.startswith(opening)
    house.engine(form, written.removeprefix(opening))
    reply = ask(house, form, stream=stream, tool_choice="required")
    assert engine.prompt.endswith(opening)
    assert called(reply) == [("find-it", {"days": 2})]
    assert reply.choices[0].finish_reason == "tool_calls"


def test_strict_is_taken_and_not_shown_to_the_model(house: House) -> None:
    engine = house.engine("hermes", "Hm.")
    ask(house, "hermes", stream=False)
    shown = engine.prompt
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    ask(house, "hermes", stream=False, tools=strict)
    assert engine.prompt == shown


def test_the_choice_none_shows_the_model_no_tools(house: House) -> None:
    engine = house.engine("hermes", write_call("hermes", "get", {}))
    reply = ask(house, "hermes", stream=False, tool_choice="none")
    assert "find-it" not in engine.prompt
    assert reply.choices[0].message.tool_calls is None
    ask(house, "hermes", stream=False)
    assert "find-it" in engine.prompt


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_the_first_one_ends_the_reply(house: House, stream: bool) -> None:
    call = write_call("hermes", "get", {"days": 1})
    house.engine("hermes", f"{call}\n{call}", ended_by="length")
    reply = ask(house, "hermes", stream=stream, parallel_tool_calls=False)
    assert called(reply) == [("get", {"days": 1})]
    assert reply.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_limit_cuts_is_told_as_cut(house: House, stream: bool) -> None:
    house.engine("hermes", write_call("hermes", "get", {"city": "Bern"})[:-20], ended_by="length")
    choice = ask(house, "hermes", stream=False).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not None


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_comes_beside_the_content_under_both_names(house: House, stream: bool) -> None:
    house.engine("thinks", "<think>\nHm, hm.\n</think>\n\nYes.", width=1)
    reply = ask(house, "thinks", stream=stream, tools=[])
    message = reply.choices[0].message
    assert message.content == "Yes."
    extra = message.model_extra or {}
    assert (extra["reasoning_content"], extra["reasoning"]) == ("Hm, hm.", "Hm, hm.")
    if not stream:
        assert reply.usage is not None
        assert reply.usage.completion_tokens_details is not None
        assert 0 < (reply.usage.completion_tokens_details.reasoning_tokens or 0) < reply.usage.completion_tokens


def test_reasoning_calls_and_results_of_the_history_are_shown_to_the_model(house: House) -> None:
    engine = house.engine("thinks", "<think>\nso\n</think>\n\nSunny.")
    first = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"city":"Bern"}'}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [first], "reasoning_content": "I'll look."},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    reply = ask(house, "thinks", stream=False, messages=messages)
    assert reply.choices[0].message.content == "Sunny."
    assert "<think>\nI'll look.\n</think>" in engine.prompt
    assert '<tool_call>\n{"name": "get", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>' in engine.prompt
    assert engine.prompt.endswith("<|im_start|>tool\nsun<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("stream", [False, True])
def test_functions_get_their_older_answer(house: House, stream: bool) -> None:
    house.engine("hermes", write_call("hermes", "get", {"days": 1}))
    functions = [tool["function"] for tool in TOOLS]
    reply = ask(house, "hermes", stream=stream, tools=openai.omit, functions=functions)
    message = reply.choices[0].message
    assert message.function_call is not None
    assert (message.function_call.name, message.function_call.arguments) == ("get", '{"days": 1}')
    assert (reply.choices[0].finish_reason, message.content) == ("function_call", None)


@pytest.mark.parametrize(
    "more",
    [
        {"tools": TOOLS},
        {"tools": openai.omit, "functions": [TOOLS[0]["function"]]},
        {"tools": TOOLS, "tool_choice": NAMED},
    ],
)
def test_a_template_that_has_no_form_for_tools_refuses_them_by_its_name(house: House, more: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="template 'chatml'") as refused:
        ask(house, "chatml", stream=False, **more)
    assert refused.value.param == "tools"
    assert ask(house, "chatml", stream=False, **more | {"tool_choice": openai.omit, "tools": []} | {"functions": []})


# training


def test_ids_that_a_template_of_mistrals_would_refuse_are_named_anew_and_answers_with_them() -> None:
    bundle = speaking("mistral", ids=True)
    call = ToolCall("call_0123456789", "get", "{}")
    asked = [
        Message("user", "?"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "sun", tool_call_id=call.id),
    ]
    text = bundle.tokenizer.decode(render_prompt(bundle, asked, TOOLS).ids)
    (called_as, answered_as) = re.findall(r"id=(\w+);", text)
    assert called_as == answered_as
    assert len(called_as) == 9
    kept = [Message("assistant", "", tool_calls=(ToolCall("abcDEF123", "get", "{}"),)), Message("user", "?")]
    assert "id=abcDEF123;" in bundle.tokenizer.decode(render_prompt(bundle, kept, TOOLS).ids)


@pytest.mark.parametrize("form", list(WRITTEN))
@pytest.mark.parametrize(
    "message",
    [
        Message("assistant", "", tool_calls=(ToolCall("abcdefghi", "get", '{"city": "Zürich", "days": 2}'),)),
        Message(
            "assistant",
            "",
            tool_calls=(ToolCall("abcdefghi", "get", '{"days": -2}'), ToolCall("abcdefghj", "find-it", '{"days": 1}')),
        ),
        Message("assistant", "Plain <tool_call> [TOOL_CALLS] {}"),
    ],
)
def test_a_trained_reply_reads_back_as_the_message_it_was(form: ToolForm, message: Message) -> None:
    bundle, asked = speaking(form), [Message("user", "weather?")]
    (sequence,) = render_example(bundle, [*asked, message], 4096, tools=TOOLS)
    prompt = render_prompt(bundle, asked, TOOLS).ids
    assert sequence.ids[: len(prompt)] == prompt
    trained = [label for label in sequence.labels if label != IGNORED]
    assert trained == sequence.ids[len(prompt) :]
    reader, reply = ReplyReader(bundle, tool_use=ToolUse(tuple(TOOLS))), Reply()
    reply.add(reader.feed(trained))
    reply.add(reader.finish(at_stop=True))
    assert reply.text == message.content
    assert [(name, json.loads(text)) for name, text in reply.calls] == [
        (call.name, json.loads(call.arguments)) for call in message.tool_calls
    ]
    assert all(re.fullmatch("call_[0-9a-f]{24}|[0-9a-f]{9}", call_id) for call_id in reply.ids)


STRICT = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": ["integer", "null"]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", list(WRITTEN))
def test_the_arguments_of_a_named_strict_function_are_held_to_its_parameters(
    house: House, form: ToolForm, stream: bool
) -> None:
    tools = [TOOLS[0], {"type": "function", "function": {"name": "plan", "strict": True, "parameters": STRICT}}]
    choice = {"type": "function", "function": {"name": "plan"}}
    held = form not in ("xml", "pythonic", "pythonic_tagged")
    given = {"city": "Zürich", "days": None}
    engine = house.engine(form, json.dumps(given, ensure_ascii=False) if held else "", width=1)
    engine.stop_token = not held
    reply = ask(house, form, stream=stream and held, tools=tools, tool_choice=choice)
    engine.stop_token = True
    assert engine.asked[-1].get("structured_outputs") == ({"json": STRICT} if held else None)
    if held:
        assert called(reply) == [("plan", given)]
        assert reply.choices[0].finish_reason == "stop"
        assert not reply.choices[0].message.content


def test_parameters_that_cannot_be_held_to_are_refused_by_their_path(house: House) -> None:
    schema = {**STRICT, "properties": {**STRICT["properties"], "days": {"type": "integer", "multipleOf": 7}}}
    tools = [{"type": "function", "function": {"name": "plan", "strict": True, "parameters": schema}}]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(house, "hermes", stream=False, tools=tools, tool_choice={"type": "function", "function": {"name": "plan"}})
    assert refused.value.param == "tools[0].function.parameters"
    assert "Invalid schema for function 'plan': In context=('properties', 'days'), " in refused.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_that_the_prompt_opens_is_closed_before_a_structured_reply(house: House, stream: bool) -> None:
    fields: dict[str, Any] = {"tools": [], "response_format": {"type": "json_object"}}
    for model, prompt_end in (("opens", "<think>\n\n</think>\n\n"), ("thinks", "assistant\n")):
        engine = house.engine(model, '{"a": 1}')
        reply = ask(house, model, stream=stream, **fields)
        assert reply.choices[0].message.content == '{"a": 1}'
        assert engine.asked[-1]["structured_outputs"] == {"json_object": True}
        assert engine.prompt.endswith(prompt_end)


def test_what_an_engine_has_not_said_it_can_do_is_refused_by_the_clients_name_for_it(house: House) -> None:
    engine = house.engine("chatml", '{"a": 1}')
    asked = {"tools": openai.omit, "response_format": {"type": "json_object"}}
    for version, taken in (
        ({"kind": "llama"}, False),
        ({"kind": "llama", "structured_outputs": ["json_object"]}, True),
    ):
        engine.version = version
        if taken:
            assert ask(house, "chatml", stream=False, **asked).choices[0].message.content == '{"a": 1}'
            continue
        with pytest.raises(openai.BadRequestError) as refused:
            ask(house, "chatml", stream=False, **asked)
        assert refused.value.param == "response_format"
    engine.version = {}

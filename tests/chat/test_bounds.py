"""What a stranger's template, message or training line may cost, and what of a line must not be dropped unsaid."""

from __future__ import annotations

import json
import time

import pytest

from gateway.chat.bundle import bundle_of
from gateway.chat.conversation import Message, RenderError, ToolCall
from gateway.chat.jinja import JinjaTemplate
from gateway.chat.registry import template_named
from gateway.chat.render import render_example, render_prompt, render_quickly
from gateway.chat.sandbox import render
from tests.tiny_tokenizers import byte_level
from trainer.data.conversations import read_messages
from trainer.data.forms import form_of
from trainer.data.lines import BadLine, Line
from trainer.data.rendering import Renderer, Rendering

USER = Message("user", "hi")
JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _bundle(text: str = JINJA):  # type: ignore[no-untyped-def]
    tokenizer = byte_level()
    (end,) = (token["id"] for token in json.loads(tokenizer)["added_tokens"] if token["content"] == "<|im_end|>")
    return bundle_of(JinjaTemplate("own", text, {"eos_token": "<|im_end|>"}), tokenizer, [end])


@pytest.mark.parametrize(
    "expression",
    [
        *(f"('a' * 4000000).{name}('a' * 1000000 + 'b' + 'a' * 1000000)" for name in ("rfind", "rsplit", "rpartition")),
        *(f"('a' * 8000000).{name}('b' * 4000000 + 'a')" for name in ("strip", "lstrip", "rstrip")),
        "('a' * 8000000) | trim('b' * 4000000 + 'a')",
        "('a' * 8000000).encode().rindex(('a' * 1000000 + 'b' + 'a' * 1000000).encode())",
        "('a ' * 4000000) | title",
        "('é' * 8000000) | urlencode",
        "('a' * 8000000).join('b' * 8000000)",
        "('é' * 200000).encode('punycode').decode('punycode')",
        "('é' * 4000000).encode('ascii', 'namereplace')",
    ],
)
def test_one_operation_never_takes_long_by_itself(expression: str) -> None:
    began = time.thread_time()
    with pytest.raises(RenderError):
        render(f"{{{{ {expression} }}}}", {"messages": []})
    assert time.thread_time() - began < 1


def test_the_same_operations_are_there_for_what_templates_do_with_them() -> None:
    text = "{{ ' x<|end|> '.strip().rstrip('<|end|>') ~ 'a,b'.rsplit(',', 1)[1] ~ 'a b' | title ~ ('ab' | trim('a')) }}"
    assert render(text, {"messages": []}) == "xb" + "A Bb"
    assert render("{{ '-'.join('abc') ~ 'é'.encode('utf-8').decode() }}", {"messages": []}) == "a-b-cé"


def test_only_what_is_small_throughout_is_rendered_at_once() -> None:
    bundle, long = _bundle(), "word " * 5000
    call = ToolCall("c", "f", json.dumps({"a": long}))
    assert render_quickly(bundle, [USER]) is not None
    assert render_quickly(bundle, [USER], None, {"enable_thinking": False}) is not None
    for messages, options in (
        ([USER, Message("assistant", "x", reasoning=long), USER], None),
        ([USER, Message("assistant", "", tool_calls=(call,)), USER], None),
        ([Message("user", "x", name=long)], None),
        ([USER, Message("tool", "x", tool_call_id="c")], None),
        ([USER], {"a": ["x"] * 100_000}),
        ([USER], {"system": long}),
        ([USER] * 5000, None),
    ):
        assert render_quickly(bundle, messages, None, options) is None


def test_a_template_that_loops_over_calls_is_tried_once() -> None:
    began = time.monotonic()
    bundle = _bundle(
        "{% for m in messages if m.tool_calls %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}" + JINJA
    )
    assert bundle.template.call_form is None
    assert time.monotonic() - began < 3


def test_what_is_nested_too_deeply_is_an_error_of_the_one_who_sent_it() -> None:
    bundle, deep = _bundle(), '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": nested}}}
    with pytest.raises(RenderError, match="too deeply"):
        render_prompt(bundle, [USER], [tool])
    assert render_prompt(bundle, [USER, Message("assistant", "", tool_calls=(ToolCall("c", "f", deep),)), USER]).ids
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": deep}}
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert isinstance(Renderer(Rendering(bundle, 1000), form_of(line)).render(Line(1, line)), BadLine)


@pytest.mark.parametrize("name", ["zero_shot", "metharme", "falcon-chat"])
def test_a_reply_that_serving_would_cut_at_a_stop_string_is_refused(name: str) -> None:
    bundle = bundle_of(template_named(name), byte_level(), [0])
    (stop,) = bundle.stop_strings
    with pytest.raises(RenderError, match="serving stops"):
        render_example(bundle, [USER, Message("assistant", f"a{stop} b")], 1000)
    assert render_example(bundle, [USER, Message("assistant", "a b")], 1000)


def test_thoughts_are_taken_under_both_names_as_they_are_in_requests() -> None:
    for name in ("reasoning_content", "reasoning"):
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", name: "hm"}]
        assert read_messages(said, "messages")[-1].reasoning == "hm"


def test_calls_are_given_in_a_form_in_which_their_results_come_out_too() -> None:
    """As QwQ's template: it looks into the content of every message of the assistant but the last."""
    text = JINJA.replace(
        "<|im_start|>{{",
        "{% if m.role == 'assistant' and not loop.last %}{% set _ = m.content.split('x') %}{% endif %}<|im_start|>{{",
    )
    bundle, call = _bundle(text), ToolCall("c", "look", '{"a": 1}')
    said = [USER, Message("assistant", "", tool_calls=(call,)), Message("tool", "a fjord", tool_call_id="c")]
    assert "a fjord" in bundle.tokenizer.decode(render_prompt(bundle, said).ids)

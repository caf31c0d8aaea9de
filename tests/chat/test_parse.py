"""Replies read as they come: what is text, reasoning and a call does not depend on the splits, and costs one pass."""

from __future__ import annotations

import json
import sys
from types import FrameType
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.chat.bundle import Bundle, bundle_of
from gateway.chat.calls import CallReader
from gateway.chat.jinja import JinjaTemplate
from gateway.chat.parse import ReplyReader
from gateway.chat.speech import Speech, ToolForm, ToolUse, call_opening, read_speech, text_opening
from tests.chat.spoken import THINK, TOOLS, Reply, read_text, write_call
from tests.tiny_tokenizers import byte_level

FORMS: tuple[ToolForm, ...] = get_args(ToolForm)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = [tool["function"]["name"] for tool in TOOLS]
# Forms whose calls may stand behind text, without the first one being the reply's very beginning.
AFTER_TEXT = [form for form in FORMS if form not in ("llama3_json", "pythonic", "functionary", "harmony")]

plain = st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0\ufdd1"), max_size=20)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=5,
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "city": plain,
        "days": st.integers(-99, 99),
        "where": st.dictionaries(plain, values, max_size=3),
        "tags": st.lists(values, max_size=3),
        "sure": st.booleans(),
    },
)
calls = st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=3)
# Pieces that make and break markers, objects and names.
shards = st.sampled_from(
    "<tool_call> </tool_call> <tool_ </ < <function= <function=get> </function> <parameter=city> </parameter> > "
    '[TOOL_CALLS] [TOOL_ [ARGS] [CALL_ID] [ ] { } {" "name" "name": "get" "get", "arguments" "arguments": "parameters": '
    '{} {"city":"x"} {"name":"get","arguments":{} {"name":"find-it","parameters":{"a":[1,"\\\\"]}} , : " \\ '
    "<|python_tag|> ; get( get(city= get(city='x')] get()] 'x' ) <|tool_call_start|> <|tool_call_end|> >>> >>>get\n all\n "
    "<|channel|> <|message|> <|start|> <|end|> <|call|> to=functions.get analysis commentary final "
    "<think> </think> <think>\n \n x é 😀 null".split(" ")
)
mosaics = st.lists(shards | st.sampled_from([" ", "\n"]), max_size=25).map("".join)
cuts = st.lists(st.integers(0, 200), max_size=12)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None)
@given(calls=calls, cuts=cuts)
def test_calls_come_back_as_they_were_written(
    form: ToolForm, calls: list[tuple[str, dict[str, Any]]], cuts: list[int]
) -> None:
    if form == "xml":  # has no way to write its own closing tag, nor newlines at a value's ends
        unsaid = ("</parameter>", "\n")
        calls = [
            (name, {k: v for k, v in given.items() if not any(u in str(v) for u in unsaid)}) for name, given in calls
        ]
    if form == "harmony":
        calls = calls[:1]  # the call ends the reply
    glue = {"llama3_json": "; ", "functionary": ""}.get(form, "\n")
    if form == "pythonic":
        written = "[" + ", ".join(write_call(form, name, given)[1:-1] for name, given in calls) + "]"
    else:
        written = glue.join(write_call(form, name, given) for name, given in calls)
    written = written.removeprefix(">>>") if form == "functionary" else written
    reply = read_text(form, written, cuts)
    assert [(name, json.loads(text)) for name, text in reply.calls] == calls
    assert (reply.text, reply.reasoning) == ("", "")


@pytest.mark.parametrize("form", AFTER_TEXT)
@settings(max_examples=10, deadline=None)
@given(before=plain, after=plain, thought=plain, given_=arguments, cuts=cuts)
def test_text_and_reasoning_stand_apart_from_a_call_between_them(
    form: ToolForm, before: str, after: str, thought: str, given_: dict[str, Any], cuts: list[int]
) -> None:
    given_ = {key: value for key, value in given_.items() if form != "xml" or key == "days"}
    before, thought = before.strip() or "Well.", thought.strip() or "hm"
    written = f"<think>\n{thought}\n</think>\n\n{before}\n{write_call(form, 'get', given_)}{after}"
    reply = read_text(form, written, cuts, reasoning=THINK)
    assert reply.reasoning == thought
    assert [name for name, _ in reply.calls] == ["get"]
    assert json.loads(reply.calls[0][1]) == given_
    assert reply.text == before + (after if after.strip() else "")


@pytest.mark.parametrize("form", [*FORMS, None])
@settings(max_examples=30, deadline=None)
@given(text=mosaics, cuts=cuts, thinks=st.booleans(), inside=st.booleans(), single=st.booleans())
@example(text="<think><tool_call>", cuts=[3], thinks=True, inside=True, single=False)
def test_a_reply_reads_the_same_at_every_split(
    form: ToolForm | None, text: str, cuts: list[int], thinks: bool, inside: bool, single: bool
) -> None:
    how: dict[str, Any] = {"reasoning": THINK if thinks else None, "in_reasoning": thinks and inside, "single": single}
    whole = read_text(form, text, **how)
    assert read_text(form, text, cuts, **how) == whole
    assert read_text(form, text, range(len(text)), **how) == whole
    assert not single or len(whole.calls) <= 1


@pytest.mark.parametrize("form", [*FORMS, None])
@settings(max_examples=30, deadline=None)
@given(text=mosaics)
@example(text='Write <tool_call>{"name": …}</tool_call> to call.')
@example(text='{"name": "get_weather", "temperature": 20}')
@example(text='{"name": "Ada", "arguments": {}}')
@example(text="[get_weather, get]")
@example(text='<tool_call>\n{"name": "get", "arguments": 5}\n</tool_call>')
def test_where_no_call_is_found_no_character_is_lost(form: ToolForm | None, text: str) -> None:
    reply = read_text(form, text)
    if form == "functionary":
        text = text.removeprefix("all\n").replace(">>>all\n", "")
    if form == "harmony" and any(mark in text for mark in ("<|message|>", "<|end|>", "<|call|>")):
        return  # these are the frame of a message and no one's words
    if not reply.calls:
        assert reply.text == text


@pytest.mark.parametrize(
    ("form", "text", "name", "arguments", "rest"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "get"}</tool_call>', "get", '{"a": 1}', ""),
        ("hermes", '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}</tool_call>', "get", '{"a": 1}', ""),
        ("hermes", '<tool_call>{"name": "get"}</tool_call>', "get", "{}", ""),
        ("hermes", '<tool_call>{"name": "get", "arguments": null}</tool_call>!', "get", "{}", "!"),
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": "</tool_call>', "get", '{"a": "</tool_call>', ""),
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": 1</tool_call>x', "get", '{"a": 1', "</tool_call>x"),
        ("llama3_json", '<|python_tag|>{"name": "get", "parameters": {}}', "get", "{}", ""),
        ("llama3_json", '{"type": "function", "function": {"name": "get", "parameters": {}}}', "get", "{}", ""),
        ("mistral", '[TOOL_CALLS] {"name": "get", "arguments": {}}', "get", "{}", ""),
        ("mistral_args", 'Hm.[TOOL_CALLS]get[CALL_ID]123456789[ARGS]{"a": 1}', "get", '{"a": 1}', "Hm."),
        ("pythonic", "[get(a='it\\'s', b=(1, None), c=x.y, d=true)]", "get", None, ""),
        ("functionary", 'all\nHm.\n>>>get\n{"a": 1}', "get", '{"a": 1}', "Hm."),
        ("xml", "<function=get>\n<parameter=days>\n5\n</parameter>\n</function>", "get", '{"days": 5}', ""),
        (
            "xml",
            "<tool_call><function=get>\n<parameter=city>\n5\n</parameter>\n</tool_call>",
            "get",
            '{"city": "5"}',
            "",
        ),
        ("harmony", ' to=functions.get<|channel|>commentary json<|message|>{"a": 1}<|call|>', "get", '{"a": 1}', ""),
    ],
)
def test_calls_in_the_looser_ways_of_real_models_are_read(
    form: ToolForm, text: str, name: str, arguments: str | None, rest: str
) -> None:
    reply = read_text(form, text)
    wanted = arguments or '{"a": "it\'s", "b": [1, null], "c": "x.y", "d": true}'
    assert (reply.calls, reply.text) == ([(name, wanted)], rest)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "functionary_tags"])
def test_a_single_call_ends_the_reply(form: ToolForm) -> None:
    call = write_call(form, "get", {"days": 1}).removeprefix(">>>" if form == "functionary" else "")
    reader = CallReader(Speech(form), TOOLS, {}, lambda: "id", in_reasoning=False, single=True)
    for char in call:
        reader.feed(char)
    assert reader.enough
    reader.feed("more")
    reader.finish()
    assert reader.text == []
    assert reader.count == 1


def test_reasoning_that_the_prompt_opened_is_told_apart() -> None:
    assert read_text(None, "so\n\nso\n</think>\n\nYes.", reasoning=THINK, in_reasoning=True) == Reply(
        "Yes.", "so\n\nso"
    )
    assert read_text(None, "<think>\nso</think>Yes.", reasoning=THINK, in_reasoning=True) == Reply("Yes.", "so")
    assert read_text(None, "never done", reasoning=THINK, in_reasoning=True) == Reply("", "never done")
    assert read_text(None, "No <think>x</think>", reasoning=THINK) == Reply("No <think>x</think>", "")


def test_channels_are_reasoning_and_text() -> None:
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    assert read_text("harmony", text) == Reply("Yes.", "hm")


# what it costs

LONG: list[tuple[ToolForm, str, str]] = [
    ("hermes", '<tool_call>{"name": "get", "arguments": {"a": "', 'word \\" <tool_call> {} '),
    ("hermes", '<tool_call>{"arguments": {"a": [', '{"b": "c"}, '),
    ("hermes", "", "<tool_call "),
    ("hermes", "", '<tool_call>{"name": "get'),
    ("hermes", "x", "\n \t"),
    ("hermes", '<tool_call>{"name":', " \n"),
    ("hermes", '<tool_call>{"id": "', "x\\\\"),
    ("llama3_json", '{"type": "', "function "),
    ("mistral", "[TOOL_CALLS][", '{"name": "get", "arguments": {}}, '),
    ("mistral_args", "[TOOL_CALLS]get[CALL_ID]", "[ARG"),
    ("pythonic", "[get(city='", "a\\'b,)"),
    ("pythonic", "[get(", "city"),
    ("pythonic", "[get(city=", "[(1, {2: "),
    ("functionary", "all\n", ">>>ge"),
    ("functionary_tags", "<function=get>", '{"a": '),
    ("xml", "<tool_call>\n<function=get>\n<parameter=city>\n", "</parameter "),
    ("harmony", "<|channel|>", "analysis <|mess"),
]


@pytest.mark.parametrize(("form", "start", "repeated"), LONG)
def test_a_long_reply_costs_one_pass_however_it_hesitates(form: ToolForm, start: str, repeated: str) -> None:
    def work(size: int) -> int:
        """Lines of ours that run while `size` characters come one by one."""
        reader = CallReader(Speech(form, THINK), TOOLS, {}, lambda: "id", in_reasoning=False, single=False)
        reader.feed(start)
        text = (repeated * (size // len(repeated) + 1))[:size]
        lines = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal lines
            lines += event == "line"
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            for char in text:
                reader.feed(char)
                assert reader.waiting < 300, "what is looked at again is never more than a marker or a word"
            reader.finish()
        finally:
            sys.settrace(previous)
        return lines

    small, large = work(500), work(2000)
    assert large < 4.4 * small


# ids, with control tokens among them


def bundle_with(taught: str, controls: list[str]) -> Bundle:
    """A bundle whose tokenizer knows `controls` as control tokens, and whose template teaches what is `taught`."""
    written = json.loads(byte_level())
    first = max(written["model"]["vocab"].values()) + 1
    written["added_tokens"] += [
        {**written["added_tokens"][0], "id": first + number, "content": name} for number, name in enumerate(controls)
    ]
    template = JinjaTemplate("spoken", CHATML + "{% if tools %}" + taught + "{% endif %}", {"eos_token": "<|im_end|>"})
    return bundle_of(template, json.dumps(written).encode(), [])


def read_ids(bundle: Bundle, ids: list[int], width: int, **how: Any) -> tuple[Reply, ReplyReader]:
    reader, reply = ReplyReader(bundle, tool_use=ToolUse(tuple(TOOLS)), **how), Reply()
    for at in range(0, len(ids), width):
        reply.add(reader.feed(ids[at : at + width]))
    reply.add(reader.finish(at_stop=True))
    return reply, reader


MISTRAL = "[TOOL_CALLS] [THINK] [/THINK]"


@pytest.mark.parametrize("width", [1, 2, 5, 1000])
def test_a_marker_that_is_a_control_token_counts_only_as_that_token(width: int) -> None:
    bundle = bundle_with(MISTRAL, ["[TOOL_CALLS]"])
    call = '[{"name": "get", "arguments": {"city": "é😀"}}]'
    encode = bundle.tokenizer.encode
    reply, _ = read_ids(bundle, [*encode("So: "), *encode(f"[TOOL_CALLS]{call}"), *encode("<|im_end|>")], width)
    assert reply.calls == [("get", '{"city": "é😀"}')]
    assert reply.text == "So:"
    assert len(reply.ids[0]) == 9, "Mistral's own templates take ids of nine characters only"
    typed = encode(bundle.tokenizer.mark("[TOOL_CALLS]") + call)
    reply, _ = read_ids(bundle, typed, width)
    assert (reply.text, reply.calls) == (f"[TOOL_CALLS]{call}", [])


@pytest.mark.parametrize("controls", [[], ["<tool_call>", "</tool_call>", "<think>", "</think>"]])
@pytest.mark.parametrize("width", [1, 3, 1000])
def test_markers_are_recognised_as_characters_and_as_control_tokens(controls: list[str], width: int) -> None:
    bundle = bundle_with('<think></think> <tool_call>\n{"name": ', controls)
    text = f"<think>\nhm\n</think>\n\nHi <tool_call>nothing</tool_call>\n{write_call('hermes', 'get', {'days': 1})}"
    ids = bundle.tokenizer.encode(text)
    reply, reader = read_ids(bundle, ids, width)
    assert reply.calls == [("get", '{"days": 1}')]
    assert reply.text == "Hi <tool_call>nothing</tool_call>", "what comes to nothing is text, markers and all"
    assert reply.reasoning == "hm"
    inner, whole = (len(bundle.tokenizer.encode(said)) for said in ("\nhm\n", "<think>\nhm\n</think>"))
    assert inner < reader.reasoning_tokens <= whole
    assert reply.ids[0].startswith("call_")


def test_control_tokens_that_mark_nothing_are_no_text() -> None:
    bundle = bundle_with('<tool_call>\n{"name": ', ["<|pad|>"])
    pad = bundle.tokenizer.encode("<|pad|>")
    reply, _ = read_ids(bundle, [*bundle.tokenizer.encode("a"), *pad, *bundle.tokenizer.encode("b")], 1)
    assert reply == Reply("ab")


@pytest.mark.parametrize("width", [1, 4, 1000])
def test_a_stop_string_ends_a_reply_with_reasoning_too(width: int) -> None:
    bundle = bundle_with("<think></think>", [])
    ids = bundle.tokenizer.encode("<think>hm</think>one END two")
    reply, reader = read_ids(bundle, ids, width, stops=["END"])
    assert reader.stopped
    assert reply == Reply("one ", "hm")


def test_a_call_begun_in_the_prompt_goes_on_in_the_reply() -> None:
    bundle = bundle_with('<think></think> <tool_call>\n{"name": ', [])
    encode = bundle.tokenizer.encode
    begun = encode('\n</think>\n\n<tool_call>\n{"name": "get", "arguments":')
    reply, reader = read_ids(
        bundle, encode(' {"days": 2}}\n</tool_call>'), 1, begun=begun, opens_reasoning=True, stops=["\n</think>"]
    )
    assert (reply.calls, reply.text, reader.n_calls) == ([("get", '{"days": 2}')], "", 1)
    assert reader.reasoning_tokens == 0


# how a template speaks


@pytest.mark.parametrize(
    ("template", "speech"),
    [
        ("{{ messages }}", Speech()),
        ('<tool_call>\\n{"name": <function-name>, "arguments": …', Speech("hermes")),
        ('\'<tool_call>\\n{"name": "\' + call.name', Speech("hermes")),
        ("<tool_call>{{ name }}<arg_key>", Speech()),
        ("<tool_call>\n<function=f>\n<parameter=p>", Speech("xml")),
        ("[TOOL_CALLS][", Speech("mistral")),
        ("[TOOL_CALLS]' + name + '[ARGS]", Speech("mistral_args")),
        ("[THINK]", Speech(None, ("[THINK]", "[/THINK]"))),
        ("{{ '>>>all\\n' }}", Speech("functionary")),
        ("<function=f>{}</function>", Speech("functionary_tags")),
        ("[func_name1(params_name1=value)]", Speech("pythonic")),
        ("<|tool_call_start|>", Speech("pythonic_tagged")),
        ('{"name": function name, "parameters": dictionary of names}', Speech("llama3_json")),
        ("content.split('</think>')", Speech(None, THINK)),
        ("<|channel|><|message|>", Speech("harmony", ("<|channel|>analysis<|message|>", "<|end|>"))),
    ],
)
def test_a_template_says_how_its_model_speaks(template: str, speech: Speech) -> None:
    assert read_speech(template) == speech


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_was_begun_for_the_model_reads_as_a_call_once_it_goes_on(form: ToolForm) -> None:
    opening = call_opening(Speech(form), ["get"])
    own_rests = {"xml": "<parameter=days>\n1\n</parameter>\n</function>", "pythonic": "days=1)]"}
    rest = own_rests.get(form.removesuffix("_tagged"), ' {"days": 1}')
    assert read_text(form, opening).calls in ([], [("get", "")])
    ((name, text),) = read_text(form, opening + rest).calls
    assert (name, json.loads(text)) == ("get", {"days": 1})
    thinking = Speech(form, THINK)
    assert call_opening(thinking, ["get"], in_reasoning=True) == f"\n</think>\n\n{opening}"
    assert call_opening(thinking, ["get"], lead="<think>\n\n</think>\n\n") == f"<think>\n\n</think>\n\n{opening}"
    assert call_opening(Speech(form), ["get"], lead=" ") == f" {opening}"


@pytest.mark.parametrize("form", [None, *FORMS])
def test_a_reply_that_must_be_text_is_opened_as_text(form: ToolForm | None) -> None:
    speech = Speech(form, None if form == "harmony" else THINK)
    opening = text_opening(speech, in_reasoning=False)
    assert opening == {"harmony": "<|channel|>final<|message|>", "functionary": "all\n"}.get(form or "", "")
    if form == "harmony":
        assert read_text(form, opening + '{"a": 1}') == Reply('{"a": 1}', "")
    elif form != "functionary":
        closing = text_opening(speech, in_reasoning=True)
        assert read_text(form, closing + '{"a": 1}', reasoning=THINK, in_reasoning=True) == Reply('{"a": 1}', "")

# ruff: noqa: E501 (templates are easier to read in one line)
"""Chat templates from strangers: what transformers writes, nothing that they should not reach, and an end to all they begin."""

from __future__ import annotations

import asyncio
import datetime
import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from gateway.chat.conversation import Message, RenderError, ToolCall
from gateway.chat.jinja import CallForm, JinjaTemplate
from gateway.chat.sandbox import TooLong, compiled, literal_text, render

pytestmark = pytest.mark.anyio

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": '  Be ünïcode <b> & "quoted"\n'},
    {"role": "user", "content": "hello\n\nthere 😀"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": [None, True]}}}],
    },
    {"role": "user", "content": "x"},
]

# Things that real templates do, each compared with what transformers makes of it.
ORDINARY = {
    "loops, filters and tests": "{% for m in messages if m.role != 'system' %}{{ loop.index0 }}{{ m.content | trim }}"
    "{{ ',' if not loop.last }}{% else %}none{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[2].tool_calls | tojson(indent=2) }}"
    "{{ {'b': 'é', 'a': 1} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}",
    "namespaces": "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.text = ns.text ~ m.role %}{% endfor %}{{ ns.n }}{{ ns.text }}",
    "macros and calls": "{% macro say(x, y='d') %}[{{ x }}|{{ y }}|{{ caller() if caller }}]{% endmacro %}{{ say(1) }}"
    "{% call say('a', y=2) %}inner{% endcall %}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{% if loop.index == 4 %}"
    "{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}\n{% endgeneration %}{% endfor %}",
    "whitespace": "  {%- for m in messages %}\n    {{- m.role }}\n  {% if true %}\n  y\n  {% endif %}\n{% endfor %}\n",
    "strings": "{{ messages[1].content.split('\\n')[0].upper() }}{{ 'a' * 3 }}{{ 'x%sy' % 3 }}{{ '%s-%d' | format('q', 7) }}"
    "{{ '{}:{:>4}'.format('k', 5) }}{{ messages[0].content.strip().replace('e', 'E') }}{{ 'abc'[::-1] }}{{ 'a-b' | replace('-', '+') }}",
    "lists": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ [3, 1, 2] | sort | first }}{{ (messages | groupby('role'))[0].grouper }}{{ messages[1:][::-1] | length }}"
    "{{ ['b', 'a', 'b'] | unique | list }}{{ range(3) | list }}{{ [1, 2] + [3] }}{{ [[1], [2]] | sum(start=[]) }}",
    "mappings": "{% for k, v in messages[2].tool_calls[0].function.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
    "{{ dict(a=1) | dictsort }}{{ messages[2].tool_calls[0].function.arguments | items | list }}{{ {'a': 1}.get('z', 9) }}",
    "undefined": "{{ nothing }}{{ nothing is defined }}{{ messages[0].nothing is none }}{{ tools is none }}{{ bos_token }}",
    "markup": "{{ ('<b>' | safe) + '<i>' }}{{ '<' | e }}{{ '<b>' | safe ~ '<' }}",
    "numbers": "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ 1.5 | round }}{{ '12' | int + 1 }}{{ -3 | abs }}{{ 1 / 4 }}",
    "blocks and filters": "{% filter upper %}quiet {{ bos_token }}{% endfilter %}{% set x %}a{{ 1 }}{% endset %}{{ x }}"
    "{% block b %}in{% endblock %}{{ self.b() }}{% with z = 5 %}{{ z }}{% endwith %}",
    "recursion": "{% for i in [[1, [2]], [3]] recursive %}{% if i is iterable %}({{ loop(i) }}){% else %}{{ i }}{% endif %}{% endfor %}",
    "dates": "{{ strftime_now('%Y') | length }}",
    "indent and center": "{{ 'a\\nb' | indent(2) }}{{ 'x' | center(5) }}|{{ 'x'.ljust(3) }}|{{ '7'.zfill(3) }}{{ 'abcdef' | truncate(4) }}",
}  # fmt: skip


@pytest.mark.parametrize("what", ORDINARY)
def test_templates_write_what_they_write_in_transformers(what: str) -> None:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template([MESSAGES], chat_template=ORDINARY[what], **variables)
    assert render(ORDINARY[what], {**variables, "messages": MESSAGES, "add_generation_prompt": False}) == expected[0]


CANARY = "canary alive"
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by filter": "{{ '' | attr('__class__') | attr('__mro__') }}",
    "classes by map": "{{ [''] | map(attribute='__class__') | list | first }}{{ [''] | map('attr', '__class__') | list }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m._func.__globals__ }}",
    "globals of a loop": "{% for i in [1] %}{{ loop.__init__.__globals__ }}{{ loop.__class__ }}{% endfor %}",
    "the namespace's class": "{{ namespace.__init__.__globals__.os.remove('CANARY') }}",
    "a namespace's privates": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "a namespace's privates by keyword": "{{ namespace(__init__=1) }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('rm CANARY').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].remove('CANARY') }}",
    "dict": "{{ dict.__class__.__base__.__subclasses__() }}{{ dict.mro() }}",
    "self": "{{ self._TemplateReference__context.environment }}{{ self.__init__.__globals__ }}",
    "the context": "{{ context.environment }}{{ environment.from_string('x') }}",
    "format fields": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format of a map": "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "format by filter": "{{ ('{0.__class__}' | attr('format'))('') }}",
    "an undefined's class": "{{ nothing.__class__.__init__.__globals__ }}",
    "include": "{% include 'CANARY' %}",
    "import": "{% import 'CANARY' as c %}",
    "from": "{% from 'CANARY' import c %}",
    "extends": "{% extends 'CANARY' %}",
    "changing a list": "{% set x = [] %}{{ x.append(1) }}",
    "changing the messages": "{{ messages.clear() }}",
    "changing a mapping": "{{ messages[0].update({'role': 'x'}) }}{{ messages[0].pop('role') }}",
    "a code object": "{{ messages.__iter__.__self__ }}{{ (messages | map('upper')).gi_frame.f_globals }}",
    "a generator's frame": "{% set g = messages | map('string') %}{{ g.gi_frame.f_back.f_builtins }}",
    "the finalizer": "{{ 'x' | tunegate tick }}",
    "open": "{{ open('CANARY', 'w') }}",
    "eval": "{{ eval('1') }}{{ exec('1') }}{{ __import__('os') }}",
    "bytes": "{{ 'x'.encode().__class__ }}{{ (1).__class__ }}",
    "str.join through a type": "{{ ''.join.__self__.__class__ }}{{ ''.join.__objclass__ }}",
    "autoescape": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "formatting of privates by percent": "{{ '%(__class__)s' % messages[0] }}",
}  # fmt: skip

# Jinja gives nothing for these, as it does for a name that is not there.
MERELY_EMPTY = {
    "classes by filter",
    "classes by map",
    "format of a map",
    "format by filter",
    "bytes",
    "str.join through a type",
}


@pytest.mark.parametrize("what", ESCAPES)
def test_nothing_leads_out_of_the_sandbox(what: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text(CANARY)
    given = [{"role": "user", "content": "hi"}]
    variables = {"messages": given, "add_generation_prompt": True}
    template = ESCAPES[what].replace("CANARY", str(canary))
    if what in MERELY_EMPTY:
        assert render(template, variables) in ("", "[Undefined]")
    else:
        with pytest.raises(RenderError):
            render(template, variables)
    assert canary.read_text() == CANARY
    assert given == [{"role": "user", "content": "hi"}]


_BIG = "{% set b = 'xxxxxxxxxxxxxxxx' * 400000 %}"
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that skip": "{% for a in range(99999) %}{% for b in range(99999) if b is none %}{% endfor %}{% endfor %}",
    "macros that call themselves": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "blocks that call themselves": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "a macro under a budget's name": "{% macro tunegate_tick() %}{% endmacro %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{{ 1 }}{% endfor %}{% endfor %}",
    "doubling a text": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by a set block": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a list of itself": "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "a tuple of itself as a key": "{% set ns = namespace(x=(1,)) %}{% for i in range(40) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
    "{{ {ns.x: 1} }}",
    "a mapping of itself": "{% set ns = namespace(x={}) %}{% for i in range(40) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}"
    "{{ ns.x | tojson }}",
    "comparing lists of themselves": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "deep lists": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "namespaces in namespaces": "{% set ns = namespace(x=1) %}{% for i in range(40) %}{% set ns.x = [namespace(a=ns.x), ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "dict.fromkeys": "{% set ns = namespace(x=[1]) %}{% for i in range(9) %}{% set ns.x = dict.fromkeys(range(999), ns.x) %}{% endfor %}"
    "{{ ns.x }}",
    "multiplying a text": "{{ 'a' * 99999999999 }}",
    "multiplying from the left": "{{ 99999999999 * 'a' }}",
    "multiplying a list": "{{ [1] * 99999999999 }}",
    "multiplying step by step": "{{ 'a' * 9999 * 9999 * 9999 }}",
    "powers": "{{ 9 ** 99999999 }}",
    "squaring": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "bytes to a number": "{{ (1).from_bytes(('9' * 999999).encode(), 'big') % 7 }}",
    "rounding": "{{ 1 | round(99999999) }}",
    "range": "{{ range(99999999999) | list }}",
    "center": "{{ 'a' | center(99999999999) }}",
    "str.center": "{{ 'a'.center(99999999999) }}",
    "ljust again and again": "{% for i in range(99999) %}{% set x = 'a'.ljust(8000000) %}{% endfor %}",
    "zfill": "{{ 'a'.zfill(99999999999) }}",
    "expandtabs": "{{ ('\\t' * 9999).expandtabs(999999) }}",
    "indent": "{{ ('a\\n' * 9999) | indent(999999) }}",
    "format by percent": "{{ '%99999999999d' % 1 }}",
    "format by percent, computed": "{{ '%*d' % (99999999, 1) }}",
    "format by filter": "{{ '%99999999999d' | format(1) }}",
    "format by method": "{{ '{:>99999999999}'.format(1) }}",
    "format by method, computed": "{{ '{:>{}}'.format(1, 8000000) * 9 }}",
    "format of many fields": "{{ ('{0}' * 99999).format('x' * 99999) }}",
    "format of many percents": "{{ ('%(a)s' * 99999) % {'a': 'x' * 99999} }}",
    "precision": "{{ '%.99999999999f' % 1 }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "str.join": "{{ ('x' * 99999).join(range(99999) | map('string')) }}",
    "join of one text": "{{ ('x' * 99999) | join('y' * 9999) }}",
    "replace": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "replace of nothing": "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "translate": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "tojson's indent": "{{ [[[[1]]]] * 9999 | tojson(indent=99999) }}",
    "tojson's separators": "{{ (range(99999) | list) | tojson(separators=('x' * 99999, ':')) }}",
    "batch": "{{ [1] | batch(99999999, 'x') | list }}",
    "slice": "{{ [1] | slice(99999999) | list }}",
    "map over many": "{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    "select over many": "{% for i in range(99999) %}{% set x = range(99999) | reject | list %}{% endfor %}",
    "attributes of many": "{% for i in range(99999) %}{{ range(99999) | map(attribute='x') | list | length }}{% endfor %}",
    "sorting the same long texts": _BIG + "{% for i in range(999) %}{% set x = [b ~ 1, b ~ 2] | sort %}{% endfor %}",
    "comparing long texts": _BIG + "{% set a = b ~ 1 %}{% set c = b ~ 2 %}" + "{% for i in range(99999) %}{% if a == c %}{% endif %}{% endfor %}",
    "slicing long texts": _BIG + "{% set a = b[1:] %}" * 2000,
    "upper of long texts": _BIG + "{% set a = b | upper %}" * 2000,
    "sums of lists": "{% set x = range(9999) | map('string') | map('list') | list %}{{ x | sum(start=[]) }}",
    "unique of many": "{% for i in range(9999) %}{% set x = range(99999) | unique | list %}{% endfor %}",
    "urlize": "{{ ('(' * 99999) | urlize }}",
    "striptags": "{{ ('<!--' * 99999) | striptags }}",
    "wordwrap": "{{ ('a ' * 99999) | wordwrap(1, wrapstring='x' * 999) }}",
    "pprint": "{{ range(99999) | list | pprint }}",
    "lipsum": "{{ lipsum(99999, max=99999) }}",
    "a text of its own, often": "{% for a in range(99999) %}" + "y" * 5000 + "{% endfor %}",
    "a text of its own, kept": "{% set x %}{% for a in range(99999) %}" + "y" * 5000 + "{% endfor %}{% endset %}",
    "small pieces": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "a date's form": "{{ strftime_now('%c' * 99999) }}",
    "cycler": "{% set c = cycler(1, 2) %}{% for a in range(99999) %}{% for b in range(99999) %}{% set x = c.next() %}{% endfor %}{% endfor %}",
    "splitting": "{% for i in range(99999) %}{% set x = ('a,' * 99999).split(',') %}{% endfor %}",
    "titles": _BIG + "{% set a = b | title %}" * 2000,
    "word counts": _BIG + "{% set a = b | wordcount %}" * 2000,
    "splitting by each letter": _BIG + "{% set a = b | list %}" * 2000,
    "encoding": _BIG + "{% set a = b.encode() %}" * 2000,
    "grouping": "{% for i in range(9999) %}{% set x = range(99999) | groupby('real') %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("what", ENDLESS)
def test_a_template_without_end_is_stopped(what: str) -> None:
    try:
        compiled(ENDLESS[what])
    except RenderError:
        return
    began = time.thread_time()
    with pytest.raises(RenderError):
        render(ENDLESS[what], {"messages": []})
    assert time.thread_time() - began < 1.5, (
        "it is stopped after half a second; what is above is one operation's own time"
    )


async def test_the_event_loop_never_notices_a_template_that_loops_for_ever() -> None:
    """The loop's timer goes on being served while a thread renders; the interpreter's switch interval is all that it waits."""
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    heart = asyncio.create_task(beat())
    endless = ENDLESS["nested loops"]
    await asyncio.sleep(0.02)
    with pytest.raises(RenderError, match=r"0\.5 s"):
        await asyncio.to_thread(render, endless, {"messages": []})
    heart.cancel()
    assert beats > 8, "some fifty fit in"


def test_a_template_that_takes_long_gives_up_early_where_nobody_may_wait() -> None:
    endless = ENDLESS["nested loops"]
    with pytest.raises(TooLong):
        render(endless, {"messages": []}, quick=True)
    assert render("{{ 1 + 1 }}", {"messages": []}, quick=True) == "2"


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ x",
        "{% if x %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ x }}" * 30_000,
        "a" * 200_000,
    ],
)
def test_what_is_no_template_or_too_large_is_refused(template: str) -> None:
    with pytest.raises(RenderError):
        render(template, {"messages": []})


def test_an_error_of_the_template_is_told_with_its_own_words() -> None:
    with pytest.raises(RenderError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", {"messages": []})


def test_the_date_is_a_render_option() -> None:
    template = JinjaTemplate("dated", "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    said = [Message("user", "x")]
    assert template.text(said, generate=True, options={"date": "2024-02-29"}) == "29 Feb 2024 x"
    today = datetime.datetime.now().strftime("%d %b %Y")
    assert template.text(said, generate=True) == f"{today} x"
    with pytest.raises(RenderError, match="YYYY-MM-DD"):
        template.text(said, generate=True, options={"date": "soon"})


def test_a_default_system_text_is_a_render_option() -> None:
    template = JinjaTemplate(
        "s", "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}", options={"system": "be"}
    )
    assert template.text([Message("user", "x")], generate=True) == "system:be user:x "
    assert template.text([Message("system", "no"), Message("user", "x")], generate=True) == "system:no user:x "


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_an_option_cannot_stand_for_what_is_written(name: str) -> None:
    template = JinjaTemplate("t", "{{ messages[0].content }}")
    with pytest.raises(RenderError, match=name):
        template.text([Message("user", "x")], generate=True, options={name: []})


CALL = ToolCall("call_abc", "get_weather", '{"city": "Łódź", "days": 2}')
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": {}}}]
_CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}CALL%s{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("written", "form"),
    [
        ("{{ c.id }}{{ c.function.name }}{{ c.function.arguments | tojson }}", CallForm()),
        (
            '{{ c.function.name }}{% for k, v in c.function.arguments.items() %}"{{ k }}"={{ v }}{% endfor %}',
            CallForm(),
        ),
        ("{{ c.function.name }}{{ '' + c.function.arguments }}", CallForm("text")),
        ("{{ c.function.name }}{{ c.function.arguments }}", CallForm("text")),
        (
            "{{ c.function.name if m.content is none }}{{ c.function.arguments | tojson if m.content is none }}",
            CallForm("object", "null"),
        ),
        (
            "{{ raise_exception('length 9') if c.id | length != 9 }}{{ c.function.name }}{{ c.function.arguments | tojson }}",
            CallForm(ids="nine"),
        ),
        ("{{ c.id }}{{ c.function.arguments | tojson }}", CallForm(ids="named")),
    ],
)
def test_a_probe_finds_the_form_in_which_a_template_wants_calls(written: str, form: CallForm) -> None:
    template = JinjaTemplate("calls", _CALLS.replace("%s", written))
    assert template.call_form == form
    text = template.text([Message("user", "?"), Message("assistant", "", tool_calls=(CALL,))], generate=False)
    assert "get_weather" in text
    assert '"city"' in text
    assert "Łódź" in text


def test_what_a_template_cannot_write_is_refused_by_name() -> None:
    template = JinjaTemplate("plain", "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
    with pytest.raises(RenderError, match="'plain' cannot offer tools"):
        template.text([Message("user", "x")], generate=True, tools=TOOLS)
    with pytest.raises(RenderError, match=r"messages\[1\] holds a tool call"):
        template.text([Message("user", "x"), Message("assistant", "", tool_calls=(CALL,))], generate=True)


def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_tools() -> None:
    template = JinjaTemplate(
        "set",
        {
            "default": "plain {{ messages[0].content }}",
            "tool_use": "tools {{ tools | tojson }} {{ messages[0].content }}",
        },
    )
    said = [Message("user", "x")]
    assert template.text(said, generate=True) == "plain x"
    assert template.text(said, generate=True, tools=TOOLS) == f"tools {json.dumps(TOOLS)} x"
    with pytest.raises(RenderError, match="no 'default'"):
        JinjaTemplate("set", {"rag": "x"}).text(said, generate=True)


def test_literal_text_is_what_a_template_may_write_itself() -> None:
    text = literal_text("<a>{% if x == '<b>' %}{{ '<c>' }}{% endif %}{# <d> #}")
    assert all(part in text for part in ("<a>", "<b>", "<c>"))
    assert "<d>" not in text

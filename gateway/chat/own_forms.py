"""Tool calls in a grammar of their own: tags around each parameter, Python's syntax, channels.

Place in the flow: calls → **own_forms** → cursor. `gateway.chat.speech` says which form is which.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import TYPE_CHECKING

from gateway.chat.cursor import Waiting

if TYPE_CHECKING:
    from gateway.chat.calls import CallReader

_RECIPIENT = re.compile(r"to=functions\.([\w-]+)")


def xml(reader: CallReader) -> Waiting[None]:
    cursor = reader.cursor
    opening, function, closing = map(reader.spell, ("<tool_call>", "<function=", "</tool_call>"))
    while found := (yield from cursor.until((opening, function), reader.tell)):
        if found == opening:
            yield from cursor.space()
            found = yield from cursor.literal(function)
        name = (yield from cursor.literal(*(f"{known}>" for known in reader.names)))[:-1] if found else ""
        if name and (yield from _parameters(reader, name)):
            yield from cursor.space()
            if (yield from cursor.literal(closing)):
                cursor.held.clear()
        reader.give_up()


def _parameters(reader: CallReader, name: str) -> Waiting[bool]:
    cursor = reader.cursor
    parameter, parameter_end = map(reader.spell, ("<parameter=", "</parameter>"))
    closings = [reader.spell("</function>"), reader.spell("</tool_call>")]  # some models leave the first one out
    before = "{"
    reader.begin(name)
    while True:
        yield from cursor.space()
        found = yield from cursor.literal(parameter, *closings)
        if found in closings:
            reader.argue("{}" if before == "{" else "}")
            reader.end()
        if found != parameter:
            return bool(found)
        start = len(cursor.held)
        if not (yield from cursor.until((">",), cursor.hold)):
            return False
        value = len(cursor.held)
        if not (yield from cursor.until((parameter_end,), cursor.hold)):
            return False
        key = reader.plain("".join(cursor.held[start : value - 1]))
        text = reader.plain("".join(cursor.held[value:-1])).removeprefix("\n").removesuffix("\n")
        cursor.held.clear()
        reader.argue(f"{before}{json.dumps(key)}: {_typed(reader, name, key, text)}")
        before = ", "


def _typed(reader: CallReader, name: str, key: str, text: str) -> str:
    """A parameter's text as JSON: a string where the tool's schema says so or it is no JSON."""
    parameters = reader.functions[name].get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    schema = properties.get(key) if isinstance(properties, dict) else None
    if not isinstance(schema, dict) or schema.get("type") == "string" or not _is_json(text):
        return json.dumps(text, ensure_ascii=False)
    return text.strip()


def pythonic(reader: CallReader) -> Waiting[None]:
    cursor = reader.cursor
    tags = reader.speech.tool_calls == "pythonic_tagged"
    opening, closing = map(reader.spell, ("<|tool_call_start|>", "<|tool_call_end|>"))
    yield from cursor.space()
    if (yield from cursor.literal("[")):
        yield from _python_list(reader)
    reader.give_up()
    while tags and (yield from cursor.until((opening,), reader.tell)):
        yield from cursor.space()
        if (yield from cursor.literal("[")) and (yield from _python_list(reader)):
            yield from cursor.space()
            if (yield from cursor.literal(closing)):
                cursor.held.clear()
        reader.give_up()


def _python_list(reader: CallReader) -> Waiting[bool]:
    cursor = reader.cursor
    while True:
        yield from cursor.space()
        name = (yield from cursor.literal(*(f"{known}(" for known in reader.names)))[:-1]
        if not name or not (yield from _keywords(reader, name)):
            return False
        yield from cursor.space()
        found = yield from cursor.literal(",", "]")
        if found != ",":
            if found:
                cursor.held.clear()
            return bool(found)


def _keywords(reader: CallReader, name: str) -> Waiting[bool]:
    cursor = reader.cursor
    before = "{"
    while True:
        yield from cursor.space()
        if (yield from cursor.literal(")")):
            break
        key = yield from cursor.word()
        yield from cursor.space()
        if not key or not (yield from cursor.literal("=")):
            return False
        start = len(cursor.held)
        if not (yield from cursor.code(cursor.hold)):
            return False
        value = reader.plain("".join(cursor.held[start:]))
        if before == "{":
            reader.begin(name)
        cursor.held.clear()
        reader.argue(f"{before}{json.dumps(key)}: {_json_of_python(value)}")
        before = ", "
        if (yield from cursor.literal(",", ")")) == ")":
            break
    if before == "{":
        reader.begin(name)
    reader.argue("{}" if before == "{" else "}")
    reader.end()
    return True


def harmony(reader: CallReader) -> Waiting[None]:
    cursor = reader.cursor
    channel, start, message = map(reader.spell, ("<|channel|>", "<|start|>", "<|message|>"))
    ends = [reader.spell(mark) for mark in ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")]
    found = yield from cursor.literal(channel, start, " to=")
    while found or (found := (yield from cursor.until(ends, reader.tell))):
        if found not in (channel, start, " to="):
            cursor.held.clear()
            found = ""
            continue
        yield from cursor.until((message,), cursor.hold)
        header = reader.plain("".join(cursor.held))
        if not header.endswith("<|message|>"):
            reader.give_up()
            return
        cursor.held.clear()
        recipient = _RECIPIENT.search(header)
        name = recipient[1] if recipient else ""
        reader.reasons = "<|channel|>analysis" in header and name not in reader.functions
        if name in reader.functions:
            reader.begin(name)
            found = yield from cursor.until(ends, reader.argue)
            reader.end()
        elif reader.reasons:
            found = yield from cursor.until(ends, reader.think)
            reader.space.clear()
        else:
            found = yield from cursor.until(ends, reader.tell)
        reader.reasons = False
        cursor.held.clear()
        if found in (channel, start):
            cursor.held.append(found)
        else:
            found = ""


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _is_text(value: object) -> bool:
    """Whether it can be written without escapes: a string may hold half of a surrogate pair."""
    return not re.search(r"\\u[dD][89a-fA-F]", repr(value))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _json_of_python(code: str) -> str:
    """A Python literal as JSON; what is none is a string of its own text."""
    code = code.strip()
    if code in ("true", "false", "null"):
        return code
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a string is the model's affair
            value = ast.literal_eval(code)
        return json.dumps(value, ensure_ascii=not _is_text(value), allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return json.dumps(code, ensure_ascii=False)

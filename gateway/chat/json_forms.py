"""Tool calls whose arguments are written as JSON: each function reads a whole reply in one form.

Place in the flow: calls → **json_forms** → cursor. `gateway.chat.speech` says which form is which.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from gateway.chat.cursor import Waiting

if TYPE_CHECKING:
    from gateway.chat.calls import CallReader

_KEYS = ("name", "arguments", "parameters", "id", "type", "index", "function")


def hermes(reader: CallReader) -> Waiting[None]:
    cursor, closing = reader.cursor, reader.spell("</tool_call>")
    while (yield from cursor.until((reader.spell("<tool_call>"),), reader.tell)):
        yield from cursor.space()
        if (yield from cursor.literal("{")) and (yield from _object(reader)):
            yield from cursor.space()
            if (yield from cursor.literal(closing)):
                cursor.held.clear()
        reader.give_up()


def llama_3(reader: CallReader) -> Waiting[None]:
    cursor, tag = reader.cursor, reader.spell("<|python_tag|>")
    yield from cursor.space()
    tagged = yield from cursor.literal(tag)
    yield from cursor.space()
    while (yield from cursor.literal("{")) and (yield from _object(reader, bare=not tagged)):
        yield from cursor.space()
        yield from cursor.literal(";", ",")
        yield from cursor.space()
        tagged = yield from cursor.literal(tag)
    reader.give_up()
    while len(tag) == 1 and (yield from cursor.until((tag,), reader.tell)):
        yield from cursor.space()
        if (yield from cursor.literal("{")):
            yield from _object(reader)
        reader.give_up()


def mistral(reader: CallReader) -> Waiting[None]:
    cursor = reader.cursor
    opening, args, call_id = map(reader.spell, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"))
    named = {name + mark: name for name in reader.names for mark in (args, call_id)}
    while (yield from cursor.until((opening,), reader.tell)):
        found = opening
        while found == opening:  # one after another: only the last may open something
            marker = cursor.held.pop()
            reader.give_up()
            cursor.hold(marker)
            yield from cursor.space()
            found = yield from cursor.literal("[", "{", opening, *named)
        if found == "[":
            yield from _array(reader)
        elif found == "{":
            yield from _object(reader)
        elif found:
            yield from _mistral_args(reader, named[found], found, args, call_id)
        reader.give_up()


def _mistral_args(reader: CallReader, name: str, found: str, args: str, call_id: str) -> Waiting[None]:
    cursor = reader.cursor
    if found.endswith(call_id) and not (yield from cursor.until((args,), cursor.hold)):
        return
    yield from cursor.space()
    if (yield from cursor.char()) == "{":
        yield from _stream(reader, name)


def _array(reader: CallReader) -> Waiting[None]:
    cursor = reader.cursor
    while True:
        yield from cursor.space()
        if not (yield from cursor.literal("{")) or not (yield from _object(reader)):
            return
        yield from cursor.space()
        found = yield from cursor.literal(",", "]")
        if found == "]":
            cursor.held.clear()
        if found != ",":
            return


def _object(reader: CallReader, *, bare: bool = False) -> Waiting[bool]:
    """{"name": …, "arguments": …} behind its brace, in any order. Whether it was a whole call.

    A bare object, one that no marker announces, is a call only with arguments.
    """
    cursor = reader.cursor
    name, arguments, told = "", "", False
    keys = [f'"{key}"' for key in _KEYS]
    while True:
        yield from cursor.space()
        key = yield from cursor.literal(*keys)
        if not key:
            break
        yield from cursor.space()
        if not (yield from cursor.literal(":")):
            return False
        yield from cursor.space()
        if key == '"name"':
            name = (yield from cursor.literal(*(f'"{known}"' for known in reader.names))).strip('"')
            if not name:
                return False
        elif key in ('"arguments"', '"parameters"') and not told:
            if name and (yield from cursor.char()) == "{":
                told = True
                if not (yield from _stream(reader, name)):
                    return False
            else:
                arguments = _unquoted((yield from _captured_value(reader)))
                if not arguments:
                    return False
        elif key == '"function"' and not told and (yield from cursor.literal("{")):
            told = yield from _object(reader, bare=bare)
            if not told:
                return False
        elif not (yield from cursor.value(cursor.hold)):
            return False
        yield from cursor.space()
        if not (yield from cursor.literal(",")):
            break
    if not (yield from cursor.literal("}")):
        return False
    if not told:
        if not name or (bare and not arguments):
            return False
        reader.begin(name)
        reader.argue(arguments or "{}")
        reader.end()
    cursor.held.clear()
    return True


def _stream(reader: CallReader, name: str) -> Waiting[bool]:
    """A call whose arguments begin here, as JSON text."""
    reader.begin(name)
    if not (yield from reader.cursor.value(reader.argue)):
        return False
    reader.end()
    return True


def _captured_value(reader: CallReader) -> Waiting[str]:
    start = len(reader.cursor.held)
    whole = yield from reader.cursor.value(reader.cursor.hold)
    return reader.plain("".join(reader.cursor.held[start:])) if whole else ""


def functionary(reader: CallReader) -> Waiting[None]:
    cursor = reader.cursor
    opened = True  # the prompt ends with the marker
    while opened:
        name = (yield from cursor.literal("all\n", *(f"{known}\n" for known in reader.names))).strip("\n")
        if name in reader.functions:
            yield from cursor.space()
            if (yield from cursor.char()) == "{":
                yield from _stream(reader, name)
        elif name:
            cursor.held.clear()
        reader.give_up()
        opened = bool((yield from cursor.until((">>>",), reader.tell)))


def functionary_tags(reader: CallReader) -> Waiting[None]:
    cursor = reader.cursor
    while (yield from cursor.until((reader.spell("<function="),), reader.tell)):
        name = (yield from cursor.literal(*(f"{known}>" for known in reader.names)))[:-1]
        if name:
            yield from cursor.space()
            if (yield from cursor.char()) == "{" and (yield from _stream(reader, name)):
                yield from cursor.space()
                if (yield from cursor.literal(reader.spell("</function>"))):
                    cursor.held.clear()
        reader.give_up()


def _unquoted(arguments: str) -> str:
    """A whole JSON value as arguments: an object, also one written as a JSON string; null is none. "" for all else."""
    if arguments.startswith('"'):
        try:
            arguments = str(json.loads(arguments, strict=False)).strip()
            arguments.encode()
        except ValueError:  # half of a surrogate pair, too
            return ""
    return "{}" if arguments == "null" else arguments if arguments.startswith("{") else ""

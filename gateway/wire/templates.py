"""Templates on the wire: a registration becomes a `Registration`, what is on the shelf becomes JSON. Pure.

The one rule: a template is made of data that is named here; a field that is not is refused, never kept unread.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastchat.conversation import SeparatorStyle

from gateway.errors import RequestError
from gateway.wire.fields import boolean, refuse_unknown, required_string, show

NAME_CHARS = 128
SOURCE_CHARS = 256 * 1024
EXAMPLE_TURNS = 64
REGISTER_FIELDS = ("name", "kind", "source", "override", "tokens", "options")
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
OWN_TEMPLATE = "model"  # as a base's template: the one that the model brings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]*")
_FASTCHAT_TEXTS = {"system_template": "{system_message}", "system_message": "", "sep": "\n", "sep2": None}
_FASTCHAT_FIELDS = (
    *("name", "system_template", "system_message", "roles", "messages", "offset"),
    *("sep_style", "sep", "sep2", "stop_str", "stop_token_ids"),
)


@dataclass(frozen=True)
class Registration:
    """A template that somebody wants under a name; `source` is what `gateway.chat` makes it of."""

    name: str
    kind: str
    source: dict[str, Any]
    override: bool = False


def parse_registration(body: Mapping[str, Any]) -> Registration:
    """The request, checked field by field; whether the template works is another matter. Raises RequestError."""
    refuse_unknown(body, REGISTER_FIELDS)
    name = template_name(required_string(body, "name"))
    kind = required_string(body, "kind", 40)
    override = boolean(body, "override") or False
    if kind == "jinja":
        text = required_string(body, "source", SOURCE_CHARS)
        return Registration(name, kind, jinja_source(name, text, body.get("tokens"), body.get("options")), override)
    if kind != "fastchat":
        raise RequestError(f"'kind' is {show(kind)}; it must be 'jinja' or 'fastchat'", param="kind")
    for field in ("tokens", "options"):
        if body.get(field):
            raise RequestError(f"'{field}' goes with a Jinja template, not with one of kind 'fastchat'", param=field)
    fields = body.get("source")
    if not isinstance(fields, dict):
        raise RequestError(
            f"'source' is {show(fields)}; for a fastchat template it must be an object with its fields: "
            f"{', '.join(_FASTCHAT_FIELDS)}",
            param="source",
        )
    return Registration(name, kind, fastchat_source(name, fields), override)


def template_name(name: str) -> str:
    """The name, if a template may have it. Raises RequestError."""
    if len(name) > NAME_CHARS or not _NAME.fullmatch(name):
        raise RequestError(
            f"{show(name)} cannot be a template's name: it has 1 to {NAME_CHARS} letters, digits and . _ - + / and starts "
            "with a letter or digit",
            param="name",
        )
    if name == OWN_TEMPLATE:
        raise RequestError(f"the name '{name}' stands for the template that a model brings; take another", param="name")
    return name


def jinja_source(name: str, text: str, tokens: Any = None, options: Any = None) -> dict[str, Any]:
    """What a Jinja template is made of. Tokens that are not given are the model's own. Raises RequestError."""
    tokens = {} if tokens is None else tokens
    if not isinstance(tokens, dict) or not all(isinstance(token, str) for token in tokens.values()):
        raise RequestError(f"'tokens' must be an object of strings, not {show(tokens)}", param="tokens")
    for token in tokens:
        if token not in TOKEN_NAMES:
            raise RequestError(f"'tokens' has {show(token)}; known are {', '.join(TOKEN_NAMES)}", param="tokens")
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise RequestError(f"'options' must be an object, not {show(options)}", param="options")
    return {"name": name, "template": text, "tokens": tokens, "options": options}


def fastchat_source(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a fastchat Conversation, with the library's defaults for those not given. Raises RequestError."""
    for field in fields:
        if field not in _FASTCHAT_FIELDS:
            known = ", ".join(_FASTCHAT_FIELDS)
            raise RequestError(f"a fastchat template has no {show(field)}; its fields are {known}", param="source")
    if fields.get("name") not in (None, name):
        raise RequestError(f"'source.name' is {show(fields['name'])}, but the name is '{name}'", param="source.name")
    examples = _examples(fields.get("messages"))
    if fields.get("offset") not in (None, len(examples)):
        raise RequestError(
            f"'offset' is {show(fields['offset'])}; it is the number of 'messages', {len(examples)}",
            param="source.offset",
        )
    made = {field: _text(fields, field, default) for field, default in _FASTCHAT_TEXTS.items()}
    _check_system_template(made["system_template"] or "")
    return {
        "name": name,
        **made,
        "roles": _roles(fields.get("roles")),
        "messages": examples,
        "offset": len(examples),
        "sep_style": _style(fields.get("sep_style")),
        "stop_str": _stops(fields.get("stop_str")),
        "stop_token_ids": _stop_ids(fields.get("stop_token_ids")),
    }


def template_object(
    *,
    name: str,
    kind: str,
    origin: str,
    version: str,
    created_at: int | None,
    overrides: str | None,
    bases: Sequence[tuple[str, str]],
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A template as it is shown; `bases` are those rendered through it, each with the digest of its bundle."""
    shown: dict[str, Any] = {
        "id": name,
        "object": "template",
        "kind": kind,
        "origin": origin,
        "version": version,
        "created_at": created_at,
        "overrides": overrides,
        "bases": [{"id": base, "version": digest} for base, digest in bases],
    }
    return shown if source is None else shown | {"source": dict(source)}


def deleted_body(name: str) -> dict[str, Any]:
    return {"id": name, "object": "template", "deleted": True}


def conversation_body(
    model: str, name: str, kind: str, version: str, source: Mapping[str, Any], *, bundle: str
) -> dict[str, Any]:
    """The template in use for a model. One of fastchat's has `conv` too, as FastChat's own workers answer.

    `bundle` is the digest of template, tokenizer and options: what /v1/templates shows as the version of a base.
    """
    shown: dict[str, Any] = {"model": model, "name": name, "kind": kind, "version": version, "bundle": bundle}
    shown["source"] = dict(source)
    if kind != "fastchat":
        return shown
    style = int(SeparatorStyle[source["sep_style"]])
    conversation = {field: source[field] for field in _FASTCHAT_FIELDS}
    return {"conv": conversation | {"sep_style": style}, **shown}


def _text(fields: Mapping[str, Any], field: str, default: str | None) -> str | None:
    value = fields.get(field)
    if value is None:
        return default
    if not isinstance(value, str):
        raise RequestError(f"'{field}' must be a string, not {show(value)}", param=f"source.{field}")
    if len(value) > SOURCE_CHARS:
        raise RequestError(
            f"'{field}' has {len(value)} characters; at most {SOURCE_CHARS} are taken", param=f"source.{field}"
        )
    return value


def _check_system_template(text: str) -> None:
    """The library formats it: any other field could reach into objects, any width could fill the memory."""
    try:
        fields = [part[1:] for part in string.Formatter().parse(text) if part[1] is not None]
    except ValueError:
        fields = []
    if not fields or any(field != ("system_message", "", None) for field in fields):
        raise RequestError(
            f"'system_template' is {show(text)}; it must hold {{system_message}}, where the system message goes, and no "
            "other field (a brace by itself is written twice)",
            param="source.system_template",
        )


def _roles(value: Any) -> list[str]:
    if value is None:
        return ["USER", "ASSISTANT"]
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(role, str) for role in value):
        raise RequestError(
            f"'roles' must be two strings, the user's and the assistant's, not {show(value)}", param="source.roles"
        )
    return list(value)


def _examples(value: Any) -> list[list[str]]:
    """Turns that stand in every prompt, each as [role, text]."""
    turns = [] if value is None else value
    if not isinstance(turns, list | tuple) or len(turns) > EXAMPLE_TURNS:
        raise RequestError(
            f"'messages' must be a list of at most {EXAMPLE_TURNS} turns, not {show(value)}", param="source.messages"
        )
    for turn in turns:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(part, str) for part in turn):
            raise RequestError(f"'messages' holds {show(turn)}; each turn is [role, text]", param="source.messages")
    return [list(turn) for turn in turns]


def _style(value: Any) -> str:
    """A separator style by name, which does not move between versions as its number may."""
    if value is None:
        return "ADD_COLON_SINGLE"
    if isinstance(value, str) and value.upper() in SeparatorStyle.__members__:
        return value.upper()
    if isinstance(value, int) and not isinstance(value, bool) and value in set(map(int, SeparatorStyle)):
        return str(SeparatorStyle(value).name)
    known = ", ".join(SeparatorStyle.__members__)
    raise RequestError(f"'sep_style' is {show(value)}; it must be one of {known}", param="source.sep_style")


def _stops(value: Any) -> str | list[str] | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, list) and value and all(isinstance(stop, str) and stop for stop in value):
        return value
    raise RequestError(
        f"'stop_str' must be a string or a list of strings, none of them empty, not {show(value)}",
        param="source.stop_str",
    )


def _stop_ids(value: Any) -> list[int] | None:
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        return value
    raise RequestError(
        f"'stop_token_ids' must be a list of token ids, not {show(value)}", param="source.stop_token_ids"
    )

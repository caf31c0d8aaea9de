"""Which templates there are by name, and how one that was written down is made again."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastchat.conversation import conv_templates

from gateway.chat.fastchat import FastChatTemplate
from gateway.chat.jinja import JinjaTemplate
from gateway.chat.templates import CHATML, LLAMA_3, Template, TurnTemplate
from gateway.chat.validation import validate


def template_named(name: str) -> Template:
    """The template of that name. Raises KeyError with the names there are, or with why it is refused."""
    known, refused = _shelf()
    if name in known:
        return known[name]
    if name in refused:
        raise KeyError(f"the template '{name}' is not taken: {refused[name]}")
    raise KeyError(f"there is no template '{name}'; there are: {', '.join(known)}")


def registered_templates() -> dict[str, Template]:
    """All built-in templates by name: our own, and those of fastchat that validate."""
    return dict(_shelf()[0])


def refused_templates() -> dict[str, str]:
    """Those of fastchat's that are not taken, and why."""
    return dict(_shelf()[1])


def template_from_source(kind: str, source: dict[str, Any]) -> Template:
    """The template that `source()` wrote down, whatever the registry or the library says today. Raises ValueError."""
    try:
        if kind == TurnTemplate.kind:
            return TurnTemplate(**source)
        if kind == FastChatTemplate.kind:
            return FastChatTemplate(source)
        if kind == JinjaTemplate.kind:
            return JinjaTemplate(**source)
    except (TypeError, KeyError) as error:
        raise ValueError(f"a template of the kind '{kind}' cannot be made of this: {error}") from error
    raise ValueError(f"unknown kind of template '{kind}'; known: turns, fastchat, jinja")


@cache
def _shelf() -> tuple[dict[str, Template], dict[str, str]]:
    known: dict[str, Template] = {CHATML.name: CHATML, LLAMA_3.name: LLAMA_3}
    refused: dict[str, str] = {}
    for name in conv_templates:
        try:
            template = FastChatTemplate.named(name)
        except ValueError as error:
            refused[name] = str(error)
            continue
        if problems := validate(template):
            refused[name] = "; ".join(problems)
        else:
            known.setdefault(name, template)
    return known, refused


TEMPLATE_NAMES = tuple(_shelf()[0])

"""Which templates there are by name, and how one that was written down is made again."""

from __future__ import annotations

from typing import Any

from gateway.chat.fastchat import FastChatTemplate
from gateway.chat.templates import CHATML, LLAMA_3, Template, TurnTemplate

TEMPLATE_NAMES = ("vicuna_v1.1", "alpaca", "chatml", "llama-2", "llama-3")


def template_named(name: str) -> Template:
    """The template of that name. Raises KeyError with the names there are."""
    for template in (CHATML, LLAMA_3):
        if template.name == name:
            return template
    if name in TEMPLATE_NAMES:
        return FastChatTemplate.named(name)
    raise KeyError(f"there is no template '{name}'; there are: {', '.join(TEMPLATE_NAMES)}")


def template_from_source(kind: str, source: dict[str, Any]) -> Template:
    """The template that `source()` wrote down, whatever the registry or the library says today."""
    if kind == TurnTemplate.kind:
        return TurnTemplate(**source)
    if kind == FastChatTemplate.kind:
        return FastChatTemplate(source)
    raise ValueError(f"unknown kind of template '{kind}'; known: turns, fastchat")

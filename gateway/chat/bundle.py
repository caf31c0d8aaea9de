"""A bundle: the template, the tokenizer and the render options that travel with a base and with each adapter.

An adapter is always rendered through the bundle that it was trained with, whatever the registry says today.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gateway.chat.conversation import Message
from gateway.chat.registry import template_from_source, template_named
from gateway.chat.speech import Speech, read_speech
from gateway.chat.templates import Template
from gateway.chat.tokenizer import Tokenizer

TEMPLATE_FILE, TOKENIZER_FILE = "template.json", "tokenizer.json"
_PROBE = "\ufdd3"


@dataclass(frozen=True)
class ReplyFrame:
    """What a template puts around a reply: `lead` before it, `tail` between it and the stop."""

    lead: str
    tail: str
    stop: str
    stop_id: int | None  # None: the tokenizer has no such token, the stop is text


@dataclass(frozen=True)
class Bundle:
    """How messages become ids for one model."""

    template: Template
    tokenizer: Tokenizer
    frame: ReplyFrame
    eos_ids: tuple[int, ...]
    files: dict[str, bytes] = field(repr=False)

    @cached_property
    def speech(self) -> Speech:
        """How the model writes tool calls and reasoning down; only templates that a model brings say so."""
        return read_speech(str(self.template.source().get("template", "")))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        own = () if self.frame.stop_id is None else (self.frame.stop_id,)
        return own + tuple(i for i in self.eos_ids if i not in own)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.frame.stop,) if self.frame.stop_id is None else ()

    @property
    def digest(self) -> str:
        """Names this version: "sha256:…" over both files."""
        digest = hashlib.sha256()
        for name in (TEMPLATE_FILE, TOKENIZER_FILE):
            digest.update(hashlib.sha256(self.files[name]).digest())
        return f"sha256:{digest.hexdigest()}"

    def to_files(self) -> dict[str, bytes]:
        """The files to keep, by name."""
        return dict(self.files)

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Bundle:
        """The bundle that `to_files` gave. Raises ValueError when a file is missing or makes no sense."""
        try:
            written = json.loads(files[TEMPLATE_FILE])
            template = template_from_source(written["kind"], written["source"])
            eos_ids = tuple(int(i) for i in written["eos_ids"])
            tokenizer = Tokenizer(files[TOKENIZER_FILE])
        except KeyError as error:
            raise ValueError(f"the template bundle lacks {error}") from error
        kept = {name: files[name] for name in (TEMPLATE_FILE, TOKENIZER_FILE)}
        return cls(template, tokenizer, _frame(template, tokenizer), eos_ids, kept)


def make_bundle(template_name: str, tokenizer_json: bytes, eos_ids: list[int]) -> Bundle:
    """A bundle of a registered template and a model's tokenizer; `eos_ids` are the model's end-of-text tokens.

    Raises KeyError for an unknown template, ValueError when the two do not fit.
    """
    template = template_named(template_name)
    written: dict[str, Any] = {
        "format": 1,
        "name": template.name,
        "kind": template.kind,
        "source": template.source(),
        "eos_ids": eos_ids,
    }
    content = json.dumps(written, indent=1, sort_keys=True).encode()
    return Bundle.from_files({TEMPLATE_FILE: content, TOKENIZER_FILE: tokenizer_json})


def _frame(template: Template, tokenizer: Tokenizer) -> ReplyFrame:
    """Read off the template by rendering: what it adds around a reply after the prompt that asked for it."""
    asked = [Message("user", "?")]
    prompt = template.text(asked, generate=True)
    whole = template.text([*asked, Message("assistant", _PROBE)], generate=False)
    lead, probe, rest = whole[len(prompt) :].partition(_PROBE)
    if not whole.startswith(prompt) or not probe:
        raise ValueError(f"the template '{template.name}' does not write a reply where its prompt ends")
    stop = tokenizer.first_control(rest) or template.stop
    tail, found, _ = rest.partition(stop)
    if not stop or not found:
        raise ValueError(f"the template '{template.name}' ends no reply with its stop {template.stop!r}")
    return ReplyFrame(lead, tail, stop, tokenizer.control_ids.get(stop))

"""A bundle: the template, the tokenizer and the render options that travel with a base and with each adapter.

An adapter is always rendered through the bundle that it was trained with, whatever the registry says today.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from gateway.chat.frame import ReplyFrame, read_frame, speech_of
from gateway.chat.registry import template_from_source, template_named
from gateway.chat.speech import Speech
from gateway.chat.templates import Template
from gateway.chat.tokenizer import Controls, Tokenizer

TEMPLATE_FILE, TOKENIZER_FILE = "template.json", "tokenizer.json"


@dataclass(frozen=True)
class Bundle:
    """How messages become ids for one model. `options` are over the template's own, and under a request's."""

    template: Template
    tokenizer: Tokenizer
    frame: ReplyFrame
    eos_ids: tuple[int, ...]
    options: Mapping[str, Any]
    controls: Controls
    speech: Speech
    files: dict[str, bytes] = field(repr=False)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        own = () if self.frame.stop_id is None else (self.frame.stop_id,)
        return tuple(dict.fromkeys((*own, *self.frame.other_stop_ids, *self.eos_ids)))

    @cached_property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.frame.stop,) if self.frame.stop_id is None else ()

    @cached_property
    def silent_ids(self) -> frozenset[int]:
        """Tokens that are no text of a reply: control tokens, and what ends it."""
        return self.tokenizer.control_id_set | set(self.stop_ids)

    @cached_property
    def digest(self) -> str:
        """Names this version: "sha256:…" over both files."""
        digest = hashlib.sha256()
        for name in (TEMPLATE_FILE, TOKENIZER_FILE):
            digest.update(hashlib.sha256(self.files[name]).digest())
        return f"sha256:{digest.hexdigest()}"

    def to_files(self) -> dict[str, bytes]:
        """The files to keep, by name."""
        return dict(self.files)

    def with_options(self, options: Mapping[str, Any]) -> Bundle:
        """The same with other render options: another version, with a digest of its own."""
        return bundle_of(self.template, self.files[TOKENIZER_FILE], self.eos_ids, options)

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Bundle:
        """The bundle that `to_files` gave. Raises ValueError when a file is missing or makes no sense."""
        try:
            written = json.loads(files[TEMPLATE_FILE])
            template = template_from_source(written["kind"], written["source"])
            eos_ids = tuple(int(i) for i in written["eos_ids"])
            options = dict(written.get("options") or {})
            tokenizer = _tokenizer(files[TOKENIZER_FILE])
        except KeyError as error:
            raise ValueError(f"the template bundle lacks {error}") from error
        kept = {name: files[name] for name in (TEMPLATE_FILE, TOKENIZER_FILE)}
        controls = tokenizer.controls_of(template.literal_text)
        speech = speech_of(template)
        frame = read_frame(template, tokenizer, controls, eos_ids, speech.reasoning, options)
        return cls(template, tokenizer, frame, eos_ids, options, controls, speech, kept)


# Adapters of one base come with equal tokenizers: some hundred megabytes each, and a second to read.
_tokenizer = lru_cache(maxsize=8)(Tokenizer)


def make_bundle(
    template_name: str, tokenizer_json: bytes, eos_ids: Sequence[int], options: Mapping[str, Any] | None = None
) -> Bundle:
    """A bundle of a registered template and a model's tokenizer; `eos_ids` are the model's end-of-text tokens.

    Raises KeyError for an unknown template, ValueError when the two do not fit.
    """
    return bundle_of(template_named(template_name), tokenizer_json, eos_ids, options)


def bundle_of(
    template: Template, tokenizer_json: bytes, eos_ids: Sequence[int], options: Mapping[str, Any] | None = None
) -> Bundle:
    """A bundle of any template and a model's tokenizer. Raises ValueError when the two do not fit."""
    written: dict[str, Any] = {
        "format": 1,
        "name": template.name,
        "kind": template.kind,
        "source": template.source(),
        "eos_ids": list(eos_ids),
        "options": dict(options or {}),
    }
    content = json.dumps(written, indent=1, sort_keys=True).encode()
    return Bundle.from_files({TEMPLATE_FILE: content, TOKENIZER_FILE: tokenizer_json})

"""Tokenizers to render with: real vocabularies of the sdist, and small ones that are given a template's control tokens."""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import lru_cache
from pathlib import Path

from tests.parity.sdist import llama_cpp_models
from tests.tiny_tokenizers import byte_level, sentencepiece_like
from trainer.export import gguf_metadata, pretokenizers, tokenizers
from trainer.export.tensors import UnsupportedModel

# By which real vocabulary a template's model reads, where there is one among those of the sdist.
_REAL = (
    (re.compile("qwen3.5", re.I), "qwen35"),
    (re.compile("qwen|qwq|mimo|smollm", re.I), "qwen2"),
    (re.compile("llama-3|hermes|functionary|r1-distill-llama|firefunction", re.I), "llama-bpe"),
    (re.compile("deepseek", re.I), "deepseek-llm"),
    (re.compile("command|cohere", re.I), "command-r"),
    (re.compile("phi", re.I), "phi-3"),
    (re.compile("gemma", re.I), "gemma-4"),
)
_TOKEN_LIKE = re.compile(
    r"<\|[^\s<>|]{1,40}\|>|<｜[^\s<>｜]{1,40}｜>|</?[a-z_:]{2,20}>|<[a-z_]+\|>|<\|[a-z_]+>|\[/?[A-Z_]{3,24}\]"
)


def real_vocabulary(template: str) -> str | None:
    return next((name for pattern, name in _REAL if pattern.search(template)), None)


def vocabularies() -> list[str]:
    """The names of the sdist's vocabularies."""
    return sorted(
        path.name.removeprefix("ggml-vocab-").removesuffix(".gguf") for path in llama_cpp_models().glob("*.gguf")
    )


def vocabulary_path(name: str) -> Path:
    return llama_cpp_models() / f"ggml-vocab-{name}.gguf"


@lru_cache(maxsize=4)
def vocabulary(name: str) -> bytes:
    """A real vocabulary as tokenizer.json, kept beside the sdist for the next time. Raises UnsupportedModel."""
    source = vocabulary_path(name)
    digest = hashlib.sha256()
    for module in (tokenizers, pretokenizers, gguf_metadata):  # converted anew when the conversion changes
        digest.update(Path(str(module.__file__)).read_bytes())
    kept = llama_cpp_models() / f"{name}.{digest.hexdigest()[:12]}.tokenizer.json"
    if not kept.is_file():
        made = tokenizers.tokenizer_json_of(source)
        beside = kept.with_suffix(f".{os.getpid()}")
        beside.write_bytes(made)
        beside.replace(kept)
    return kept.read_bytes()


@lru_cache(maxsize=64)
def with_tokens(tokenizer_json: bytes, template_text: str, names: tuple[str, ...] = ()) -> bytes:
    """A tokenizer that knows what looks like a control token in a template's text; those of words are no special ones."""
    made = json.loads(tokenizer_json)
    known = {token["content"] for token in made["added_tokens"]} | set(
        made["model"]["vocab"] if _has_dict(made) else ()
    )
    size = len(made["model"]["vocab"])
    next_id = max([size, *(token["id"] + 1 for token in made["added_tokens"])])
    for name in dict.fromkeys((*names, *_TOKEN_LIKE.findall(template_text))):
        if name in known:
            continue
        word = name.strip("</>").isalpha() and name not in names
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": not word}
        made["added_tokens"].append({"id": next_id, "content": name, **flags})
        next_id += 1
    return json.dumps(made, ensure_ascii=False).encode()


def _has_dict(made: dict[str, dict[str, object]]) -> bool:
    return isinstance(made["model"]["vocab"], dict)


def small_tokenizers() -> dict[str, bytes]:
    return {"byte-level": byte_level(), "sentencepiece": sentencepiece_like()}


def refused_vocabularies() -> dict[str, str]:
    """Those that are not taken, and why."""
    refused = {}
    for name in vocabularies():
        try:
            vocabulary(name)
        except UnsupportedModel as error:
            refused[name] = str(error)
    return refused

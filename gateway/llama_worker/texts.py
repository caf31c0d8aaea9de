"""The dialect's smaller requests as bytes: embeddings, tokenise, detokenise. Pure; on the HTTP thread."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from gateway.errors import ContextLengthExceeded, RequestError
from gateway.llama_worker.fields import Limits, boolean, ids, show, text

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000  # of all inputs together
MAX_CHARACTERS = 2**20
MAX_TOKENS = 2**20


@dataclass(frozen=True)
class EmbeddingRequest:
    """Token ids to be embedded."""

    model: str
    inputs: list[list[int]]
    base64: bool

    @property
    def tokens(self) -> int:
        return sum(map(len, self.inputs))


@dataclass(frozen=True)
class TokenizeRequest:
    """A text to be cut into tokens."""

    prompt: str
    add_special_tokens: bool
    return_token_strs: bool


def parse_embedding(fields: dict[str, Any], limits: Limits) -> EmbeddingRequest:
    """The request in `fields`; RequestError with its `param` when a value breaks a rule."""
    given = fields.get("input")
    listed = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    if len(listed) > MAX_INPUTS:
        raise RequestError(f"input has {len(listed)} entries; at most {MAX_INPUTS} are taken.", param="input")
    inputs = []
    for entry in listed:
        if not isinstance(entry, list) or not entry:
            raise RequestError(f"input holds {show(entry)}; each is a list of one or more token ids.", param="input")
        if len(entry) > limits.max_model_len:
            raise ContextLengthExceeded(
                f"An input has {len(entry)} tokens; this model's context holds {limits.max_model_len}.", param="input"
            )
        inputs.append(ids(entry, "input", limits, limits.max_model_len))
    if sum(map(len, inputs)) > MAX_INPUT_TOKENS:
        raise RequestError(f"input has more than {MAX_INPUT_TOKENS} tokens together.", param="input")
    form = fields.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise RequestError(f"encoding_format is {show(form)}; it must be float or base64.", param="encoding_format")
    return EmbeddingRequest(text(fields, "model"), inputs, form == "base64")


def embedding_body(asked: EmbeddingRequest, vectors: Sequence[npt.NDArray[np.float32]]) -> bytes:
    """The list of embeddings."""
    data = [
        {"object": "embedding", "index": index, "embedding": _spell(vector) if asked.base64 else vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": asked.tokens, "total_tokens": asked.tokens}
    body = {"object": "list", "data": data, "model": asked.model, "usage": usage}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def parse_tokenize(fields: dict[str, Any]) -> TokenizeRequest:
    """The request in `fields`; RequestError with its `param`."""
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or len(prompt) > MAX_CHARACTERS:
        raise RequestError(f"prompt must be a string of at most {MAX_CHARACTERS} characters.", param="prompt")
    add_special = True if fields.get("add_special_tokens") is None else boolean(fields, "add_special_tokens")
    return TokenizeRequest(prompt, add_special, boolean(fields, "return_token_strs"))


def tokenize_body(tokens: list[int], spelled: list[bytes] | None, limits: Limits) -> bytes:
    """The ids of a text, and how each is spelled where that was asked for."""
    return orjson.dumps(
        {
            "count": len(tokens),
            "max_model_len": limits.max_model_len,
            "tokens": tokens,
            "token_strs": None if spelled is None else [piece.decode(errors="replace") for piece in spelled],
        }
    )


def parse_detokenize(fields: dict[str, Any], limits: Limits) -> list[int]:
    """The ids in `fields`; RequestError with its `param`."""
    if not isinstance(fields.get("tokens"), list):
        raise RequestError("tokens must be a list of token ids.", param="tokens")
    return ids(fields["tokens"], "tokens", limits, MAX_TOKENS)


def _spell(vector: npt.NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()

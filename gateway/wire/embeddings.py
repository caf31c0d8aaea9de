"""`/v1/embeddings`: the request read, and the body that answers it. Pure."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from gateway.errors import RequestError
from gateway.wire import fields
from gateway.wire.fields import Body, show

_KNOWN = frozenset("model input encoding_format dimensions user".split())
_INPUT_LIMIT = 2048


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """A checked request; each input is a text or a list of token ids."""

    model: str
    inputs: list[str | list[int]]
    as_base64: bool
    dimensions: int | None


def parse(body: Body) -> EmbeddingsRequest:
    """Raises RequestError that names the field, its value and the rule."""
    fields.refuse_unknown(body, _KNOWN)
    model = fields.required_string(body, "model", 1000)
    form = body.get("encoding_format")
    if form not in (None, "float", "base64"):
        raise RequestError(f"'encoding_format' must be float or base64, not {show(form)}", param="encoding_format")
    dimensions = fields.integer(body, "dimensions", 1, 2**31)
    return EmbeddingsRequest(model, fields.texts_or_ids(body, "input", _INPUT_LIMIT), form == "base64", dimensions)


def embeddings(request: EmbeddingsRequest, vectors: Sequence[str], prompt_tokens: int) -> bytes:
    """The list of embeddings; `vectors` are base64 of 32-bit floats.

    Raises RequestError where other dimensions were asked for: cutting a vector short keeps its meaning only in models that
    were trained for it, and none says so.
    """
    width = len(base64.b64decode(vectors[0])) // 4
    if request.dimensions not in (None, width):
        raise RequestError(
            f"'dimensions' is {request.dimensions}, and '{request.model}' makes vectors of {width}; leave it out",
            param="dimensions",
        )
    data = [
        {"object": "embedding", "index": index, "embedding": vector if request.as_base64 else _floats(vector)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return orjson.dumps({"object": "list", "data": data, "model": request.model, "usage": usage})


def _floats(vector: str) -> tuple[float, ...]:
    data = base64.b64decode(vector)
    return struct.unpack(f"<{len(data) // 4}f", data)

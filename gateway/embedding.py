"""Texts → vectors: read as the model reads them, and asked of its engine in parts. `inference` calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.engines.catalog import Served
from gateway.errors import ContextLengthExceeded, EngineError, RequestError

INPUTS_AT_ONCE = 32  # in a request to the engine: its answer stays small, and others come in between
TOKEN_LIMIT = 300_000  # OpenAI's, of all inputs together


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors in the order of their inputs, each as base64 of little-endian floats of 32 bits."""

    vectors: list[str]
    prompt_tokens: int


async def embed(served: Served, inputs: list[list[int]]) -> Embeddings:
    """The vectors of what `inputs_as_ids` gave. Raises EngineError."""
    vectors: list[str] = []
    for start in range(0, len(inputs), INPUTS_AT_ONCE):
        vectors += await _embedded(served, inputs[start : start + INPUTS_AT_ONCE])
    return Embeddings(vectors, sum(map(len, inputs)))


def inputs_as_ids(served: Served, inputs: Sequence[str | list[int]]) -> list[list[int]]:
    """What is to be embedded as the model reads it: a text between what its tokenizer puts around one, ids as they are.

    Raises RequestError, ContextLengthExceeded. Long texts take a while: called on a thread.
    """
    tokenizer, listed = served.bundle.tokenizer, []
    for given in inputs:
        if isinstance(given, str):
            ids = [*tokenizer.prefix_ids, *tokenizer.encode(given), *tokenizer.suffix_ids]
        else:
            ids = given
            if max(ids) >= tokenizer.vocab_size:
                raise RequestError(
                    f"'input' holds the token id {max(ids)}, and the model has {tokenizer.vocab_size} tokens",
                    param="input",
                )
        if len(ids) > served.context_length:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {served.context_length} tokens, and an input has {len(ids)}. "
                "Please shorten it.",
                param="input",
            )
        listed.append(ids)
    if sum(map(len, listed)) > TOKEN_LIMIT:
        raise RequestError(f"'input' has more than {TOKEN_LIMIT} tokens in all", param="input")
    return listed


async def _embedded(served: Served, inputs: list[list[int]]) -> list[str]:
    body = {"model": served.engine_model, "input": inputs, "encoding_format": "base64"}
    stream = await served.client.stream(body, "/v1/embeddings")
    try:
        frames = await stream.frames()
        while await stream.frames():
            pass  # to its end, so that the connection can be kept
    finally:
        stream.cancel()
    try:
        vectors = [str(entry["embedding"]) for entry in sorted(frames[0]["data"], key=lambda entry: entry["index"])]
    except (IndexError, KeyError, TypeError) as error:
        raise EngineError(f"the engine's embeddings are not as the dialect has them: {error!r}") from error
    if len(vectors) != len(inputs):
        raise EngineError(f"the engine gave {len(vectors)} embeddings for {len(inputs)} inputs")
    return vectors

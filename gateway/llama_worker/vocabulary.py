"""The model's own vocabulary: text → ids → text. llama.cpp's vocabulary never changes, so any thread may ask it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp.llama_cpp as llama
import numpy as np

from gateway.llama_worker.native import Model, NativeError

FIRST_BUFFER = 64


class NativeVocabulary:
    """Tokenises and spells as llama.cpp does for `model`."""

    def __init__(self, model: Model) -> None:
        self._vocab = llama.llama_model_get_vocab(model.pointer)
        self.size = model.vocab_size

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """The ids of `text`, with `add_special` what the model puts around a text too.

        Text is text: no control token comes of it.
        """
        data = text.encode()
        room = len(data) + 4
        ids = np.empty(room, dtype=np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = llama.llama_tokenize(self._vocab, data, len(data), pointer, room, add_special, False)
        if count < 0:
            raise NativeError(f"llama_tokenize wants {-count} places for {len(data)} bytes")
        return [int(token) for token in ids[:count]]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens by their names."""
        tokens = np.asarray(ids, dtype=np.int32)
        pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        room = 16 * len(tokens) + FIRST_BUFFER
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = llama.llama_detokenize(self._vocab, pointer, len(tokens), buffer, room, False, True)
            if size >= 0:
                return buffer.raw[:size].decode(errors="replace")
            room = -size

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes that a token adds to a text; nothing for a control token, unless `special` asks for its name."""
        room = FIRST_BUFFER
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = llama.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if size >= 0:
                return buffer.raw[:size]
            room = -size

    def pieces(self) -> list[bytes]:
        """`piece` of every token; some tenths of a second for a large vocabulary."""
        return [self.piece(token) for token in range(self.size)]

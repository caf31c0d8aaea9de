"""llama.cpp's own tokenizer over a GGUF's vocabulary, through the C API."""

from __future__ import annotations

import ctypes

import llama_cpp


class LlamaVocabulary:
    """Only the vocabulary is loaded. To be closed."""

    def __init__(self, path: str) -> None:
        llama_cpp.llama_backend_init()
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        # Back to its own: llama.cpp keeps the pointer, and the function goes with this object.
        llama_cpp.llama_log_set(ctypes.cast(0, llama_cpp.llama_log_callback), ctypes.c_void_p(0))
        if not self._model:
            raise OSError(f"llama.cpp cannot load {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def __enter__(self) -> LlamaVocabulary:
        return self

    def __exit__(self, *error: object) -> None:
        llama_cpp.llama_model_free(self._model)

    def encode(self, text: str) -> list[int]:
        """Without BOS; control tokens are taken by name."""
        data = text.encode()
        room = len(data) + 16
        ids = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, room, False, True)
        if count < 0:
            raise ValueError(f"{-count} tokens do not fit into {room}")
        return list(ids[:count])

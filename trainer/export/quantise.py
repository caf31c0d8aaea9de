"""An f16 GGUF → a smaller type, by llama.cpp's own quantiser. No torch."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import gguf

DEFAULT_TYPE, PLAIN_TYPE = "q4_0", "f16"
_TYPES = (
    "f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k iq4_nl iq4_xs"
).split()
TYPES = {name: int(gguf.LlamaFileType[f"MOSTLY_{name.upper()}"]) for name in _TYPES}
_STEP = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


def write_quantised(
    source: Path,
    path: Path,
    kind: str = DEFAULT_TYPE,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes `path` with weights of the type `kind`; `progress` is told how many tensors of how many are begun.

    Raises RuntimeError when llama.cpp fails.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = TYPES[kind]
    said: list[str] = []

    def hear(level: int, text: bytes, _: object) -> None:
        line = text.decode(errors="replace")
        said[:] = [*said[-5:], line]
        if found := _STEP.match(line):
            progress(int(found[1]), int(found[2]))

    listener = llama_cpp.llama_log_callback(hear)
    llama_cpp.llama_log_set(listener, ctypes.c_void_p(0))
    try:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params))
    finally:
        llama_cpp.llama_log_set(ctypes.cast(0, llama_cpp.llama_log_callback), ctypes.c_void_p(0))
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise {source}: {''.join(said).strip()}")

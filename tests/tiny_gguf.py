"""Random models and adapters in GGUF, for tests and benchmarks of what reads GGUF.

A Llama-architecture model with seeded random weights and a SentencePiece-like vocabulary (`<unk>`, `<s>`, `</s>`, 256 byte
tokens, then invented pieces). It says nothing sensible, but it is the real format at a real shape, so it exercises the
real engine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

UNK, BOS, EOS = 0, 1, 2
BYTE_TOKENS = 256
LLAMA_FTYPE_MOSTLY_Q4_0 = 2
OF_THE_TYPE = ("general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-architecture model."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 128
    vocab_size: int = 320
    context_length: int = 512


def write_tiny_gguf(
    path: Path,
    seed: int = 0,
    vocab_size: int = 320,
    q4_0: bool = True,
    shape: Shape | None = None,
    words: Sequence[str] = (),
    pooling: gguf.PoolingType | None = None,
) -> Path:
    """Writes a random model to `path` (q4_0 as llama.cpp's own quantiser makes it, or f16) and returns the path.

    `words` are the first of the invented pieces; `pooling` makes it a model for embeddings.
    """
    shape = shape or Shape(vocab_size=vocab_size)
    target = path.with_suffix(".f16.gguf") if q4_0 else path
    _write_f16(target, shape, np.random.default_rng(seed), words, pooling)
    if q4_0:
        _quantize(target, path)
        target.unlink()
    return path


def write_tiny_lora(
    path: Path, shape: Shape | None = None, seed: int = 0, rank: int = 4, alpha: float = 8.0, strength: float = 1.0
) -> Path:
    """Writes a random LoRA adapter (every projection of every layer) for a model of `shape`; returns the path."""
    shape = shape or Shape()
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for layer in range(shape.layers):
        for name, (rows, columns) in _projections(shape).items():
            a = rng.standard_normal((rank, columns), dtype=np.float32) / np.sqrt(columns)  # (rank, in)
            b = rng.standard_normal((rows, rank), dtype=np.float32) * strength / np.sqrt(rank)  # (out, rank)
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", a.astype(np.float32))
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", b.astype(np.float32))
    _finish(writer)
    return path


def as_f32(source: Path, target: Path) -> None:
    """Copies a GGUF file with all its tensors as f32 and without a word of their type."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in OF_THE_TYPE:
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_f16(
    path: Path, shape: Shape, rng: np.random.Generator, words: Sequence[str], pooling: gguf.PoolingType | None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocab_size)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    _add_vocabulary(writer, shape.vocab_size, words)
    writer.add_tensor("token_embd.weight", _random(rng, shape.vocab_size, shape.hidden, gain=shape.hidden**0.5))
    writer.add_tensor("output_norm.weight", np.ones(shape.hidden, dtype=np.float32))
    # Logits of some spread, so that greedy choices have a margin and sampling has something to choose among.
    writer.add_tensor("output.weight", _random(rng, shape.vocab_size, shape.hidden, gain=2.0))
    for layer in range(shape.layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(shape.hidden, dtype=np.float32))
        for name, (rows, columns) in _projections(shape).items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", _random(rng, rows, columns))
    _finish(writer)


def _projections(shape: Shape) -> dict[str, tuple[int, int]]:
    kv = shape.hidden // shape.heads * shape.kv_heads
    return {  # name: (out, in)
        "attn_q": (shape.hidden, shape.hidden),
        "attn_k": (kv, shape.hidden),
        "attn_v": (kv, shape.hidden),
        "attn_output": (shape.hidden, shape.hidden),
        "ffn_gate": (shape.feed_forward, shape.hidden),
        "ffn_up": (shape.feed_forward, shape.hidden),
        "ffn_down": (shape.hidden, shape.feed_forward),
    }


def _random(rng: np.random.Generator, rows: int, columns: int, gain: float = 1.0) -> npt.NDArray[np.float16]:
    return (rng.standard_normal((rows, columns), dtype=np.float32) * gain / np.sqrt(columns)).astype(np.float16)


def _add_vocabulary(writer: gguf.GGUFWriter, vocab_size: int, words: Sequence[str]) -> None:
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(BYTE_TOKENS)]
    types = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * BYTE_TOKENS
    if vocab_size < len(pieces):
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {len(pieces)} to hold the byte tokens")
    extra = vocab_size - len(pieces)
    pieces += [word.replace(" ", "▁") for word in words] + [f"▁w{index}" for index in range(extra - len(words))]
    types += [gguf.TokenType.NORMAL] * extra
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(index) for index in range(vocab_size)])
    writer.add_token_types([int(kind) for kind in types])
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantize(source: Path, target: Path) -> None:
    import llama_cpp.llama_cpp as llama

    @llama.llama_log_callback
    def drop(level: int, text: bytes, user_data: object) -> None: ...

    llama.llama_log_set(drop, ctypes.c_void_p())
    try:
        params = llama.llama_model_quantize_default_params()
        params.ftype = LLAMA_FTYPE_MOSTLY_Q4_0
        status = llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    finally:
        llama.llama_log_set(ctypes.cast(None, llama.llama_log_callback), ctypes.c_void_p())
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status} for {source}")

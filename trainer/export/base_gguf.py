"""A Hugging Face folder of the Llama architecture → f16 GGUF, with nothing but numpy and gguf.

Place in the flow: convert → **base_gguf**, for small models. One rule: what it cannot write exactly it refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from trainer.export.hf_folder import HfFolder
from trainer.export.tensors import Layout, UnsupportedModel, as_float16
from trainer.export.vocabulary import read_vocabulary

_FTYPE_F16 = 1


def write_f16_gguf(folder: HfFolder, name: str, path: Path, progress: Callable[[str], None] = lambda _: None) -> None:
    """Writes `path`; `progress` is told each tensor's name. Raises UnsupportedModel.

    All tensors are in memory at once (as f16): GGUF wants every header before the first tensor.
    """
    config = folder.config
    layout = _llama_layout(config)
    writer = gguf.GGUFWriter(str(path), "llama")
    _write_shape(writer, config, name)
    tensors = dict(_tensors(folder, layout, progress))
    size = tensors["token_embd.weight"].shape[0]
    writer.add_vocab_size(size)
    read_vocabulary(folder, size).write(writer, folder.add_bos)
    frequencies = rope_frequencies(config)
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", frequencies)
    for gguf_name, tensor in tensors.items():
        writer.add_tensor(gguf_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_layout(config: dict[str, Any]) -> Layout:
    layout = Layout.from_config(config)
    if layout.architecture != "llama":
        raise UnsupportedModel(f"{config['architectures'][0]} is converted by llama.cpp's own script")
    return layout


def _tensors(folder: HfFolder, layout: Layout, progress: Callable[[str], None]) -> list[tuple[str, npt.NDArray[Any]]]:
    tied = bool(folder.config.get("tie_word_embeddings"))
    found: list[tuple[str, npt.NDArray[Any]]] = []
    for hf_name, tensor in folder.tensors():
        progress(hf_name)
        if hf_name.endswith("rotary_emb.inv_freq") or (tied and hf_name == "lm_head.weight"):
            continue
        name = layout.to_gguf_name(hf_name)
        rows = layout.to_gguf_rows(name, tensor)
        # llama.cpp keeps norms and biases, which are vectors, in full precision.
        found.append((name, as_float16(hf_name, rows) if rows.ndim > 1 else rows))
    return found


def _write_shape(writer: gguf.GGUFWriter, config: dict[str, Any], name: str) -> None:
    if config.get("sliding_window"):
        raise UnsupportedModel(
            f"config.json sets sliding_window to {config['sliding_window']}; only null can be prepared"
        )
    heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_name(name)
    writer.add_file_type(_FTYPE_F16)
    writer.add_context_length(int(config.get("max_position_embeddings", 2048)))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10_000.0)))
    if _rope_type(config) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(_rope(config)["factor"]))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Both ways of writing it: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    return {"rope_theta": config.get("rope_theta", 10_000.0), **(config.get("rope_scaling") or {})} | (
        config.get("rope_parameters") or {}
    )


def _rope_type(config: dict[str, Any]) -> str:
    rope = _rope(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def rope_frequencies(config: dict[str, Any]) -> npt.NDArray[np.float32] | None:
    """Llama 3's divisor for each rotated pair, None where frequencies are plain. Shape (head_size / 2,)."""
    kind = _rope_type(config)
    if kind in ("default", "linear"):
        return None
    if kind != "llama3":
        raise UnsupportedModel(
            f"config.json asks for the rope type '{kind}'; default, linear and llama3 can be prepared"
        )
    rope = _rope(config)
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    divisors = []
    for pair in range(0, size, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (pair / size)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)

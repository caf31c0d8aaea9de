"""Tensor names and row order of Llama-architecture models in GGUF: the one place that knows both.

Place in the flow: base_gguf (write) · model (read) · lora_gguf (write). One rule: llama.cpp rotates pairs of neighbouring
rows where transformers rotates halves of a head, so the rows of q and k are stored interleaved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

# transformers' module names and llama.cpp's, for the layer {} and for what is outside the layers
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}
_HF_NAMES = {ours: theirs for theirs, ours in _NAMES.items()}
_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")


class UnsupportedModel(ValueError):
    """A model that this project cannot turn into GGUF; says what about it and what can be used instead."""


@dataclass(frozen=True)
class Llama:
    """What of a model's shape decides the order of rows, from its config.json."""

    heads: int
    kv_heads: int

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Llama:
        """Raises UnsupportedModel for another architecture."""
        architecture = (config.get("architectures") or ["?"])[0]
        if architecture not in ARCHITECTURES:
            raise UnsupportedModel(
                f"config.json names the architecture '{architecture}'; those that can be prepared are "
                f"{' and '.join(ARCHITECTURES)}"
            )
        heads = int(config["num_attention_heads"])
        return cls(heads, int(config.get("num_key_value_heads") or heads))

    def to_gguf_rows(self, gguf_name: str, tensor: Array) -> Array:
        """Rows (outputs) in llama.cpp's order; shape is kept: (outputs, …)."""
        heads = self._rotated_heads(gguf_name)
        if heads is None:
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    def from_gguf_rows(self, gguf_name: str, tensor: Array) -> Array:
        """The inverse of `to_gguf_rows`."""
        heads = self._rotated_heads(gguf_name)
        if heads is None:
            return tensor
        pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)

    def _rotated_heads(self, gguf_name: str) -> int | None:
        if ".attn_q." in gguf_name:
            return self.heads
        return self.kv_heads if ".attn_k." in gguf_name else None


def to_gguf_name(hf_name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` → `blk.0.attn_q.weight`. Raises UnsupportedModel when unknown."""
    return _translated(hf_name, _NAMES)


def to_hf_name(gguf_name: str) -> str:
    """The inverse of `to_gguf_name`."""
    return _translated(gguf_name, _HF_NAMES)


def as_float16(name: str, tensor: Array) -> npt.NDArray[np.float16]:
    """Raises UnsupportedModel when a value does not fit."""
    with np.errstate(over="ignore"):
        half = tensor.astype(np.float16)
    if not np.isfinite(half).all():
        raise UnsupportedModel(f"the tensor '{name}' has values that float16 cannot hold (NaN, or beyond 65504)")
    return half


def _translated(name: str, names: dict[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    layer = _LAYER.search(module)
    found = names.get(_LAYER.sub("{}", module, count=1))
    if found is None or kind not in ("weight", "bias"):
        raise UnsupportedModel(f"the tensor '{name}' is not one of a Llama-architecture model")
    return f"{found.format(layer[0]) if layer else found}.{kind}"

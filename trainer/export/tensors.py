"""Tensor names and row order of Llama-architecture models in GGUF: the one place that knows both.

Place in the flow: base_gguf (write) · model (read) · lora_gguf (write). One rule: llama.cpp rotates pairs of neighbouring
rows where transformers rotates halves of a head, so the rows of q and k are stored interleaved.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


class UnsupportedModel(ValueError):
    """A model that this project cannot turn into GGUF; says what about it and what can be used instead."""


@dataclass(frozen=True)
class Llama:
    """The shape of a Llama-architecture model, from its config.json."""

    layers: int
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
        return cls(int(config["num_hidden_layers"]), heads, int(config.get("num_key_value_heads") or heads))

    @cached_property
    def _names(self) -> gguf.TensorNameMap:
        return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, self.layers)

    def gguf_name(self, hf_name: str) -> str:
        """`model.layers.0.self_attn.q_proj.weight` → `blk.0.attn_q.weight`. Raises UnsupportedModel when unknown."""
        name = self._names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModel(f"the tensor '{hf_name}' has no name in a Llama GGUF")
        return str(name)

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


def as_float16(name: str, tensor: Array) -> npt.NDArray[np.float16]:
    """Raises UnsupportedModel when a value does not fit."""
    half = tensor.astype(np.float16)
    if not np.isfinite(half).all():
        raise UnsupportedModel(f"the tensor '{name}' has values that float16 cannot hold (NaN, or beyond 65504)")
    return half

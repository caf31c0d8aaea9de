"""Tensor names and row order in GGUF, for each architecture that can be trained: the one place that knows both.

Place in the flow: base_gguf (write) · model (read) · lora_gguf (write). Names are those of gguf's own table. One rule:
where llama.cpp rotates pairs of neighbouring rows and transformers halves of a head (Llama, Mistral), the rows of q and k
are stored interleaved; where transformers multiplies by 1 + weight (Gemma), norms are stored with the 1 in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# transformers' class and llama.cpp's name for it, of models that are layers of plain linear projections
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
}
_TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}  # of models that see, the part that reads
_INTERLEAVED = ("llama",)
_SHIFTED_NORMS = ("gemma", "gemma2", "gemma3")
_ARCH_IDS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


class UnsupportedModel(ValueError):
    """A model that this project cannot turn into GGUF or train; says what about it and what can be used instead."""


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the part of a model that reads and writes text; the whole one where that is all there is."""
    architecture = (config.get("architectures") or ["?"])[0]
    part = _TEXT_PARTS.get(architecture)
    if part is None or not isinstance(config.get("text_config"), dict):
        return config
    shared = {key: config[key] for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings") if key in config}
    return {**shared, **config["text_config"], "architectures": [part]}


@dataclass(frozen=True)
class Layout:
    """How one model's tensors lie in GGUF."""

    architecture: str  # llama.cpp's name
    layers: int
    heads: int
    kv_heads: int
    _names: gguf.TensorNameMap = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = gguf.get_tensor_name_map(_ARCH_IDS[self.architecture], self.layers)
        object.__setattr__(self, "_names", names)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Layout:
        """Of a config.json's content. Raises UnsupportedModel for an architecture whose layout is not known."""
        config = text_config(config)
        name = (config.get("architectures") or ["?"])[0]
        if name not in ARCHITECTURES:
            raise UnsupportedModel(
                f"config.json names the architecture '{name}'; those whose tensors are known here are "
                f"{', '.join(ARCHITECTURES)}"
            )
        heads = int(config.get("num_attention_heads", 1))
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return cls(ARCHITECTURES[name], int(config["num_hidden_layers"]), heads, kv_heads)

    def to_gguf_name(self, hf_name: str) -> str:
        """`model.layers.0.self_attn.q_proj.weight` → `blk.0.attn_q.weight`. Raises UnsupportedModel when unknown."""
        found = self._names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedModel(f"the tensor '{hf_name}' is not one of the architecture '{self.architecture}'")
        return str(found)

    def to_gguf_rows(self, gguf_name: str, tensor: Array) -> Array:
        """Rows (outputs) in llama.cpp's order; shape is kept: (outputs, …)."""
        heads = self._interleaved_heads(gguf_name)
        if heads is None:
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    def from_gguf_rows(self, gguf_name: str, tensor: Array) -> Array:
        """The inverse of `to_gguf_rows`."""
        heads = self._interleaved_heads(gguf_name)
        if heads is None:
            return tensor
        pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)

    def from_gguf_values(self, gguf_name: str, tensor: Array) -> Array:
        """A dequantised tensor of a base as transformers has it: rows in its order, norms without the 1."""
        if self.architecture in _SHIFTED_NORMS and gguf_name.endswith("norm.weight"):
            return tensor - np.float32(1)
        return self.from_gguf_rows(gguf_name, tensor)

    def _interleaved_heads(self, gguf_name: str) -> int | None:
        if self.architecture not in _INTERLEAVED:
            return None
        if ".attn_q." in gguf_name:
            return self.heads
        return self.kv_heads if ".attn_k." in gguf_name else None


def as_float16(name: str, tensor: Array) -> npt.NDArray[np.float16]:
    """Raises UnsupportedModel when a value does not fit."""
    with np.errstate(over="ignore"):
        half = tensor.astype(np.float16)
    if not np.isfinite(half).all():
        raise UnsupportedModel(f"the tensor '{name}' has values that float16 cannot hold (NaN, or beyond 65504)")
    return half

"""A ready GGUF as the source of a base: its tokenizer, its chat template, and the config.json that transformers needs to train.

Place in the flow: the source of `prepare`, beside HfFolder. One rule: the file is served as it is, whatever it holds; it
is trained on only where every number that decides what the model computes is known here, else `config` says why not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from trainer.export.base_gguf import rope_frequencies
from trainer.export.gguf_metadata import TEMPLATE_KEY, TensorInfo, chat_templates, read_header
from trainer.export.hf_folder import usable_context
from trainer.export.tensors import ARCHITECTURES, UnsupportedModel
from trainer.export.tokenizers import tokenizer_json_of

_HF_NAMES = {ours: theirs for theirs, ours in reversed(ARCHITECTURES.items())}
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the one size whose attention is scaled by hidden size / heads
_LLAMA_3_CONTEXTS = tuple(2**power for power in range(5, 18))


class GgufFile:
    """Raises UnsupportedModel when it is no GGUF that can be served."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, self.tensors = read_header(path)
        if int(self.metadata.get("split.count", 1)) > 1:
            raise UnsupportedModel(
                f"{path.name} is one part of several; join them with llama.cpp's llama-gguf-split --merge"
            )
        if "token_embd.weight" not in self.tensors:
            raise UnsupportedModel(f"{path.name} holds no language model (it has no token_embd.weight)")
        if (missing := max(map(_end, self.tensors.values())) - path.stat().st_size) > 0:
            raise UnsupportedModel(f"{path.name} is cut off: {missing} bytes of its weights are missing")

    @property
    def architecture(self) -> str:
        """transformers' class where it is known, else llama.cpp's name."""
        name = str(self.metadata["general.architecture"])
        return _HF_NAMES.get(name, name)

    @property
    def context_length(self) -> int:
        trained = int(self._read("context_length", 2048))
        try:
            return min(trained, usable_context(self.config))
        except UnsupportedModel:
            return trained

    @property
    def eos_token_ids(self) -> list[int]:
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = (self.metadata.get(f"tokenizer.ggml.{key}") for key in keys)
        return list(dict.fromkeys(int(token) for token in found if token is not None))

    @property
    def chat_template(self) -> str | dict[str, str]:
        found = chat_templates(self.path)
        if not found:
            raise UnsupportedModel(
                f"{self.path.name} brings no chat template (tokenizer.chat_template); name one (`models add --template`, or "
                "`template` in the settings), such as chatml, llama-3 or vicuna_v1.1"
            )
        return found

    @property
    def exported_template(self) -> str | None:
        """The template.json of a tuned model that was exported."""
        found = self.metadata.get(TEMPLATE_KEY)
        return found if isinstance(found, str) else None

    @property
    def special_tokens(self) -> dict[str, str]:
        texts = self.metadata.get("tokenizer.ggml.tokens", [])
        ids = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        found = {name: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids.items()}
        return {name: texts[number] for name, number in found.items() if number is not None and number < len(texts)}

    @cached_property
    def tokenizer_json(self) -> bytes:
        return tokenizer_json_of(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json that transformers' class of this model needs. Raises UnsupportedModel when it cannot be told."""
        name = str(self.metadata["general.architecture"])
        if name not in _HF_NAMES:
            raise UnsupportedModel(f"its architecture is '{name}'; trained are {', '.join(_HF_NAMES)}")
        self._refuse_what_cannot_be_trained()
        hidden, heads = int(self._read("embedding_length")), int(self._read("attention.head_count"))
        head_size = int(self._read("attention.key_length", hidden // heads))
        config: dict[str, Any] = {
            "architectures": [_HF_NAMES[name]],
            "model_type": "gemma3_text" if name == "gemma3" else name,
            "hidden_size": hidden,
            "intermediate_size": int(self._read("feed_forward_length")),
            "num_hidden_layers": int(self._read("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._read("attention.head_count_kv", heads)),
            "max_position_embeddings": int(self._read("context_length")),
            "rms_norm_eps": float(self._read("attention.layer_norm_rms_epsilon")),
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.eos_token_ids or None,
            "pad_token_id": None,
        }
        if name != "phi3":
            config["head_dim"] = head_size
        return config | getattr(self, f"_{name}_config")(config, head_size)

    def _refuse_what_cannot_be_trained(self) -> None:
        if int(self._read("expert_count", 0)):
            raise UnsupportedModel("it is a mixture of experts, whose weights are not trained here")
        known = {int(kind): kind for kind in gguf.GGMLQuantizationType}
        for number in {tensor.kind for tensor in self.tensors.values()}:
            if number not in known or not _is_dequantised(known[number]):
                name = known[number].name if number in known else number
                raise UnsupportedModel(f"it has weights of the type {name}, which only llama.cpp can read")

    def _llama_config(self, config: Mapping[str, Any], head_size: int) -> dict[str, Any]:
        rope = self._plain_rope(head_size)
        if "rope_freqs.weight" in self.tensors:
            rope = self._llama_3_rope(rope, head_size)
        biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
        return {"rope_parameters": rope} | {key: name in self.tensors for key, name in biases.items()}

    def _qwen2_config(self, config: Mapping[str, Any], head_size: int) -> dict[str, Any]:
        return {"rope_parameters": self._plain_rope(head_size)}

    def _qwen3_config(self, config: Mapping[str, Any], head_size: int) -> dict[str, Any]:
        return {"rope_parameters": self._plain_rope(head_size), "attention_bias": "blk.0.attn_q.bias" in self.tensors}

    def _gemma_config(self, config: Mapping[str, Any], head_size: int) -> dict[str, Any]:
        return {"rope_parameters": self._plain_rope(head_size)}

    def _gemma2_config(self, config: Mapping[str, Any], head_size: int) -> dict[str, Any]:
        return {
            "rope_parameters": self._plain_rope(head_size),
            "sliding_window": int(self._read("attention.sliding_window", 4096)),
            "attn_logit_softcapping": float(self._read("attn_logit_softcapping", 50.0)),
            "final_logit_softcapping": float(self._read("final_logit_softcapping", 30.0)),
            "query_pre_attn_scalar": _attention_scalar("gemma2", config, head_size),
        }

    def _gemma3_config(self, config: Mapping[str, Any], head_size: int) -> dict[str, Any]:
        local = {"rope_type": "default", "rope_theta": float(self._read("rope.freq_base_swa", 10_000.0))}
        return {
            "rope_parameters": {"full_attention": self._plain_rope(head_size, 1_000_000.0), "sliding_attention": local},
            "sliding_window": int(self._read("attention.sliding_window", 0)) or config["max_position_embeddings"],
            "final_logit_softcapping": self._read("final_logit_softcapping", 0.0) or None,
            "query_pre_attn_scalar": _attention_scalar("gemma3", config, head_size),
        }

    def _phi3_config(self, config: Mapping[str, Any], head_size: int) -> dict[str, Any]:
        original = int(self._read("rope.scaling.original_context_length", config["max_position_embeddings"]))
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(self._read("rope.freq_base", 10_000.0))}
        rope["partial_rotary_factor"] = int(self._read("rope.dimension_count", head_size)) / head_size
        if "rope_factors_long.weight" in self.tensors:
            factors = {
                f"{kind}_factor": self._floats(f"rope_factors_{kind}.weight").tolist() for kind in ("long", "short")
            }
            rope |= {"rope_type": "longrope", "original_max_position_embeddings": original} | factors
        return {
            "rope_parameters": rope,
            "original_max_position_embeddings": original,
            "sliding_window": int(self._read("attention.sliding_window", 0)) or None,
        }

    def _plain_rope(self, head_size: int, theta: float = 10_000.0) -> dict[str, Any]:
        """What the metadata says of the rotation. UnsupportedModel for a scaling that is not computed alike."""
        if (rotated := int(self._read("rope.dimension_count", head_size))) != head_size:
            raise UnsupportedModel(
                f"it rotates {rotated} of {head_size} dimensions of a head, which is not known for it"
            )
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(self._read("rope.freq_base", theta))}
        kind = str(self._read("rope.scaling.type", "none"))
        if kind == "linear":
            rope |= {"rope_type": "linear", "factor": float(self._read("rope.scaling.factor"))}
        elif kind == "yarn":
            original = int(self._read("rope.scaling.original_context_length"))
            rope |= {"rope_type": "yarn", "factor": float(self._read("rope.scaling.factor"))}
            rope["original_max_position_embeddings"] = original
        elif kind != "none":
            raise UnsupportedModel(f"its rope is scaled by '{kind}', which is not known here")
        return rope

    def _llama_3_rope(self, plain: dict[str, Any], head_size: int) -> dict[str, Any]:
        """The file has the divisor of each frequency, transformers wants the numbers that it was made from."""
        divisors = self._floats("rope_freqs.weight")
        for original in _LLAMA_3_CONTEXTS:
            rope = plain | {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
            made = rope_frequencies({"rope_parameters": rope, "head_dim": head_size})
            if made is not None and made.shape == divisors.shape and np.allclose(made, divisors, rtol=1e-4):
                return rope
        raise UnsupportedModel(
            "its rope_freqs.weight is not that of Llama 3, and transformers cannot be told of another"
        )

    def _floats(self, name: str) -> Any:
        tensor: TensorInfo = self.tensors[name]
        if tensor.kind != gguf.GGMLQuantizationType.F32:
            raise UnsupportedModel(f"its tensor '{name}' is not float32")
        return np.fromfile(self.path, "<f4", int(np.prod(tensor.shape)), offset=tensor.at)

    def _read(self, key: str, default: Any = None) -> Any:
        found = self.metadata.get(f"{self.metadata['general.architecture']}.{key}", default)
        if found is None or isinstance(found, list):
            raise UnsupportedModel(f"its metadata has no single number for {key}")
        return found


def _end(tensor: TensorInfo) -> int:
    """Where a tensor's data ends in the file; where it begins, for a type that is not known here."""
    if tensor.kind not in gguf.GGML_QUANT_SIZES:
        return tensor.at
    values, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
    return tensor.at + math.prod(tensor.shape) // values * size_bytes


def _attention_scalar(name: str, config: Mapping[str, Any], head_size: int) -> int:
    """What queries are divided by the root of: llama.cpp knows it by the number of layers."""
    if config["num_hidden_layers"] == _LARGEST[name]:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return head_size


def _is_dequantised(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the gguf package can read weights of this type."""
    _, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, size_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True

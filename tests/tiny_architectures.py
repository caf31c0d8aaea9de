"""A random model of each architecture that can be trained, as transformers saves it, small enough to convert in a second."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny_model import write_tokenizer

_ALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What sets each apart: heads that are not hidden size / heads, biases, tied or own heads, windows, norms of q and k.
SHAPES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rope_parameters": _LLAMA_3_ROPE, "tie_word_embeddings": False},
    "MistralForCausalLM": {"sliding_window": None, "head_dim": 32},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {"head_dim": 32, "tie_word_embeddings": False},
    "GemmaForCausalLM": {"head_dim": 32},
    "Gemma2ForCausalLM": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
        "final_logit_softcapping": 3.0,
    },
    "Gemma3ForCausalLM": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "num_hidden_layers": 6},
    "Phi3ForCausalLM": {"original_max_position_embeddings": 256, "sliding_window": None},
}


def random_model(architecture: str, vocab_size: int, seed: int = 0) -> Any:
    """A transformers model whose weights, norms and biases among them, are random and large enough to matter."""
    kind = getattr(transformers, architecture)
    torch.manual_seed(seed)
    config = kind.config_class(**(_ALL | SHAPES[architecture]), vocab_size=vocab_size)
    config.architectures = [architecture]
    model = kind(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        elif parameter.ndim == 1:
            parameter.data.normal_(0, 0.3)
        else:
            parameter.data.normal_(0, 1.2 / parameter.shape[1] ** 0.5)
    return model.eval()


def write_tiny_architecture(folder: Path, architecture: str, seed: int = 0) -> Path:
    """The model's folder: config.json, model.safetensors and a tokenizer in both forms."""
    folder.mkdir(parents=True)
    added = ["<|endoftext|>"] if architecture == "Phi3ForCausalLM" else []  # llama.cpp insists on it
    model = random_model(architecture, write_tokenizer(folder, added), seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    named = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder

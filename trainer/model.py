"""The base to train on, as it is served: the tensors of the prepared q4_0 GGUF, dequantised; and LoRA on top of it.

Place in the flow: prepared base → **model** → sft. One rule: what is trained on is bit for bit what llama.cpp multiplies with,
so an adapter learns to live with the quantisation.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from gateway.jobdir import BaseRef, Lora
from trainer.export.tensors import Llama, to_hf_name


def load_base(base: BaseRef) -> PreTrainedModel:
    """The base in float32, frozen, in eval mode."""
    folder = Path(base.path)
    raw = json.loads((folder / "config.json").read_bytes())
    llama = Llama.from_config(raw)  # so the class below is one of two that are known, whatever the file says
    kind: type[PreTrainedModel] = getattr(transformers, raw["architectures"][0])
    config = kind.config_class(**{key: value for key, value in raw.items() if not key.endswith("dtype")})
    config.use_cache = False
    model = kind.from_pretrained(
        None,
        config=config,
        state_dict=read_dequantised(folder / base.gguf, llama),
        dtype=torch.float32,
        attn_implementation="sdpa",
    )
    model.name_or_path = base.name  # what adapter_config.json will name; never a path of this machine
    model.config._name_or_path = base.name
    return model.requires_grad_(False).eval()


def read_dequantised(path: Path, llama: Llama) -> dict[str, torch.Tensor]:
    """A GGUF's tensors by transformers' names, in float32, rows in transformers' order."""
    tensors: dict[str, torch.Tensor] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name == "rope_freqs.weight":  # config.json says the same
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        rows = llama.from_gguf_rows(tensor.name, values)
        tensors[to_hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(rows))
    return tensors


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """The model with a fresh adapter named "default", in float32; only the adapter has gradients."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_modules(model, lora.target_modules),
        bias="none",
    )
    with warnings.catch_warnings():  # this PEFT asks by a name that this transformers calls old
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def target_modules(model: PreTrainedModel, asked: str) -> list[str]:
    """The modules' last names, in order: "all-linear" is every linear layer but the LM head; else a list with commas."""
    if asked != "all-linear":
        return sorted(name.strip() for name in asked.split(","))
    head = model.get_output_embeddings()
    linear = (name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def base_learning_rate(hidden_size: int) -> float:
    """The learning rate that the client's multiplier multiplies: 2.4e-3 at a hidden size of 256, 2.9e-4 at 4096.

    The fit of "LoRA Without Regret" (Thinking Machines, 2025) for Llama models: ten times the best rate of full
    fine-tuning, falling with the width, and the same for every rank.
    """
    return float(5e-5 * 10 * (2000 / hidden_size) ** 0.775)

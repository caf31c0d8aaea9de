"""The base to train on, as it is served: the tensors of the prepared GGUF, dequantised, or those that vLLM serves; and LoRA.

Place in the flow: prepared base → **model** → loop. One rule: what is trained on is bit for bit what the engine multiplies
with, so an adapter learns to live with the quantisation.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel

from gateway.jobdir import BaseRef, Lora
from trainer.export.tensors import Layout, UnsupportedModel, text_config

_DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # config.json says the same


def load_base(base: BaseRef) -> PreTrainedModel:
    """The base in float32, frozen, in eval mode. Raises UnsupportedModel when file and architecture do not fit."""
    model = _load_hf(Path(base.path) / base.hf) if base.hf else _load_gguf(base)
    model.config.use_cache = False
    model.name_or_path = base.name  # what adapter_config.json will name; never a path of this machine
    model.config._name_or_path = base.name
    return model.requires_grad_(False).eval()


def _load_hf(folder: Path) -> PreTrainedModel:
    """As vLLM serves it, but in float32: bfloat16 is a part of it, so the values are the same."""
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return model


def _load_gguf(base: BaseRef) -> PreTrainedModel:
    assert base.gguf is not None
    folder = Path(base.path)
    raw = text_config(json.loads((folder / "config.json").read_bytes()))
    layout = Layout.from_config(raw)  # so the class below is one of those that are known, whatever the file says
    kind: type[PreTrainedModel] = getattr(transformers, raw["architectures"][0])
    tensors = read_dequantised(folder / base.gguf)
    config = kind.config_class(**{key: value for key, value in raw.items() if not key.endswith("dtype")})
    # As llama.cpp takes them: no head of its own means a tied one, and rows that no token has may be cut off.
    config.tie_word_embeddings = "output.weight" not in tensors
    config.vocab_size = len(tensors["token_embd.weight"])
    model: PreTrainedModel = kind.from_pretrained(
        None,
        config=config,
        state_dict=_as_state(tensors, kind, config, layout),
        dtype=torch.float32,
        # Gemma 2 caps the scores inside attention, which torch's fused one cannot.
        attn_implementation="sdpa" if kind._supports_sdpa else "eager",
    )
    return model


def read_dequantised(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """A GGUF's tensors by its own names, in float32."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name not in _DERIVED
    }


def _as_state(
    tensors: dict[str, npt.NDArray[np.float32]], kind: type[PreTrainedModel], config: PretrainedConfig, layout: Layout
) -> dict[str, torch.Tensor]:
    """The tensors by transformers' names, as transformers has them: exactly those that the model asks for."""
    with torch.device("meta"):
        wanted = kind(config).state_dict()
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    names = {layout.to_gguf_name(name): name for name in wanted}
    if odd := sorted(set(names) ^ set(tensors)):
        raise UnsupportedModel(
            f"the base's GGUF and transformers' {kind.__name__} differ in tensors: {', '.join(odd[:5])}"
        )
    state = {}
    for gguf_name, name in names.items():
        values = torch.from_numpy(np.ascontiguousarray(layout.from_gguf_values(gguf_name, tensors.pop(gguf_name))))
        if values.shape != wanted[name].shape:
            raise UnsupportedModel(
                f"the tensor '{gguf_name}' is {list(values.shape)}, and config.json makes it {list(wanted[name].shape)}"
            )
        state[name] = values
    return state


def add_lora(model: PreTrainedModel, lora: Lora, seed: int, start: Path | None = None) -> PeftModel:
    """The model with an adapter named "default", in float32; only the adapter has gradients.

    Fresh, or with the weights in the folder `start`. Raises UnsupportedModel for weights that are not `lora`'s.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_modules(model, lora.target_modules),
        bias="none",
        use_rslora=lora.use_rslora,
    )
    with warnings.catch_warnings():  # this PEFT asks by a name that this transformers calls old
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        tuned: PeftModel = get_peft_model(model, config)
    if start is not None:
        _load_adapter(tuned, start)
    return tuned


def _load_adapter(tuned: PeftModel, start: Path) -> None:
    tensors = load_file(start / "adapter_model.safetensors")
    wanted = {
        name: tensor.shape for name, tensor in get_peft_model_state_dict(tuned, save_embedding_layers=False).items()
    }
    if odd := sorted(set(wanted.items()) ^ {(name, tensor.shape) for name, tensor in tensors.items()}):
        raise UnsupportedModel(
            f"the adapter in {start.name}/ does not fit this model: {odd[0][0]} has another shape or place"
        )
    set_peft_model_state_dict(tuned, tensors)


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

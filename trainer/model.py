"""The base to train on, as it is served: the tensors of the prepared GGUF, dequantised, or those that vLLM serves; and LoRA.

Place in the flow: prepared base → **model** → loop. One rule: what is trained on is bit for bit what the engine multiplies
with, so an adapter learns to live with the quantisation. Only a job that asks for it trains on less: quantised once more by
bitsandbytes, or rounded to a GPU's half precision.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from gateway.jobdir import BaseRef, Lora, Method
from trainer.arithmetic import EXACT, Arithmetic
from trainer.export.tensors import Layout, UnsupportedModel, text_config

_DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # config.json says the same


def load_base(base: BaseRef, arithmetic: Arithmetic = EXACT) -> PreTrainedModel:
    """The base, frozen, in eval mode; by default in float32, just as it is served.

    Raises UnsupportedModel when file and architecture do not fit.
    """
    options: dict[str, Any] = {"dtype": arithmetic.base_dtype}
    if arithmetic.quantization != "none":
        options["quantization_config"] = _quantization(arithmetic)
        options["device_map"] = {"": torch.cuda.current_device() if arithmetic.gpu else "cpu"}
    folder = Path(base.path)
    model = _load_hf(folder / base.hf, arithmetic, options) if base.hf else _load_gguf(base, arithmetic, options)
    for (
        module
    ) in model.modules():  # bitsandbytes packs the weights of whoever is asked in eval mode anew, for a CPU's bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):  # instructions, and from then on its gradients are wrong
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    model.name_or_path = base.name  # what adapter_config.json will name; never a path of this machine
    model.config._name_or_path = base.name
    return model.requires_grad_(False).eval()


def _load_hf(folder: Path, arithmetic: Arithmetic, options: dict[str, Any]) -> PreTrainedModel:
    """As vLLM serves it, but in float32: bfloat16 is a part of it, so the values are the same."""
    if arithmetic.flash_attention:
        options["attn_implementation"] = "flash_attention_2"
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, **options
    )
    return model


def _load_gguf(base: BaseRef, arithmetic: Arithmetic, options: dict[str, Any]) -> PreTrainedModel:
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
        attn_implementation=_attention(kind, arithmetic),
        **options,
    )
    return model


def _attention(kind: type[PreTrainedModel], arithmetic: Arithmetic) -> str:
    if arithmetic.flash_attention and kind._supports_flash_attn:
        return "flash_attention_2"
    return "sdpa" if kind._supports_sdpa else "eager"  # Gemma 2 caps the scores inside attention, which torch's cannot


def _quantization(arithmetic: Arithmetic) -> BitsAndBytesConfig:
    """The head stays as it is: it is a few percent of the weights and makes every logit."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 has a word at each multiplication
    if arithmetic.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=arithmetic.base_dtype,
    )


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
    """The model with an adapter named "default", in float32, fresh or as in the folder `start`; only it has gradients.

    An adapter that is trained on keeps its shape: of `lora` only the dropout counts. Raises UnsupportedModel for weights that
    are not of this base.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_modules(model, lora.target_modules),
        use_rslora=lora.use_rslora,
        bias="none",
    )
    if start is not None:
        shape = json.loads((start / "adapter_config.json").read_bytes())
        for name in ("r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern"):
            if name in shape:
                setattr(config, name, shape[name])
    tuned = wrap(model, config)
    if start is not None:
        load_adapter(tuned, load_file(start / "adapter_model.safetensors"))
    return tuned


def wrap(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """PEFT's model with a fresh adapter."""
    with warnings.catch_warnings():  # this PEFT asks by a name that this transformers calls old
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def load_adapter(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Gives the adapter these weights. Raises UnsupportedModel when they are of another shape or base."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if odd := sorted(_shapes(own) ^ _shapes(state)):
        raise UnsupportedModel(f"the adapter does not fit this model: {odd[0][0]} has another shape or place")
    set_peft_model_state_dict(model, state)


def _shapes(state: dict[str, torch.Tensor]) -> set[tuple[str, torch.Size]]:
    return {(name, tensor.shape) for name, tensor in state.items()}


def target_modules(model: PreTrainedModel, asked: str) -> list[str]:
    """The modules' last names, in order: "all-linear" is every linear layer but the LM head; else a list with commas."""
    if asked != "all-linear":
        return sorted(name.strip() for name in asked.split(","))
    head = model.get_output_embeddings()
    linear = (name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def base_learning_rate(hidden_size: int, method: Method = "supervised") -> float:
    """The learning rate that the client's multiplier multiplies: 2.4e-3 at a hidden size of 256, 2.9e-4 at 4096.

    The fit of "LoRA Without Regret" (Thinking Machines, 2025) for Llama models: ten times the best rate of full
    fine-tuning, falling with the width, and the same for every rank. A preference method takes a share of it.
    """
    return float(5e-5 * 10 * (2000 / hidden_size) ** 0.775) * _METHOD_SHARES[method]


# dpo and kto sum over whole replies, and drift from the reference if pushed: 1e-5 at 7B, what TRL advises for LoRA, is a
# thirtieth of the supervised rate. orpo learns the chosen reply as supervised training does: its authors' 8e-6 without LoRA,
# ten times that with it.
_METHOD_SHARES: dict[Method, float] = {"supervised": 1.0, "dpo": 1 / 30, "kto": 1 / 30, "orpo": 1 / 4}

"""A PEFT adapter → adapter.gguf, as llama.cpp loads it, for every architecture of `tensors`.

Place in the flow: after training, beside the safetensors. One rule: lora_B's rows lie as the base's do. llama.cpp scales
by alpha / rank and knows nothing else, so what else PEFT may do (rsLoRA, alpha_pattern, rank_pattern) is folded in; what
cannot be is refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from trainer.export.lora import alpha_of, read_pairs
from trainer.export.tensors import Layout, UnsupportedModel


def write_lora_gguf(
    path: Path,
    tensors: dict[str, npt.NDArray[np.float32]],
    config: dict[str, Any],
    layout: Layout,
) -> None:
    """Writes `path`; `tensors` are named as in adapter_model.safetensors, `config` is adapter_config.json's content.

    Raises UnsupportedModel for an adapter that llama.cpp could not apply as PEFT does.
    """
    pairs = read_pairs(tensors, config)
    alpha = _folded_alpha(float(config["lora_alpha"]), int(config["r"]), config) or 1.0
    writer = gguf.GGUFWriter(str(path), layout.architecture)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, (down, up) in sorted(pairs.items()):
        name = layout.to_gguf_name(f"{module}.weight")
        if name == "output.weight":
            raise UnsupportedModel("the adapter changes the LM head; take lm_head out of target_modules")
        own_alpha = _folded_alpha(alpha_of(module, config), down.shape[0], config)
        rows = layout.to_gguf_rows(name, up * (own_alpha / alpha))
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(down, np.float32))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(rows, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _folded_alpha(alpha: float, rank: int, config: dict[str, Any]) -> float:
    """What llama.cpp must divide by `rank` to scale as PEFT does."""
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha

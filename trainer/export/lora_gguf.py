"""A PEFT adapter → adapter.gguf, as llama.cpp loads it.

Place in the flow: after training, beside the safetensors. One rule: the rows of q's and k's lora_B are interleaved as the
base's are. llama.cpp scales by alpha / rank and knows nothing else, so what else PEFT may do is folded in.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from trainer.export.tensors import Llama, to_gguf_name

_PREFIX = "base_model.model."


def write_lora_gguf(
    path: Path,
    tensors: dict[str, npt.NDArray[np.float32]],
    config: dict[str, Any],
    llama: Llama,
) -> None:
    """Writes `path`; `tensors` are named as in adapter_model.safetensors, `config` is adapter_config.json's content."""
    alpha = _effective_alpha("", int(config["r"]), config)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name in sorted(name for name in tensors if name.endswith(".lora_A.weight")):
        module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        gguf_name = to_gguf_name(f"{module}.weight")
        down = tensors[name]  # (rank, inputs)
        up = tensors[name.replace(".lora_A.", ".lora_B.")]  # (outputs, rank)
        up = up * (_effective_alpha(module, down.shape[0], config) / alpha)
        writer.add_tensor(f"{gguf_name}.lora_a", np.ascontiguousarray(down, np.float32))
        writer.add_tensor(f"{gguf_name}.lora_b", np.ascontiguousarray(llama.to_gguf_rows(gguf_name, up), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _effective_alpha(module: str, rank: int, config: dict[str, Any]) -> float:
    """What llama.cpp must divide by `rank` to scale as PEFT does: alpha_pattern and rsLoRA are in it."""
    patterns = config.get("alpha_pattern") or {}
    found = [value for key, value in patterns.items() if module == key or module.endswith(f".{key}")]
    alpha = float(found[0] if found else config["lora_alpha"])
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha

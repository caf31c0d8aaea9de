"""A PEFT adapter's tensors as what they are: a pair of factors for each linear layer that it changes.

Place in the flow: read by `lora_gguf` and `merge`. One rule: what is more than plain LoRA is refused by name.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.export.tensors import UnsupportedModel

_PREFIX = "base_model.model."
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_REFUSED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)

Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]  # lora_A (rank, inputs), lora_B (outputs, rank)


def read_pairs(tensors: dict[str, npt.NDArray[np.float32]], config: dict[str, Any]) -> dict[str, Pair]:
    """The pairs by module. `tensors` are named as in adapter_model.safetensors, `config` is adapter_config.json's content.

    Raises UnsupportedModel.
    """
    for key in _REFUSED:
        if config.get(key):
            raise UnsupportedModel(f"adapter_config.json sets {key}, which is more than plain LoRA")
    halves: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    for name, tensor in tensors.items():
        match = _PAIR.fullmatch(name.removeprefix(_PREFIX))
        if match is None or tensor.ndim != 2:
            raise UnsupportedModel(f"the adapter holds '{name}', which is no LoRA weight of a linear layer")
        halves.setdefault(match["module"], {})[match["half"]] = tensor
    for module, found in halves.items():
        if len(found) != 2:
            raise UnsupportedModel(f"the adapter holds only lora_{next(iter(found))} of '{module}'")
    return {module: (found["A"], found["B"]) for module, found in halves.items()}


def alpha_of(module: str, config: dict[str, Any]) -> float:
    """A module's alpha; the first pattern that fits wins, as in PEFT: a regular expression for the end of its name."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(config["lora_alpha"])


def scale_of(module: str, rank: int, config: dict[str, Any]) -> float:
    """What PEFT multiplies lora_B · lora_A by."""
    return alpha_of(module, config) / (math.sqrt(rank) if config.get("use_rslora") else rank)

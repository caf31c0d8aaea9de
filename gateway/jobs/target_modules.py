"""Which linear layers of a base LoRA can change, by their last names, read off the prepared base without torch.

Place in the flow: creation asks, so that a name that the base has not is refused before a job is. Its one rule: it is the
list that the trainer's "all-linear" stands for; a test holds the two together for every architecture.
"""

from __future__ import annotations

import json
from pathlib import Path

from gateway.bases import PreparedBase
from gateway.engines.safetensors_header import HeaderError, read_header

_SEPARATE = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
_FUSED = ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")
_WITH_FUSED = ("Phi3ForCausalLM",)  # of the architectures that can be trained in GGUF (`trainer.export.tensors`)


def linear_modules(base: PreparedBase) -> tuple[str, ...] | None:
    """In order; None where it cannot be told from the files. Blocks."""
    if base.hf is not None:
        return _of_weights(base.hf)
    return _FUSED if _architecture(base) in _WITH_FUSED else _SEPARATE


def _of_weights(folder: Path) -> tuple[str, ...] | None:
    """The matrices inside the numbered layers: embeddings and the head are outside, norms and biases are vectors."""
    found = set()
    try:
        for path in folder.glob("*.safetensors"):
            for name, tensor in read_header(path).items():
                *place, module, kind = name.split(".")
                if kind == "weight" and len(tensor.shape) == 2 and any(part.isdigit() for part in place):
                    found.add(module)
    except (OSError, HeaderError, ValueError):
        return None
    return tuple(sorted(found)) or None


def _architecture(base: PreparedBase) -> str:
    try:
        named = json.loads((base.path / "config.json").read_bytes())["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        return base.architecture
    return str(named)

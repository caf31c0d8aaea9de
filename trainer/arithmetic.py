"""In which numbers a job computes: precision, quantisation, attention, and whether activations are computed twice.

Place in the flow: job.json → **arithmetic** → model, loop. One rule: the adapter and its optimiser are float32 whatever the
base is in; what is served is float32 or what the engine makes of it, so the witness never uses what is chosen here.

    f32     everything in float32
    bf16    autocast; on a GPU the frozen base is kept in bfloat16 too, on a CPU in float32, exact
    fp16    the same in float16, with a scaled loss: on a GPU only
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from gateway.jobdir import Options, Quantization

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_USABLE_SHARE = 0.8  # of the GPU's free memory: the rest is the optimiser's, the allocator's and the reserve


class UnsupportedOption(ValueError):
    """An option of the job that this machine cannot honour."""


@dataclass(frozen=True)
class Arithmetic:
    """What `choose` found for a job on this machine."""

    precision: Literal["f32", "bf16", "fp16"]
    quantization: Quantization
    gpu: bool

    @property
    def base_dtype(self) -> torch.dtype:
        """Of the frozen base, or of what is not quantised of it."""
        return _HALVES.get(self.precision, torch.float32) if self.gpu else torch.float32

    @property
    def base_is_exact(self) -> bool:
        """Whether the base in memory has the very values that are served."""
        return self.quantization == "none" and self.base_dtype is torch.float32

    @property
    def flash_attention(self) -> bool:
        return self.gpu and self.precision != "f32" and bool(is_flash_attn_2_available())

    def autocast(self) -> AbstractContextManager[None]:
        """The context of every pass that is trained on."""
        kind = "cuda" if self.gpu else "cpu"
        return torch.autocast(kind, _HALVES.get(self.precision), enabled=self.precision in _HALVES)


EXACT = Arithmetic("f32", "none", gpu=False)


def choose(options: Options) -> Arithmetic:
    """Resolves "auto". Raises UnsupportedOption."""
    gpu = torch.cuda.is_available()
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "f32"
    if precision == "fp16" and not gpu:
        raise UnsupportedOption("precision is 'fp16', which needs a GPU; this machine trains in 'f32' or 'bf16'")
    return Arithmetic(precision, options.quantization, gpu)


def needs_checkpointing(
    config: PreTrainedConfig, tokens: int, trained_tokens: int, free_bytes: int, arithmetic: Arithmetic
) -> bool:
    """Whether the activations of a pass outgrow the memory, so that each layer's have to be computed twice.

    `tokens` of a pass, padding included; those that are trained on have logits, in float32, with their gradients.
    """
    value_bytes = 4 if arithmetic.precision == "f32" else 2
    saved = (
        8 * config.hidden_size + 4 * config.intermediate_size
    )  # of a layer: norms, q, k, v, o; gate, up and their product
    layers = config.num_hidden_layers * tokens * saved * value_bytes
    logits = 3 * 4 * trained_tokens * config.vocab_size
    return layers + logits > _USABLE_SHARE * free_bytes

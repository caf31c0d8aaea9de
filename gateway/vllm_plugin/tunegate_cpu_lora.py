"""Two faults of vLLM's CPU build (0.32) that would answer wrongly or not at all, mended in the vLLMs that we start.

vLLM calls `mend` in each of its processes (a general plugin, see the dist-info beside). Its kernels for GPUs have neither
fault, and nothing is touched there.

- Its torch kernels read "no adapter", −1, as the last slot: a request for the base that shares a batch with adapters was
  answered through whichever adapter lies there.
- Scoring a prompt (`prompt_logprobs`, which a witness needs) beside other requests ended the whole engine: adapters were
  applied to the LM head for as many rows as there are requests, not as there are prompt tokens.
"""

from __future__ import annotations

import functools
from typing import Any


def mend() -> None:
    """Replaces what is faulty; a version that has other names is left as it is."""
    try:
        from vllm.lora.ops.torch_ops import lora_ops
        from vllm.lora.punica_wrapper import punica_cpu

        shrink = lora_ops.bgmv_shrink
        at_head = punica_cpu.PunicaWrapperCPU.add_lora_logits
    except (ImportError, AttributeError):
        return

    @functools.wraps(shrink)
    def shrink_of_adapters(
        inputs: Any, lora_b_weights: Any, output_tensor: Any, lora_indices_tensor: Any, scaling: float = 1.0
    ) -> None:
        shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[lora_indices_tensor < 0] = 0  # what follows multiplies it with the other half, and adds

    @functools.wraps(at_head)
    def at_head_of_replies(self: Any, y: Any, x: Any, *arguments: Any, **named: Any) -> None:
        if x.view(-1, x.shape[-1]).shape[0] == self.sampler_indices.shape[0]:
            at_head(self, y, x, *arguments, **named)

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = shrink_of_adapters
    punica_cpu.PunicaWrapperCPU.add_lora_logits = at_head_of_replies

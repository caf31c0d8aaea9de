"""How to decode so that a reply is the same alone and under load, for the weights at hand. Pure.

What a number depends on, measured on x86 with AVX-512 and q4_0 (`python -m tests.bench.llama_worker.bits` prints it anew):

    what changes                                      largest change of a logit
    another stream, the same call again               none
    prompt chunks of 8 to 200 rows                    none (flash attention on: 0.16)
    eight prompts in one call                         none
    2, 3, 5 decode rows instead of 1                  none (flash attention on, from 512 positions on: 0.16)
    8 decode rows instead of 1                        2e-6: the q6_K output matrix has another kernel from 8 rows on
    a prompt one row at a time                        0.14: attention has dot products for one row, tinyBLAS for more
    an adapter with one row and with several          0.15: see adapter_forms

So prompt rows and decode rows never share a call (llama.cpp would cut the chunk to mix them), KV that decode rows wrote is
never reused for a prompt, and flash attention is off. That costs: eight streams decode at 224 tokens/s instead of 300 at 60
positions, at 175 instead of 208 at 550. What is left depends on the type of the weights:

    q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl      only the output matrix has a kernel for many rows: it is off (5% at 16)
    q5_K, q6_K, iq4_xs                        its kernel for 8 rows and more makes prompts twice as fast: it stays, and a decode
                                              call has 7 rows at most
    q2_K, q3_K, q4_K and what is not named    repacked kernels differ from 4 rows on: 3 rows at most, and adapters as for floats
    f32                                       sums in another order, without any quantisation after it: 1e-5
    f16, bf16                                 not to be had: one row is a dot product, several are tinyBLAS (0.005 and 0.04)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from enum import Enum

ANY = 1 << 20


class AdapterForm(Enum):
    """In which form an adapter is used: see adapter_forms."""

    AS_IT_IS = "as it is"
    EIGHT_BITS = "eight bits"
    ODD_RANK = "odd rank"


@dataclass(frozen=True)
class Arrangement:
    """What the decode loop and llama.cpp are told."""

    flash_attention: bool
    many_row_kernels: bool  # llama.cpp's "tiled" matrix kernels
    rows: int  # in one decode call, at most
    adapters: AdapterForm

    def prepare(self) -> None:
        """Tells llama.cpp. Before the first decode of the process: it reads the variable once."""
        if not self.many_row_kernels:
            os.environ.setdefault("GGML_CPU_TILED_MM", "0")


FASTEST = Arrangement(flash_attention=True, many_row_kernels=True, rows=ANY, adapters=AdapterForm.AS_IT_IS)

_BY_BLOCK = Arrangement(flash_attention=False, many_row_kernels=False, rows=ANY, adapters=AdapterForm.EIGHT_BITS)
_SEVEN_ROWS = replace(_BY_BLOCK, many_row_kernels=True, rows=7)
_THREE_ROWS = replace(_BY_BLOCK, many_row_kernels=True, rows=3, adapters=AdapterForm.ODD_RANK)
_FLOATS = replace(_BY_BLOCK, adapters=AdapterForm.ODD_RANK)

# `general.file_type` of a GGUF: llama.cpp's enum llama_ftype.
_F32, _F16, _BF16 = 0, 1, 32
_Q4_0, _Q4_1, _Q8_0, _Q5_0, _Q5_1, _IQ4_NL = 2, 3, 7, 8, 9, 25
_Q5_K_S, _Q5_K_M, _Q6_K, _IQ4_XS = 16, 17, 18, 30


def steady(file_type: int | None) -> Arrangement:
    """The fastest arrangement in which numbers do not depend on the load, for weights of that type (None: not stated)."""
    if file_type in (_F32, _F16, _BF16):
        return _FLOATS
    if file_type in (_Q4_0, _Q4_1, _Q8_0, _Q5_0, _Q5_1, _IQ4_NL):
        return _BY_BLOCK
    if file_type in (_Q5_K_S, _Q5_K_M, _Q6_K, _IQ4_XS):
        return _SEVEN_ROWS
    return _THREE_ROWS

"""The arrangement for the weights at hand, held against the real kernels: quantised anew by llama.cpp, in each type."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.llama_worker.steady import FASTEST, steady
from tests.llama_worker.conftest import MIDDLE
from tests.tiny_gguf import write_tiny_gguf

TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q2_K": 10, "q4_K_M": 15, "q5_K_M": 17, "q6_K": 18, "iq4_nl": 25}
# In a process of its own: llama.cpp reads its variables once.
COMPARE = """
import sys
import numpy as np
from pathlib import Path
from gateway.llama_worker.native import Context, ContextSize, Model, NativeLog
from gateway.llama_worker.steady import steady
from tests.bench.llama_worker.bits import compute

model = Model(Path(sys.argv[1]), NativeLog())
arrangement = steady(model.file_type)
assert model.file_type == int(sys.argv[2])
arrangement.prepare()
context = Context(model, ContextSize(128, 8, 512), threads=1)
prompts = np.random.default_rng(0).integers(3, model.vocab_size, (8, 48)).tolist()
rows = min(8, arrangement.rows)
assert (compute(context, prompts[:1], 1) == compute(context, prompts[:rows], 1)).all(), "decode rows"
assert (compute(context, prompts[:1], 16) == compute(context, prompts, 48)).all(), "prompt chunks"
"""


@pytest.fixture(scope="module")
def f16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("f16") / "model.gguf", q4_0=False, shape=MIDDLE)


@pytest.mark.parametrize("name", TYPES)
def test_rows_and_chunks_do_not_change_a_bit(f16_model: Path, tmp_path: Path, name: str) -> None:
    import llama_cpp.llama_cpp as llama

    path = tmp_path / "model.gguf"
    params = llama.llama_model_quantize_default_params()
    params.ftype = TYPES[name]
    assert llama.llama_model_quantize(str(f16_model).encode(), str(path).encode(), ctypes.byref(params)) == 0
    environment = {key: value for key, value in os.environ.items() if key != "GGML_CPU_TILED_MM"}
    command = [sys.executable, "-c", COMPARE, str(path), str(TYPES[name])]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]


def test_a_type_that_nobody_measured_gets_the_careful_arrangement() -> None:
    assert steady(None).rows == steady(99).rows == min(steady(number).rows for number in TYPES.values())
    assert not any(steady(number).flash_attention for number in [None, *TYPES.values()])
    assert FASTEST.flash_attention

"""What the worker reports as log-probabilities is the log-softmax of llama.cpp's own logits, taken here without the worker."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt
import pytest

from gateway.llama_worker.native import Model, NativeLog
from tests.llama_worker.running import RunningWorker, prompt

IDS = prompt(40)


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> npt.NDArray[np.float64]:
    """log-softmax after each token of IDS, from one batch on a context of its own: (tokens, vocabulary)."""
    model = Model(tiny_model, NativeLog())
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.flash_attn_type = 0
    params.no_perf = True
    context = llama.llama_init_from_model(model.pointer, params)
    batch = llama.llama_batch_init(len(IDS), 0, 1)
    batch.n_tokens = len(IDS)
    for place, token in enumerate(IDS):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert llama.llama_decode(context, batch) == 0
    buffer = ctypes.cast(llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    logits = np.ctypeslib.as_array(buffer, shape=(len(IDS), model.vocab_size)).astype(np.float64)
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    model.close()
    largest = logits.max(axis=1, keepdims=True)
    return logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))


def likeliest(row: npt.NDArray[np.float64], count: int) -> dict[str, float]:
    return {str(token): float(row[token]) for token in np.argsort(-row, kind="stable")[:count]}


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 2.0, "seed": 3}, {"top_k": 1, "presence_penalty": 2.0}, {"logit_bias": {"9": 50}}],
    ids=str,
)
def test_top_logprobs_of_the_first_token(
    worker: RunningWorker, expected: npt.NDArray[np.float64], fields: dict[str, Any]
) -> None:
    choice = worker.complete(prompt=IDS, max_tokens=1, logprobs=20, **fields)["choices"][0]
    (token,) = choice["token_ids"]
    (top,) = choice["logprobs"]["top_logprobs"]
    told = {name.removeprefix("token_id:"): value for name, value in top.items()}
    assert told == pytest.approx(likeliest(expected[-1], 20) | {str(token): expected[-1][token]}, abs=1e-4)
    assert choice["logprobs"]["token_logprobs"] == [told[str(token)]]


def test_logprobs_and_ranks_of_the_prompt(worker: RunningWorker, expected: npt.NDArray[np.float64]) -> None:
    choice = worker.complete(prompt=IDS, max_tokens=1, prompt_logprobs=5)["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for place, entry in enumerate(others):
        row, token = expected[place], IDS[place + 1]
        told = {name: score["logprob"] for name, score in entry.items()}
        assert told == pytest.approx(likeliest(row, 5) | {str(token): row[token]}, abs=1e-4)
        assert entry[str(token)]["rank"] == 1 + int((row > row[token]).sum())

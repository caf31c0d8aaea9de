"""The forms of an adapter for decode steps: the same numbers in any company, and the adapter's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from gateway.llama_worker.adapter_forms import Forms, read
from gateway.llama_worker.native import Context, ContextSize, Floats, Model, NativeLog
from gateway.llama_worker.steady import AdapterForm
from tests.bench.llama_worker.bits import compute
from tests.llama_worker.conftest import MIDDLE
from tests.tiny_gguf import write_tiny_gguf, write_tiny_lora

RANKS = (3, 4, 16, 32, 40)


@pytest.fixture(scope="module")
def f16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("f16") / "model.gguf", q4_0=False, shape=MIDDLE)


def logits(model: Path, adapter: Path, kind: AdapterForm | None) -> Floats:
    """Of one prompt, a row at a time, under the adapter in that form or under the base."""
    with decoding(model, adapter, kind or AdapterForm.AS_IT_IS) as (context, forms):
        return compute(context, prompts(1), 1, adapter=forms.for_decoding if kind else None)


@contextmanager
def decoding(model_path: Path, adapter: Path, kind: AdapterForm) -> Iterator[tuple[Context, Forms]]:
    model = Model(model_path, NativeLog())
    context = Context(model, ContextSize(64, 8, 64), threads=2)
    forms = Forms(model, adapter, kind, read(adapter, kind).made)
    try:
        yield context, forms
    finally:
        context.close()
        forms.close()
        model.close()


def prompts(count: int) -> list[list[int]]:
    found: list[list[int]] = np.random.default_rng(0).integers(3, MIDDLE.vocab_size, (count, 24)).tolist()
    return found


@pytest.mark.parametrize("kind", [AdapterForm.EIGHT_BITS, AdapterForm.ODD_RANK])
@pytest.mark.parametrize("rank", RANKS)
def test_one_row_and_several_have_the_same_bits(
    middle_model: Path, tmp_path: Path, rank: int, kind: AdapterForm
) -> None:
    adapter = write_tiny_lora(tmp_path / "adapter.gguf", MIDDLE, rank=rank)
    with decoding(middle_model, adapter, kind) as (context, forms):
        alone = compute(context, prompts(1), 1, adapter=forms.for_decoding)
        for rows in (2, 3, 7):  # the output matrix has another kernel from eight rows on, unless it is told not to
            assert (alone == compute(context, prompts(rows), 1, adapter=forms.for_decoding)).all(), rows
        chunks = compute(context, prompts(1), 24, adapter=forms.for_prompts)
        assert (chunks == compute(context, prompts(2), 12, adapter=forms.for_prompts)).all()


@pytest.mark.parametrize("kind", [AdapterForm.EIGHT_BITS, AdapterForm.ODD_RANK])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("strength", [0.3, 1e-7])  # 1e-7: a B that is hardly trained
def test_a_form_is_the_adapter(f16_model: Path, tmp_path: Path, rank: int, kind: AdapterForm, strength: float) -> None:
    # The same effect each time: llama.cpp multiplies by alpha / rank.
    path = write_tiny_lora(tmp_path / "adapter.gguf", MIDDLE, rank=rank, alpha=0.3 * rank / strength, strength=strength)
    base, as_it_is, form = (logits(f16_model, path, each) for each in (None, AdapterForm.AS_IT_IS, kind))
    effect, error = np.abs(as_it_is - base).mean(), np.abs(form - as_it_is).mean()
    assert effect > 0.01
    assert error < (0.02 if kind is AdapterForm.EIGHT_BITS else 0.001) * effect

"""Sampling against its definition, on small distributions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from gateway.llama_worker.sampling import Sampler, Sampling
from gateway.llama_worker.scoring import score_rows, top_ids

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], dtype=np.float32))


def draw(count: int = 4000, logits: np.ndarray = LOGITS, **fields: Any) -> Counter[int]:
    sampler = Sampler(Sampling(seed=1, **fields), [0], 0, len(logits), frozenset())
    return Counter(sampler.choose(logits) for _ in range(count))


def test_plain_sampling_follows_the_probabilities() -> None:
    drawn = draw(20_000)
    for token, probability in enumerate(np.exp(LOGITS)):
        assert drawn[token] / 20_000 == pytest.approx(probability, abs=0.015)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 1}),
        ({"top_p": 0.8}, {0, 1, 2}),
        ({"top_p": 0.9999}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.01}, {0}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # of the three that top_k leaves, two reach 0.8
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
    ],
)
def test_filters_keep_exactly_the_tokens_they_define(fields: dict[str, Any], kept: set[int]) -> None:
    assert set(draw(**fields)) == kept


def test_a_nucleus_of_many_is_exact() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(2000).astype(np.float32) * 0.1  # nearly flat: 0.9 needs most of the tokens
    order = np.argsort(-logits)
    reach = int(np.searchsorted(np.cumsum(np.exp(logits[order]) / np.exp(logits).sum()), 0.9)) + 1
    drawn = draw(3000, logits, top_p=0.9)
    assert set(drawn) <= set(order[:reach].tolist())
    assert len(drawn) > 1000


def test_temperature_sharpens_and_flattens() -> None:
    assert draw(temperature=0.5)[0] > draw()[0] > draw(temperature=2.0)[0]


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_no_temperature_is_greedy(temperature: float) -> None:
    assert draw(temperature=temperature) == {0: 4000}


def test_a_tiny_temperature_neither_overflows_nor_wanders() -> None:
    assert draw(temperature=1e-4, logits=LOGITS * 1000) == {0: 4000}


def test_bias_moves_a_choice() -> None:
    assert draw(temperature=0.0, logit_bias={4: 5.0}) == {4: 4000}
    assert 0 not in draw(logit_bias={0: -100.0})


def test_presence_is_paid_once_and_frequency_each_time() -> None:
    def walk(**fields: Any) -> list[int]:
        sampler = Sampler(Sampling(temperature=0.0, **fields), [0], 0, 3, frozenset())
        return [sampler.choose(np.array([2.0, 1.5, -9.0], dtype=np.float32)) for _ in range(6)]

    assert walk() == [0] * 6
    assert walk(presence_penalty=1.0) == [0, 1, 0, 0, 0, 0]
    assert walk(frequency_penalty=1.0) == [0, 1, 0, 1, 0, 1]


def test_repetition_divides_positive_logits_and_multiplies_negative_ones() -> None:
    def first(logits: list[float]) -> int:
        sampler = Sampler(Sampling(temperature=0.0, repetition_penalty=2.0), [0], 0, 2, frozenset())
        return sampler.choose(np.array(logits, dtype=np.float32))

    assert first([2.0, 1.5]) == 1
    assert first([4.0, 1.5]) == 0
    assert first([-1.0, -1.5]) == 1
    assert first([-1.0, -2.5]) == 0


def test_each_choice_of_a_seed_has_a_stream_of_its_own() -> None:
    texts = []
    for index in (0, 1, 0):
        sampler = Sampler(Sampling(seed=5), [0], index, len(LOGITS), frozenset())
        texts.append([sampler.choose(LOGITS) for _ in range(50)])
    assert texts[0] == texts[2] != texts[1]


def test_the_logits_are_left_as_they_were() -> None:
    logits = LOGITS.copy()
    draw(10, logits, presence_penalty=1.0, logit_bias={1: 3.0}, repetition_penalty=2.0)
    assert (logits == LOGITS).all()


def test_scores_hold_for_large_and_for_masked_logits() -> None:
    large, flat = score_rows(np.array([[1e4, 1e4 - 1, -np.inf], [0, 0, 0]], dtype=np.float32), [1, 2], 2)
    assert large.logprob == pytest.approx(-1 - np.log1p(np.exp(-1)), abs=1e-6)
    assert (large.rank, [token for token, _ in large.top]) == (2, [0, 1])
    assert flat.logprob == pytest.approx(-np.log(3), abs=1e-6)
    assert flat.rank == 1


def test_the_largest_come_first_and_equals_by_id() -> None:
    values = np.array([1, 3, 3, 2, 0], dtype=np.float32)
    assert top_ids(values, 3).tolist() == [1, 2, 3]
    assert top_ids(values, 0).tolist() == []
    assert top_ids(values, 99).tolist() == [1, 2, 3, 0, 4]


@pytest.mark.parametrize("fields", [{"top_p": 0.5, "top_k": 3, "min_p": 0.1}, {"min_p": 1.0}, {}, {"temperature": 0.5}])
@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e-20])
def test_a_penalty_that_overflows_still_chooses_a_likeliest_token(penalty: float, fields: dict[str, Any]) -> None:
    sampler = Sampler(Sampling(repetition_penalty=penalty, **fields), [1, 2], 0, 4, frozenset())
    assert sampler.choose(np.array([3.0, 2.0, -1.0, 0.5], dtype=np.float32)) == 1


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0}, {"temperature": 0, "logit_bias": {3: 9.0}}, {"temperature": 0, "frequency_penalty": 1.0}],
)
def test_knowing_the_likeliest_token_beforehand_changes_no_choice(fields: dict[str, Any]) -> None:
    known, unknown = (Sampler(Sampling(seed=5, **fields), [0], 0, len(LOGITS), frozenset()) for _ in range(2))

    likeliest = int(LOGITS.argmax())
    assert [known.choose(LOGITS, likeliest) for _ in range(20)] == [unknown.choose(LOGITS) for _ in range(20)]

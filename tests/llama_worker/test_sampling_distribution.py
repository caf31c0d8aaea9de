"""The sampler against a second, slow and plain reading of what each field means: distributions by chi-square, walks exactly.

Seeds are fixed, so a run decides nothing by chance; the bound is the one that a right sampler passes 999 times in 1000.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.llama_worker.sampling import TRIES, Sampler, Sampling
from gateway.llama_worker.structured.constraint import Constraint, Structure
from gateway.llama_worker.structured.rules import parse
from gateway.llama_worker.structured.vocabulary import Vocabulary

DRAWS = 20_000
SPREAD = np.random.default_rng(3).normal(0, 2, 40).astype(np.float32)


def expected(
    logits: list[float], fields: dict[str, Any], prompt: list[int], made: list[int], ends: set[int]
) -> list[float]:
    """The probability of each token, field by field, in exact order and without a shortcut."""
    values = [float(value) for value in logits]
    for token, bias in fields.get("logit_bias", {}).items():
        values[token] += bias
    if len(made) < fields.get("min_tokens", 0):
        for token in ends:
            values[token] = -math.inf
    for token in set(prompt + made):
        penalty = fields.get("repetition_penalty", 1.0)
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token, count in Counter(made).items():
        values[token] -= fields.get("frequency_penalty", 0.0) * count + fields.get("presence_penalty", 0.0)
    temperature = fields.get("temperature", 1.0)
    if temperature == 0:
        best = values.index(max(values))
        return [float(token == best) for token in range(len(values))]
    weights = [math.exp((value - max(values)) / temperature) for value in values]
    weights = [weight if weight >= fields.get("min_p", 0.0) else 0.0 for weight in weights]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if fields.get("top_k"):
        for token in order[fields["top_k"] :]:
            weights[token] = 0.0
    total, reached = sum(weights), 0.0
    for token in order:
        if reached >= fields.get("top_p", 1.0) * total:
            weights[token] = 0.0
        reached += weights[token]
    return [weight / sum(weights) for weight in weights]


def chi_square_holds(drawn: Counter[int], probabilities: list[float]) -> bool:
    """Whether counts fit probabilities; rare tokens are put together, as the test wants."""
    count = sum(drawn.values())
    assert all(probabilities[token] > 0 for token in drawn), "a token of probability 0 was drawn"
    observed, wanted, rare = [], [], [0.0, 0.0]
    for token, probability in enumerate(probabilities):
        if probability * count >= 8:
            observed.append(float(drawn[token]))
            wanted.append(probability * count)
        else:
            rare[0] += drawn[token]
            rare[1] += probability * count
    if rare[1] > 1:
        observed.append(rare[0])
        wanted.append(rare[1])
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    freedom = len(wanted) - 1
    if freedom == 0:
        return statistic < 1e-6
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty, 0.999
    return statistic < bound


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1.9},
        {"top_p": 0.7},
        {"top_p": 0.95, "temperature": 1.5},
        {"top_k": 7},
        {"min_p": 0.05},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 1.2},
        {"logit_bias": {3: 4.0, 8: -100.0}},
        {"min_tokens": 5},
        {"repetition_penalty": 1.8},
    ],
    ids=str,
)
def test_first_tokens_are_drawn_as_the_fields_say(fields: dict[str, Any]) -> None:
    prompt, ends = [1, 1, 5, 30], {0, 12}
    drawn = Counter(
        Sampler(Sampling(seed=seed, **fields), prompt, 0, len(SPREAD), frozenset(ends)).choose(SPREAD)
        for seed in range(DRAWS)
    )
    assert chi_square_holds(drawn, expected(SPREAD.tolist(), fields, prompt, [], ends))


def test_one_stream_of_draws_is_as_good_as_many_seeds() -> None:
    for index in range(3):
        sampler = Sampler(Sampling(seed=11), [0], index, len(SPREAD), frozenset())
        drawn = Counter(sampler.choose(SPREAD) for _ in range(DRAWS))
        assert chi_square_holds(drawn, expected(SPREAD.tolist(), {}, [], [], set()))


def test_the_check_itself_sees_a_sampler_that_is_slightly_wrong() -> None:
    sampler = Sampler(Sampling(seed=11, temperature=1.1), [0], 0, len(SPREAD), frozenset())
    drawn = Counter(sampler.choose(SPREAD) for _ in range(DRAWS))
    assert not chi_square_holds(drawn, expected(SPREAD.tolist(), {}, [], [], set()))


@given(
    logits=st.lists(st.integers(-64, 64).map(lambda eighths: eighths / 8), min_size=8, max_size=8, unique=True),
    prompt=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    presence=st.sampled_from([0.0, 0.5, -1.0, 2.0]),
    frequency=st.sampled_from([0.0, 0.25, -0.5, 2.0]),
    repetition=st.sampled_from([1.0, 0.5, 2.0, 4.0]),
    bias=st.dictionaries(st.integers(0, 7), st.sampled_from([-100.0, -1.0, 2.5]), max_size=3),
    min_tokens=st.integers(0, 4),
)
@settings(max_examples=300, deadline=None)
def test_a_greedy_walk_under_penalties_is_the_plain_readings_walk(
    logits: list[float],
    prompt: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
    min_tokens: int,
) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.0,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        "repetition_penalty": repetition,
        "logit_bias": bias,
        "min_tokens": min_tokens,
    }
    array = np.array(logits, dtype=np.float32)
    sampler = Sampler(Sampling(**fields), prompt, 0, 8, frozenset({7}))
    made: list[int] = []
    for _ in range(8):
        token = sampler.choose(array)
        probabilities = expected(logits, fields, prompt, made, {7})
        assert probabilities[token] == 1.0
        made.append(token)


PIECES = [bytes([97 + token % 10]) * (1 + token // 10) for token in range(40)]  # a, b, …, j, aa, …, jjjj
HELD = 'root ::= ("a" | "bb" | "ccc" | [f-h]) "z"?'
ALLOWED = {
    token for token, piece in enumerate(PIECES) if piece in (b"a", b"b", b"bb", b"c", b"cc", b"ccc", b"f", b"g", b"h")
}


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.5}, {"logit_bias": {3: 20.0}}], ids=str)
def test_under_a_grammar_the_allowed_tokens_keep_their_proportions(fields: dict[str, Any]) -> None:
    structure = Structure(parse(HELD), Vocabulary(PIECES))
    free = expected(SPREAD.tolist(), fields, [], [], set())
    mass = sum(free[token] for token in ALLOWED)
    held = [probability / mass if token in ALLOWED else 0.0 for token, probability in enumerate(free)]
    drawn = Counter(
        Sampler(Sampling(seed=seed, structure=structure, **fields), [0], 0, len(SPREAD), frozenset()).choose(SPREAD)
        for seed in range(DRAWS // 2)
    )
    assert chi_square_holds(drawn, held)


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_k": 1}])
def test_under_a_grammar_the_likeliest_allowed_token_is_the_greedy_one(fields: dict[str, Any]) -> None:
    structure = Structure(parse(HELD), Vocabulary(PIECES))
    best = max(ALLOWED, key=lambda token: SPREAD[token])
    for seed in range(20):
        sampler = Sampler(Sampling(seed=seed, structure=structure, **fields), [0], 0, len(SPREAD), frozenset())
        assert sampler.choose(SPREAD) == best


def test_filters_hold_among_what_a_grammar_allows() -> None:
    structure = Structure(parse("root ::= [a-j]"), Vocabulary(PIECES))
    likeliest = set(sorted(range(10), key=lambda token: -SPREAD[token])[:3])
    raised = dict.fromkeys(range(10, 40), 90.0)  # the first choice is always one that the grammar refuses
    drawn = {
        Sampler(
            Sampling(seed=seed, top_k=3, temperature=5, logit_bias=raised, structure=structure),
            [0],
            0,
            len(SPREAD),
            frozenset(),
        ).choose(SPREAD)
        for seed in range(300)
    }
    assert drawn == likeliest


class Counting(Structure):
    """Counts how many tokens are asked about one by one."""

    asked = 0

    def constraint(self, end_ids: Iterable[int]) -> Constraint:
        constraint, one = super().constraint(end_ids), Constraint.allows

        def allows(token: int) -> bool:
            self.asked += 1
            return one(constraint, token)

        constraint.allows = allows  # type: ignore[method-assign]
        return constraint


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.5])
def test_a_grammar_that_refuses_nearly_everything_is_asked_a_few_times_a_token(temperature: float) -> None:
    letters = [bytes([byte]) for byte in b"abcdefghijklmnopqrstuvwxyz"]
    pieces = [b"\x01", *letters, *(a + b for a in letters for b in letters)]
    structure = Counting(parse('root ::= ([a-z] "\\x01")+'), Vocabulary(pieces))
    logits = np.array([-30.0] * 27 + [0.0] * 26**2, dtype=np.float32)  # what is liked is refused
    sampler = Sampler(Sampling(seed=1, temperature=temperature, structure=structure), [0], 0, len(pieces), frozenset())
    for token in range(40):
        piece = pieces[sampler.choose(logits)]
        assert piece == b"\x01" if token % 2 else piece in letters
    assert structure.asked <= 40 * TRIES


def test_what_was_refused_is_not_tried_again() -> None:
    for spread in (1, 3, 20):
        choices = list(
            islice(Sampler(Sampling(seed=5), [0], 0, len(SPREAD), frozenset())._choices(SPREAD * spread), 12)
        )
        assert len(choices) == len(set(choices)) > 12 - spread
    assert sorted(Sampler(Sampling(temperature=0), [0], 0, 3, frozenset())._choices(SPREAD[:3])) == [0, 1, 2]

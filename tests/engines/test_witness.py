"""The comparison itself: what counts as the same adapter, and what does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.engines.adapters import AdapterRejected
from gateway.engines.witness import Tolerances, WitnessItem, WitnessMismatch, WitnessReport, compare, read_witness

RNG = np.random.default_rng(0)
BASE = RNG.normal(-3, 1, 120)
EFFECT = RNG.normal(0, 0.8, 120)
TUNED = BASE + EFFECT


def judge(base: Any, tuned: Any, wanted_base: Any = BASE, wanted_tuned: Any = TUNED) -> WitnessReport:
    items = [
        WitnessItem([1, 2], [3] * 40, list(wanted_base[i : i + 40]), list(wanted_tuned[i : i + 40]))
        for i in range(0, 120, 40)
    ]
    return compare(
        items, [base[i : i + 40] for i in (0, 40, 80)], [tuned[i : i + 40] for i in (0, 40, 80)], Tolerances()
    )


def test_the_same_numbers_pass_with_no_error() -> None:
    report = judge(BASE, TUNED)
    assert (report.items, report.tokens, report.error, report.noise) == (3, 120, 0, 0)
    assert report.scale == pytest.approx(1) and report.warning is None


def test_the_rounding_of_a_quantised_engine_passes() -> None:
    noise = RNG.normal(0, 0.05, (2, 120))
    report = judge(BASE + noise[0], TUNED + noise[1])
    assert 0 < report.error < 0.15 and report.warning is None


@pytest.mark.parametrize("factor", [2.0, 0.5, 4.0, 1.25, 0.0, -1.0])
def test_an_effect_of_another_strength_is_a_mismatch_that_names_the_factor(factor: float) -> None:
    with pytest.raises(WitnessMismatch, match=f"{factor:.2f} times as strong"):
        judge(BASE, BASE + factor * EFFECT)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_wrong_strength_shows_through_rounding_that_is_nearly_as_large_as_the_effect(factor: float) -> None:
    noise = RNG.normal(0, 0.15, (2, 120))
    judge(BASE + noise[0], TUNED + noise[1])
    with pytest.raises(WitnessMismatch, match="times as strong"):
        judge(BASE + noise[0], BASE + factor * EFFECT + noise[1])


def test_another_effect_of_the_same_size_is_a_mismatch() -> None:
    with pytest.raises(WitnessMismatch, match="something else"):
        judge(BASE, BASE + RNG.permutation(EFFECT))


def test_another_base_is_a_mismatch_even_where_the_effect_agrees() -> None:
    other = BASE + RNG.normal(0, 1, 120)
    with pytest.raises(WitnessMismatch, match="base itself"):
        judge(other, other + EFFECT)


def test_an_adapter_that_does_nothing_passes_with_a_warning() -> None:
    quiet = RNG.normal(0, 0.001, 120)
    noise = RNG.normal(0, 0.03, (2, 120))
    report = judge(BASE + noise[0], BASE + quiet + noise[1], wanted_tuned=BASE + quiet)
    assert report.warning is not None and "next to nothing" in report.warning


def test_an_adapter_of_exactly_no_effect_passes_with_a_warning() -> None:
    assert judge(BASE, BASE, wanted_tuned=BASE).warning is not None


def test_an_adapter_that_did_nothing_in_training_but_acts_here_is_a_mismatch() -> None:
    with pytest.raises(WitnessMismatch, match=r"effect of 0\.000 nats"):
        judge(BASE, TUNED, wanted_tuned=BASE)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_single_number_that_is_not_finite_is_a_mismatch(value: float, which: str) -> None:
    bad = BASE.copy()
    bad[7] = value
    with pytest.raises(WitnessMismatch, match="not all finite"):
        judge(bad if which == "base" else BASE, bad if which == "tuned" else TUNED)


def test_too_few_scores_are_a_mismatch() -> None:
    with pytest.raises(WitnessMismatch, match="scored 119"):
        judge(BASE[:119], TUNED[:119])


GOOD = {"prompt_ids": [1], "reply_ids": [2, 3], "base_logprobs": [-1.0, -2], "tuned_logprobs": [-0.5, -1.5]}


def test_a_good_witness_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "witness.json"
    path.write_text(json.dumps({"items": [GOOD, GOOD]}))
    assert [item.reply_ids for item in read_witness(path)] == [[2, 3], [2, 3]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"items":[]}',
        b"[" * 100_000,
        json.dumps({"items": [GOOD | {"base_logprobs": [-1.0]}]}).encode(),
        json.dumps({"items": [GOOD | {"base_logprobs": [-1.0, float("nan")]}]}).encode(),
        json.dumps({"items": [GOOD | {"tuned_logprobs": [True, -1]}]}).encode(),
        json.dumps({"items": [GOOD | {"reply_ids": [2, -3]}]}).encode(),
        json.dumps({"items": [GOOD | {"reply_ids": [], "base_logprobs": [], "tuned_logprobs": []}]}).encode(),
        json.dumps({"items": [GOOD | {"prompt_ids": "1"}]}).encode(),
        json.dumps({"items": [GOOD] * 1000}).encode(),
    ],
)
def test_a_witness_that_proves_nothing_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "witness.json").write_bytes(content)
    with pytest.raises(AdapterRejected, match="witness"):
        read_witness(tmp_path / "witness.json")

"""Graders: the metrics against hand counts, the formula and the placeholders against what must not be, runs through the SDK."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import BadRequestError, NotFoundError, OpenAI

from gateway.grading.formula import FormulaError, evaluate, names_in, parse_formula
from gateway.grading.placeholders import MAX_CHARS, FillError, UnknownVariable, fill, fill_all
from gateway.grading.similarity import METRICS, TooLong, similarity
from tests.server import Server

MODEL = "tunegate-demo"
CAT = "the cat sat on the mat"


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "cosine"])
@given(first=st.text(max_size=60), second=st.text(max_size=60))
def test_a_metric_stays_between_0_and_1_and_knows_what_is_equal(metric: str, first: str, second: str) -> None:
    assert 0 <= similarity(metric, first, second) <= 1 + 1e-9
    assert similarity(metric, CAT, CAT) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("metric", "text", "expected"),
    [
        ("rouge_1", "the cat sat", 2 * 3 / (3 + 6)),
        ("rouge_2", "the cat on the mat", 2 * 3 / (4 + 5)),
        ("rouge_3", "the cat sat down", 2 * 1 / (2 + 4)),
        ("rouge_5", "the cat", 0.0),
        ("rouge_l", "the mat sat on the cat", 2 * 4 / (6 + 6)),
        ("gleu", "the cat sat on a mat", 11 / 18),
        ("bleu", "a dog", 0.0),
        ("fuzzy_match", CAT, 1.0),
        ("meteor", "the cats sat on the mats", 1.0),
    ],
)
def test_a_metric_counts_as_by_hand(metric: str, text: str, expected: float) -> None:
    assert similarity(metric, text, CAT) == pytest.approx(expected, abs=0.01)


def test_a_text_that_would_take_too_long_is_refused() -> None:
    with pytest.raises(TooLong):
        similarity("meteor", "a " * 3000, CAT)
    with pytest.raises(TooLong):
        similarity("bleu", "a" * 200_000, CAT)
    with pytest.raises(TooLong):
        similarity("fuzzy_match", "a" * 30_000, "b" * 30_000)
    with pytest.raises(TooLong):
        similarity("fuzzy_match", "a" * 10_000, "b" * 5_000)
    assert similarity("fuzzy_match", "a" * 10_000, "a" * 9_000) > 0.9


def test_a_formula_is_arithmetic_over_scores() -> None:
    formula = parse_formula("0.5 * a + max(b, 0.25) ** 2 - (-1)")
    assert names_in(formula) == {"a", "b"}
    assert evaluate(formula, {"a": 1, "b": 0.5}) == pytest.approx(1.75)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "a.b",
        "[1]",
        "a if b else c",
        "lambda: 1",
        "'x' * 9",
        "True",
        "1j",
        "min()",
        "max(a, key=b)",
        "(" * 500,
        "1 +",
        "+".join("a" * 400),
    ],
)
def test_what_is_no_arithmetic_is_no_formula(text: str) -> None:
    with pytest.raises(FormulaError):
        parse_formula(text)


@pytest.mark.parametrize("text", ["1 / a", "9 ** 9 ** 9 ** 9", "b", "exp(1000)", "log(a)", "abs(1, 2)"])
def test_a_formula_without_a_value_says_so(text: str) -> None:
    with pytest.raises(FormulaError):
        evaluate(parse_formula(text), {"a": 0})


def test_placeholders_are_filled_in_once() -> None:
    variables = {"item": {"q": "{{ item.secret }}", "list": [{"a": 1}]}, "sample": {"output_text": "hi"}}
    assert fill("{{ item.q }}|{{sample.output_text}}|{{item.list[0].a}}", variables) == "{{ item.secret }}|hi|1"
    for unknown in ("{{ item.x }}", "{{ other }}", "{{ item.q.__class__ }}", "{{ item.list[3] }}"):
        with pytest.raises(UnknownVariable):
            fill(unknown, variables)


def test_a_long_value_that_is_named_many_times_is_refused_before_it_takes_the_memory(client: OpenAI) -> None:
    many = {**CHECK, "operation": "eq", "input": "{{item.long}}" * 10_000}
    told = run(client, many, "x", long="x" * 1_000_000, want="x")  # 10 GB, if it were filled in
    assert told.reward == 0 and told.metadata.errors.other_error
    with pytest.raises(FillError):
        fill_all(["{{item.long}}"] * 3, {"item": {"long": "x" * (MAX_CHARS // 2)}})
    assert len(fill("{{item.long}}", {"item": {"long": "x" * MAX_CHARS}})) == MAX_CHARS


def run(client: OpenAI, grader: dict[str, Any], sample: str, **item: Any) -> Any:
    return client.fine_tuning.alpha.graders.run(grader=grader, model_sample=sample, item=item)  # type: ignore[arg-type]


CHECK = {"type": "string_check", "name": "same", "input": "{{sample.output_text}}", "reference": "{{item.want}}"}


@pytest.mark.parametrize(
    ("operation", "sample", "reward"),
    [
        ("eq", "yes", 1),
        ("eq", "Yes", 0),
        ("ne", "no", 1),
        ("like", "oh yes!", 1),
        ("like", "YES", 0),
        ("ilike", "YES!", 1),
    ],
)
def test_a_string_check_compares(client: OpenAI, operation: str, sample: str, reward: float) -> None:
    assert run(client, {**CHECK, "operation": operation}, sample, want="yes").reward == reward


def test_a_multi_grader_combines_what_its_parts_give(client: OpenAI) -> None:
    similar = {
        "type": "text_similarity",
        "name": "near",
        "input": "{{sample.output_text}}",
        "reference": "{{item.want}}",
        "evaluation_metric": "rouge_1",
    }
    multi = {
        "type": "multi",
        "name": "both",
        "graders": {"exact": {**CHECK, "operation": "eq"}, "near": similar},
        "calculate_output": "0.5 * exact + 0.5 * near",
    }
    told = run(client, multi, "the cat", want=CAT)
    assert told.sub_rewards == {"exact": 0.0, "near": pytest.approx(0.5)}
    assert told.reward == pytest.approx(0.25)
    assert told.metadata.name == "both"


def test_a_model_gives_a_score_within_its_range(client: OpenAI) -> None:
    grader = {
        "type": "score_model",
        "name": "judge",
        "model": MODEL,
        "input": [{"role": "user", "content": "Grade from 2 to 5: {{sample.output_text}}"}],
        "range": [2, 5],
        "sampling_params": {"temperature": 0, "seed": 1},
    }
    told = run(client, grader, "hello")
    failed = told.metadata.errors.api_model_grader_parse_error
    assert told.reward == 0 if failed else 2 <= told.reward <= 5
    assert told.metadata.sampled_model_name == MODEL
    assert told.api_model_grader_token_usage_per_model[MODEL] == told.metadata.token_usage > 0
    with pytest.raises(NotFoundError):
        run(client, {**grader, "model": "nobody"}, "hello")


def test_a_grader_that_cannot_work_says_why(client: OpenAI) -> None:
    told = run(client, {**CHECK, "operation": "eq"}, "yes")
    assert (told.reward, told.metadata.errors.invalid_variable_error) == (0, True)


def test_a_grader_is_validated(client: OpenAI) -> None:
    grader: Any = {**CHECK, "operation": "eq"}
    valid = client.fine_tuning.alpha.graders.validate(grader=grader).grader
    assert valid is not None and valid.to_dict() == grader


@pytest.mark.parametrize(
    ("grader", "param"),
    [
        ({"type": "magic"}, "grader.type"),
        ({"type": "python", "name": "p", "source": "1"}, "grader.type"),
        ({**CHECK, "operation": "near"}, "grader.operation"),
        ({**CHECK, "operation": "eq", "reference": 5}, "grader.reference"),
        ({"type": "multi", "name": "m", "graders": {}, "calculate_output": "1"}, "grader.graders"),
        (
            {"type": "multi", "name": "m", "graders": {"a": {**CHECK, "operation": "eq"}}, "calculate_output": "b"},
            "grader.calculate_output",
        ),
        (
            {"type": "multi", "name": "m", "graders": {"a": {**CHECK, "operation": "eq"}}, "calculate_output": "a."},
            "grader.calculate_output",
        ),
        (
            {
                "type": "label_model",
                "name": "l",
                "model": "m",
                "input": [{"role": "user", "content": "x"}],
                "labels": ["a"],
                "passing_labels": ["b"],
            },
            "grader.passing_labels",
        ),
        ({"type": "score_model", "name": "s", "model": "m", "input": "x"}, "grader.input"),
    ],
)
def test_what_is_no_grader_is_refused_by_name(client: OpenAI, grader: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.fine_tuning.alpha.graders.validate(grader=grader)
    assert refused.value.param == param


def test_moderations_say_that_none_is_configured(server: Server) -> None:
    told = httpx.post(f"{server.base_url}/moderations", json={"input": "x"})
    assert (told.status_code, told.json()["error"]["code"]) == (404, "moderation_not_configured")

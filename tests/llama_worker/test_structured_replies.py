"""Structured outputs from a worker: what a random model is made to say, and that nobody else pays for a hostile grammar."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.llama_worker.running import RunningWorker, prompt, running
from tests.llama_worker.words import WORDS
from tests.tiny_gguf import BYTE_TOKENS, EOS, Shape, write_tiny_gguf

VOCABULARY = 3 + BYTE_TOKENS + len(WORDS)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["home", "work"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
OTHERWISE_FOREVER = {
    "anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "array", "minItems": 1, "items": {"$ref": "#"}}]
}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    """A worker whose model has the pieces of WORDS."""
    folder = tmp_path_factory.mktemp("talker")
    model = write_tiny_gguf(folder / "model.gguf", shape=Shape(vocab_size=VOCABULARY), words=WORDS)
    with running(folder, model) as started:
        yield started


def text_of(ids: list[int]) -> str:
    """The text of a reply's ids."""
    pieces = b"".join(
        bytes([token - 3]) if token < 3 + BYTE_TOKENS else WORDS[token - 3 - BYTE_TOKENS].encode()
        for token in ids
        if token != EOS
    )
    return pieces.decode()


def reply(talker: RunningWorker, wish: Any, **fields: Any) -> tuple[str, str]:
    """(text, finish_reason) of a sampled reply."""
    fields = {"temperature": 1.0, "seed": 1, "max_tokens": 400, **fields}
    (choice,) = talker.complete(structured_outputs=wish, **fields)["choices"]
    return text_of(choice["token_ids"]), choice["finish_reason"]


def test_the_version_names_what_it_can_hold_a_reply_to(talker: RunningWorker) -> None:
    kinds = talker.client.get("/version").json()["structured_outputs"]
    assert kinds == ["json", "json_object", "regex", "choice", "grammar"]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.01}, {"temperature": 0}, {"top_k": 1}])
def test_a_schema_makes_a_random_model_write_its_documents(
    talker: RunningWorker, seed: int, filters: dict[str, Any]
) -> None:
    text, reason = reply(talker, {"json": PERSON}, seed=seed, prompt=prompt(5, seed), **filters)
    person = json.loads(text)
    assert reason == "stop"
    assert list(person) == ["name", "age", "kind"]
    assert 0 <= person["age"] <= 130
    assert person["kind"] in ("home", "work")


def test_json_object_writes_an_object(talker: RunningWorker) -> None:
    closing = {str(3 + BYTE_TOKENS + WORDS.index(word)): 4 for word in ('"}', "}}", '"', "{}") if word in WORDS}
    whole = 0
    for seed in range(10):
        text, reason = reply(talker, {"json_object": True}, seed=seed, logit_bias=closing)
        assert text.lstrip(" ").startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)
            whole += 1
    assert whole > 0


def test_a_regex_a_choice_and_a_grammar_are_held_to(talker: RunningWorker) -> None:
    text, reason = reply(talker, {"regex": r"[A-Z]{2}-\d{1,3}(é|😀)"})
    assert re.fullmatch(r"[A-Z]{2}-\d{1,3}(é|😀)", text)
    assert reason == "stop"
    said = {reply(talker, {"choice": ["Paris", "Par", "Lyon"]}, seed=seed, temperature=10)[0] for seed in range(40)}
    assert said == {"Paris", "Par", "Lyon"}
    assert reply(talker, {"grammar": 'root ::= "a" b{3}\nb ::= "b" | "c"'})[0][0] == "a"


def test_a_reply_that_may_but_need_not_go_on_ends_with_the_end_token(talker: RunningWorker) -> None:
    body = talker.complete(structured_outputs={"regex": "a*"}, logit_bias={str(EOS): 100}, max_tokens=50)
    assert (body["choices"][0]["token_ids"], body["choices"][0]["finish_reason"]) == ([EOS], "stop")
    body = talker.complete(
        structured_outputs={"regex": "a*"}, logit_bias={str(EOS): 100}, ignore_eos=True, max_tokens=20
    )
    assert (text_of(body["choices"][0]["token_ids"]), body["choices"][0]["finish_reason"]) == ("a" * 20, "length")


def test_a_stop_id_stops_where_the_grammar_may_end_and_nowhere_else(talker: RunningWorker) -> None:
    stop = 300  # a piece that is no text of this grammar
    fields: dict[str, Any] = {"stop_token_ids": [stop], "logit_bias": {str(stop): 100}, "max_tokens": 20}
    body = talker.complete(structured_outputs={"regex": "(ab){2,}"}, **fields)
    assert text_of(body["choices"][0]["token_ids"][:-1]) == "abab"
    assert (body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == ("stop", stop)


def test_a_seed_and_a_schema_give_the_same_text_alone_and_among_others(talker: RunningWorker) -> None:
    seeded = {"structured_outputs": {"json": PERSON}, "temperature": 1.0, "seed": 9, "max_tokens": 300}
    alone = talker.ids(**seeded)
    others = [{**seeded, "seed": seed, "structured_outputs": {"json_object": True}} for seed in range(3)]
    free = [{"temperature": 1.0, "max_tokens": 100, "prompt": prompt(20, salt)} for salt in range(3)]
    together = talker.ids_together([seeded, *others, *free, seeded])
    assert together[0] == together[-1] == alone


def test_choices_of_one_request_each_follow_the_grammar_on_their_own(talker: RunningWorker) -> None:
    body = talker.complete(structured_outputs={"json": PERSON}, n=4, temperature=1.0, seed=3, max_tokens=300)
    texts = [text_of(choice["token_ids"]) for choice in body["choices"]]
    assert len(set(texts)) == 4
    assert all(json.loads(text)["kind"] in ("home", "work") for text in texts)


def test_logprobs_are_the_raw_models_all_the_same(talker: RunningWorker) -> None:
    body = talker.complete(structured_outputs={"choice": ["Paris"]}, logprobs=3, max_tokens=1)["choices"][0]
    (token,) = body["token_ids"]
    held = body["logprobs"]["token_logprobs"][0]
    free = talker.complete(logprobs=0, max_tokens=1, logit_bias={str(token): 100})["choices"][0]
    assert free["logprobs"]["token_logprobs"] == [held]


@pytest.mark.parametrize(
    "wish",
    [
        {"json": {"type": "object", "properties": {"a": {"multipleOf": 2}}}},
        {"json": "{"},
        {"json": {"$ref": "#"}},
        {"regex": "(?=a)"},
        {"grammar": 'root ::= root "a"'},
        {"grammar": "root ::= " + "(" * 100_000},
        {"choice": []},
        {"lark": "start: x"},
        {"json": {}, "regex": "a"},
        "json",
    ],
)
def test_what_it_cannot_hold_to_is_refused_by_name(talker: RunningWorker, wish: Any) -> None:
    response = talker.post(structured_outputs=wish)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "structured_outputs")


def test_a_grammar_that_no_token_can_go_on_with_is_an_error_of_that_request(talker: RunningWorker) -> None:
    response = talker.post(structured_outputs={"grammar": "root ::= []"})
    assert response.status_code == 400
    assert "no token" in response.json()["error"]["message"]
    assert talker.post().status_code == 200


def test_an_ambiguous_schema_ends_alone_while_others_go_on(talker: RunningWorker) -> None:
    opening = {str(3 + ord("[")): 100, str(3 + BYTE_TOKENS + WORDS.index(" [")): 60}
    hostile = {"structured_outputs": {"json": OTHERWISE_FOREVER}, "logit_bias": opening, "max_tokens": 400}
    fields: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "prompt": prompt(9)}
    alone = talker.ids(**fields)
    with ThreadPoolExecutor(4) as pool:
        attacks = [pool.submit(talker.post, **hostile, seed=seed) for seed in range(3)]
        assert talker.ids(**fields) == alone
        refusals = [attack.result() for attack in attacks]
    assert {refused.status_code for refused in refusals} == {400}
    assert "too many ways" in refusals[0].json()["error"]["message"]
    talker.wait_metric("sequences_running", 0, timeout_s=1)


def test_compiling_the_largest_schema_stops_no_stream(talker: RunningWorker) -> None:
    large = {
        "type": "object",
        "properties": {f"property-{n}": {"enum": [f"{n}-{m}" for m in range(5)]} for n in range(500)},
    }
    with talker.client.stream(
        "POST",
        "/v1/completions",
        json={"model": "base", "prompt": [1, 2], "max_tokens": 400, "ignore_eos": True, "stream": True},
    ) as response:
        lines = response.iter_lines()
        next(lines)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(talker.post, structured_outputs={"json": large}, max_tokens=1)
            came = 0
            while not asked.done():
                came += bool(next(lines, None))
                time.sleep(0)
        assert asked.result().status_code == 200
    assert came > 2


def test_a_range_that_runs_backwards_is_refused(talker: RunningWorker) -> None:
    response = talker.post(structured_outputs={"grammar": "root ::= [z-a]"})
    assert response.status_code == 400 and "ends before it begins" in response.json()["error"]["message"]
    assert talker.post().status_code == 200


@pytest.mark.parametrize("as_text", [False, True])
def test_what_is_nested_too_deeply_is_refused(talker: RunningWorker, as_text: bool) -> None:
    deep = json.loads('{"const": ' + "[" * 400 + "]" * 400 + "}")
    response = talker.post(structured_outputs={"json": json.dumps(deep) if as_text else deep})
    assert response.status_code == 400 and "nested too deeply" in response.json()["error"]["message"]

"""What the worker generates: the same alone and in company, scored as the raw model scores it."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.llama_worker.running import RunningWorker, prompt
from tests.tiny_gguf import EOS


def test_greedy_text_is_the_same_alone_and_among_eight(worker: RunningWorker) -> None:
    requests = [{"prompt": prompt(10 + 37 * salt, salt), "max_tokens": 48} for salt in range(8)]
    alone = [worker.ids(**fields) for fields in requests]
    for _ in range(3):
        assert worker.ids_together(requests) == alone


def test_two_adapters_and_the_base_in_flight_each_equal_what_they_give_alone(worker: RunningWorker) -> None:
    requests = [
        {"model": model, "prompt": prompt(20 + 50 * salt, salt), "max_tokens": 40}
        for salt in range(3)
        for model in ("base", "red", "blue")
    ]
    alone = [worker.ids(**fields) for fields in requests]
    assert len({tuple(ids) for ids in alone}) == len(alone), "the adapters must make a difference"
    for _ in range(3):
        assert worker.ids_together(requests) == alone


def test_a_place_used_under_one_adapter_gives_the_next_request_nothing_of_it(worker: RunningWorker) -> None:
    shared = prompt(90)
    first = {model: worker.ids(model=model, prompt=shared) for model in ("base", "red", "blue")}
    for model in ("red", "base", "red", "blue", "base", "blue"):
        assert worker.ids(model=model, prompt=shared) == first[model]


def test_a_seed_gives_the_same_text_whatever_else_runs(worker: RunningWorker) -> None:
    seeded = {"temperature": 1.0, "seed": 42, "max_tokens": 32, "top_p": 0.95}
    alone = worker.ids(**seeded)
    noise = [{"temperature": 1.0, "max_tokens": 40, "prompt": prompt(30, salt)} for salt in range(6)]
    together = worker.ids_together([seeded, *noise, seeded])
    assert together[0] == together[-1] == alone
    assert worker.ids(**{**seeded, "seed": 43}) != alone


def test_without_a_seed_two_answers_differ(worker: RunningWorker) -> None:
    assert worker.ids(temperature=1.0, max_tokens=32) != worker.ids(temperature=1.0, max_tokens=32)


def test_top_k_of_one_is_greedy_at_any_temperature(worker: RunningWorker) -> None:
    assert worker.ids(temperature=2.0, top_k=1) == worker.ids()


def test_logprobs_are_ordered_and_of_the_raw_model(worker: RunningWorker) -> None:
    fields: dict[str, Any] = {"logprobs": 20, "max_tokens": 12}
    plain = worker.complete(**fields)["choices"][0]
    scores = plain["logprobs"]
    assert scores["tokens"] == [f"token_id:{token}" for token in plain["token_ids"]]
    for token, logprob, top in zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True):
        values = list(top.values())
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1 + 1e-6
        assert top[token] == logprob == values[0]
    hot = worker.complete(**fields, temperature=3.0, top_k=1, repetition_penalty=1.0)["choices"][0]
    assert hot["logprobs"] == scores


def test_logprobs_of_the_whole_vocabulary_sum_to_one(worker: RunningWorker) -> None:
    seen: dict[int, float] = {}
    for token in range(0, 320, 16):  # a bias moves the choice, never the raw log-probability that is reported
        for candidate in range(token, token + 16):
            body = worker.complete(max_tokens=1, logprobs=0, logit_bias={str(candidate): 100}, ignore_eos=True)
            seen[candidate] = body["choices"][0]["logprobs"]["token_logprobs"][0]
    assert len(seen) == 320
    assert sum(math.exp(value) for value in seen.values()) == pytest.approx(1, abs=1e-5)


def test_a_chosen_token_outside_the_top_is_listed_beside_it(worker: RunningWorker) -> None:
    body = worker.complete(max_tokens=1, logprobs=2, logit_bias={"300": 100})
    (top,) = body["choices"][0]["logprobs"]["top_logprobs"]
    assert len(top) == 3
    assert next(iter(top)) == "token_id:300"


@pytest.mark.parametrize("model", ["base", "red"])
def test_prompt_logprobs_equal_those_of_the_same_tokens_when_generated(worker: RunningWorker, model: str) -> None:
    start = prompt(50)
    made = worker.complete(model=model, prompt=start, max_tokens=100, logprobs=0)["choices"][0]
    whole = start + made["token_ids"]  # crosses two chunk borders
    scored = worker.complete(model=model, prompt=whole, max_tokens=1, prompt_logprobs=1)["choices"][0]
    entries = scored["prompt_logprobs"]
    assert len(entries) == len(whole)
    assert entries[0] is None
    assert scored["prompt_token_ids"] == whole
    for position, logprob in enumerate(made["logprobs"]["token_logprobs"], start=len(start)):
        entry = entries[position][str(whole[position])]
        assert entry["logprob"] == pytest.approx(logprob, abs=0.25)  # one token a step against 64: q4_0 rounds apart
        assert entry["rank"] <= 2
    assert all(str(token) in entry for token, entry in zip(whole[1:], entries[1:], strict=True))


def test_prompt_logprobs_are_the_same_twice_and_under_load(worker: RunningWorker) -> None:
    fields: dict[str, Any] = {"prompt": prompt(150), "prompt_logprobs": 0, "max_tokens": 1}
    first = worker.complete(**fields)["choices"][0]["prompt_logprobs"]
    assert [len(entry) for entry in first[1:]] == [1] * 149
    noise = [{"prompt": prompt(40, salt), "model": "blue", "max_tokens": 200, "ignore_eos": True} for salt in range(4)]
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(worker.ids_together, noise)
        while not busy.done():
            assert worker.complete(**fields)["choices"][0]["prompt_logprobs"] == first


def test_n_choices_start_from_one_prompt_and_go_their_own_ways(worker: RunningWorker) -> None:
    fields: dict[str, Any] = {"n": 4, "temperature": 1.0, "seed": 7, "max_tokens": 24, "ignore_eos": True}
    fields |= {"prompt": prompt(100), "cache_salt": "this test alone"}
    body = worker.complete(**fields)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert len({tuple(choice["token_ids"]) for choice in body["choices"]}) == 4
    assert body["usage"] == {
        "prompt_tokens": 100,
        "completion_tokens": 96,
        "total_tokens": 196,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert worker.complete(**fields)["choices"] == body["choices"]


def test_greedy_choices_all_equal_the_only_one(worker: RunningWorker) -> None:
    alone = worker.ids(prompt=prompt(70), max_tokens=30)
    choices = worker.complete(prompt=prompt(70), max_tokens=30, n=8)["choices"]
    assert [choice["token_ids"] for choice in choices] == [alone] * 8


def test_a_stop_id_ends_the_text_and_is_its_last_token(worker: RunningWorker) -> None:
    ids = worker.ids(max_tokens=20)
    stop = ids[5]
    choice = worker.complete(max_tokens=20, stop_token_ids=[stop])["choices"][0]
    assert choice["token_ids"] == ids[: ids.index(stop) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_the_end_token_stops_without_a_stop_reason(worker: RunningWorker) -> None:
    choice = worker.complete(logit_bias={str(EOS): 100})["choices"][0]
    assert choice["token_ids"] == [EOS]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


def test_ignore_eos_goes_on_to_the_length(worker: RunningWorker) -> None:
    choice = worker.complete(logit_bias={str(EOS): 100}, ignore_eos=True)["choices"][0]
    assert choice["token_ids"] == [EOS] * 6
    assert choice["finish_reason"] == "length"


def test_min_tokens_holds_every_stop_back(worker: RunningWorker) -> None:
    held = worker.ids(logit_bias={str(EOS): 100, "9": 90}, min_tokens=3, stop_token_ids=[9])
    assert len(held) == 4
    assert not {EOS, 9} & set(held[:3])
    assert held[3] == EOS


def test_penalties_keep_a_text_from_repeating(worker: RunningWorker) -> None:
    fields: dict[str, Any] = {"max_tokens": 40, "logit_bias": {"20": 6, "21": 6}}
    plain = worker.ids(**fields)
    assert len(set(plain)) < 20
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 3.0}):
        assert len(set(worker.ids(**fields, **penalty))) > len(set(plain)), penalty


def test_repetition_penalty_counts_the_prompt_and_presence_does_not(worker: RunningWorker) -> None:
    first = worker.ids(max_tokens=1)[0]
    start = [1, 5, 6, 7]
    favoured = {"prompt": [first, *start], "logit_bias": {str(first): 8}, "max_tokens": 1}
    assert worker.ids(**favoured) == [first]
    assert worker.ids(**favoured, presence_penalty=2.0, frequency_penalty=2.0) == [first]
    assert worker.ids(**favoured, repetition_penalty=50.0) != [first]


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_frames_add_up_to_the_unary_reply(worker: RunningWorker, n: int) -> None:
    fields: dict[str, Any] = {"n": n, "temperature": 1.0, "seed": 3, "max_tokens": 20, "logprobs": 2}
    whole = worker.complete(**fields)
    *frames, usage = worker.stream(**fields, stream_options={"include_usage": True})
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [frame["choices"][0] for frame in frames if frame["choices"][0]["index"] == choice["index"]]
        assert [token for part in mine for token in part["token_ids"]] == choice["token_ids"]
        assert [part["finish_reason"] for part in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for key in ("tokens", "token_logprobs", "top_logprobs"):
            assert [entry for part in mine for entry in part["logprobs"][key]] == choice["logprobs"][key]


def test_a_reply_may_fill_the_context_to_its_last_position(worker: RunningWorker) -> None:
    assert len(worker.ids(prompt=prompt(112), max_tokens=400, ignore_eos=True)) == 400

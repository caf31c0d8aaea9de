"""Prompts computed once: what is shared, what never is, and that nobody can tell by the reply."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.llama_worker.filling import PROMPT_CHUNK
from gateway.llama_worker.prefix_cache import PAGE, Owner, PrefixCache, borders, shared
from tests.llama_worker.conftest import MIDDLE
from tests.llama_worker.running import RunningWorker, hanging_request, prompt, running
from tests.tiny_gguf import write_tiny_lora

BASE = Owner(0, "")


def blob(size: int = 10) -> Any:
    return np.zeros(size, dtype=np.uint8)


def test_two_prompts_share_the_borders_up_to_where_they_part() -> None:
    first = borders(BASE, list(range(10 * PAGE + 5)))
    second = borders(BASE, [*range(6 * PAGE + 3), 99999, *range(100)])
    assert len(first) == 10
    assert shared(first, second) == 6
    assert shared(first, first) == 10


def test_an_adapter_and_a_project_share_with_nobody() -> None:
    ids = list(range(5 * PAGE))
    owners = [Owner(0, ""), Owner(1, ""), Owner(2, ""), Owner(0, "a"), Owner(1, "a"), Owner(0, "b")]
    seen = [digest for owner in owners for digest in borders(owner, ids)]
    assert len(set(seen)) == len(seen)


def test_the_longest_shared_beginning_is_found() -> None:
    cache = PrefixCache(1000)
    long, short = borders(BASE, list(range(8 * PAGE))), borders(BASE, [*range(3 * PAGE), *range(900, 1000)])
    cache.add(blob(), long)
    cache.add(blob(), short)
    saved, count = cache.longest(borders(BASE, [*range(7 * PAGE), 5, 5, 5]))
    assert saved is not None and saved.borders == long and count == 7
    assert cache.longest(borders(BASE, [7] * 100)) == (None, 0)


def test_the_least_recently_used_goes_when_the_budget_is_reached() -> None:
    cache = PrefixCache(30)
    prompts = [borders(BASE, [start, *range(2 * PAGE)]) for start in range(4)]
    for index in (0, 1, 2):
        cache.add(blob(10), prompts[index])
    cache.longest(prompts[0])
    cache.add(blob(10), prompts[3])
    assert [cache.longest(each)[1] > 0 for each in prompts] == [True, False, True, True]
    assert cache.used_bytes == 30
    cache.add(blob(31), borders(BASE, [50] * 64))
    assert cache.used_bytes == 30 and len(cache) == 3
    cache.clear()
    assert cache.used_bytes == len(cache) == 0 == cache.longest(prompts[0])[1]


def test_a_longer_prompt_takes_the_place_of_its_beginning() -> None:
    cache = PrefixCache(1000)
    ids = list(range(8 * PAGE))
    cache.add(blob(), borders(BASE, ids[: 4 * PAGE]))
    cache.add(blob(), borders(BASE, ids))
    assert len(cache) == 1
    assert not cache.wants(borders(BASE, ids), 8)
    assert not cache.wants(borders(BASE, [*range(16 * PAGE)]), 15)
    assert cache.wants(borders(BASE, [*range(16 * PAGE)]), 8)


@pytest.fixture(scope="module")
def middle_worker(middle_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("middle")
    with running(folder / "worker", middle_model) as worker:
        for seed, name in enumerate(("red", "blue"), start=1):
            write_tiny_lora(folder / name / "adapter.gguf", MIDDLE, seed, strength=0.3)
            assert worker.load(name, folder / name).status_code == 200
        yield worker


def reply(worker: RunningWorker, **fields: Any) -> tuple[list[int], list[float], int]:
    body = worker.complete(logprobs=0, ignore_eos=True, **{"max_tokens": 24, **fields})
    (choice,) = body["choices"]
    cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], cached


@pytest.mark.parametrize("model", ["base", "red"])
@pytest.mark.parametrize("length", [2, 16, 17, 63, 64, 65, 66, 80, 100, 129, 200, 513, 577, 600])
def test_cached_is_uncached_token_for_token_and_bit_for_bit(
    middle_worker: RunningWorker, model: str, length: int
) -> None:
    ids = prompt(length, 3)
    fresh = reply(middle_worker, model=model, prompt=ids, cache_salt=f"{model} {length}")
    again = reply(middle_worker, model=model, prompt=ids, cache_salt=f"{model} {length}")
    assert fresh[2] == 0
    assert again[2] % PAGE == 0 and again[2] < length
    assert again[2] > length - PAGE - PROMPT_CHUNK
    assert again[:2] == fresh[:2]


def test_a_shared_beginning_with_another_end_is_reused(middle_worker: RunningWorker) -> None:
    beginning = prompt(500, 5)
    for end in range(1, 5):
        ids = beginning + prompt(50, 100 + end)
        fresh = reply(middle_worker, prompt=ids, cache_salt=f"end {end}")
        shared_reply = reply(middle_worker, prompt=ids, cache_salt="shared")
        assert fresh[2] == 0
        assert shared_reply[2] == (0 if end == 1 else 496)
        assert shared_reply[:2] == fresh[:2]


def test_adapters_never_read_each_others_kv(middle_worker: RunningWorker) -> None:
    ids = prompt(300, 7)
    first = {name: reply(middle_worker, model=name, prompt=ids, cache_salt="ABA") for name in ("base", "red", "blue")}
    assert all(cached == 0 for _, _, cached in first.values())
    assert first["base"][0] != first["red"][0] != first["blue"][0]
    for name in ("base", "red", "blue", "red", "base"):
        again = reply(middle_worker, model=name, prompt=ids, cache_salt="ABA")
        assert again == (*first[name][:2], 288)


def test_projects_never_share(middle_worker: RunningWorker) -> None:
    ids = prompt(200, 9)
    assert reply(middle_worker, prompt=ids, cache_salt="one project")[2] == 0
    assert reply(middle_worker, prompt=ids, cache_salt="another")[2] == 0
    assert reply(middle_worker, prompt=ids, cache_salt="one project")[2] == 192


@pytest.mark.parametrize("salt", ["", 5, ["x"], "x" * 257])
def test_a_salt_that_is_no_short_text_is_refused(middle_worker: RunningWorker, salt: object) -> None:
    response = middle_worker.post(cache_salt=salt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "cache_salt"


def test_requests_that_come_together_compute_their_beginning_once(middle_worker: RunningWorker) -> None:
    beginning = prompt(1000, 11)
    prompts = [beginning + prompt(40, 200 + index) for index in range(6)]
    alone = [reply(middle_worker, prompt=ids, cache_salt=f"apart {index}") for index, ids in enumerate(prompts)]
    before = middle_worker.metric("prompt_tokens_total")
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda ids: reply(middle_worker, prompt=ids, cache_salt="at once"), prompts))
    computed = middle_worker.metric("prompt_tokens_total") - before
    assert [one[:2] for one in together] == [one[:2] for one in alone]
    assert sorted(cached for _, _, cached in together) == [0] + [992] * 5
    assert computed == 1040 + 5 * 48


def test_the_next_turn_of_a_conversation_reuses_the_one_before(middle_worker: RunningWorker) -> None:
    ids = prompt(100, 13)
    for _ in range(3):
        tokens, _, cached = reply(middle_worker, prompt=ids, cache_salt="turns")
        fresh = reply(middle_worker, prompt=ids, cache_salt=f"fresh {len(ids)}")
        assert tokens == fresh[0]
        before, ids = len(ids), ids + tokens + prompt(60, len(ids))
    assert cached > before - 24 - 60 - PROMPT_CHUNK


def test_a_stream_says_what_was_cached(middle_worker: RunningWorker) -> None:
    fields = {"prompt": prompt(100, 15), "cache_salt": "stream", "stream_options": {"include_usage": True}}
    usages = [middle_worker.stream(**fields)[-1]["usage"]["prompt_tokens_details"] for _ in range(2)]
    assert usages == [{"cached_tokens": 0}, {"cached_tokens": 80}]  # not 96: four rows would be left


def test_prompt_logprobs_are_computed_anew(middle_worker: RunningWorker) -> None:
    fields = {"prompt": prompt(100, 17), "cache_salt": "scored", "prompt_logprobs": 0, "max_tokens": 1}
    first, second = (middle_worker.complete(**fields) for _ in range(2))
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert first["choices"] == second["choices"]


def test_a_cancelled_prompt_leaves_whole_pages_that_are_right(middle_worker: RunningWorker) -> None:
    ids = prompt(2000, 19)
    fresh = reply(middle_worker, prompt=ids, cache_salt="not cancelled")
    before = middle_worker.metric("prompt_tokens_total")
    with hanging_request(middle_worker, prompt=ids, cache_salt="cut"):
        while middle_worker.metric("prompt_tokens_total") < before + 200:
            time.sleep(0.002)
    middle_worker.wait_metric("sequences_running", 0, timeout_s=10)
    again = reply(middle_worker, prompt=ids, cache_salt="cut")
    assert 0 < again[2] < 2000 and again[2] % PAGE == 0
    assert again[:2] == fresh[:2]


def test_without_memory_for_it_nothing_is_kept(middle_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, middle_model, "--cache-mib", "0") as worker:
        for _ in range(2):
            assert reply(worker, prompt=prompt(100))[2] == 0
        assert worker.metric("prefix_cache_bytes") == 0


def test_a_small_budget_holds_and_replies_stay_right(middle_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, middle_model, "--cache-mib", "1") as worker:
        replies = [reply(worker, prompt=prompt(400, index), max_tokens=4) for index in range(8)]
        assert 0 < worker.metric("prefix_cache_bytes") <= 2**20
        assert [reply(worker, prompt=prompt(400, index), max_tokens=4)[:2] for index in range(8)] == [
            each[:2] for each in replies
        ]

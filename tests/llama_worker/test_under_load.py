"""Alone = under load, number for number: for the base and two adapters, with neighbours that join and leave at every step."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.llama_worker.conftest import MIDDLE
from tests.llama_worker.running import RunningWorker, prompt, running
from tests.tiny_gguf import write_tiny_lora

MODELS = ("base", "red", "blue")


@pytest.fixture(scope="module")
def loaded_worker(middle_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    """Twelve places and two adapters: a request and more neighbours than the kernels for few rows take."""
    folder = tmp_path_factory.mktemp("loaded")
    with running(folder / "worker", middle_model, "--max-seqs", "12", "--cache-mib", "16") as worker:
        for seed, (name, rank) in enumerate((("red", 4), ("blue", 16)), start=1):
            write_tiny_lora(folder / name / "adapter.gguf", MIDDLE, seed, rank, strength=0.3)
            assert worker.load(name, folder / name).status_code == 200
        yield worker


@contextmanager
def neighbours(worker: RunningWorker, models: tuple[str, ...], count: int) -> Iterator[None]:
    """So many clients that send requests of all lengths, some with a shared beginning, until the block is left."""
    over = threading.Event()

    def client(number: int) -> None:
        order = random.Random(number)
        while not over.is_set():
            shared = prompt(order.choice([0, 0, 100, 400]), 50)
            worker.post(
                model=order.choice(models),
                prompt=shared + prompt(order.randrange(2, 150), order.randrange(100)),
                max_tokens=order.randrange(1, 30),
                temperature=order.choice([0, 1]),
                n=order.choice([1, 1, 1, 2]),
                ignore_eos=True,
            )

    with ThreadPoolExecutor(count) as pool:
        clients = [pool.submit(client, number) for number in range(count)]
        try:
            yield
        finally:
            over.set()
    for finished in clients:
        finished.result()


def measured(worker: RunningWorker, model: str, length: int) -> tuple[Any, ...]:
    fields: dict[str, Any] = {"model": model, "prompt": prompt(length, length), "max_tokens": 40, "ignore_eos": True}
    # Each time its own salt, so that it is computed and not read.
    salt = f"{threading.get_ident()}-{random.random()}"
    (choice,) = worker.complete(**fields, logprobs=3, cache_salt=salt)["choices"]
    return choice["token_ids"], choice["logprobs"]


@pytest.mark.parametrize("length", [5, 65, 300, 620])
@pytest.mark.parametrize("model", MODELS)
def test_a_reply_is_the_same_alone_and_among_others(loaded_worker: RunningWorker, model: str, length: int) -> None:
    alone = measured(loaded_worker, model, length)
    assert measured(loaded_worker, model, length) == alone
    with neighbours(loaded_worker, (model,), 8):
        assert [measured(loaded_worker, model, length) for _ in range(2)] == [alone] * 2
    with neighbours(loaded_worker, MODELS, 8):
        assert [measured(loaded_worker, model, length) for _ in range(2)] == [alone] * 2


def test_sequences_were_moved_and_shared_on_the_way(loaded_worker: RunningWorker) -> None:
    with neighbours(loaded_worker, MODELS, 10):
        for length in (5, 300):
            measured(loaded_worker, "base", length)
    assert loaded_worker.metric("sequences_moved_total") > 0
    assert loaded_worker.metric("cached_tokens_total") > 0
    assert loaded_worker.metric("adapter_turns_total") > 0


def test_a_seeded_sample_is_the_same_alone_and_among_others(loaded_worker: RunningWorker) -> None:
    fields: dict[str, Any] = {"model": "red", "prompt": prompt(90, 3), "temperature": 1.0, "seed": 11, "n": 3}
    fields |= {"max_tokens": 40, "ignore_eos": True}
    alone = [choice["token_ids"] for choice in loaded_worker.complete(**fields)["choices"]]
    with neighbours(loaded_worker, MODELS, 7):
        together = [choice["token_ids"] for choice in loaded_worker.complete(**fields)["choices"]]
    assert together == alone


def test_a_long_prompt_does_not_hold_up_a_stream(loaded_worker: RunningWorker) -> None:
    # In tokens, not in seconds: while a prompt of 2000 tokens is computed, a stream goes on at every chunk.
    with ThreadPoolExecutor(2) as pool:
        reply = pool.submit(loaded_worker.stream, prompt=prompt(10), max_tokens=400, ignore_eos=True)
        loaded_worker.wait_metric("sequences_running", 1, timeout_s=10)
        before = loaded_worker.metric("generated_tokens_total")
        loaded_worker.complete(prompt=prompt(2000, 1), max_tokens=1, cache_salt="long")
        after = loaded_worker.metric("generated_tokens_total")
        assert len(reply.result()) == 400
    assert after - before >= 2000 // 64


def test_a_tenant_with_many_requests_does_not_starve_another_adapter(loaded_worker: RunningWorker) -> None:
    with neighbours(loaded_worker, ("red",), 9):
        loaded_worker.wait_metric("adapters_in_memory", 2, timeout_s=10)
        before = loaded_worker.metric("generated_tokens_total")
        loaded_worker.complete(model="blue", prompt=prompt(40, 77), max_tokens=30, ignore_eos=True)
        passed = loaded_worker.metric("generated_tokens_total") - before
    assert passed < 30 * 60  # it had its turns: red's nine sequences got no more than a few steps for each of its own


def test_requests_that_come_together_are_decoded_together(loaded_worker: RunningWorker) -> None:
    # Eight prompts of a chunk each, in line behind a long one: with a step after every chunk it would be 37 steps.
    before = loaded_worker.metric('step_seconds_count{kind="decode"}')
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(loaded_worker.complete, prompt=prompt(2000, 3), max_tokens=1, cache_salt="together")
        loaded_worker.wait_metric("sequences_running", 1, timeout_s=10)
        replies = [
            pool.submit(loaded_worker.complete, prompt=prompt(60, 200 + number), max_tokens=31, ignore_eos=True)
            for number in range(8)
        ]
        loaded_worker.wait_metric("sequences_running", 9, timeout_s=10)
        assert not first.done()
        for reply in replies:
            assert reply.result()["usage"]["completion_tokens"] == 31
    assert loaded_worker.metric('step_seconds_count{kind="decode"}') - before < 37

"""Requests whose adapter cannot be had at once: others go on meanwhile, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.llama_worker.in_process import Loop, loop
from tests.llama_worker.running import prompt

WAIT_S = 30


@pytest.fixture
def one_adapter(tiny_model: Path, adapter_folders: dict[str, Path]) -> Iterator[Loop]:
    """A loop with room for one adapter, red in memory and blue not."""
    with loop(tiny_model, max_adapters=1) as running:
        running.start()
        for name in ("blue", "red"):
            running.load(name, adapter_folders[name]).result(WAIT_S)
        yield running


def test_others_overtake_a_request_whose_adapter_has_no_room(one_adapter: Loop) -> None:
    asked = [
        one_adapter.ask(prompt(10), tokens, model=name) for name, tokens in (("red", 200), ("blue", 5), ("base", 5))
    ]
    assert [len(reply.result(WAIT_S)[0]) for reply in asked] == [200, 5, 5]
    assert one_adapter.over == ["base", "red", "blue"]


def test_a_request_is_overtaken_by_so_many_and_no_more(one_adapter: Loop) -> None:
    asked = [one_adapter.ask(prompt(10), 240, model="red"), one_adapter.ask(prompt(10), 1, model="blue")]
    asked += [one_adapter.ask(prompt(10), 1) for _ in range(80)]
    for reply in asked:
        reply.result(WAIT_S)
    assert one_adapter.over.index("red") < one_adapter.over.index("blue")
    assert 32 < one_adapter.over.index("blue") < 32 + 5


def test_streams_go_on_while_the_files_of_an_adapter_are_read_and_converted(one_adapter: Loop) -> None:
    released = threading.Event()
    one_adapter.adapters._thread.submit(released.wait)  # the thread that does it has other work
    red = one_adapter.ask(prompt(10), 5, model="red")  # in memory, but its form for decode steps is still to be made
    assert len(one_adapter.ask(prompt(10), 100).result(WAIT_S)[0]) == 100
    assert not red.done()
    released.set()
    assert len(red.result(WAIT_S)[0]) == 5
    released.clear()
    one_adapter.adapters._thread.submit(released.wait)
    blue = one_adapter.ask(prompt(10), 5, model="blue")  # not in memory: to be read first
    assert len(one_adapter.ask(prompt(10), 100).result(WAIT_S)[0]) == 100
    assert not blue.done()
    released.set()
    assert len(blue.result(WAIT_S)[0]) == 5


def test_a_stop_answers_those_who_wait_for_an_adapter_to_go(one_adapter: Loop) -> None:
    red = one_adapter.ask(prompt(10), 240, model="red")
    gone = one_adapter.unload("red")
    one_adapter.scheduler.stop(0)
    one_adapter.ended.result(WAIT_S)
    assert "shutting down" in str(red.exception(WAIT_S))
    assert gone.result(WAIT_S) is None

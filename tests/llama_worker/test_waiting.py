"""Requests whose adapter cannot be had at once: others go on meanwhile, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway.llama_worker.adapter_forms import ReadFile
from gateway.llama_worker.generation import Event, Generation
from gateway.llama_worker.sampling import Sampling
from gateway.llama_worker.scheduler import MOST_OVERTAKING
from gateway.llama_worker.wire import Choice, Completion
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


@contextmanager
def red_stays(running: Loop) -> Iterator[None]:
    """A request for red, once it has begun, ends only after this; blue's file is read already, so that it needs room alone."""
    released = threading.Event()
    running.adapters._thread.submit(released.wait)  # red's form for decode steps is not made meanwhile
    blue = running.adapters.get("blue")
    assert blue is not None
    running.adapters._reading[blue.serial] = Future()
    running.adapters._reading[blue.serial].set_result(ReadFile(blue.identity, None))
    try:
        yield
    finally:
        released.set()


def test_others_overtake_a_request_whose_adapter_has_no_room(one_adapter: Loop) -> None:
    with red_stays(one_adapter):
        red, blue = (one_adapter.ask(prompt(10), 5, model=name) for name in ("red", "blue"))
        assert len(one_adapter.ask(prompt(10), 5).result(WAIT_S)[0]) == 5
        assert not red.done() and not blue.done()
    assert len(red.result(WAIT_S)[0]) == len(blue.result(WAIT_S)[0]) == 5
    assert one_adapter.over == ["base", "red", "blue"]


def test_a_request_is_overtaken_by_so_many_and_no_more(one_adapter: Loop) -> None:
    with red_stays(one_adapter):
        others = [one_adapter.ask(prompt(10), 5, model=name) for name in ("red", "blue")]
        asked = [one_adapter.ask(prompt(10), 1) for _ in range(MOST_OVERTAKING + 20)]
        for reply in asked[:MOST_OVERTAKING]:
            reply.result(WAIT_S)
        for _ in range(20):
            one_adapter.round()
        assert one_adapter.over == ["base"] * MOST_OVERTAKING
    for reply in others + asked:
        reply.result(WAIT_S)
    assert one_adapter.over.index("red") == MOST_OVERTAKING


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


def test_what_was_read_of_an_adapter_is_kept_as_long_as_somebody_waits_for_it(one_adapter: Loop) -> None:
    reading, waiting = one_adapter.adapters._reading, one_adapter.scheduler._waiting
    with red_stays(one_adapter):
        red = one_adapter.ask(prompt(10), 5, model="red")
        one_adapter.round()
        for _ in range(2):
            one_adapter.ask(prompt(10), 5, model="blue")
        one_adapter.round()
        for left in (1, 0):
            one_adapter.scheduler.cancel(waiting[0])
            one_adapter.round()
            assert (len(waiting), len(reading)) == (left, left)
    assert len(red.result(WAIT_S)[0]) == 5


def test_a_stop_answers_those_who_wait_for_an_adapter_to_go(one_adapter: Loop) -> None:
    with one_adapter.held():
        red = one_adapter.ask(prompt(10), 240, model="red")
        gone = one_adapter.unload("red")
        one_adapter.scheduler.stop(0)
    one_adapter.ended.result(WAIT_S)
    assert "shutting down" in str(red.exception(WAIT_S))
    assert gone.result(WAIT_S) is None


def test_a_request_that_is_cancelled_gets_no_step_more(one_adapter: Loop) -> None:
    taken: list[int] = []

    def deliver(event: Event) -> None:
        assert isinstance(event, Choice)
        taken.extend(event.ids)
        if len(taken) == 5:
            one_adapter.scheduler.cancel(generation)

    sampling = Sampling(max_tokens=200, temperature=0, ignore_eos=True)
    generation = Generation(Completion("base", prompt(10), sampling, 1, None, None, False, False), deliver)
    one_adapter.scheduler.submit(generation)
    assert len(one_adapter.ask(prompt(10), 200).result(WAIT_S)[0]) == 200  # beside it, and long after
    assert len(taken) == 5 and one_adapter.scheduler._places.free == 4

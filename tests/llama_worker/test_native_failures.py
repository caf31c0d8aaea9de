"""llama.cpp that fails in the middle: the loop goes on, and only the requests that it concerns know of it."""

from __future__ import annotations

from pathlib import Path

from tests.llama_worker.in_process import loop
from tests.llama_worker.running import prompt

WAIT_S = 30


def test_a_prompt_that_cannot_be_kept_is_computed_again_by_the_one_that_shares_it(tiny_model: Path) -> None:
    shared = prompt(100)
    with loop(tiny_model) as running:
        running.context.failing.add("save")
        asked = [running.ask(shared + end, 5) for end in ([5, 6], [7, 8])]
        running.start()
        replies = [reply.result(WAIT_S) for reply in asked]
        assert running.context.failed
        running.context.failing.clear()
        assert [running.ask(shared + end, 5).result(WAIT_S) for end in ([5, 6], [7, 8])] == replies


def test_a_sequence_that_cannot_be_moved_stays_where_it_is(tiny_model: Path) -> None:
    with loop(tiny_model) as running:
        running.context.failing.add("restore")
        lengths = [120, 4, 4, 120]  # those in the middle leave a gap
        asked = [running.ask(prompt(20, salt), length) for salt, length in enumerate(lengths)]
        running.start()
        replies = [reply.result(WAIT_S) for reply in asked]
        assert running.context.failed
        assert [len(ids) for (ids,) in replies] == lengths
        running.context.failing.clear()
        # Every place is there once: four at the same time, and never a fifth.
        again = [running.ask(prompt(20, salt), length) for salt, length in enumerate(lengths * 2)]
        assert [len(reply.result(WAIT_S)[0]) for reply in again] == lengths * 2
        assert running.scheduler._places.free == 4

"""Fairness between the adapters that have work, and what a change of adapter may cost."""

from __future__ import annotations

from collections import Counter

from gateway.llama_worker.turns import CHANGE_SHARE, LONGEST_S, SHORTEST_S, Turns


def test_a_group_alone_keeps_its_turn() -> None:
    turns = Turns()
    assert [turns.next([7], now) for now in (0.0, 10.0, 20.0)] == [7, 7, 7]


def test_every_group_gets_as_many_rounds_as_the_others_and_none_waits_long() -> None:
    turns = Turns()
    groups = [0, 1, 2, 3, 4]
    rounds: Counter[int] = Counter()
    last = dict.fromkeys(groups, 0.0)
    now = 0.0
    for _ in range(5000):
        group = turns.next(groups, now)
        rounds[group] += 1
        assert now - last[group] <= len(groups) * (turns.length_s + 0.01)
        last[group] = now
        now += 0.01
    assert max(rounds.values()) - min(rounds.values()) < 50


def test_a_newcomer_waits_for_those_in_line_and_no_longer() -> None:
    turns = Turns()
    now, served = 0.0, []
    for index in range(200):
        served.append(turns.next([1, 2] if index < 20 else [1, 2, 3], now))
        now += 0.01
    assert 3 in served[20 : 20 + 2 * round(turns.length_s / 0.01) + 3]


def test_a_turn_is_as_long_as_makes_the_change_a_small_share_of_it() -> None:
    turns = Turns()
    for _ in range(50):
        turns.changed(0.006, 0.003)
    assert abs(turns.length_s - CHANGE_SHARE * 0.003) < 0.005
    for _ in range(50):
        turns.changed(0.003, 0.003)
    assert turns.length_s == SHORTEST_S
    for _ in range(50):
        turns.changed(1.0, 0.1)
    assert turns.length_s == LONGEST_S

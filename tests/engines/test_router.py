"""Where a request goes: warm before busy, busy before anything else. Pure, so many at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest

from gateway.engines.breaker import FAILURES, Breaker
from gateway.engines.router import ADAPTER_HOMES, BUSY_FACTOR, NEVER_BUSY, choose, seed_of

PROMPTS = [[number, *range(100)] for number in range(400)]


@dataclass
class Replica:
    name: str
    in_flight: int = 0
    breaker: Breaker = field(default_factory=Breaker)

    @property
    def seed(self) -> int:
        return seed_of(self.name)


def replicas(count: int, load: int = 0) -> list[Replica]:
    return [Replica(f"replica {number}", load) for number in range(count)]


def chosen(among: list[Replica], prompt: list[int], adapter: str | None = None) -> str:
    return choose(among, adapter, prompt, 0.0)[0].name


def test_the_same_beginning_goes_to_the_same_replica_and_different_ones_are_spread() -> None:
    four = replicas(4)
    homes = [chosen(four, prompt) for prompt in PROMPTS]
    assert homes == [chosen(four, [*prompt, 1, 2, 3]) for prompt in PROMPTS], "the next turn of a conversation"
    counts = Counter(homes)
    assert len(counts) == 4 and min(counts.values()) > len(PROMPTS) / 4 * 0.7


def test_a_replica_that_leaves_moves_its_own_share_alone() -> None:
    four = replicas(4)
    before = {tuple(prompt): chosen(four, prompt) for prompt in PROMPTS}
    for prompt in PROMPTS:
        if (home := before[tuple(prompt)]) != "replica 2":
            assert chosen([four[0], four[1], four[3]], prompt) == home


def test_an_adapter_lives_on_few_replicas_and_a_conversation_on_one_of_them() -> None:
    eight = replicas(8)
    everywhere = set()
    for number in range(30):
        adapter = f"ft:base:org:{number}@0123456789ab"
        homes = {chosen(eight, prompt, adapter) for prompt in PROMPTS}
        assert len(homes) == ADAPTER_HOMES
        assert chosen(eight, PROMPTS[0], adapter) == chosen(eight, PROMPTS[0], adapter)
        everywhere |= homes
    assert len(everywhere) == 8


@pytest.mark.parametrize("adapter", [None, "tuned@0123456789ab"])
def test_what_is_busy_spills(adapter: str | None) -> None:
    four = replicas(4, load=8)
    home, why = choose(four, adapter, PROMPTS[0], 0.0)
    assert why == "warm"
    home.in_flight = 12  # the mean is below 9.3, and 1.25 times that below 11.6
    second, why = choose(four, adapter, PROMPTS[0], 0.0)
    assert why == "spilled" and second is not home
    home.in_flight = second.in_flight = 14
    next(each for each in four if each.in_flight == 8).in_flight = 7
    assert choose(four, adapter, PROMPTS[0], 0.0)[0].in_flight == 7, "the least loaded"


@pytest.mark.parametrize("adapter", [None, "tuned@0123456789ab"])
def test_one_hot_prompt_leaves_no_replica_much_busier_than_the_mean(adapter: str | None) -> None:
    five = replicas(5)
    for _ in range(200):
        choose(five, adapter, PROMPTS[0], 0.0)[0].in_flight += 1
    assert max(each.in_flight for each in five) <= max(NEVER_BUSY, BUSY_FACTOR * 200 / 5) + 1
    assert min(each.in_flight for each in five) > 200 / 5 * 0.8


def test_short_prompts_go_where_least_is_under_way() -> None:
    three = replicas(3, load=5)
    three[1].in_flight = 4
    for prompt in ([1, 2, 3], ()):
        assert choose(three, None, prompt, 0.0) == (three[1], "least_loaded")


def test_one_that_rests_is_passed_over_unless_there_is_no_other() -> None:
    two = replicas(2)
    for _ in range(FAILURES):
        two[0].breaker.fail(0.0)
    assert all(choose(two, None, prompt, 0.5) == (two[1], "only") for prompt in PROMPTS)
    for _ in range(FAILURES):
        two[1].breaker.fail(0.2)
    assert choose(two, None, PROMPTS[0], 0.5) == (two[0], "last_resort"), "it has rested longest"
    assert choose(two[1:], None, PROMPTS[0], 0.5) == (two[1], "only")

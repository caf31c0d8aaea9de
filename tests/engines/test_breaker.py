"""When a replica rests, and how it comes back. The time is the test's."""

from __future__ import annotations

from gateway.engines.breaker import FAILURES, LONGEST_REST_S, Breaker, BreakerState


def broken(now: float = 100.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES):
        breaker.begin()
        breaker.fail(now)
    return breaker


def test_it_opens_after_failures_in_a_row_and_not_before() -> None:
    breaker = Breaker()
    for _ in range(10):  # each success begins the count anew
        for _ in range(FAILURES - 1):
            breaker.fail(100.0)
        assert breaker.state(100.0) is BreakerState.CLOSED and breaker.admits(100.0)
        breaker.succeed()
    assert broken().state(100.5) is BreakerState.OPEN
    assert not broken().admits(100.5)


def test_half_open_it_lets_one_request_through_whose_answer_closes_it() -> None:
    breaker = broken()
    assert breaker.state(101.0) is BreakerState.HALF_OPEN
    assert breaker.admits(101.0)
    breaker.begin()
    assert not breaker.admits(101.0), "one probe"
    breaker.succeed()
    assert breaker.state(101.0) is BreakerState.CLOSED and breaker.admits(101.0)


def test_a_probe_that_fails_doubles_the_rest_up_to_a_bound() -> None:
    breaker, now = broken(), 100.0
    rests = []
    for _ in range(8):
        rests.append(breaker.until - now)
        now = breaker.until
        breaker.begin()
        breaker.fail(now)
    assert rests == [1, 2, 4, 8, 16, LONGEST_REST_S, LONGEST_REST_S, LONGEST_REST_S]
    breaker.succeed()
    for _ in range(FAILURES):
        breaker.fail(now)
    assert breaker.until - now == 1, "a success forgets how bad it was"


def test_requests_from_before_it_opened_do_not_lengthen_its_rest() -> None:
    breaker = broken()
    for _ in range(50):
        breaker.fail(100.2)
    assert breaker.until == 101.0 and breaker.opened == 1


def test_a_probe_whose_client_left_leaves_room_for_another() -> None:
    breaker = broken()
    breaker.begin()
    breaker.forget()
    assert breaker.admits(101.0)

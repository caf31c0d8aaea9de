"""Whether the decode loop makes progress, as /health says it."""

from __future__ import annotations

import time

from gateway.llama_worker.heartbeat import Heartbeat


def test_a_loop_that_waits_for_work_is_not_silent() -> None:
    heartbeat = Heartbeat()
    time.sleep(0.02)
    assert heartbeat.silent_s() == 0
    heartbeat.asked()
    heartbeat.beat()
    heartbeat.rest()
    time.sleep(0.02)
    assert heartbeat.silent_s() == 0


def test_work_that_nobody_does_is_silence() -> None:
    heartbeat = Heartbeat()
    time.sleep(0.03)
    heartbeat.asked()
    assert heartbeat.silent_s() < 0.03  # it counts from the asking, not from the last work
    time.sleep(0.03)
    heartbeat.asked()
    assert heartbeat.silent_s() >= 0.03  # and asking again does not hide it


def test_every_round_ends_the_silence() -> None:
    heartbeat = Heartbeat()
    heartbeat.asked()
    time.sleep(0.03)
    heartbeat.beat()
    assert heartbeat.silent_s() < 0.03

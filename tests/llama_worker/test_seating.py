"""Which sequence ids a group gets: neighbours are decoded in one pass, gaps cost one more."""

from __future__ import annotations

import random

from gateway.llama_worker.seating import WORTH_MOVING, Seating


def test_one_group_sits_without_a_gap() -> None:
    seating = Seating(8)
    for _ in range(8):
        seating.take(0)
    assert seating.parts(0) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert seating.free == 0


def test_four_groups_that_come_in_turn_sit_apart_from_each_other() -> None:
    seating = Seating(8)
    for _ in range(2):
        for group in (1, 2, 3, 4):
            seating.take(group)
    assert all(len(seating.parts(group)) == 1 for group in (1, 2, 3, 4))


def test_a_newcomer_takes_the_gap() -> None:
    seating = Seating(8)
    seats = [seating.take(0) for _ in range(6)]
    seating.leave(seats[2])
    assert seating.take(0) == seats[2]


def test_a_torn_group_is_closed_by_moving_its_smallest_part() -> None:
    seating = Seating(8)
    for _ in range(5):
        seating.take(0)
    seating.leave(3)
    assert seating.parts(0) == [[0, 1, 2], [4]]
    assert seating.move(0) == (4, 3)
    assert seating.parts(0) == [[0, 1, 2, 3]]
    assert seating.move(0) is None


def test_large_parts_are_left_where_they_are() -> None:
    seating = Seating(2 * WORTH_MOVING + 3)
    for _ in range(seating.count):
        seating.take(0)
    seating.leave(WORTH_MOVING + 1)
    assert seating.move(0) is None


def test_seats_stay_one_a_member_whatever_happens() -> None:
    random_order = random.Random(1)
    seating = Seating(16)
    sitting: list[tuple[int, int]] = []
    for _ in range(3000):
        if sitting and (seating.free == 0 or random_order.random() < 0.5):
            _, seat = sitting.pop(random_order.randrange(len(sitting)))
            seating.leave(seat)
        else:
            group = random_order.randrange(4)
            sitting.append((group, seating.take(group)))
        for group in range(4):
            move = seating.move(group)
            if move is not None:
                sitting[sitting.index((group, move[0]))] = (group, move[1])
            assert [seat for run in seating.parts(group) for seat in run] == sorted(s for g, s in sitting if g == group)
        assert seating.free == 16 - len(sitting)

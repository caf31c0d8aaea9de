"""Whether a replica is asked, by how it answered before. Pure: the time is handed in. One object a replica.

                3 failures in a row              1 s, 2 s, … 30 s
    CLOSED ───────────────────────────▶ OPEN ────────────────────▶ HALF_OPEN
      ▲                                  ▲                           │   │
      │                                  └───── the probe failed ────┘   │
      └──────────────────────── the probe was answered ──────────────────┘

Its rule: it only ever turns requests elsewhere. Half open it lets one through, the probe; where no other replica can be asked,
the router asks this one all the same, since an error from it is no worse than one made up here.
"""

from __future__ import annotations

import enum

FAILURES = 3  # in a row
FIRST_REST_S, LONGEST_REST_S = 1.0, 30.0


class BreakerState(enum.Enum):
    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


class Breaker:
    """`begin` before each request, and after it just one of `succeed`, `fail`, or `forget` when it showed neither."""

    __slots__ = ("closed", "failures", "opened", "probing", "rest_s", "until")

    def __init__(self) -> None:
        self.closed = True
        self.failures = 0  # in a row
        self.opened = 0  # times that it opened, ever
        self.probing = False
        self.rest_s = FIRST_REST_S  # of the next time that it opens
        self.until = 0.0

    def state(self, now: float) -> BreakerState:
        if self.closed:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self.until else BreakerState.HALF_OPEN

    def admits(self, now: float) -> bool:
        """Whether one more request may be sent."""
        return self.closed or (now >= self.until and not self.probing)

    def begin(self) -> None:
        """A request is sent; where it is not closed, that is the probe."""
        if not self.closed:
            self.probing = True

    def succeed(self) -> None:
        """It was answered."""
        if self.failures or not self.closed:
            self.closed, self.probing, self.failures, self.rest_s = True, False, 0, FIRST_REST_S

    def fail(self, now: float) -> None:
        """It was not answered, or not as an engine that is well does."""
        self.failures += 1
        if not self.closed or self.failures >= FAILURES:
            if self.closed or self.probing:  # late failures of requests from before it opened do not lengthen its rest
                self.opened += 1
                self.until = now + self.rest_s
                self.rest_s = min(2 * self.rest_s, LONGEST_REST_S)
            self.closed = self.probing = False

    def forget(self) -> None:
        """The request ended before it showed anything: the client left."""
        self.probing = False

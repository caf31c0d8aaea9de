"""Requests and tokens a minute, by key. In memory: a restart fills every allowance.

Its one rule: a request that was let in is never cut short. Its prompt must fit into what is left; what its reply takes
beyond is owed, and paid before the next request is let in.
"""

from __future__ import annotations

import math
import time
from typing import Self

from gateway.access import Limits
from gateway.errors import RateLimited

MINUTE_S = 60.0
Headers = list[tuple[bytes, bytes]]


class Bucket:
    """What is left of one key's allowance; each part refills evenly over a minute."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self._requests = None if requests_per_minute is None else _Level(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else _Level(tokens_per_minute)

    @classmethod
    def of(cls, limits: Limits) -> Self | None:
        """None where nothing is limited by the minute."""
        if limits.requests_per_minute is None and limits.tokens_per_minute is None:
            return None
        return cls(limits.requests_per_minute, limits.tokens_per_minute)

    def take_request(self) -> None:
        """Lets one request in. Raises RateLimited."""
        if self._tokens is not None and self._tokens.left() <= 0:
            raise _refusal("tokens", self._tokens, 1)
        if self._requests is not None and not self._requests.take(1):
            raise _refusal("requests", self._requests, 1)

    def take_tokens(self, count: int) -> None:
        """Takes a prompt's tokens. Raises RateLimited where they are more than what is left."""
        if self._tokens is None or self._tokens.take(count):
            return
        if count > self._tokens.limit:
            raise RateLimited(
                f"Request too large: its prompt has {count} tokens, and this key has {self._tokens.limit} a minute. "
                "Shorten it.",
                code="request_too_large",
            )
        raise _refusal("tokens", self._tokens, count)

    def owe_tokens(self, count: int) -> None:
        """Takes what a reply came to, also beyond what is left."""
        if self._tokens is not None:
            self._tokens.owe(count)

    def headers(self) -> Headers:
        """OpenAI's x-ratelimit-…, as things stand."""
        found: Headers = []
        for name, level in ((b"requests", self._requests), (b"tokens", self._tokens)):
            if level is not None:
                left = level.left()
                found.append((b"x-ratelimit-limit-" + name, b"%d" % level.limit))
                found.append((b"x-ratelimit-remaining-" + name, b"%d" % max(0, int(left))))
                found.append((b"x-ratelimit-reset-" + name, duration(level.wait_s(level.limit)).encode()))
        return found


class _Level:
    """A level that rises to `limit` at `limit` a minute."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = time.monotonic()

    def left(self) -> float:
        now = time.monotonic()
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / MINUTE_S)
        self._at = now
        return self._level

    def take(self, count: int) -> bool:
        if self.left() < count:
            return False
        self._level -= count
        return True

    def owe(self, count: int) -> None:
        self._level = self.left() - count

    def wait_s(self, count: int) -> float:
        """Until `count` are there."""
        return max(0.0, (count - self.left()) * MINUTE_S / self.limit)


def duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _refusal(what: str, level: _Level, count: int) -> RateLimited:
    wait_s = max(1, math.ceil(level.wait_s(count)))
    return RateLimited(
        f"Rate limit reached for this key on {what} per minute: limit {level.limit}, left {max(0, int(level.left()))}, "
        f"requested {count}. Please try again in {duration(wait_s)}.",
        retry_after_s=wait_s,
    )

"""Waiting out an engine that is busy or on its way, for work that nobody waits for at the other end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from gateway.errors import EngineUnavailable, RateLimited

T = TypeVar("T")

PATIENCE_S = 600.0


async def ask_patiently(ask: Callable[[], Awaitable[T]], patience_s: float = PATIENCE_S) -> T:
    """What `ask` gives, asked again for so long. Raises what it raised last; at once what waiting does not mend."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return await ask()
        except (RateLimited, EngineUnavailable) as error:
            pause_s = error.retry_after_s or 1
            if error.code == "request_too_large" or time.monotonic() + pause_s > deadline:
                raise
            await asyncio.sleep(pause_s)

"""SIGHUP: the settings are read again, or, where a terminal was closed, the server ends as any program does then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

logger = logging.getLogger("tunegate")


@contextlib.asynccontextmanager
async def hangups(reload: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Calls `reload` at each SIGHUP while this is open, one after another. On the main thread; elsewhere, never."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    had_terminal = _has_terminal()

    def on_hangup() -> None:
        if had_terminal and not _has_terminal():
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            asked.set()

    async def serve() -> None:
        while True:
            await asked.wait()
            asked.clear()
            try:
                await reload()
            except Exception:  # whatever it is, the server goes on with what it has
                logger.exception("The settings were not taken")

    serving = asyncio.create_task(serve(), name="SIGHUP")
    with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGHUP)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def _has_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()

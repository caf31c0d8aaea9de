"""What was asked of which model, by whom: counted in memory, written to the store every second.

Its one rule: what was counted is written once. A write that fails leaves its counts where they are, for the next; a power cut
may lose the last FLUSH_S.
"""

from __future__ import annotations

import asyncio
import logging
import time

from gateway.access import Caller
from gateway.errors import StoreUnavailable
from gateway.store.database import Store
from gateway.store.metering import Count, Kind, Slot, add_counts

logger = logging.getLogger("tunegate.usage")

FLUSH_S = 1.0
MINUTE_S = 60


class Meter:
    """`add` from the loop, for every reply that ended; `await run(store)` beside it."""

    def __init__(self) -> None:
        self._counts: dict[Slot, Count] = {}
        self.totals: dict[tuple[str, Kind], Count] = {}  # since the start, by model and kind

    def add(
        self, caller: Caller, model: str, kind: Kind, prompt_tokens: int, completion_tokens: int, cached_tokens: int
    ) -> None:
        """One reply, also one that was cut short: with what it came to."""
        minute = int(time.time()) // MINUTE_S * MINUTE_S
        slot = Slot(minute, caller.project_id, caller.key_id or "", model, kind, caller.is_batch)
        one = Count(1, prompt_tokens, completion_tokens, cached_tokens)
        self._counts.setdefault(slot, Count()).add(one)
        self.totals.setdefault((model, kind), Count()).add(one)

    async def run(self, store: Store) -> None:
        """Writes what was counted every second, for ever."""
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush(store)
            except StoreUnavailable as error:
                logger.warning("usage waits to be written: %s", error.message)

    async def flush(self, store: Store) -> None:
        """Writes what was counted. Raises StoreUnavailable, and has lost nothing then."""
        if not self._counts:
            return
        taken, self._counts = self._counts, {}
        try:
            await asyncio.shield(store.write(lambda connection: add_counts(connection, taken)))
        except StoreUnavailable:
            for slot, count in taken.items():
                if (newer := self._counts.get(slot)) is not None:
                    count.add(newer)
                self._counts[slot] = count
            raise

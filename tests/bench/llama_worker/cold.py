"""An adapter that is registered and not in memory: how long its first token takes, beside one that is."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.llama_worker.rows import PLAIN_PROMPT, stream
from tests.bench.llama_worker.servers import Ask, Ours, Setting, encode

IN_MEMORY = 16
FACTOR = 1.5


@dataclass(frozen=True)
class ColdStart:
    """Medians, in seconds."""

    registered: int
    load_s: float  # the load request of an adapter, which reads the file once
    warm_s: float  # to the first token
    cold_s: float

    @property
    def holds(self) -> bool:
        """Whether a cold adapter answers within 1.5 times a warm one's time and its load."""
        return self.cold_s <= FACTOR * self.warm_s + self.load_s

    def __str__(self) -> str:
        figures = f"load {1e3 * self.load_s:.0f} ms, warm {1e3 * self.warm_s:.0f} ms, cold {1e3 * self.cold_s:.0f} ms"
        verdict = "holds" if self.holds else f"does not hold: over {FACTOR} × warm + load"
        return f"{self.registered} adapters registered, {IN_MEMORY} in memory, first token: {figures} ({verdict})"


def measure(setting: Setting, folder: Path, registered: int, rounds: int, vocab_size: int) -> ColdStart:
    """Registers so many names over the setting's adapter files and asks for some that are in memory and some that are not."""
    order = random.Random(rounds)
    with Ours(setting, folder, IN_MEMORY) as server:
        loads = []
        for index in range(len(setting.adapters), registered):
            started = time.perf_counter()
            path = setting.adapters[index % len(setting.adapters)]
            server.worker.load(f"adapter-{index}", path.parent).raise_for_status()
            loads.append(time.perf_counter() - started)
        cold: list[float] = []
        warm: list[float] = []
        for index in order.sample(range(registered - IN_MEMORY), max(5, rounds)):
            for times in (cold, warm):
                prompt = [1, *(order.randrange(300, vocab_size) for _ in range(PLAIN_PROMPT))]
                request = encode(server, Ask(prompt, index, 2))
                started = time.perf_counter()
                first, _ = asyncio.run(stream(server, request))
                times.append(first - started)
    return ColdStart(registered, statistics.median(loads), statistics.median(warm), statistics.median(cold))

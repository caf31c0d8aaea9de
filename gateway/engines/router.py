"""Which of a model's replicas answers a request. Pure, and microseconds: every request passes here, between two awaits.

Its rule: where the work is warm, unless that is busy. What a replica has computed before (the adapter in its memory, the
beginning of the prompt in its cache) is worth most of a first token's time, so the same work goes to the same replica, found by
rendezvous hashing: every gateway comes to the same one, and one replica more or less moves only its own share. A replica is
busy at 1.25 times the mean (Mirrokni, Thorup, Zadimoghaddam: Consistent hashing with bounded loads); then the one with the
least under way is asked, which is also where work goes that is warm nowhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar

from gateway.engines.breaker import Breaker

Why = Literal["only", "warm", "spilled", "least_loaded", "last_resort"]
REASONS: tuple[Why, ...] = ("only", "warm", "spilled", "least_loaded", "last_resort")

BUSY_FACTOR = 1.25
NEVER_BUSY = 2  # so many requests at once cost an engine little beside a cold prompt
ADAPTER_HOMES = 2  # replicas that an adapter is kept warm on, as long as these are not busy
BLOCK_TOKENS = (
    64  # of a prompt's beginning: long enough to tell system texts apart, short enough to be the same at the next turn
)
SHORTEST_BLOCK_TOKENS = 16  # what vLLM caches at once; of a shorter prompt nothing is warm anywhere
_MASK = (1 << 64) - 1


class Candidate(Protocol):
    """What the choice depends on."""

    @property
    def seed(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def breaker(self) -> Breaker: ...


C = TypeVar("C", bound=Candidate)


def choose(candidates: Sequence[C], adapter: str | None, prompt: Sequence[int], now: float) -> tuple[C, Why]:
    """One of `candidates`, which are ready and serve the model, and why that one. There must be at least one.

    `adapter` is a tuned model's name at the engine, `prompt` the prompt's ids (empty where nothing of it can be warm).
    """
    if len(candidates) == 1:
        return candidates[0], "only"
    admitted = [candidate for candidate in candidates if candidate.breaker.admits(now)]
    if not admitted:
        return min(candidates, key=_rested_longest), "last_resort"
    if len(admitted) == 1:
        return admitted[0], "only"
    block = hash(tuple(prompt[:BLOCK_TOKENS])) if len(prompt) >= SHORTEST_BLOCK_TOKENS else 0  # no seed in integers
    if adapter is not None:
        homes = _ranked(zlib.crc32(adapter.encode()), admitted)[:ADAPTER_HOMES]
        if block:
            homes = _ranked(block, homes)
    elif block:
        homes = _ranked(block, admitted)[:1]
    else:
        return min(admitted, key=_load), "least_loaded"
    under_way = 1  # with this one
    for candidate in admitted:
        under_way += candidate.in_flight
    busy = max(NEVER_BUSY, BUSY_FACTOR * under_way / len(admitted))
    if homes[0].in_flight < busy:
        return homes[0], "warm"
    for home in homes[1:]:
        if home.in_flight < busy:
            return home, "spilled"
    return min(admitted, key=_load), "spilled"


def seed_of(name: str) -> int:
    """A replica's own number for hashing, from its name."""
    return _mix(zlib.crc32(name.encode()))


def prompt_of(body: dict[str, Any]) -> Sequence[int]:
    """The prompt's ids in a body of the dialect; empty where there is none (embeddings)."""
    prompt = body.get("prompt")
    return prompt if isinstance(prompt, list) else ()


def _ranked(key: int, candidates: Sequence[C]) -> list[C]:
    """The candidates in the order that is a key's own, whoever else there is."""
    ranked = sorted([(_mix(key ^ candidate.seed), number) for number, candidate in enumerate(candidates)], reverse=True)
    return [candidates[number] for _, number in ranked]


def _mix(value: int) -> int:
    """64 bits, each depending on all of the value's (the finalizer of splitmix64)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _load(candidate: Candidate) -> int:
    return candidate.in_flight


def _rested_longest(candidate: Candidate) -> float:
    return candidate.breaker.until

"""A request on its way through the decode loop, and the events that it sends back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.errors import TunegateError
from gateway.llama_worker.adapters import Registered
from gateway.llama_worker.sampling import Sampler
from gateway.llama_worker.scoring import Score
from gateway.llama_worker.wire import Choice, Completion


@dataclass(eq=False)
class Generation:
    """A request on its way through the loop. `deliver` is called on the HTTP thread with each event."""

    request: Completion
    deliver: Callable[[Event], None]
    adapter: Registered | None = None  # None: the base
    borders: list[bytes] = field(default_factory=list)  # of its prompt: see prefix_cache
    places: list[int] = field(default_factory=list)  # sequence ids, one a choice
    sequences: list[Sequence] = field(default_factory=list)  # those still running
    computed: int = 0  # prompt positions in the KV
    overtaken: int = 0  # by so many requests, while its adapter could not be had
    cached: int = 0  # of them, those that were not computed for this request
    prompt_scores: list[Score] = field(default_factory=list)
    over: bool = False

    @property
    def group(self) -> int:
        """What it shares steps with: the serial of its adapter, 0 for the base."""
        return self.adapter.serial if self.adapter else 0


@dataclass(frozen=True)
class Finished:
    """Every choice has ended; `prompt_scores` when they were asked for; `cached` of the prompt's tokens were there before."""

    prompt_scores: list[Score] | None
    cached: int


Event = Choice | Finished | TunegateError


@dataclass(eq=False)
class Sequence:
    """One running choice of a generation."""

    generation: Generation
    index: int
    place: int
    sampler: Sampler
    position: int  # of the next token to be decoded
    last_id: int
    generated: int = 0

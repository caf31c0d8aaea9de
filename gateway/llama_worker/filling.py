"""Prompts on their way into the KV, a chunk at a time. On the decode loop's thread.

Its rules:
- a chunk ends at a multiple of PROMPT_CHUNK or where the prompt ends, whatever the load and the cache; it starts there too,
  or at a border of the cache (a multiple of PAGE), where it has the same rows in the same kernels;
- a prompt that shares more with one that is being computed than with what is saved waits for it: it is computed once;
- what is saved has only what prompt chunks computed, whole pages of it, so a cancelled prompt leaves a valid beginning.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator

from gateway.llama_worker.decoder import Decoder
from gateway.llama_worker.generation import Generation
from gateway.llama_worker.metrics import Metrics
from gateway.llama_worker.native import Floats, NativeError
from gateway.llama_worker.places import Places
from gateway.llama_worker.prefix_cache import PAGE, Owner, PrefixCache, borders, shared
from gateway.llama_worker.scoring import score_rows

log = logging.getLogger(__name__)

PROMPT_CHUNK = 64
# The matrix kernels have other code for very few rows, so a chunk that starts after the cache has at least so many.
FEWEST_ROWS = 8


class Filling:
    """Prompts with a place that are not computed yet, first come, first served within an adapter."""

    def __init__(self, decoder: Decoder, places: Places, cache: PrefixCache, metrics: Metrics) -> None:
        self._decoder = decoder
        self._places = places
        self._cache = cache
        self._metrics = metrics
        self._line: deque[Generation] = deque()
        self.current: Generation | None = None  # the prompt of the last chunk

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Generation]:
        return iter(self._line)

    def __contains__(self, generation: Generation) -> bool:
        return generation in self._line

    def waiting(self, group: int) -> int:
        """How many prompts of `group` are in line."""
        return sum(generation.group == group for generation in self._line)

    def add(self, generation: Generation) -> None:
        """Takes a request that has its places."""
        request = generation.request
        if self._cache.enabled:
            generation.borders = borders(Owner(generation.group, request.cache_salt), request.prompt_ids)
        self._line.append(generation)

    def remove(self, generation: Generation, keep: bool) -> None:
        """Drops a prompt; with `keep`, the whole pages of it that were computed are saved."""
        self._line.remove(generation)
        if keep:
            self.save(generation)

    def compute_chunk(self, group: int) -> tuple[Generation, Floats] | None:
        """Computes one chunk of one prompt of `group`; that prompt and the logits after it, if it is complete now.

        NativeError leaves the prompt in line; it is `current` then.
        """
        generation = self._next(group)
        if generation is None:
            return None
        self.current = generation
        request = generation.request
        start = generation.computed
        ids = request.prompt_ids[start : start - start % PROMPT_CHUNK + PROMPT_CHUNK]
        end = start + len(ids)
        last = end == len(request.prompt_ids)
        scored = request.prompt_logprobs is not None
        logits = self._decoder.prompt(generation, ids, [scored] * (len(ids) - 1) + [scored or last])
        generation.computed = end
        self._metrics.prompt_tokens.inc(len(ids))
        if scored:
            following = request.prompt_ids[start + 1 : end + 1]
            generation.prompt_scores += score_rows(logits[: len(following)], following, request.prompt_logprobs or 0)
        if not last:
            return None
        self._line.remove(generation)
        self.save(generation)
        return generation, logits[-1]

    def save(self, generation: Generation) -> None:
        """Keeps what was computed of a prompt, if it is worth it. Nothing must have been decoded after it."""
        pages = generation.borders[: generation.computed // PAGE]
        if self._cache.wants(pages, generation.cached // PAGE):
            try:
                self._cache.add(self._places.save(generation.places[0]), pages)
            except NativeError as error:
                log.warning("a prompt was not kept: %s", error)
        self._metrics.cache_bytes.set(self._cache.used_bytes)
        self._metrics.cache_entries.set(len(self._cache))

    def _next(self, group: int) -> Generation | None:
        for generation in self._line:
            if generation.group == group and (generation.computed or self._begin(generation)):
                return generation
        return None

    def _begin(self, generation: Generation) -> bool:
        """Restores what is known of a prompt; False when it should wait for one before it in line."""
        if generation.request.prompt_logprobs is not None:
            return True  # every position's logits are wanted, so every position is computed
        pages = _usable(generation)
        saved, known = self._cache.longest(pages)
        if self._shared_ahead(generation, pages) > known:
            return False  # it is saved when it is complete
        known = _leave_rows(known, generation)
        if saved is not None and known:
            try:
                self._places.fill(generation.places[0], saved.blob, known * PAGE)
            except NativeError as error:
                log.warning("a saved prompt was not used: %s", error)
                return True
            generation.computed = generation.cached = known * PAGE
            self._metrics.cached_tokens.inc(generation.cached)
        return True

    def _shared_ahead(self, generation: Generation, pages: list[bytes]) -> int:
        """How many of its pages a prompt before `generation` in line shares, at most."""
        before = itertools.takewhile(lambda other: other is not generation, self._line)
        return max((shared(pages, other.borders) for other in before), default=0)


def _usable(generation: Generation) -> list[bytes]:
    """The borders before the last token, which is always computed: its logits choose the first token."""
    return generation.borders[: (len(generation.request.prompt_ids) - 1) // PAGE]


def _leave_rows(pages: int, generation: Generation) -> int:
    """`pages`, or fewer where a chunk of too few rows would follow that there would not be without the cache."""
    length = len(generation.request.prompt_ids)
    while pages and (pages * PAGE) % PROMPT_CHUNK and length - pages * PAGE < FEWEST_ROWS:
        pages -= 1
    return pages

"""Prompts that were computed before, so that a shared beginning is computed once. On the decode loop's thread.

A prompt's borders lie at multiples of PAGE. Each has a digest of everything before it: whose KV it is (`Owner`: the adapter
as it was loaded, and the project's `cache_salt`) and all ids. Two prompts share a border only if its digests are equal, so
KV of one adapter or project can never be handed to another. What is kept is the KV of a prompt as llama.cpp writes it
out, in ordinary memory, and only what prompt chunks computed: a token that was decoded alone has other rounding.

Its rule: entries are whole, and the least recently used go first when `budget_bytes` is reached.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Blob = npt.NDArray[np.uint8]

# Prompt chunks start at multiples of it, so a token has the same place in the 16-row tiles of the matrix kernels whether
# what is before it was computed or restored.
PAGE = 16
# A prompt is kept when at least this share of it is new: the rest of it is kept already, with another ending.
NEW_SHARE = 8


@dataclass(frozen=True)
class Owner:
    """Whose KV it is. `serial` tells two adapters apart that had the same name one after the other; 0 is the base."""

    serial: int
    salt: str


@dataclass(eq=False)
class Saved:
    """The KV of the first `len(borders) * PAGE` positions of a prompt, or of some more."""

    blob: Blob
    borders: list[bytes]


class PrefixCache:
    """Saved prompts by the digests of their borders."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._saved: OrderedDict[int, Saved] = OrderedDict()  # by identity, the least recently used first
        self._holders: dict[bytes, list[Saved]] = {}
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._saved)

    @property
    def enabled(self) -> bool:
        """Whether anything can be kept."""
        return self._budget_bytes > 0

    def longest(self, borders: Sequence[bytes]) -> tuple[Saved | None, int]:
        """The entry that shares most of `borders`, and how many of them; (None, 0) when none does."""
        for count in range(len(borders), 0, -1):
            holders = self._holders.get(borders[count - 1])
            if holders:
                saved = holders[-1]
                self._saved.move_to_end(id(saved))
                return saved, count
        return None, 0

    def wants(self, borders: Sequence[bytes], known: int) -> bool:
        """Whether a prompt with `borders`, `known` of which are here already, is worth keeping."""
        return self.enabled and (len(borders) - known) * NEW_SHARE >= max(1, len(borders))

    def add(self, blob: Blob, borders: list[bytes]) -> None:
        """Keeps a prompt; what it extends is dropped, then the least recently used until the budget holds."""
        if not borders or blob.nbytes > self._budget_bytes or borders[-1] in self._holders:
            return
        for digest in borders[:-1]:
            for saved in list(self._holders.get(digest, ())):
                if saved.borders[-1] == digest:
                    self._drop(saved)
        saved = Saved(blob, borders)
        self._saved[id(saved)] = saved
        self.used_bytes += blob.nbytes
        for digest in borders:
            self._holders.setdefault(digest, []).append(saved)
        while self.used_bytes > self._budget_bytes:
            self._drop(next(iter(self._saved.values())))

    def clear(self) -> None:
        """Forgets everything."""
        for saved in list(self._saved.values()):
            self._drop(saved)

    def _drop(self, saved: Saved) -> None:
        del self._saved[id(saved)]
        self.used_bytes -= saved.blob.nbytes
        for digest in saved.borders:
            holders = self._holders[digest]
            holders.remove(saved)
            if not holders:
                del self._holders[digest]


def borders(owner: Owner, ids: Sequence[int]) -> list[bytes]:
    """The digest of every border of a prompt: after PAGE ids, after two times PAGE, …"""
    root = f"{owner.serial}\0{owner.salt}".encode()
    digest = hashlib.blake2b(root, digest_size=16).digest()
    packed = np.asarray(ids, dtype=np.int32).tobytes()
    width = 4 * PAGE
    found = []
    for start in range(0, len(packed) - width + 1, width):
        digest = hashlib.blake2b(digest + packed[start : start + width], digest_size=16).digest()
        found.append(digest)
    return found


def shared(some: Sequence[bytes], others: Sequence[bytes]) -> int:
    """How many borders two prompts share."""
    low, high = 0, min(len(some), len(others))
    while low < high:  # a digest names everything before it: equal ones come first, then none
        middle = (low + high + 1) // 2
        if some[middle - 1] == others[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low

"""Ids of texts that other texts began with: a chat's next turn is tokenised from where its last one ended.

A text may be cut right after a control token, since tokenizers cut there too: what follows is tokenised the same, whatever came
before. `tokenizer` cuts; this only remembers. Its rule: bounded by characters held, the least recently used goes first.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict

_HELD_CHARACTERS = 8_000_000  # of text; the ids take about as much memory again


class Prefixes:
    """Remembers the ids of beginnings. Any thread may use it."""

    def __init__(self, held_characters: int = _HELD_CHARACTERS) -> None:
        self._limit = held_characters
        self._held: OrderedDict[str, array[int]] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def longest(self, text: str, borders: list[int]) -> tuple[int, list[int]]:
        """(where it ends, its ids) of the longest beginning of `text` that is known and ends at a border; (0, []) if none."""
        with self._lock:
            for border in reversed(borders):
                found = self._held.get(text[:border])
                if found is not None:
                    self._held.move_to_end(text[:border])
                    return border, found.tolist()
        return 0, []

    def keep(self, text: str, ids: list[int]) -> None:
        """Remembers the ids of a text that ends right after a control token."""
        if len(text) > self._limit:
            return
        with self._lock:
            if text not in self._held:
                self._characters += len(text)
            self._held[text] = array("i", ids)
            self._held.move_to_end(text)
            while self._characters > self._limit:
                self._characters -= len(self._held.popitem(last=False)[0])

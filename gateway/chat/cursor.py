"""Text as it comes, read once from left to right by generators that yield where they need more of it.

Place in the flow: parse → calls → **cursor**. One rule: what a reader decides depends on the characters alone, never on how
they were split, and none is looked at again but the few that may begin a marker.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

Result = TypeVar("Result")
Waiting = Generator[None, None, Result]  # `yield`: more text, please, or the end
Take = Callable[[str], None]

# Control tokens stand in the text as lone surrogates, which no UTF-8 decodes to.
FIRST_CONTROL = 0xD800
_CONTROLS = "\ud800-\udfff"
_IN_STRING = re.compile('["\\\\]')
_IN_BRACKETS = re.compile(f'["{{}}\\[\\]<{_CONTROLS}]')
_SCALAR_END = re.compile(f'["{{}}\\[\\],:;\\s<{_CONTROLS}]')
_IN_CODE = re.compile(f"[\"'()\\[\\]{{}},{_CONTROLS}]")
_IN_QUOTES = {quote: re.compile(f"[{quote}\\\\]") for quote in "\"'"}
_SPACE, _NEWLINES = re.compile(r"\s*"), re.compile("\n*")
_WORD = re.compile(r"[^\W\d]\w*")
_WORD_LIMIT = 256


class Cursor:
    """`held` is what was read and not yet given away: text again, should it turn out to be no call."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.ended = False
        self._text = ""
        self._at = 0

    def add(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    @property
    def waiting(self) -> int:
        """How many characters wait to be looked at again: never more than a marker or a word."""
        return len(self._text) - self._at

    def rest(self) -> str:
        """All that has come and was not read."""
        return self._take(len(self._text), lambda _: None)

    def hold(self, piece: str) -> None:
        self.held.append(piece)

    def char(self) -> Waiting[str]:
        """The next character, not taken; "" at the end."""
        while self._at >= len(self._text):
            if self.ended:
                return ""
            yield
        return self._text[self._at]

    def literal(self, *options: str) -> Waiting[str]:
        """The longest option that the text goes on with, held; "" where it goes on with none."""
        longest = max(map(len, options), default=0)
        while True:
            rest = self._text[self._at : self._at + longest]
            if not self.ended and any(len(o) > len(rest) and o.startswith(rest) for o in options):
                yield
                continue
            found = max((option for option in options if rest.startswith(option)), key=len, default="")
            if found:
                self._take(self._at + len(found), self.hold)
            return found

    def space(self) -> Waiting[None]:
        """Holds the white space that comes."""
        yield from self._run(_SPACE)

    def newlines(self) -> Waiting[None]:
        yield from self._run(_NEWLINES)

    def word(self) -> Waiting[str]:
        """An identifier, held; "" where there is none, or one beyond all bounds."""
        while True:
            found = _WORD.match(self._text, self._at)
            end = found.end() if found else self._at
            if end - self._at > _WORD_LIMIT or (found is None and self._at < len(self._text)):
                return ""
            if end < len(self._text) or self.ended:
                return self._take(end, self.hold)
            yield

    def until(self, markers: Sequence[str], take: Take) -> Waiting[str]:
        """Gives what comes before the first marker to `take`; the marker is held and returned, "" at the end."""
        pattern = re.compile("|".join(map(re.escape, markers)) or "(?!)")
        while True:
            found = pattern.search(self._text, self._at)
            if found:
                self._take(found.start(), take)
                return self._take(found.end(), self.hold)
            keep = 0 if self.ended else max((_overlap(self._text, self._at, marker) for marker in markers), default=0)
            self._take(len(self._text) - keep, take)
            if self.ended:
                return ""
            yield

    def value(self, take: Take) -> Waiting[bool]:
        """Gives one JSON value to `take` as it comes, told by quotes and brackets; False where it breaks off.

        A marker ends it, but not within a string: a model may be asked to write just that.
        """
        depth, in_string, begun = 0, False, False
        while True:
            pattern = _IN_STRING if in_string else _IN_BRACKETS if depth else _SCALAR_END
            found = pattern.search(self._text, self._at)
            begun |= bool(self._take(found.start() if found else len(self._text), take))
            if found is None:
                if self.ended:
                    return begun and not depth and not in_string
                yield
                continue
            char = found[0]
            if in_string:
                if char == "\\":
                    if not (yield from self._escape(take)):
                        return False
                else:
                    self._take(found.end(), take)
                    in_string = False
                    if not depth:
                        return True
            elif not depth and begun:
                return True
            elif char == '"':
                in_string = begun = bool(self._take(found.end(), take))
            elif char in "{[":
                begun = bool(self._take(found.end(), take))
                depth += 1
            elif char in "}]" and depth:
                self._take(found.end(), take)
                depth -= 1
                if not depth:
                    return True
            else:
                return False

    def code(self, take: Take) -> Waiting[bool]:
        """Gives a Python literal to `take`, up to the "," or ")" behind it; False where there is neither."""
        depth, quote = 0, ""
        while True:
            found = (_IN_QUOTES[quote] if quote else _IN_CODE).search(self._text, self._at)
            self._take(found.start() if found else len(self._text), take)
            if found is None:
                if self.ended:
                    return False
                yield
                continue
            char = found[0]
            if char == "\\":
                if not (yield from self._escape(take)):
                    return False
                continue
            if not depth and not quote and char in ",)":
                return True
            if char not in "\"'()[]{}," or (char in "]}" and not quote and not depth):
                return False
            self._take(found.end(), take)
            if quote:
                quote = ""
            elif char in "\"'":
                quote = char
            elif char != ",":
                depth += 1 if char in "([{" else -1

    def _escape(self, take: Take) -> Waiting[bool]:
        """A backslash and what it escapes."""
        while len(self._text) - self._at < 2:
            if self.ended:
                return False
            yield
        self._take(self._at + 2, take)
        return True

    def _run(self, pattern: re.Pattern[str]) -> Waiting[None]:
        while True:
            found = pattern.match(self._text, self._at)
            if found:
                self._take(found.end(), self.hold)
            if self._at < len(self._text) or self.ended:
                return
            yield

    def _take(self, end: int, take: Take) -> str:
        piece = self._text[self._at : end]
        self._at = end
        if piece:
            take(piece)
        return piece


def _overlap(text: str, start: int, marker: str) -> int:
    """How many last characters of text[start:] may begin the marker."""
    for size in range(min(len(marker) - 1, len(text) - start), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0

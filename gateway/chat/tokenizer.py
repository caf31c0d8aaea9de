"""Text → ids and ids → text over a model's `tokenizer.json`, with control tokens kept apart from the same characters."""

from __future__ import annotations

import codecs
import json
import re
from functools import cached_property
from typing import Any

import tokenizers

# Noncharacters: they stand around control-token names inside a message while a template writes its text around them.
MARK_START, MARK_END = "\ufdd0", "\ufdd1"
_utf8_decoder = codecs.getincrementaldecoder("utf-8")
_MARKED = re.compile(f"{MARK_START}(.*?){MARK_END}", re.DOTALL)


class Tokenizer:
    """A `tokenizer.json`. Safe to share between threads: nothing changes after construction but a cache of constants."""

    def __init__(self, content: bytes) -> None:
        """`content` is the file's bytes. Raises ValueError when it is not a tokenizer."""
        try:
            self._json = json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        special = [token for token in self._json.get("added_tokens", []) if token.get("special")]
        self.control_ids: dict[str, int] = {token["content"]: token["id"] for token in special}
        self.control_id_set = frozenset(self.control_ids.values())
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._is_byte_level = _reads_byte_level(self._json.get("decoder"))
        self._bytes: dict[int, bytes] = {}  # filled as tokens are met
        self.prefix_ids: list[int] = self._tokenizer.encode("", add_special_tokens=True).ids

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def first_control(self, text: str) -> str | None:
        """The first control token named in `text`."""
        found = self._control.search(text)
        return found[0] if found else None

    def mark(self, text: str) -> str:
        """`text` with marks around each control token's name in it, so that `encode` takes those as characters."""
        if not self._control.search(text):
            return text
        text = text.replace(MARK_START, "").replace(MARK_END, "")
        return self._control.sub(f"{MARK_START}\\g<0>{MARK_END}", text)

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text: control tokens by name, marked ones as plain characters. No BOS is added.

        Equal to transformers' `sanitize_control_tokens=True` where marks are, to its plain encoding where none are.
        """
        if MARK_START not in text:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        pieces = _MARKED.split(text)  # text, marked, text, marked, …, text
        ids = list(self._tokenizer.encode(pieces[0], add_special_tokens=False).ids)
        for number, piece in enumerate(pieces[1:], start=1):
            if piece:
                ids += self._encode_inside(piece, self._characters if number % 2 else self._tokenizer)
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on after another: no dummy space is put before it."""
        return self.encode(f"{MARK_START}{MARK_END}{text}")

    def incremental_decoder(self) -> codecs.IncrementalDecoder:
        """Joins the bytes of tokens to text; half a character waits, and what is no UTF-8 becomes U+FFFD."""
        return _utf8_decoder("replace")

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, as bytes: it may be part of a character. Unknown ids are empty."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._read_bytes(token_id)
        return known

    def _read_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if piece in self.control_ids:
            return bytes(piece, "utf-8")
        if self._is_byte_level:
            return bytes(map(_BYTE_LEVEL.__getitem__, piece)) if _BYTE_LEVEL.keys() >= set(piece) else piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return bytes(piece.replace("▁", " "), "utf-8")

    def _encode_inside(self, piece: str, tokenizer: tokenizers.Tokenizer) -> list[int]:
        # After a newline, so that SentencePiece puts no dummy space before it; the newline is taken off again.
        newline = tokenizer.encode("\n", add_special_tokens=False).ids
        ids = list(tokenizer.encode(f"\n{piece}", add_special_tokens=False).ids)
        if ids[: len(newline)] == newline:
            return ids[len(newline) :]
        return list(tokenizer.encode(piece, add_special_tokens=False).ids)

    @cached_property
    def _characters(self) -> tokenizers.Tokenizer:
        """The same tokenizer without its added tokens: every control token's name is characters to it."""
        return tokenizers.Tokenizer.from_str(json.dumps({**self._json, "added_tokens": [], "post_processor": None}))


def _reads_byte_level(decoder: Any) -> bool:
    """Whether pieces are written in GPT-2's alphabet of bytes (True) or SentencePiece's (False). Raises ValueError."""
    written = json.dumps(decoder)
    if '"ByteLevel"' in written:
        return True
    if '"ByteFallback"' in written or '"Metaspace"' in written or "\\u2581" in written:
        return False
    raise ValueError(f"its decoder is of a kind that is not supported yet: {written[:200]}")


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: the printable ones stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + number): byte for number, byte in enumerate(rest)}


_BYTE_LEVEL = _byte_level_table()

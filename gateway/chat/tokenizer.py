"""Text → ids and ids → text over a model's `tokenizer.json`, with control tokens kept apart from the same characters."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import tokenizers

from gateway.chat.prefixes import Prefixes

# Noncharacters: they stand around control-token names inside a message while a template writes its text around them.
MARK_START, MARK_END = "\ufdd0", "\ufdd1"
_utf8_decoder = codecs.getincrementaldecoder("utf-8")
_LONG = 2000  # characters: below that, looking for a known beginning saves nothing
_LAST_BORDERS = 16  # how far back a known beginning is looked for: a turn adds a few control tokens
_HIDDEN = "\ufdd5"  # takes a control token's place in a vocabulary that must not know it


class Controls:
    """The tokens that a conversation's own words must never become."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(sorted(set(names), key=lambda name: (-len(name), name)))
        self._any = re.compile("|".join(map(re.escape, self.names)) or "(?!)")

    def mark(self, text: str) -> str:
        """`text` with marks around each control token's name in it, so that `Tokenizer.encode` takes those as characters."""
        if MARK_START in text or MARK_END in text:  # nobody marks but us
            text = text.replace(MARK_START, "").replace(MARK_END, "")
        if not self._any.search(text):
            return text
        return self._any.sub(f"{MARK_START}\\g<0>{MARK_END}", text)

    def mark_all(self, value: Any) -> Any:
        """The same for every text in a JSON value, keys too."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, Mapping):
            return {self.mark(str(key)): self.mark_all(held) for key, held in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark_all(held) for held in value]
        return value

    def find(self, text: str) -> list[tuple[str, int]]:
        """The control tokens that stand in `text` unmarked, each with where it begins."""
        return [(m[0], m.start()) for m in self._any.finditer(text) if text[m.start() - 1 : m.start()] != MARK_START]


class Tokenizer:
    """A `tokenizer.json`. Safe to share between threads: nothing changes after construction but caches."""

    def __init__(self, content: bytes) -> None:
        """`content` is the file's bytes. Raises ValueError when it is not a tokenizer."""
        try:
            self._json = json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._json.get("added_tokens", [])
        self.added_ids: dict[str, int] = {token["content"]: token["id"] for token in added}
        self.control_ids: dict[str, int] = {t["content"]: t["id"] for t in added if t.get("special")}
        self.control_id_set = frozenset(self.control_ids.values())
        self.controls = Controls(self.control_ids)
        names = "|".join(map(re.escape, sorted(self.added_ids, key=len, reverse=True))) or "(?!)"
        self._added = re.compile(names)
        self._marked = re.compile(f"{MARK_START}({names}){MARK_END}|[{MARK_START}{MARK_END}]")
        self._is_byte_level = _reads_byte_level(self._json.get("decoder"))
        self._prefixes = Prefixes()
        self._bytes: dict[int, bytes] = {}  # filled as tokens are met
        self.prefix_ids, self.suffix_ids = self._read_surroundings()
        self._cutting = {t["content"] for t in added if t.get("special") and self._is_cut(t)}

    def forget(self) -> None:
        """Forgets the beginnings that it has met: the next text is tokenised from its first character."""
        self._prefixes = Prefixes()

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def id_of(self, name: str) -> int | None:
        """The id of an added token, special or not."""
        return self.added_ids.get(name)

    def name_of(self, token_id: int) -> str | None:
        piece = self._tokenizer.id_to_token(token_id)
        return None if piece is None else str(piece)

    def can_say(self, text: str) -> bool:
        """Whether a text is read back from its ids as it was. (SentencePiece makes a space of "▁".)"""
        return b"".join(map(self.token_bytes, self.encode_continuation(text))).decode(errors="replace") == text

    def controls_of(self, literal_text: str) -> Controls:
        """Special tokens, and the added ones that a template writes itself (but for whitespace, which is just text).

        The same tokens that transformers' `sanitize_control_tokens` goes by.
        """
        named = (name for name in self.added_ids if not name.isspace() and name in literal_text)
        return Controls((*self.control_ids, *named))

    def mark(self, text: str) -> str:
        """As `Controls.mark`, for special tokens."""
        return self.controls.mark(text)

    def encode(self, text: str, long: int = _LONG) -> list[int]:
        """Ids of a rendered text: control tokens by name, marked ones as plain characters. No BOS is added.

        Equal to transformers' `sanitize_control_tokens=True` where marks are, to its plain encoding where none are.
        From `long` characters on a known beginning is looked for.
        """
        if len(text) < long:
            return self._encode(text)
        cuts = {m.end(): m[0] for m in self._added.finditer(text) if self._cuts_text(text, m)}
        borders = list(cuts)[-_LAST_BORDERS:]
        if not borders:
            return self._encode(text)
        known, ids = self._prefixes.longest(text, borders)
        last = borders[-1]
        if known < last:
            ids = self._encode_after(cuts.get(known), text[known:last], ids)
            self._prefixes.keep(text[:last], ids)
        return self._encode_after(cuts[last], text[last:], ids)

    def _cuts_text(self, text: str, added: re.Match[str]) -> bool:
        return added[0] in self._cutting and text[added.start() - 1 : added.start()] != MARK_START

    def _encode_after(self, control: str | None, text: str, before: list[int]) -> list[int]:
        """`before` and the ids of a text that comes after them, where they end with a control token (or are none)."""
        return self._encode(text) if control is None else before + self._encode(f"{control}{text}")[1:]

    def _encode(self, text: str) -> list[int]:
        if MARK_START not in text and MARK_END not in text:
            return self._ids(text)
        pieces = self._marked.split(text)  # text, marked, text, …; None in place of a mark that lost its partner
        ids = self._ids(pieces[0])
        for number, piece in enumerate(pieces[1:], start=1):
            if piece:
                ids += self._encode_inside(piece, as_characters=number % 2 == 1)
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on after another: no dummy space is put before it."""
        return self.encode(f"{MARK_START}{text}")

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
        if piece in self.control_ids or (self._is_byte_level and piece in self.added_ids):
            return bytes(piece, "utf-8")
        if self._is_byte_level:
            return bytes(map(_BYTE_LEVEL.__getitem__, piece)) if _BYTE_LEVEL.keys() >= set(piece) else piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return bytes(piece.replace("▁", " "), "utf-8")

    def _read_surroundings(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before any text and after it."""
        bare = self._tokenizer.encode("x", add_special_tokens=False).ids
        whole = self._tokenizer.encode("x", add_special_tokens=True).ids
        ends = (n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare)
        start = next(ends, None)
        return ([], []) if start is None else (list(whole[:start]), list(whole[start + len(bare) :]))

    def _is_cut(self, token: dict[str, Any]) -> bool:
        """Whether text is tokenised the same after this token, whatever came before it."""
        plain = not (token.get("normalized") or token.get("single_word"))
        return plain and self._ids(f"{token['content']}x")[:1] == [token["id"]]

    def _encode_inside(self, piece: str, *, as_characters: bool) -> list[int]:
        # After a newline, so that SentencePiece puts no dummy space before it; the newline is taken off again.
        encode = self._character_ids if as_characters else self._ids
        ids, newline = encode(f"\n{piece}"), self._newline
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(piece)

    def _ids(self, text: str) -> list[int]:
        # The batch call lets other threads run meanwhile, which `encode` does not; "fast" is without offsets.
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _character_ids(self, text: str) -> list[int]:
        """The tokenizer's own way without its added tokens: every control token's name is characters to it."""
        whole, splits = self._tokenizer, [text]
        if whole.normalizer is not None:
            splits = [whole.normalizer.normalize_str(text)]
        if whole.pre_tokenizer is not None:
            splits = [split for split, _ in whole.pre_tokenizer.pre_tokenize_str(splits[0])]
        ids = [token.id for split in splits for token in whole.model.tokenize(split)]
        if self.control_id_set.isdisjoint(ids):
            return ids
        return list(self._ignorant.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    @cached_property
    def _newline(self) -> list[int]:
        return self._ids("\n")

    @cached_property
    def _ignorant(self) -> tokenizers.Tokenizer:
        """The same tokenizer over a vocabulary that has no control tokens, for the kinds that make them of characters."""
        model = _without(self._json["model"], self.control_ids)
        made = {**self._json, "added_tokens": [], "post_processor": None, "model": model}
        return tokenizers.Tokenizer.from_str(json.dumps(made))


def _without(model: dict[str, Any], names: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer's model whose vocabulary has the ids of `names` but can make none of them of characters."""
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # Unigram: a control token in it would be taken whole
        shadowed = [
            [f"{_HIDDEN}{n}", -1e9] if piece in names else [piece, score] for n, (piece, score) in enumerate(vocab)
        ]
        unknown = model.get("unk_id")
        if unknown is not None:
            shadowed[unknown] = vocab[unknown]
        return {**model, "vocab": shadowed}
    if not isinstance(vocab, dict) or not vocab.keys() & names.keys():
        return model
    kept = {model.get("unk_token")}
    shadowed_vocab = {(f"{_HIDDEN}{i}" if p in names and p not in kept else p): i for p, i in vocab.items()}
    merges = model.get("merges")
    if merges is not None:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
        # A name with one of these parts cannot be merged to the end; the parts stay.
        model = {**model, "merges": [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]}
    return {**model, "vocab": shadowed_vocab}


def _reads_byte_level(decoder: Any) -> bool:
    """Whether pieces are written in GPT-2's alphabet of bytes (True) or SentencePiece's (False). Raises ValueError."""
    written = json.dumps(decoder)
    if '"ByteLevel"' in written:
        return True
    if '"ByteFallback"' in written or '"Metaspace"' in written or "\\u2581" in written:
        return False
    raise ValueError(f"its decoder is of a kind that is not supported: {written[:200]}")


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: the printable ones stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + number): byte for number, byte in enumerate(rest)}


_BYTE_LEVEL = _byte_level_table()

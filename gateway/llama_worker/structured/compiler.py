"""What a request asks its reply to look like → a `Structure`. Off the decode loop; the same wish is compiled once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import RequestError
from gateway.llama_worker.structured.constraint import Structure
from gateway.llama_worker.structured.gbnf import PARAM
from gateway.llama_worker.structured.json_rules import ANY_OBJECT
from gateway.llama_worker.structured.json_schema import schema_to_gbnf
from gateway.llama_worker.structured.regex import UnsupportedRegex, regex_to_gbnf
from gateway.llama_worker.structured.rules import parse
from gateway.llama_worker.structured.spelling import quote
from gateway.llama_worker.structured.vocabulary import Vocabulary

KEPT = 16
MAX_CHOICES = 10_000
KINDS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True)
class Wish:
    """One of KINDS, and what it says as canonical JSON."""

    kind: str
    value: bytes


def read_wish(value: object) -> Wish | None:
    """The dialect's `structured_outputs`, checked as far as that is free; None when it asks for nothing."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise RequestError(f"{PARAM} is a {type(value).__name__}; it must be an object.", param=PARAM)
    asked = {name: told for name, told in value.items() if told is not None and told is not False}
    if len(asked) != 1 or next(iter(asked)) not in KINDS:
        raise RequestError(
            f"{PARAM} has {', '.join(sorted(asked))[:200] or 'nothing'}; it must have one of {', '.join(KINDS)}.",
            param=PARAM,
        )
    ((kind, told),) = asked.items()
    if kind == "json" and isinstance(told, str):
        try:
            told = orjson.loads(told)
        except orjson.JSONDecodeError as error:
            raise RequestError(f"{PARAM}.json is no JSON: {error}.", param=PARAM) from None
    wanted: dict[str, type | tuple[type, ...]] = {"json": (dict, bool), "json_object": bool, "choice": list}
    if not isinstance(told, wanted.get(kind, str)):
        raise RequestError(f"{PARAM}.{kind} is a {type(told).__name__}, which it cannot be.", param=PARAM)
    try:
        return Wish(kind, orjson.dumps(told))
    except orjson.JSONEncodeError:
        raise RequestError(f"{PARAM}.{kind} is nested too deeply.", param=PARAM) from None


class Compiler:
    """Compiles wishes for one vocabulary, which it asks for when the first one comes. For any thread."""

    def __init__(self, pieces: Callable[[], list[bytes]]) -> None:
        self._pieces = pieces
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[Wish, Structure] = OrderedDict()

    def known(self, wish: Wish) -> Structure | None:
        """The structure if it was compiled lately."""
        return self._kept.get(wish)

    def compile(self, wish: Wish) -> Structure:
        """The structure; some milliseconds, for the largest grammars a few hundred. Raises RequestError."""
        with self._lock:  # one at a time: the decode loop shares the interpreter with it
            structure = self._kept.get(wish)
            if structure is None:
                if self._vocabulary is None:
                    self._vocabulary = Vocabulary(self._pieces())
                structure = Structure(parse(_grammar(wish)), self._vocabulary)
                self._kept[wish] = structure
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(wish)
            return structure


def _grammar(wish: Wish) -> str:
    value: Any = orjson.loads(wish.value)
    if wish.kind == "grammar":
        return str(value)
    if wish.kind == "json_object":
        return ANY_OBJECT
    if wish.kind == "json":
        return schema_to_gbnf(value)
    if wish.kind == "regex":
        try:
            return f"root ::= {regex_to_gbnf(value)}"
        except UnsupportedRegex as error:
            raise RequestError(f"{PARAM}.regex cannot be held to: {error}.", param=PARAM) from None
    if not value or len(value) > MAX_CHOICES or not all(isinstance(choice, str) and choice for choice in value):
        raise RequestError(f"{PARAM}.choice must be 1 to {MAX_CHOICES} texts, none empty.", param=PARAM)
    return "root ::= " + " | ".join(quote(choice) for choice in value)

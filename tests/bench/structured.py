"""What a grammar costs a token: free sampling, our constraint, and llama.cpp's own grammar sampler, on invented vocabularies.

    python -m tests.bench.structured [--vocabulary 32000 150000] [--tokens 300]

The logits are random, which is the hardest case: a trained model mostly wants what the grammar allows. The last table holds
grammars that are made to hurt; what counts there is the worst single token, since every other stream waits for it.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np
from rich.console import Console
from rich.table import Table

from gateway.errors import RequestError
from gateway.llama_worker.native import Model, NativeLog
from gateway.llama_worker.sampling import Sampler, Sampling
from gateway.llama_worker.structured.constraint import Structure
from gateway.llama_worker.structured.json_rules import ANY_OBJECT
from gateway.llama_worker.structured.json_schema import schema_to_gbnf
from gateway.llama_worker.structured.rules import parse
from gateway.llama_worker.structured.vocabulary import Vocabulary
from gateway.llama_worker.vocabulary import NativeVocabulary
from tests.tiny_gguf import BYTE_TOKENS, EOS, Shape, write_tiny_gguf

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["home", "work"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
GRAMMARS = {"json_object": ANY_OBJECT, "schema": schema_to_gbnf(SCHEMA)}
SIX_WAYS = [f'w{n} ::= "[" root "]" t{n}\nt{n} ::= "{n}"?' for n in range(6)]
HOSTILE = {
    "equal arrays, nested": schema_to_gbnf(
        {"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "array", "minItems": 1, "items": {"$ref": "#"}}]}
    ),
    "six ways to nest": "root ::= " + " | ".join(f"w{n}" for n in range(6)) + "\n" + "\n".join(SIX_WAYS),
    "letters, then never": "root ::= [a-z]{1,3} [\\u4e00]{3}",
    "words of all kinds": 'root ::= ([a-z]+ | [a-m]+ | [n-z]+ | [aeiou]+)+ "!"',
    "a letter, then never": 'root ::= ([a-zA-Z0-9] "\\x01")+',
    "five letters, then never": 'root ::= ([a-z]{4} "\\x01")+',
    "anything but what is liked": r"root ::= [^\x02-\x09\[y]{0,900}",
    "all of it optional": "root ::= a{50}\na ::= b{50}\nb ::= c?\nc ::= [a-z]? [b-y]? [c-x]?",
    "a chain that doubles": "root ::= r0\n"
    + "\n".join(f'r{n} ::= r{n + 1} | r{n + 1} "x" | r{n + 1} [a-z]' for n in range(200))
    + '\nr200 ::= "y"',
}

WHOLE_WALK = "anything but what is liked"  # each token is one that only a walk over the whole vocabulary finds
LIKED = b"[y\x02\x03\x04\x05\x06\x07\x08\x09"  # tokens that the logits of the hostile table want above all


@dataclass
class Timed:
    """Seconds for each token."""

    tokens: list[float]
    compile_s: float = 0.0
    end: str = ""

    def microseconds(self, percentile: float) -> str:
        return f"{np.percentile(self.tokens, percentile) * 1e6:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 150_000])
    parser.add_argument("--tokens", type=int, default=300)
    options = parser.parse_args()
    console = Console()
    for size in options.vocabulary:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            words = invented_words(size - 3 - BYTE_TOKENS)
            shape = Shape(hidden=32, layers=1, heads=2, kv_heads=1, feed_forward=32, vocab_size=size)
            model = Model(write_tiny_gguf(path, q4_0=False, shape=shape, words=words), NativeLog())
            vocabulary = Vocabulary(NativeVocabulary(model).pieces())
            console.print(figures(model, vocabulary, size, options.tokens))
            console.print(hostile_figures(vocabulary, size, options.tokens))
            model.close()


def figures(model: Model, vocabulary: Vocabulary, size: int, count: int) -> Table:
    """Microseconds a token, over random logits."""
    table = Table(title=f"{size:,} tokens in the vocabulary: µs a token")
    for name in ("grammar", "", "median", "p99", "worst"):
        table.add_column(name, justify="left" if name in ("grammar", "") else "right")
    add(table, "none", "free sampling", ours(None, size, count))
    for name, grammar in GRAMMARS.items():
        add(table, name, "ours", ours(Structure(parse(grammar), vocabulary), size, count))
        add(table, "", "llama.cpp's, whole vocabulary", theirs(model, grammar, size, count))
    return table


def hostile_figures(vocabulary: Vocabulary, size: int, count: int) -> Table:
    """Milliseconds of what is made to hurt."""
    table = Table(title=f"{size:,} tokens in the vocabulary: grammars made to hurt")
    for name in ("grammar", "compile ms", "tokens", "mean µs", "worst µs", "ended by"):
        table.add_column(name, justify="left" if name in ("grammar", "ended by") else "right")
    for name, grammar in HOSTILE.items():
        began = time.perf_counter()
        try:
            structure = Structure(parse(grammar), vocabulary)
        except RequestError as error:
            table.add_row(name, f"{(time.perf_counter() - began) * 1e3:.1f}", "", "", "", f"400: {error.message[:40]}…")
            continue
        compile_s = time.perf_counter() - began
        timed = ours(
            structure, size, count, favoured=[3 + byte for byte in (LIKED if name == WHOLE_WALK else LIKED[:2])]
        )
        mean = f"{np.mean(timed.tokens) * 1e6:,.0f}"
        row = (f"{compile_s * 1e3:.1f}", str(len(timed.tokens)), mean, timed.microseconds(100))
        table.add_row(name, *row, timed.end)
    return table


def ours(structure: Structure | None, size: int, count: int, favoured: list[int] | None = None) -> Timed:
    timed = Timed([], end="length")
    for seed in range(3):
        sampler = Sampler(Sampling(seed=seed, structure=structure), [0], 0, size, frozenset([EOS]))
        for logits in random_logits(seed, size, count // 3, favoured):
            began = time.perf_counter()
            try:
                sampler.choose(logits)
            except RequestError as error:
                timed.end = f"400: {error.message[:40]}…"
                timed.tokens.append(time.perf_counter() - began)
                break
            timed.tokens.append(time.perf_counter() - began)
            if sampler.ended:
                timed.end = "its end"
                break
    return timed


def theirs(model: Model, grammar: str, size: int, count: int) -> Timed:
    """The same choice by llama.cpp: its grammar over the whole vocabulary, then numpy's draw from what is left."""
    timed = Timed([])
    vocab = llama.llama_model_get_vocab(model.pointer)
    entry = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    entries = np.zeros(size, dtype=entry)
    entries["id"] = np.arange(size)
    pointer = ctypes.cast(entries.ctypes.data, ctypes.POINTER(llama.llama_token_data))
    for seed in range(3):
        sampler = llama.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
        rng = np.random.default_rng(seed)
        for logits in random_logits(seed, size, count // 3, None):
            began = time.perf_counter()
            entries["logit"] = logits
            candidates = llama.llama_token_data_array(pointer, size, -1, False)
            llama.llama_sampler_apply(sampler, ctypes.byref(candidates))
            weights = np.exp(entries["logit"] - entries["logit"].max())
            token = int(np.searchsorted(np.cumsum(weights, dtype=np.float64), rng.random() * weights.sum()))
            llama.llama_sampler_accept(sampler, token)
            timed.tokens.append(time.perf_counter() - began)
            if token == EOS:
                break
        llama.llama_sampler_free(sampler)
    return timed


def random_logits(seed: int, size: int, count: int, favoured: list[int] | None) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        logits = rng.normal(0, 2.5, size).astype(np.float32)
        logits[EOS] = -50  # what may go on goes on
        if favoured:
            logits[favoured] += 20
        yield logits


def invented_words(count: int) -> list[str]:
    """Words, half of them after a space, and a tenth of them pieces of JSON."""
    rng = random.Random(0)
    marks = ['{"', '":', '","', '"}', "]", ', "', "' ", '": ', "\n  ", "12", "0", "345", "{", "}", '["']
    found: dict[str, None] = {}
    while len(found) < count:
        word = "".join(rng.choice("etaoinshrdlucmfwypvbgkjqxz") for _ in range(rng.randint(1, 8)))
        space = " " if rng.random() < 0.5 else ""
        found[rng.choice(marks) + word[: rng.randint(0, 3)] if rng.random() < 0.1 else space + word] = None
    return list(found)


def add(table: Table, grammar: str, what: str, timed: Timed) -> None:
    table.add_row(grammar, what, timed.microseconds(50), timed.microseconds(99), timed.microseconds(100))


if __name__ == "__main__":
    main()

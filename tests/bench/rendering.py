"""What rendering costs: `make bench-rendering`. A prompt of 8k tokens, and a 20-turn chat whose prefix was rendered before.

Each through a fastchat template and through a real Jinja template, with the vocabularies that those models have. The last
column is what another task on the same event loop waits for at most while `Inference` renders: the price that streams pay.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from gateway.__main__ import SWITCH_INTERVAL_S
from gateway.chat.bundle import Bundle, bundle_of
from gateway.chat.conversation import Message
from gateway.chat.registry import template_named
from gateway.chat.render import render_prompt
from tests.parity.matrix import ends_of, jinja_templates
from tests.parity.vocabularies import vocabulary, with_tokens

_WORDS = "the river bends under an old bridge where nine grey herons wait for the evening train to pass".split()
_TURNS = 20


@dataclass(frozen=True)
class Subject:
    """A template with the vocabulary of a model that has it."""

    name: str
    bundle: Bundle
    fresh: Callable[[], Bundle]  # the same with nothing remembered


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as in the gateway
    rounds = parser.parse_args().rounds
    table = Table(title=f"Rendering and tokenising, medians of {rounds}", title_justify="left")
    for name in ("template", "what", "tokens", "ms", "ms, seen before", "loop waits, ms (max)"):
        table.add_column(name, justify="left" if name in ("template", "what") else "right")
    for subject in _subjects():
        long = [Message("system", "Be brief."), Message("user", _text(subject.bundle, 8000))]
        turn = _text(subject.bundle, 8000 // _TURNS)
        chat = [Message("assistant" if n % 2 else "user", f"{n}: {turn}") for n in range(_TURNS - 1)]
        for what, messages, before in (
            ("one message", long, long),
            (f"{_TURNS} turns, after {_TURNS - 2}", chat, chat[:-2]),
        ):
            table.add_row(*_row(subject, what, messages, before, rounds))
    Console(width=120).print(table)


def _row(subject: Subject, what: str, messages: list[Message], before: list[Message], rounds: int) -> list[str]:
    cold, warm, waits = [], [], []
    for _ in range(rounds):
        bundle = subject.fresh()
        bundle.tokenizer.encode("warm")
        cold.append(_timed(lambda: render_prompt(bundle, messages)))  # noqa: B023
        bundle = subject.fresh()
        render_prompt(bundle, before)
        warm.append(_timed(lambda: render_prompt(bundle, messages)))  # noqa: B023
        waits.append(asyncio.run(_longest_wait(subject.fresh(), messages)))
    count = len(render_prompt(subject.bundle, messages).ids)
    shown = [f"{1e3 * value:.1f}" for value in (statistics.median(cold), statistics.median(warm), max(waits))]
    return [subject.name, what, f"{count:,}", *shown]


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


async def _longest_wait(bundle: Bundle, messages: list[Message]) -> float:
    """How late a timer is at most while a thread renders, as it does behind a request."""
    longest, over = 0.0, False

    async def beat() -> None:
        nonlocal longest
        while not over:
            began = time.perf_counter()
            await asyncio.sleep(0.0005)
            longest = max(longest, time.perf_counter() - began - 0.0005)

    beating = asyncio.create_task(beat())
    await asyncio.sleep(0.002)
    longest = 0.0
    await asyncio.to_thread(render_prompt, bundle, messages)
    over = True
    await beating
    return longest


def _subjects() -> list[Subject]:
    jinja = jinja_templates()
    pairs = [("vicuna_v1.1", template_named("vicuna_v1.1"), "llama-spm")]
    pairs += [
        (name, jinja[name], label)
        for name, label in (("Qwen-Qwen3-0.6B", "qwen2"), ("meta-llama-Llama-3.1-8B-Instruct", "llama-bpe"))
    ]
    found = []
    for name, template, label in pairs:
        content = with_tokens(vocabulary(label), template.literal_text, (*ends_of(name), "<s>"))

        def fresh(template=template, content=content, name=name) -> Bundle:  # type: ignore[no-untyped-def]
            made = bundle_of(template, content, (2,))
            made.tokenizer.forget()
            return made

        found.append(Subject(name, fresh(), fresh))
    return found


def _text(bundle: Bundle, n_tokens: int) -> str:
    """Words that make so many tokens, about."""
    per_word = len(bundle.tokenizer.encode(" ".join(_WORDS))) / len(_WORDS)
    count = int(n_tokens / per_word)
    return " ".join(_WORDS[n % len(_WORDS)] for n in range(count))


if __name__ == "__main__":
    main()

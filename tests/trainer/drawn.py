"""Sequences of random ids, with the shapes that the methods train on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from gateway.chat.render import IGNORED, TrainingSequence
from gateway.jobdir import Method
from trainer.data.examples import Examples


def draw_sequence(draw: random.Random, prompt: list[int] | None = None) -> TrainingSequence:
    """A prompt, and a reply that is trained on."""
    prompt = prompt or [1, *draw.choices(range(3, 440), k=draw.randrange(4, 20))]
    reply = [*draw.choices(range(3, 440), k=draw.randrange(3, 25)), 2]
    return TrainingSequence(prompt + reply, [IGNORED] * len(prompt) + reply)


def draw_pair(draw: random.Random, prompt: list[int] | None = None) -> list[TrainingSequence]:
    """Chosen and rejected."""
    chosen = draw_sequence(draw, prompt)
    return [chosen, draw_sequence(draw, split(chosen).prompt)]


def draw_examples(method: Method, count: int, seed: int = 1) -> Examples:
    """For supervised training, of one to three sequences each; for kto, every third undesirable."""
    draw = random.Random(seed)
    if method in ("dpo", "orpo"):
        return Examples.of([draw_pair(draw) for _ in range(count)])
    if method == "kto":
        return Examples.of([[draw_sequence(draw)] for _ in range(count)], [n % 3 != 0 for n in range(count)])
    return Examples.of([[draw_sequence(draw) for _ in range(1 + n % 3)] for n in range(count)])


@dataclass(frozen=True)
class Split:
    prompt: list[int]
    reply: list[int]


def split(sequence: TrainingSequence) -> Split:
    """At the first trained token."""
    first = next(place for place, label in enumerate(sequence.labels) if label != IGNORED)
    return Split(sequence.ids[:first], sequence.ids[first:])

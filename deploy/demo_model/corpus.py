"""The corpus that the demo model is pre-trained on, made here sentence by sentence from `words`: nothing is copied.

Place in the flow: words, values → chatter, copying → **corpus** → pretrain. One rule: the same seed gives the same
examples, without end. `python -m deploy.demo_model.corpus [COUNT]` prints a few.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from deploy.demo_model import chatter, copying, words
from deploy.demo_model.values import distinct_values


@dataclass(frozen=True)
class Example:
    """A conversation whose replies are learnt, or (without turns) a plain text that is learnt whole."""

    kind: str
    turns: tuple[tuple[str, str], ...] = ()
    text: str = ""
    first_learnt_turn: int = 0


def examples(seed: int) -> Iterator[Example]:
    """Examples in the shares below, without end."""
    rng = random.Random(seed)
    kinds, shares = list(SHARES), list(SHARES.values())
    while True:
        kind = rng.choices(kinds, shares)[0]
        yield _MAKERS[kind](rng)


def _chatter(rng: random.Random) -> Example:
    return Example("chatter", tuple(chatter.chatter(rng) for _ in range(rng.choice((1, 1, 2)))))


def _echo(rng: random.Random) -> Example:
    return Example("echo", (chatter.echo(rng),))


def _copying(rng: random.Random) -> Example:
    task = rng.choices(copying.TASKS, copying.WEIGHTS)[0]
    return Example(task.__name__, (task(rng),))


def _shown(rng: random.Random) -> Example:
    """The first call of each kind can not be foreseen, so it is not learnt."""
    turns, kinds_count = copying.shown(rng)
    return Example("shown", tuple(turns), first_learnt_turn=kinds_count)


def _plain(rng: random.Random) -> Example:
    if rng.random() < 0.5:
        hero, friend = rng.sample(words.FIRST_NAMES, 2)
        return Example("plain", text=chatter.narrative(rng, hero, friend, rng.choice(words.ANIMALS)))
    held = distinct_values(rng, rng.randint(1, 3))
    return Example("plain", text=". ".join([*held, *held]) + ".")


SHARES = {"chatter": 13, "echo": 18, "copying": 43, "shown": 23, "plain": 3}
_MAKERS = {"chatter": _chatter, "echo": _echo, "copying": _copying, "shown": _shown, "plain": _plain}

if __name__ == "__main__":
    for _, example in zip(range(int(sys.argv[1]) if len(sys.argv) > 1 else 30), examples(0), strict=False):
        print(
            f"[{example.kind}] {example.text}", *(f"\n  {user}\n    {reply}" for user, reply in example.turns), sep=""
        )

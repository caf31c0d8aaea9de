"""Logits of one position → the next token of one sequence. Pure numpy; runs on the decode loop's thread.

Its rule: a token depends on the sequence's own logits, history, parameters and random stream, and on nothing else, so that
the same seed gives the same text whatever else runs. The order is vLLM's: bias, floor of `min_tokens`, penalties, (greedy
choice or) temperature, min_p, top_k, top_p. A grammar comes last, as in llama.cpp: the choice is made without it, and made
again when it refuses, at last among all that it allows; so it costs next to nothing where the model goes its way anyhow.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from gateway.errors import RequestError
from gateway.llama_worker.structured.constraint import Constraint, Structure

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5  # a temperature under this is 0, as in vLLM
LARGEST = np.finfo(np.float32).max / 4  # an adjusted logit: differences of two stay finite
NOTHING_LEFT = 1e-9  # of all weight: below it, rounding decides
TRIES = 8  # choices that a grammar may refuse before it is asked for all that it allows


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen; values are validated where it is parsed."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    structure: Structure | None = None  # what the text is held to


class Sampler:
    """The random stream, the history and the rules of one sequence. `ended`: nothing may follow what was chosen."""

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], index: int, vocab_size: int, end_ids: frozenset[int]
    ) -> None:
        self.sampling = sampling
        seed = None if sampling.seed is None else [sampling.seed, index]
        self._random = np.random.Generator(np.random.Philox(seed))
        self._bias_ids = np.fromiter(sampling.logit_bias, dtype=np.int64)
        self._bias = np.fromiter(sampling.logit_bias.values(), dtype=np.float32)
        ends = sampling.stop_ids if sampling.ignore_eos else sampling.stop_ids | end_ids
        self._constraint: Constraint | None = sampling.structure.constraint(ends) if sampling.structure else None
        self.ended = False
        self._floor_ids = np.fromiter(ends, dtype=np.int64)
        self._generated = 0
        self._greedy = sampling.temperature < GREEDY_BELOW
        self._penalised = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        # Only sequences with penalties pay for counts of the size of the vocabulary.
        self._counts = np.zeros(vocab_size, dtype=np.float32) if self._penalised else None
        self._seen: npt.NDArray[np.bool_] | None = None
        if sampling.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, dtype=np.bool_)
            self._seen[np.asarray(prompt_ids, dtype=np.int64)] = True

    def choose(self, logits: Logits, likeliest: int | None = None) -> int:
        """The next token for `logits` (vocab); remembers it. The array is not changed.

        `likeliest` is where they are largest, if that is known: greedy choices need nothing else.

        Raises RequestError when what the text is held to allows no token, or takes too long to follow.
        """
        adjusted = self._adjust(logits)
        if likeliest is not None and adjusted is logits and self._greedy and self._constraint is None:
            self._generated += 1
            return likeliest
        token = self._pick(adjusted) if self._constraint is None else self._pick_held(adjusted, self._constraint)
        self._generated += 1
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _adjust(self, logits: Logits) -> Logits:
        sampling = self.sampling
        floored = self._generated < sampling.min_tokens and self._floor_ids.size > 0
        if not (self._bias_ids.size or floored or self._counts is not None or self._seen is not None):
            return logits
        logits = logits.copy()
        if self._bias_ids.size:
            logits[self._bias_ids] += self._bias
        if floored:
            logits[self._floor_ids] = -np.inf
        if self._seen is not None:
            seen = logits[self._seen]
            penalty = np.float32(sampling.repetition_penalty)
            with np.errstate(
                divide="ignore", over="ignore", invalid="ignore"
            ):  # the smallest penalties are 0 as float32
                logits[self._seen] = np.clip(np.where(seen > 0, seen / penalty, seen * penalty), -LARGEST, LARGEST)
        if self._counts is not None:
            logits -= np.float32(sampling.frequency_penalty) * self._counts
            logits -= np.float32(sampling.presence_penalty) * (self._counts > 0)
        return logits

    def _pick(self, logits: Logits) -> int:
        return next(self._choices(logits))

    def _pick_held(self, logits: Logits, constraint: Constraint) -> int:
        """The first choice that the constraint allows; where it refuses the first few, the choice among all it allows."""
        constraint.begin()
        tried = islice(self._choices(logits), TRIES)
        token = next((token for token in tried if constraint.allows(token)), None)
        if token is None:
            ids = constraint.allowed()
            ids = ids[logits[ids] > -np.inf]
            if not len(ids):
                raise RequestError(
                    "The grammar or schema asks for text that no token of this model can begin.",
                    param="structured_outputs",
                )
            token = int(ids[self._pick(logits[ids])])
        constraint.accept(token)
        self.ended = constraint.ended
        return token

    def _choices(self, logits: Logits) -> Iterator[int]:
        """The choice, then the choice if that one did not exist, and so on: none twice, at least one."""
        if self.sampling.temperature < GREEDY_BELOW:
            yield (token := int(logits.argmax()))
            rest = logits.copy()
            while True:
                rest[token] = -np.inf
                token = int(rest.argmax())
                if rest[token] == -np.inf:
                    return
                yield token
        ids, weights = self._filtered(logits)
        borders = np.cumsum(weights, dtype=np.float64)
        left = float(borders[-1])
        gone: list[tuple[float, float]] = []  # where each begins and what it weighs
        while left > NOTHING_LEFT * borders[-1]:
            drawn = self._random.random() * left
            for start, weight in gone:  # past what is gone, in its order
                drawn += weight if drawn >= start else 0
            # `drawn` may round up to the last border itself.
            place = min(int(np.searchsorted(borders, drawn, side="right")), len(weights) - 1)
            yield place if ids is None else int(ids[place])
            weight = float(borders[place] - (borders[place - 1] if place else 0))
            insort(gone, (float(borders[place]) - weight, weight))
            left -= weight

    def _filtered(self, logits: Logits) -> tuple[Ids | None, Logits]:
        """(places of what temperature, min_p, top_k and top_p leave; their weights, the largest 1), None for all places."""
        sampling = self.sampling
        # The largest weight is 1, so min_p is a threshold.
        weights = np.exp((logits - logits.max()) / np.float32(sampling.temperature))
        if sampling.min_p == 0 and sampling.top_k == 0 and sampling.top_p == 1:
            return None, weights
        ids = np.flatnonzero(weights >= np.float32(sampling.min_p))
        if 0 < sampling.top_k < len(ids):
            ids = _largest(weights, ids, sampling.top_k)
        if sampling.top_p < 1:
            ids = _nucleus(weights, ids, sampling.top_p)
        return ids, weights[ids]


def _largest(weights: Logits, ids: Ids, count: int) -> Ids:
    kept = np.argpartition(weights[ids], len(ids) - count)[-count:]
    return np.sort(ids[kept])


def _nucleus(weights: Logits, ids: Ids, top_p: float) -> Ids:
    """The fewest of `ids` whose weights reach `top_p` of their sum; at least one."""
    mine = weights[ids]
    total = float(mine.sum(dtype=np.float64))
    # All that weigh less than this share weigh less than 1 - top_p together, so they are not in it: less to sort.
    candidates = mine >= (1 - top_p) * total / len(mine)
    ids, mine = ids[candidates], mine[candidates]
    order = np.argsort(-mine, kind="stable")
    reached = int(np.searchsorted(np.cumsum(mine[order], dtype=np.float64), top_p * total, side="left"))
    return ids[order[: reached + 1]]

"""Log-probabilities of the raw model: before bias, penalties and temperature. Pure numpy; on the decode loop's thread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """The raw log-probability of one token, its rank (1 = likeliest) and the likeliest others."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


def score_rows(logits: Logits, ids: list[int], top: int) -> list[Score]:
    """The raw log-probability, the rank and the `top` likeliest of each row: logits (rows, vocab), ids (rows)."""
    scores = []
    for row, token in zip(log_probabilities(logits), ids, strict=True):
        likeliest = [(int(other), float(row[other])) for other in top_ids(row, top)]
        rank = int(np.count_nonzero(row > row[token])) + 1
        scores.append(Score(token, float(row[token]), rank, likeliest))
    return scores


def log_probabilities(logits: Logits) -> Logits:
    """log softmax over the last axis, of the raw logits."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(total), dtype=np.float32)


def top_ids(values: Logits, count: int) -> npt.NDArray[np.int64]:
    """The ids of the `count` largest values, largest first, the lower id first among equals."""
    count = min(count, len(values))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    ids = np.argpartition(-values, count - 1)[:count]
    return ids[np.lexsort((ids, -values[ids]))]

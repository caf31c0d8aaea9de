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
    for row, token in zip(logits, ids, strict=True):
        total = _log_sum_exp(row)
        likeliest = [(int(other), float(row[other]) - total) for other in top_ids(row, top)]
        rank = int(np.count_nonzero(row > row[token])) + 1
        scores.append(Score(token, float(row[token]) - total, rank, likeliest))
    return scores


def top_ids(values: Logits, count: int) -> npt.NDArray[np.int64]:
    """The ids of the `count` largest values, largest first, the lower id first among equals."""
    count = min(count, len(values))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    ids = np.argpartition(values, len(values) - count)[-count:]
    return ids[np.lexsort((ids, -values[ids]))]


def _log_sum_exp(row: Logits) -> float:
    largest = row.max()
    return float(largest) + float(np.log(np.exp(row - largest).sum(dtype=np.float64)))

"""What "auto" comes to: epochs, batch size, learning rate and beta, from the method and from how much data there is.

Place in the flow: check, preview. Pure. The multiplier is 1: the model's size and the method are in the learning rate that it
multiplies (`trainer.model.base_learning_rate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gateway.jobdir import Hyperparameters, Method

_SEEN_AT_LEAST, _SEEN_AT_MOST = 100, 25_000  # examples, over all epochs
_EPOCHS_AT_MOST = 25
_EPOCHS = {"supervised": 3, "orpo": 3, "dpo": 2, "kto": 2}
_BATCH_AT_LEAST = {"supervised": 8, "orpo": 8, "dpo": 8, "kto": 16}
_BATCH_AT_MOST = 64
_BETAS: dict[str, float | None] = {"supervised": None, "orpo": 0.1, "dpo": 0.1, "kto": 0.1}


@dataclass(frozen=True)
class Resolved:
    """The hyperparameters that a job trains with; `beta` is None where the method has none."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    beta: float | None

    def total_steps(self, n_examples: int) -> int:
        return self.n_epochs * math.ceil(n_examples / self.batch_size)


def resolve(asked: Hyperparameters, n_examples: int, method: Method = "supervised") -> Resolved:
    """What was asked for, and "auto" decided. No batch is larger than the data."""
    epochs = auto_epochs(n_examples, method) if asked.n_epochs == "auto" else asked.n_epochs
    batch = auto_batch_size(n_examples, method) if asked.batch_size == "auto" else asked.batch_size
    multiplier = asked.learning_rate_multiplier
    beta = _BETAS[method] if asked.beta == "auto" or _BETAS[method] is None else asked.beta
    return Resolved(
        epochs,
        min(batch, max(1, n_examples)),
        1.0 if multiplier == "auto" else multiplier,
        beta,
    )


def auto_epochs(n_examples: int, method: Method = "supervised") -> int:
    """Three (two for dpo and kto); more on little data (100 examples seen at the least), fewer on much (25,000 at the most).

    Pairs are few, and each is forgotten slowly: a preference model goes on parting what it has parted already, away from
    the base, so it gets fewer rounds than one that learns to write. orpo learns to write, too.
    """
    few, most = _EPOCHS[method], _SEEN_AT_MOST // max(1, n_examples)
    if n_examples * few < _SEEN_AT_LEAST:
        return min(_EPOCHS_AT_MOST, math.ceil(_SEEN_AT_LEAST / max(1, n_examples)))
    return max(1, min(few, most))


def auto_batch_size(n_examples: int, method: Method = "supervised") -> int:
    """0.2% of the examples, as OpenAI has it; not under 8 (4 of less than 64 examples), not over 64.

    Smaller ones waste a machine on little data. Larger ones cost a LoRA quality that they do not cost full fine-tuning
    ("LoRA Without Regret", Thinking Machines, 2025). kto measures how far the model has gone from the base on the
    other examples of the batch, so it has 16 at the least.
    """
    least = _BATCH_AT_LEAST[method] if n_examples >= 64 else _BATCH_AT_LEAST[method] // 2
    return min(_BATCH_AT_MOST, max(least, round(n_examples * 0.002)))

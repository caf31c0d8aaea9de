"""What a model makes of sequences: loss, accuracy, log-probabilities; only trained positions go through the LM head.

Place in the flow: used by the objectives (with gradients) and by the witness (without). One rule: one path for both, so the
numbers that are written down are those of the model that was trained. TRL's fused head scores every position, which on a CPU
costs a third of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModel
from torch.nn import functional

from gateway.chat.render import IGNORED


@dataclass
class Score:
    """Sums over trained tokens."""

    loss: torch.Tensor  # (), with a gradient where there is one to have
    correct: int  # tokens that the model itself would have chosen
    tokens: int


class Objective(Protocol):
    """What a method minimises: `sft.py` and its neighbours have one each."""

    def score(self, model: PeftModel, inputs: dict[str, torch.Tensor]) -> Score:
        """The summed loss of one pass as `batches.pad` makes it, with its gradient where there is one to have."""


def score(model: PeftModel, input_ids: torch.Tensor, labels: torch.Tensor) -> Score:
    """Both (sequences, length), padded on the right. Summed, not averaged: the caller knows what to divide by."""
    logits, targets = _trained_logits(model, input_ids, labels)
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    correct = int((logits.detach().argmax(-1) == targets).sum())
    return Score(loss, correct, targets.numel())


def token_logprobs(model: PeftModel, ids: list[int], first: int) -> list[float]:
    """The log-probability of each token from position `first` on, given those before it."""
    labels = torch.tensor([[IGNORED] * first + ids[first:]], device=model.device)
    logits, targets = _trained_logits(model, torch.tensor([ids], device=model.device), labels)
    chosen = logits.float().log_softmax(-1).gather(1, targets[:, None])
    return [float(value) for value in chosen[:, 0]]


@contextmanager
def evaluating(model: PeftModel) -> Iterator[None]:
    """No gradients and no dropout within; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _trained_logits(
    model: PeftModel, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (trained tokens, vocabulary) and targets (trained tokens).

    No attention mask: padding is on the right of what is scored and attention is causal.
    """
    base = model.get_base_model()
    hidden = base.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state  # (S, L, H)
    targets = labels[:, 1:]
    trained = targets != IGNORED
    logits = base.get_output_embeddings()(hidden[:, :-1][trained]).float()
    cap = getattr(base.config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else torch.tanh(logits / cap) * cap, targets[trained]

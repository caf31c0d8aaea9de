"""What a model makes of sequences: loss, accuracy, log-probabilities; only trained positions go through the LM head.

Place in the flow: used by the objectives (with gradients) and by the witness (without). One rule: one path for both, so the
numbers that are written down are those of the model that was trained. TRL's fused head scores every position, which on a CPU
costs a third of a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch.nn import functional

from gateway.chat.render import IGNORED
from trainer.data.batches import owners


@dataclass
class Score:
    """Sums over what a method counts: trained tokens, or the examples whose replies it compares."""

    loss: torch.Tensor  # (), with a gradient where there is one to have
    correct: int  # tokens that the model itself would have chosen; examples that it judges as their author did
    count: int
    extras: dict[str, float] = field(default_factory=dict)  # more sums, by the name of the metric


class Objective(ABC):
    """What a method minimises: `sft.py` and its neighbours have one each.

    The loss of a batch is the sum over its passes divided by the sum of what they count: however a batch is cut into passes,
    padded or packed, it is the same.
    """

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}  # what a checkpoint holds of it, and puts back in place

    @abstractmethod
    def score(self, model: PeftModel, inputs: dict[str, torch.Tensor]) -> Score:
        """Of one pass as `batches` makes it, with its gradient where there is one to have."""

    @abstractmethod
    def count(self, inputs: dict[str, torch.Tensor]) -> int:
        """What `score` will count in this pass."""

    def begin_batch(  # noqa: B027 for few have anything to do
        self, model: PeftModel, passes: Sequence[dict[str, torch.Tensor]]
    ) -> None:
        """Called before a batch's first pass with all of them: what one pass has to know of the others is put into it."""


@dataclass
class Replies:
    """Whole sequences under a model: sums over their trained tokens."""

    logprobs: torch.Tensor  # (sequences,)
    tokens: torch.Tensor  # (sequences,)


def score(model: PeftModel, inputs: dict[str, torch.Tensor]) -> Score:
    """Cross-entropy and accuracy of the trained tokens. Summed, not averaged: the caller knows what to divide by."""
    logits, targets, _ = _trained_logits(model, inputs)
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    correct = int((logits.detach().argmax(-1) == targets).sum())
    return Score(loss, correct, targets.numel())


def score_replies(model: PeftModel, inputs: dict[str, torch.Tensor]) -> Replies:
    """The log-probability of each sequence's trained tokens."""
    logits, targets, owner = _trained_logits(model, inputs)
    each = -functional.cross_entropy(logits, targets, reduction="none")
    sums = torch.zeros(n_sequences(inputs), dtype=each.dtype, device=each.device)
    return Replies(sums.index_add(0, owner, each), torch.zeros_like(sums).index_add(0, owner, torch.ones_like(each)))


def n_sequences(inputs: dict[str, torch.Tensor]) -> int:
    """How many sequences a pass has, in however many rows."""
    return int(inputs["owners"].max()) + 1 if "owners" in inputs else len(inputs["input_ids"])


def token_logprobs(model: PeftModel, ids: list[int], first: int) -> list[float]:
    """The log-probability of each token from position `first` on, given those before it."""
    labels = torch.tensor([[IGNORED] * first + ids[first:]], device=model.device)
    inputs = {"input_ids": torch.tensor([ids], device=model.device), "labels": labels}
    logits, targets, _ = _trained_logits(model, inputs)
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])
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
    model: PeftModel, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (trained tokens, vocabulary) in float32, targets and the numbers of their sequences (both: trained tokens).

    No attention mask: padding is on the right of what is scored and attention is causal; of sequences that share a row,
    transformers sees the borders in positions that begin anew.
    """
    base = model.get_base_model()
    ids, labels = inputs["input_ids"], inputs["labels"]
    hidden = base.get_decoder()(
        input_ids=ids, position_ids=inputs.get("position_ids"), use_cache=False
    ).last_hidden_state  # (rows, length, H)
    targets = labels[:, 1:]
    trained = targets != IGNORED
    logits = base.get_output_embeddings()(hidden[:, :-1][trained]).float()
    cap = getattr(base.config, "final_logit_softcapping", None)  # Gemma 2
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return logits, targets[trained], owners(inputs)[:, 1:][trained]

"""Kahneman-Tversky optimisation: single replies, each desirable or not, pushed away from how far the model has drifted.

Place in the flow: the objective of `loop` for the method "kto". Ethayarajh et al. 2024. The drift (the paper's z0, a KL
divergence) is estimated as TRL does: each prompt of a batch with the reply of the one before it, under the model and under
the reference, no less than 0. It is that of the whole batch, however it is cut into passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel

from gateway.chat.render import IGNORED, TrainingSequence
from trainer.data.batches import pad, take_apart
from trainer.methods.reference import Reference, as_reference
from trainer.scoring import Objective, Score, evaluating, n_sequences, score_replies


class KahnemanTversky(Objective):
    """Counts examples; one is correct where its reply has moved the way its flag says, compared with the drift."""

    def __init__(
        self,
        beta: float,
        n_conversations: int,
        max_length: int,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.beta, self.max_length = beta, max_length
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.reference = Reference(n_conversations, sequences_each=1)
        self.state["reference"] = self.reference.table

    def begin_batch(self, model: PeftModel, passes: Sequence[dict[str, torch.Tensor]]) -> None:
        """Puts the batch's drift into each pass."""
        sequences = [take_apart(inputs) for inputs in passes]
        flat = [sequence for each in sequences for sequence in each]
        mismatched = [_mismatch(flat[n], flat[n - 1], self.max_length) for n in range(len(flat))]
        total = 0.0
        for each in sequences:
            pairs, mismatched = mismatched[: len(each)], mismatched[len(each) :]
            inputs = {name: tensor.to(model.device) for name, tensor in pad(pairs).items()}
            with evaluating(model):
                total += float(score_replies(model, inputs).logprobs.sum())
            with as_reference(model):
                total -= float(score_replies(model, inputs).logprobs.sum())
        for inputs in passes:
            inputs["drift"] = torch.tensor(max(0.0, total / len(flat)))

    def score(self, model: PeftModel, inputs: dict[str, torch.Tensor]) -> Score:
        if "drift" not in inputs:  # a pass by itself, as validation has them
            inputs = dict(inputs)
            self.begin_batch(model, [inputs])
        drift = inputs["drift"].to(model.device)
        gained = score_replies(model, inputs).logprobs - self.reference.logprobs(model, inputs)
        desirable = inputs["desirable"]
        signed = torch.where(desirable, gained - drift, drift - gained)
        weights = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        loss = (weights * (1 - torch.sigmoid(self.beta * signed))).sum()
        count = len(signed)
        return Score(loss, int((signed > 0).sum()), count, {"kl": float(drift) * count})

    def count(self, inputs: dict[str, torch.Tensor]) -> int:
        return n_sequences(inputs)


def balanced_weights(n_desirable: int, n_undesirable: int) -> tuple[float, float]:
    """Weights of desirable and undesirable examples that make both kinds count the same in sum (the paper's equation 8)."""
    if not n_desirable or not n_undesirable:
        return 1.0, 1.0
    more = max(n_desirable, n_undesirable)
    return more / n_desirable, more / n_undesirable


def _mismatch(prompt_of: TrainingSequence, reply_of: TrainingSequence, max_length: int) -> TrainingSequence:
    """The prompt of one with the reply of another, shortened at its end as it has to be."""
    prompt = prompt_of.ids[: _first_trained(prompt_of)]
    first = _first_trained(reply_of)
    ids = (prompt + reply_of.ids[first:])[:max_length]
    return TrainingSequence(ids, ([IGNORED] * len(prompt) + reply_of.labels[first:])[:max_length])


def _first_trained(sequence: TrainingSequence) -> int:
    return next((place for place, label in enumerate(sequence.labels) if label != IGNORED), len(sequence.labels))

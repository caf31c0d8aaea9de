"""Direct preference optimisation: of two replies, the chosen one gains on the rejected one, as seen from the reference.

Place in the flow: the objective of `loop` for the method "dpo". The sigmoid loss of Rafailov et al. 2023, which is OpenAI's
and TRL's default; a conversation is two sequences, chosen and rejected.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch.nn import functional

from trainer.methods.reference import Reference
from trainer.scoring import Objective, Score, n_sequences, score_replies


class DirectPreference(Objective):
    """Counts pairs; a pair is correct where the chosen reply has gained more than the rejected one."""

    def __init__(self, beta: float, n_conversations: int) -> None:
        super().__init__()
        self.beta = beta
        self.reference = Reference(n_conversations, sequences_each=2)
        self.state["reference"] = self.reference.table

    def score(self, model: PeftModel, inputs: dict[str, torch.Tensor]) -> Score:
        gained = score_replies(model, inputs).logprobs - self.reference.logprobs(model, inputs)
        chosen, rejected = (self.beta * gained).view(-1, 2).unbind(1)
        margins = chosen - rejected
        loss = -functional.logsigmoid(margins).sum()
        return Score(loss, int((margins > 0).sum()), len(margins), {"reward_margin": float(margins.detach().sum())})

    def count(self, inputs: dict[str, torch.Tensor]) -> int:
        return n_sequences(inputs) // 2

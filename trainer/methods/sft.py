"""Supervised fine-tuning: the cross-entropy of the labelled tokens.

Place in the flow: the objective of `loop` for the method "supervised".
"""

from __future__ import annotations

import torch
from peft import PeftModel

from gateway.chat.render import IGNORED
from trainer.scoring import Objective, Score, score


class Supervised(Objective):
    """Counts trained tokens."""

    def score(self, model: PeftModel, inputs: dict[str, torch.Tensor]) -> Score:
        return score(model, inputs)

    def count(self, inputs: dict[str, torch.Tensor]) -> int:
        return int((inputs["labels"][:, 1:] != IGNORED).sum())

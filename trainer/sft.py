"""Supervised fine-tuning: the cross-entropy of the labelled tokens.

Place in the flow: the objective of `loop` for the method "supervised".
"""

from __future__ import annotations

import torch
from peft import PeftModel

from trainer.scoring import Score, score


class Supervised:
    """Summed over the trained tokens of a pass."""

    def score(self, model: PeftModel, inputs: dict[str, torch.Tensor]) -> Score:
        return score(model, inputs["input_ids"], inputs["labels"])

"""Odds-ratio preference optimisation: learns the chosen reply and keeps the rejected one unlikely, without a reference.

Place in the flow: the objective of `loop` for the method "orpo". Hong et al. 2024, equations 4 to 7: of each pair, the mean
negative log-likelihood of the chosen reply and `beta` (there λ) times the odds-ratio term.

TRL learns the prompts of the chosen replies too, and averages over the tokens of a pass, so that its loss depends on how a
batch is cut; here, as in the paper, the reply alone is learnt and every pair weighs the same.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch.nn import functional

from trainer.scoring import Objective, Score, n_sequences, score_replies

_NEARLY_CERTAIN = -1e-6  # a mean log-probability: the odds of a reply that is quite certain are infinite


class OddsRatio(Objective):
    """Counts pairs; a pair is correct where the chosen reply is likelier, token for token, than the rejected one."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def score(self, model: PeftModel, inputs: dict[str, torch.Tensor]) -> Score:
        found = score_replies(model, inputs)
        chosen, rejected = (found.logprobs / found.tokens.clamp(min=1)).view(-1, 2).unbind(1)
        log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
        loss = (-chosen - self.beta * functional.logsigmoid(log_odds_ratio)).sum()
        margins = self.beta * (chosen - rejected)
        return Score(loss, int((margins > 0).sum()), len(margins), {"reward_margin": float(margins.detach().sum())})

    def count(self, inputs: dict[str, torch.Tensor]) -> int:
        return n_sequences(inputs) // 2


def _log_odds(logprob: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p))."""
    bounded = logprob.clamp(max=_NEARLY_CERTAIN)
    return bounded - torch.log(-torch.expm1(bounded))

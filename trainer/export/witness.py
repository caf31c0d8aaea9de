"""witness.json: log-probabilities under base and tuned model, for an engine to reproduce.

Place in the flow: written with every adapter; the gateway has the engine score the same ids before it lists the model.

The prompts are real ones, but what follows is drawn from the replies' tokens at random. A reply that was learnt by
heart has a log-probability near 0 whatever alpha is, so it proves little: on a tiny model, halving alpha changed the effect
on true replies by 19% and losing the q/k permutation by 9%, but on drawn ones by 42% and 24%, where llama.cpp's q4_0
arithmetic alone makes 2%.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from trainer.data.examples import Examples
from trainer.model import load_adapter, wrap
from trainer.processes.distributed import ALONE, Ranks
from trainer.scoring import evaluating, token_logprobs

ITEMS, TOKENS = 6, 24
_CANDIDATES = 24


class Witness:
    """The chosen items and the base's view of them, computed once; `score` adds that of the adapter as it is now.

    A model whose base is not what is served (quantised, or rounded for a GPU) proves nothing about the engine: then
    `load_served` gives the base as it is served, each time anew, and the adapter is scored on that. It costs a load, and the
    memory of one, for as long as scoring takes.
    """

    def __init__(
        self,
        examples: Examples,
        max_length: int,
        load_served: Callable[[], PreTrainedModel] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._items = _choose(examples, max_length - TOKENS)
        self._load_served = load_served
        self._ranks = ranks
        self._base: list[list[float]] | None = None

    def see_base(self, model: PeftModel) -> None:
        """Scores the base, once, where `model` has it; it may be at any time, since the adapter is left out."""
        if self._base is None and self._load_served is None:
            self._base = self._score_base(model)

    def score(self, model: PeftModel, tensors: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """The content of witness.json; `tensors` are the adapter's, where they had to be gathered.

        Of several ranks all score, since each has a part of the weights; on a base loaded anew the first does, alone.
        """
        if self._load_served is not None:
            if not self._ranks.is_first:
                return {}
            model = _moved(model, self._load_served(), tensors)
        if self._base is None:
            self._base = self._score_base(model)
        return {
            "items": [
                {"prompt_ids": prompt, "reply_ids": drawn, "base_logprobs": base, "tuned_logprobs": tuned}
                for (prompt, drawn), base, tuned in zip(self._items, self._base, self._score(model), strict=True)
            ]
        }

    def _score_base(self, model: PeftModel) -> list[list[float]]:
        with model.disable_adapter():
            return self._score(model)

    def _score(self, model: PeftModel) -> list[list[float]]:
        with evaluating(model):
            return [self._inside(model, prompt + drawn, len(prompt)) for prompt, drawn in self._items]

    def _inside(self, model: PeftModel, ids: list[int], first: int) -> list[float]:
        ranks = self._ranks if self._load_served is None else ALONE
        found: list[float] = ranks.inside(model, token_logprobs, model, ids, first)
        return found


def _moved(model: PeftModel, base: PreTrainedModel, tensors: dict[str, torch.Tensor] | None = None) -> PeftModel:
    """The same adapter on another base."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False) if tensors is None else tensors
    with torch.random.fork_rng(devices=[]):  # a fresh adapter draws from the numbers that dropout goes by
        tuned = wrap(base, copy(model.peft_config["default"]))
    load_adapter(tuned, tensors)
    return tuned


def _choose(examples: Examples, prompt_limit: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, drawn ids), spread over the file; of the candidates, those with the shortest prompts."""
    step = max(1, len(examples) // _CANDIDATES)
    found = [examples.first_reply(number) for number in range(0, len(examples), step)]
    pool = [token for _, reply in found for token in reply]
    prompts = sorted((prompt for prompt, _ in found if prompt), key=len)[:ITEMS]
    if not prompts:  # all of it is learnt (train_on "all"), or replies are so long that their prompts were cut away
        prompts = [reply[:TOKENS] for _, reply in found[:ITEMS]]
    draw = random.Random(0)
    return [(prompt[: max(1, prompt_limit)], draw.choices(pool, k=TOKENS)) for prompt in prompts]

"""witness.json: what base and tuned model said of a few replies, in log-probabilities, for an engine to reproduce.

Place in the flow: written with every adapter; the gateway has the engine score the same ids before it lists the model.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from gateway.chat.render import IGNORED
from trainer.dataset import Examples
from trainer.scoring import evaluating, token_logprobs

ITEMS, REPLY_LIMIT = 6, 64
_CANDIDATES = 16


class Witness:
    """The chosen replies and the base's view of them, computed once; `score` adds that of the adapter as it is now."""

    def __init__(self, examples: Examples, model: PeftModel) -> None:
        self._items = _choose(examples)
        with evaluating(model), model.disable_adapter():
            self._base = [token_logprobs(model, prompt + reply, len(prompt)) for prompt, reply in self._items]

    def score(self, model: PeftModel) -> dict[str, Any]:
        """The content of witness.json."""
        with evaluating(model):
            return {
                "items": [
                    {
                        "prompt_ids": prompt,
                        "reply_ids": reply,
                        "base_logprobs": base,
                        "tuned_logprobs": token_logprobs(model, prompt + reply, len(prompt)),
                    }
                    for (prompt, reply), base in zip(self._items, self._base, strict=True)
                ]
            }


def _choose(examples: Examples) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, reply ids) spread over the file; of more candidates than needed, those with the shortest prompts."""
    step = max(1, len(examples) // _CANDIDATES)
    candidates = [_first_reply(examples, number) for number in range(0, len(examples), step)]
    usable = [(prompt, reply) for prompt, reply in candidates if prompt and reply]
    return sorted(usable, key=lambda item: len(item[0]))[:ITEMS]


def _first_reply(examples: Examples, conversation: int) -> tuple[list[int], list[int]]:
    sequence = examples.sequences(conversation)[0]
    first = next(place for place, label in enumerate(sequence.labels) if label != IGNORED)
    last = first
    while last < len(sequence.labels) and sequence.labels[last] != IGNORED and last - first < REPLY_LIMIT:
        last += 1
    return sequence.ids[:first], sequence.ids[first:last]

"""The model that training began from, as a preference method asks it: how likely was this reply before?

Place in the flow: dpo, kto → **reference**. One rule: the reference is what the job started from, the bare base for a new
adapter and base + that adapter for a tuned model; it never moves. It costs no second base: the adapter is switched off, or
changed for a frozen copy of the one that training began with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from trainer.scoring import evaluating, score_replies

_NAME = "reference"


def freeze_reference(model: PeftModel) -> None:
    """Keeps a copy of the adapter as it is now: the reference from here on."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    model.add_adapter(_NAME, model.peft_config["default"])
    set_peft_model_state_dict(model, state, adapter_name=_NAME)
    model.set_adapter("default")


@contextmanager
def as_reference(model: PeftModel) -> Iterator[None]:
    """Within, the model is the reference, without gradients."""
    with evaluating(model):
        if _NAME not in model.peft_config:
            with model.disable_adapter():
                yield
            return
        model.set_adapter(_NAME)
        try:
            yield
        finally:
            model.set_adapter("default")


class Reference:
    """Log-probabilities of whole sequences under the reference; those of a conversation to train on are computed once.

    The first epoch computes them pass by pass, the others look them up. They are part of a checkpoint: computed again, in
    the company of other sequences, they would differ in the last bit, and a resumed run from an unbroken one.
    """

    def __init__(self, n_conversations: int, sequences_each: int) -> None:
        self.table = torch.full((n_conversations, sequences_each), torch.nan)

    def logprobs(self, model: PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(sequences,). `inputs["numbers"]` says which conversations they are of; without it nothing is kept."""
        numbers = inputs["numbers"].cpu() if "numbers" in inputs else None
        if numbers is not None and not (known := self.table[numbers]).isnan().any():
            return known.flatten().to(model.device)
        with as_reference(model):
            found = score_replies(model, inputs).logprobs
        if numbers is not None:
            self.table[numbers] = found.float().cpu().view(len(numbers), -1)
        return found

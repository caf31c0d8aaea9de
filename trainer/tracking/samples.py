"""Sample predictions: what the model as it is now answers to a few prompts of the validation file.

Place in the flow: progress, at each evaluation → **samples** → predictions.jsonl → the trackers. One rule: training does not
notice. Greedy, so no random number is drawn; without gradients; in eval mode, which is put back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel

from gateway.chat.bundle import Bundle
from gateway.jobdir import Prediction
from trainer.data.examples import Examples
from trainer.scoring import evaluating

MAX_TOKENS = 64  # of an answer
_PROMPT_TOKENS = 1024  # longer prompts are not asked
_BUDGET_S = 10.0  # of one evaluation; what is not answered by then is left out
_CANDIDATES = 64


@dataclass(frozen=True)
class _Question:
    prompt: list[int]
    expected: list[int]


class Samples:
    """The chosen prompts; `write` answers them."""

    def __init__(self, attempt: Path, model: PeftModel, validation: Examples, bundle: Bundle, count: int) -> None:
        """`attempt` is the folder of the attempt's events."""
        self._path, self._model, self._bundle = attempt / "predictions.jsonl", model, bundle
        self._questions = _choose(validation, count)

    def write(self, step: int) -> None:
        """Appends one line a prompt."""
        deadline = time.monotonic() + _BUDGET_S
        found = []
        with evaluating(self._model):
            for question in self._questions:
                if (left_s := deadline - time.monotonic()) <= 0:
                    break
                found.append(self._answer(question, step, left_s))
        with self._path.open("a") as file:
            file.writelines(json.dumps(asdict(prediction)) + "\n" for prediction in found)

    def _answer(self, question: _Question, step: int, budget_s: float) -> Prediction:
        ids = torch.tensor([question.prompt], device=self._model.device)
        answer = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            use_cache=True,
            max_new_tokens=MAX_TOKENS,
            max_time=budget_s,
            eos_token_id=list(self._bundle.stop_ids) or None,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        prompt = self._text(question.prompt, self._bundle.tokenizer.prefix_ids)
        return Prediction(step, prompt, self._reply(question.expected[:MAX_TOKENS]), self._reply(answer))

    def _reply(self, ids: list[int]) -> str:
        """A reply's text, up to what ends it."""
        text = self._text(ids, self._bundle.stop_ids)
        for stop in self._bundle.stop_strings:
            text = text.partition(stop)[0]
        return text

    def _text(self, ids: list[int], silent: Sequence[int]) -> str:
        """Control tokens are shown by their names, but for the `silent` ones."""
        said = (self._bundle.tokenizer.token_bytes(i) for i in ids if i not in silent)
        return b"".join(said).decode(errors="replace").strip()


def _choose(validation: Examples, count: int) -> list[_Question]:
    """Spread over the file; of each conversation its first reply."""
    step = max(1, len(validation) // _CANDIDATES)
    found = [_Question(*validation.first_reply(number)) for number in range(0, len(validation), step)]
    fitting = [question for question in found if 0 < len(question.prompt) <= _PROMPT_TOKENS]
    return fitting[:: max(1, len(fitting) // count)][:count]

"""What happens at each step: loss and accuracy told, validation measured, checkpoints asked for, the end foreseen.

Place in the flow: a callback of loop → events. One rule: it watches; nothing here changes what is trained.

Every step has train loss and accuracy. With a validation file, `valid_*` is measured on one batch of it at some fifty
steps of a job and at each checkpoint (which batch follows from the step's number), and `full_valid_*` on all of it at the
end of each epoch.
"""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gateway.jobdir import Check, read_json
from trainer.batches import pad
from trainer.distributed import ALONE, Ranks
from trainer.events import EventLog
from trainer.examples import Examples
from trainer.scoring import Objective, Score, evaluating

_PROGRESS_EVERY_S = 2.0
_VALIDATIONS_PER_JOB = 50
_FINISHING_S = 1.0  # the last adapter's export


class InvalidLoss(ArithmeticError):
    """The loss is not a finite number: training went off and cannot come back."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(
            f"The training loss became {loss} at step {step}. "
            "Set a lower learning_rate_multiplier, or look for examples that are empty or not text"
        )


class Progress(TrainerCallback):
    """One attempt's steps, as events."""

    def __init__(
        self,
        events: EventLog,
        check: Check,
        model: PeftModel,
        validation: Examples | None,
        told: set[int],
        objective: Objective,
        ranks: Ranks = ALONE,
    ) -> None:
        """`told` are the steps whose checkpoint an earlier attempt has announced."""
        self.metrics: dict[str, Any] = {}  # of the last step
        self._events, self._check, self._model, self._validation, self._told = events, check, model, validation, told
        self._objective, self._ranks = objective, ranks
        self._loss, self._correct, self._tokens = 0.0, 0.0, 0.0
        self._step_s: deque[float] = deque(maxlen=20)
        self._checkpoint_s = 0.0
        self._began = self._saved = self._said = time.monotonic()

    def tally(self, found: Score) -> None:
        """Counts one pass; a step has one or more."""
        self._loss += float(found.loss.detach())
        self._correct += found.correct
        self._tokens += found.tokens

    def resumed(self, step: int, checkpoint: Path) -> None:
        self._events.write("message", f"Training goes on from the checkpoint at step {step}")
        self.metrics = read_json(checkpoint / "metrics.json")
        if step not in self._told:  # killed between the checkpoint and its event
            self.checkpoint_written()

    def checkpoint_written(self) -> None:
        step = self.metrics["step"]
        self._events.write("checkpoint", f"Checkpoint created at step {step}", self.metrics)
        self._events.sync()
        self._checkpoint_s = time.monotonic() - self._saved

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step, total = state.global_step, state.max_steps
        if not math.isfinite(self._loss):  # before the ranks' losses are added up: this one's job is to say so
            raise InvalidLoss(step, self._loss)
        self._loss, self._correct, self._tokens = self._ranks.total(self._loss, self._correct, self._tokens)
        loss = self._loss / max(1, self._tokens)
        epoch_ends = step % math.ceil(self._check.n_examples / self._check.batch_size) == 0
        self.metrics = {
            "step": step,
            "total_steps": total,
            "train_loss": loss,
            "train_mean_token_accuracy": self._correct / max(1, self._tokens),
            **self._validate(step, total, epoch_ends),
        }
        self._loss, self._correct, self._tokens = 0.0, 0.0, 0.0
        self._events.write("metrics", _sentence(self.metrics), self.metrics)
        now = time.monotonic()
        self._step_s.append(now - self._began)
        self._saved = now
        control.should_save = epoch_ends
        self._foresee(step, total)

    def _validate(self, step: int, total: int, epoch_ends: bool) -> dict[str, float]:
        if self._validation is None:
            return {}
        found: dict[str, float] = {}
        size = min(self._check.batch_size, len(self._validation))
        if epoch_ends or step % math.ceil(total / _VALIDATIONS_PER_JOB) == 0:
            first = step * size
            numbers = [(first + offset) % len(self._validation) for offset in range(size)]
            found |= self._measure("valid", numbers)
        if epoch_ends:
            found |= self._measure("full_valid", list(range(len(self._validation))))
        return found

    def _measure(self, name: str, conversations: list[int]) -> dict[str, float]:
        assert self._validation is not None
        chunks = [conversations[start : start + 8] for start in range(0, len(conversations), 8)]
        sums: list[float] = []  # of each of this rank's chunks: loss, correct, tokens
        with evaluating(self._model):
            for number in self._ranks.share(len(chunks)):
                chunk = chunks[number or 0]
                batch = pad([sequence for conversation in chunk for sequence in self._validation.sequences(conversation)])
                batch = {name: tensor.to(self._model.device) for name, tensor in batch.items()}
                found = self._ranks.inside(self._model, self._objective.score, self._model, batch)
                sums += [0.0] * 3 if number is None else [float(found.loss), found.correct, found.tokens]
        ranks = self._ranks.each(sums)
        in_order = [row[place : place + 3] for place in range(0, len(sums), 3) for row in ranks]  # as one rank has them
        loss, correct, tokens = (sum(column) for column in zip(*in_order, strict=True))
        return {f"{name}_loss": loss / max(1, tokens), f"{name}_mean_token_accuracy": correct / max(1, tokens)}

    def _foresee(self, step: int, total: int) -> None:
        now = time.monotonic()
        if len(self._step_s) < 2 or now - self._said < _PROGRESS_EVERY_S:
            return
        self._said = now
        mean_step_s = sum(self._step_s) / len(self._step_s)
        per_epoch = math.ceil(self._check.n_examples / self._check.batch_size)
        checkpoints = math.ceil((total - step) / per_epoch)
        left_s = (total - step) * mean_step_s + checkpoints * self._checkpoint_s + _FINISHING_S
        self._events.write("progress", "", {"step": step, "estimated_finish": int(time.time() + left_s)})


def _sentence(metrics: dict[str, Any]) -> str:
    """OpenAI's words for a step."""
    parts = [f"training loss={metrics['train_loss']:.2f}"]
    if "valid_loss" in metrics:
        parts.append(f"validation loss={metrics['valid_loss']:.2f}")
    if "full_valid_loss" in metrics:
        parts.append(f"full validation loss={metrics['full_valid_loss']:.2f}")
    return f"Step {metrics['step']}/{metrics['total_steps']}: {', '.join(parts)}"

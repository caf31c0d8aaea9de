"""What happens at each step: loss and accuracy told, validation measured, checkpoints asked for, the end foreseen.

Place in the flow: a callback of loop → events. One rule: it watches and says when to save and when to stop; nothing here
changes what is trained.

Every step has train loss and accuracy. With a validation file, `valid_*` is measured on one batch of it at some fifty
steps of a job and at each checkpoint (which batch follows from the step's number), and `full_valid_*` on all of it at
each checkpoint: at the end of each epoch and every `checkpoint_steps`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gateway.jobdir import Check, JobDir, Options, read_json
from trainer.data.batches import collate
from trainer.data.examples import Examples
from trainer.events import EventLog
from trainer.forecast import Forecast
from trainer.processes.distributed import ALONE, Ranks
from trainer.scoring import Objective, Score, evaluating
from trainer.stopping import Divergence, EarlyStopping, InvalidLoss
from trainer.tracking.followers import Tracking

_PROGRESS_EVERY_S = 2.0
_VALIDATIONS_PER_JOB = 50


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
        job: JobDir | None = None,
        options: Options | None = None,
        tracking: Tracking | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """`told` are the steps whose checkpoint an earlier attempt has announced; `job` is asked whether to pause."""
        options = options or Options()
        self.metrics: dict[str, Any] = {}  # of the last step
        self.gradient_norm: float | None = None  # of the step under way, where it is known
        self.is_listed = False  # whether the checkpoint that is asked for is one for clients, not only for a pause
        self.paused = False
        self.stopping = EarlyStopping(options.early_stopping_patience if validation is not None else None)
        self._divergence = Divergence()
        self._events, self._check, self._model, self._validation, self._told = events, check, model, validation, told
        self._objective, self._job, self._checkpoint_steps = objective, job, options.checkpoint_steps
        self._tracking, self._ranks = tracking, ranks
        self._extras: dict[str, float]
        self._loss, self._correct, self._count, self._extras = 0.0, 0.0, 0.0, {}
        self._per_epoch = math.ceil(check.n_examples / check.batch_size)
        self._valid_every = math.ceil(check.total_steps / _VALIDATIONS_PER_JOB)
        self.forecast = Forecast(
            check.total_steps,
            self._per_epoch,
            options.checkpoint_steps,
            self._valid_every if validation is not None else 0,
        )
        self._began = self._saving = time.monotonic()
        self._foreseen_at = -math.inf
        self._first_batch: tuple[Examples, list[int]] | None = None

    def watch(self, training: Examples, first_batch: list[int]) -> None:
        """Which conversations the first step trains on: measured again, they tell what training did to the model."""
        self._first_batch = training, first_batch

    def tally(self, found: Score) -> None:
        """Counts one pass; a step has one or more."""
        self._loss += float(found.loss.detach())
        self._correct += found.correct
        self._count += found.count
        for name, value in found.extras.items():
            self._extras[name] = self._extras.get(name, 0.0) + value

    # of a checkpoint

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint, so that a run that goes on from it tells and decides the same."""
        return {
            "metrics": self.metrics,
            "listed": self.is_listed,
            "stopping": self.stopping.state(),
            "divergence": self._divergence.state(),
        }

    def resumed(self, step: int, checkpoint: Path) -> None:
        self._events.write("message", f"Training goes on from the checkpoint at step {step}")
        state = read_json(checkpoint / "progress.json")
        self.metrics, self.is_listed = state["metrics"], state["listed"]
        self.stopping.restore(state["stopping"])
        self._divergence.restore(state["divergence"])
        if self.is_listed and step not in self._told:  # killed between the checkpoint and its event
            self.checkpoint_written()

    def checkpoint_written(self) -> None:
        """The folder is complete: told, if it is one for clients."""
        step = self.metrics["step"]
        if self.is_listed:
            self._events.write("checkpoint", f"Checkpoint created at step {step}", self.metrics)
            self._events.sync()
            self.forecast.saved(time.monotonic() - self._saving)
        if self.paused:
            self._events.write("message", f"Training paused behind step {step}")
            self._events.sync()

    def tell_best(self) -> None:
        """Which checkpoint became the result, and why."""
        best, last, loss = self.stopping.best_step, self.metrics["step"], self.stopping.best_loss
        if self.stopping.is_over:
            self._events.write(
                "message",
                f"Stopped early at step {last}: the full validation loss did not get below {loss:.4f}, its value at step "
                f"{best}, in {self.stopping.stale} validations (early_stopping_patience)",
            )
        self._events.write("message", f"The checkpoint at step {best}, full validation loss {loss:.4f}, is the model")

    # called by transformers

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step, total = state.global_step, state.max_steps
        if not math.isfinite(self._loss):  # before the ranks' losses are added up: the one that has it is to say so
            raise InvalidLoss(step, self._loss)
        names = sorted(self._extras)
        loss, correct, count, *extras = self._ranks.total(
            self._loss, self._correct, self._count, *(self._extras[name] for name in names)
        )
        loss /= max(1, count)
        self._divergence.see(step, loss, self.gradient_norm)
        if self._divergence.is_suspected and self._first_batch is not None:
            self._divergence.judge(step, self._score(*self._first_batch)[0])
        self.forecast.stepped(time.monotonic() - self._began)
        self.is_listed = self._is_checkpoint(step) or step == total
        self.metrics = {
            "step": step,
            "total_steps": total,
            "train_loss": loss,
            "train_mean_token_accuracy": correct / max(1, count),
            **{f"train_{name}": value / max(1, count) for name, value in zip(names, extras, strict=True)},
            **self._validate(step),
        }
        self._loss, self._correct, self._count, self._extras = 0.0, 0.0, 0.0, {}
        if self.is_listed and "full_valid_loss" in self.metrics:
            self.stopping.see(step, self.metrics["full_valid_loss"])
        self._events.write("metrics", _sentence(self.metrics), self.metrics)
        if self._tracking is not None:
            self._tracking.on_metrics()
        self.paused = step < total and not self.stopping.is_over and self._is_pause_asked()
        control.should_save = self.is_listed or self.paused
        control.should_training_stop = step >= total or self.stopping.is_over or self.paused
        if step >= total:
            self._judge_end()
        self._saving = time.monotonic()
        self._foresee(step)

    def _is_checkpoint(self, step: int) -> bool:
        return step % self._per_epoch == 0 or bool(self._checkpoint_steps and step % self._checkpoint_steps == 0)

    def _is_pause_asked(self) -> bool:
        return self._job is not None and self._ranks.first_says(self._job.pause.exists())

    def _judge_end(self) -> None:
        """Tells of a model that is no better than before; of a checkpoint that was chosen as the best, validation tells."""
        if self._first_batch is None or self.stopping.patience is not None:
            return
        if complaint := self._divergence.complaint(self._score(*self._first_batch)[0]):
            self._events.write("message", complaint, level="warn")

    def _validate(self, step: int) -> dict[str, float]:
        if self._validation is None:
            return {}
        found: dict[str, float] = {}
        size = min(self._check.batch_size, len(self._validation))
        if self.is_listed or step % self._valid_every == 0:
            first, began = step * size, time.monotonic()
            numbers = [(first + offset) % len(self._validation) for offset in range(size)]
            found |= self._measure(step, "valid", numbers)
            self.forecast.validated(time.monotonic() - began, size / len(self._validation))
        if self.is_listed:
            began = time.monotonic()
            found |= self._measure(step, "full_valid", list(range(len(self._validation))))
            self.forecast.fully_validated(time.monotonic() - began)
            if self._tracking is not None:
                self._tracking.on_evaluation(step)
        return found

    def _measure(self, step: int, name: str, conversations: list[int]) -> dict[str, float]:
        assert self._validation is not None
        loss, accuracy = self._score(self._validation, conversations)
        if not math.isfinite(loss):  # the weights went off in this very step, and nothing is trained on them any more
            raise InvalidLoss(step, loss, "validation")
        return {f"{name}_loss": loss, f"{name}_mean_token_accuracy": accuracy}

    def _score(self, examples: Examples, conversations: list[int]) -> tuple[float, float]:
        """Loss and accuracy of the model as it is now."""
        chunks = [conversations[start : start + 8] for start in range(0, len(conversations), 8)]
        sums: list[float] = []  # of each of this rank's chunks: loss, correct, count
        with evaluating(self._model):
            for number in self._ranks.share(len(chunks)):
                batch = collate(examples, chunks[number or 0])
                batch = {name: tensor.to(self._model.device) for name, tensor in batch.items()}
                found = self._ranks.inside(self._model, self._objective.score, self._model, batch)
                sums += [0.0] * 3 if number is None else [float(found.loss), found.correct, found.count]
        ranks = self._ranks.each(sums)
        in_order = [row[place : place + 3] for place in range(0, len(sums), 3) for row in ranks]  # as one rank has them
        loss, correct, count = (sum(column) for column in zip(*in_order, strict=True))
        return loss / max(1, count), correct / max(1, count)

    def _foresee(self, step: int) -> None:
        left_s = self.forecast.seconds_left(step)
        now = time.monotonic()
        if left_s is not None and now - self._foreseen_at >= _PROGRESS_EVERY_S:
            self._foreseen_at = now
            self._events.write("progress", "", {"step": step, "estimated_finish": math.ceil(time.time() + left_s)})


def _sentence(metrics: dict[str, Any]) -> str:
    """OpenAI's words for a step."""
    parts = [f"training loss={metrics['train_loss']:.2f}"]
    if "valid_loss" in metrics:
        parts.append(f"validation loss={metrics['valid_loss']:.2f}")
    if "full_valid_loss" in metrics:
        parts.append(f"full validation loss={metrics['full_valid_loss']:.2f}")
    return f"Step {metrics['step']}/{metrics['total_steps']}: {', '.join(parts)}"

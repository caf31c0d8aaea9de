"""When a run ends before its last step: nothing gets better any more (early stopping), everything gets worse (divergence), or
somebody pauses it.

Place in the flow: asked by progress at each step. One rule: what each remembers is in the checkpoint, so a run that was
killed or paused stops where an unbroken one would have. Pure; imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

START_STEPS = 10  # whose mean loss is the start
DIVERGED_STEPS = 20  # in a row
DIVERGED_FACTOR, DIVERGED_NATS = 1.5, 1.0  # above the start: both
LEARNT_SHARE = 0.001  # of the loss before training, on the same batch: who gained less has learnt nothing
LEARNT_LOSS = 0.05  # nats: with less than that there is nothing left to learn


class Paused(Exception):
    """Somebody asked for it: there is a checkpoint at this step, and the job goes on from it another time."""

    def __init__(self, step: int) -> None:
        super().__init__(f"paused behind step {step}")
        self.step = step


class InvalidLoss(ArithmeticError):
    """The loss is not a finite number: training went off and cannot come back."""

    def __init__(self, step: int, loss: float, kind: str = "training") -> None:
        super().__init__(
            f"The {kind} loss became {loss} at step {step}. "
            "Set a lower learning_rate_multiplier, or look for examples that are empty or not text"
        )


class Diverged(ArithmeticError):
    """Training gets away from what it is to learn."""


@dataclass
class EarlyStopping:
    """Ends a run after `patience` full validations without a better loss than the best; without a patience, never."""

    patience: int | None
    best_step: int = 0
    best_loss: float = math.inf
    stale: int = 0  # full validations since the best

    @property
    def is_over(self) -> bool:
        return self.patience is not None and self.stale >= self.patience

    def see(self, step: int, full_valid_loss: float) -> None:
        if full_valid_loss < self.best_loss:
            self.best_step, self.best_loss, self.stale = step, full_valid_loss, 0
        else:
            self.stale += 1

    def state(self) -> dict[str, Any]:
        best = None if math.isinf(self.best_loss) else self.best_loss  # JSON has no infinity
        return {"best_step": self.best_step, "best_loss": best, "stale": self.stale}

    def restore(self, state: dict[str, Any]) -> None:
        best = state["best_loss"]
        self.best_step, self.best_loss = state["best_step"], math.inf if best is None else best
        self.stale = state["stale"]


@dataclass
class Divergence:
    """Raises when the loss stays far above where it began, or a gradient has no finite length.

    Far above: more than 1.5 times the start and a nat above it, 20 steps in a row. One hard batch, or ten, end no run, and
    neither does a loss that only fails to fall; a model that predicts worse than before it was tuned for so long has lost
    what it knew. The start is the mean of the first 10 steps.

    That mean does not show a collapse within those steps. The loss of the first one does, since nothing was learnt before
    it; but one batch may be easier than all others. So whoever is far above it for 20 steps is only a suspect, and
    is judged by the very batch of the first step, measured again: what is far above itself has diverged.
    """

    first_loss: float | None = None  # of the first step
    start_loss: float = 0.0  # the sum of the first steps' losses
    start_steps: int = 0
    above: int = 0  # steps in a row
    above_first: int = 0  # far above the first step's loss, in a row

    @property
    def is_suspected(self) -> bool:
        """Whether `judge` is to be called, with the loss on the first step's batch as it is now."""
        return self.above_first >= DIVERGED_STEPS

    def see(self, step: int, loss: float, gradient_norm: float | None) -> None:
        """Raises InvalidLoss, Diverged."""
        if not math.isfinite(loss):
            raise InvalidLoss(step, loss)
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            raise Diverged(
                f"The gradient's norm became {gradient_norm} at step {step}, where the training loss was {loss:.4g}. "
                "Set a lower learning_rate_multiplier"
            )
        if step == 1:
            self.first_loss = loss
        far = self.first_loss is not None and loss > _far_above(self.first_loss)
        self.above_first = self.above_first + 1 if far else 0
        if self.start_steps < START_STEPS:
            self.start_loss, self.start_steps = self.start_loss + loss, self.start_steps + 1
            return
        start = self.start_loss / self.start_steps
        self.above = self.above + 1 if loss > _far_above(start) else 0
        if self.above >= DIVERGED_STEPS:
            raise Diverged(
                f"Training diverged: the loss was {start:.2f} over the first {START_STEPS} steps, and has been more than "
                f"{_far_above(start):.2f} for {DIVERGED_STEPS} steps in a row (it is {loss:.2f} at step {step}). {_REMEDY}"
            )

    def judge(self, step: int, again: float) -> None:
        """A suspect, by the loss on the first step's batch as it is now. Raises Diverged; else the count begins anew."""
        assert self.first_loss is not None
        self.above_first = 0
        if not again <= _far_above(self.first_loss):
            raise Diverged(
                f"Training diverged: on the examples of the first step the loss was {self.first_loss:.2f} before training, and "
                f"is {again:.2f} at step {step}. {_REMEDY}"
            )

    def complaint(self, again: float) -> str | None:
        """What to tell of a run that ends with this loss on the first step's batch; None where it has learnt something."""
        if self.first_loss is None or again <= max((1 - LEARNT_SHARE) * self.first_loss, LEARNT_LOSS):
            return None
        measured = (
            f"on the examples of the first step its loss was {self.first_loss:.4f} before training and is {again:.4f}"
        )
        if again <= (1 + LEARNT_SHARE) * self.first_loss:
            remedy = "Set a higher learning_rate_multiplier, or more n_epochs"
            return f"The model has learnt nothing: {measured} after it. {remedy}"
        return f"Training has made the model worse: {measured} after it. {_REMEDY}"

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


_REMEDY = "Set a lower learning_rate_multiplier, or a larger batch_size"


def _far_above(start: float) -> float:
    return max(DIVERGED_FACTOR * start, start + DIVERGED_NATS)

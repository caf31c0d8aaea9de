"""When a job will be done: what its steps, validations and checkpoints have taken, times how many are to come.

Place in the flow: progress tells it what took how long, and writes what it says as `estimated_finish`. Pure.
"""

from __future__ import annotations

import math
from collections import deque

TIMED_STEPS = 20  # the last ones count: a machine may get busier
FIRST_AFTER_STEPS = 2
_FINISHING_S = 0.5  # the result, and the process's end


class Forecast:
    """`seconds_left` after a few timed steps; None before."""

    def __init__(self, total_steps: int, steps_per_epoch: int, checkpoint_steps: int | None, valid_every: int) -> None:
        """`valid_every` is 0 where nothing is validated."""
        self._total, self._per_epoch = total_steps, steps_per_epoch
        self._checkpoint_steps, self._valid_every = checkpoint_steps, valid_every
        self._step_s: deque[float] = deque(maxlen=TIMED_STEPS)
        self._valid_s = self._full_valid_s = 0.0
        self._checkpoint_s = 0.0

    def stepped(self, seconds: float) -> None:
        if len(self._step_s) == 1 and self._step_s[0] > 2 * seconds:
            self._step_s.clear()  # the first one allocates and warms up, and says little of the others
        self._step_s.append(seconds)

    def validated(self, seconds: float, share: float) -> None:
        """One batch of `share` of the validation file took so long; what all of it takes follows, until it is measured."""
        self._valid_s = seconds
        self._full_valid_s = self._full_valid_s or seconds / share

    def fully_validated(self, seconds: float) -> None:
        self._full_valid_s = seconds

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long, or scoring a witness did, which is most of one."""
        self._checkpoint_s = seconds

    @property
    def ready(self) -> bool:
        return len(self._step_s) >= FIRST_AFTER_STEPS

    def seconds_left(self, step: int) -> float | None:
        if not self.ready:
            return None
        step_s = sum(self._step_s) / len(self._step_s)
        validations = (self._total // self._valid_every - step // self._valid_every) if self._valid_every else 0
        checkpoints = self._checkpoints_after(step)
        full_valid_s = self._full_valid_s if self._valid_every else 0.0
        saving_s = (checkpoints + 1) * self._checkpoint_s + checkpoints * full_valid_s  # the result is written like one
        return (self._total - step) * step_s + validations * self._valid_s + saving_s + _FINISHING_S

    def _checkpoints_after(self, step: int) -> int:
        every = self._checkpoint_steps
        epochs = math.ceil(self._total / self._per_epoch) - step // self._per_epoch
        between = self._total // every - step // every if every else 0
        both = (
            self._total // math.lcm(every, self._per_epoch) - step // math.lcm(every, self._per_epoch) if every else 0
        )
        return epochs + between - both

"""When a run is given up: rules as numbers, no model needed."""

from __future__ import annotations

import json
import math
import re

import pytest

from trainer.__main__ import _explained
from trainer.forecast import Forecast
from trainer.stopping import Diverged, Divergence, EarlyStopping, InvalidLoss


def test_a_patience_counts_full_validations_since_the_best() -> None:
    stopping = EarlyStopping(patience=2)
    for step, loss in enumerate((3.0, 2.0, 2.0, 1.9, 1.95), start=1):
        stopping.see(step, loss)
        assert not stopping.is_over
    stopping.see(6, math.nan)  # never better
    assert stopping.is_over and (stopping.best_step, stopping.best_loss) == (4, 1.9)


def test_without_a_patience_nothing_is_stopped() -> None:
    stopping = EarlyStopping(patience=None)
    for step in range(1, 50):
        stopping.see(step, float(step))
    assert not stopping.is_over


def test_what_they_remember_survives_a_checkpoint() -> None:
    stopping, divergence = EarlyStopping(2), Divergence()
    again, diverging = EarlyStopping(2), Divergence()
    again.restore(json.loads(json.dumps(stopping.state())))
    assert again == stopping
    stopping.see(1, 0.5)
    for step in range(1, 30):
        divergence.see(step, 1.0 if step < 11 else 9.0, 1.0)
    again.restore(json.loads(json.dumps(stopping.state())))
    diverging.restore(json.loads(json.dumps(divergence.state())))
    assert (again, diverging) == (stopping, divergence) and diverging.above == 19
    with pytest.raises(Diverged, match="at step 30"):
        diverging.see(30, 9.0, 1.0)


@pytest.mark.parametrize(
    "losses",
    [
        [2.0] * 500,  # never falls
        [0.1] * 10 + [1.0] * 200,  # ten times the start, and still a good model
        ([3.0] * 10 + [9.0] * 19) * 5,  # nineteen hard batches, again and again
        [8.0] * 10 + [11.5] * 200,  # less than half as much again
    ],
)
def test_what_is_no_divergence_ends_no_run(losses: list[float]) -> None:
    divergence = Divergence()
    for step, loss in enumerate(losses, start=1):
        divergence.see(step, loss, 1.0)
    assert divergence.above < 20


def test_a_loss_far_above_its_start_for_twenty_steps_is_one() -> None:
    divergence = Divergence()
    with pytest.raises(
        Diverged, match=r"the loss was 2\.00 .* more than 3\.00 for 20 steps in a row \(it is 9\.00 at step 30"
    ):
        for step in range(1, 100):
            divergence.see(step, 2.0 if step <= 10 else 9.0, 1.0)


def test_a_collapse_within_the_first_steps_is_one_when_the_first_batch_itself_is_far_worse() -> None:
    """As of a tuned model that is trained on: 0.3, and 7 from the third step on."""
    divergence = Divergence()
    for step in range(1, 22):
        divergence.see(step, 0.3 if step <= 2 else 7.0, 1.0)
        assert not divergence.is_suspected
    divergence.see(22, 7.0, 1.0)
    assert divergence.is_suspected
    easy_first_batch = Divergence(**divergence.state())
    easy_first_batch.judge(22, 0.2)  # the others are that much harder, and nothing is wrong
    assert not easy_first_batch.is_suspected
    with pytest.raises(Diverged, match=r"first step the loss was 0\.30 before training, and is 6\.50 at step 22"):
        divergence.judge(22, 6.5)
    with pytest.raises(Diverged, match="is nan at step 22"):
        divergence.judge(22, math.nan)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (2.0, 1.9, None),
        (2.0, 2.1, "made the model worse: .* was 2.0000 before training and is 2.1000 after it. Set a lower"),
        (2.0, math.nan, "worse"),
        (2.0, 1.9995, "learnt nothing: .* Set a higher"),
        (0.02, 0.021, None),  # known by heart before
        (0.02, 0.5, "worse"),
    ],
)
def test_a_run_is_told_whether_it_got_anywhere_on_the_batch_of_its_first_step(
    before: float, after: float, said: str | None
) -> None:
    divergence = Divergence()
    divergence.see(1, before, 1.0)
    complaint = divergence.complaint(after)
    assert (complaint is None) if said is None else (complaint is not None and re.search(said, complaint))


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_without_a_finite_norm_is_one_at_once(norm: float) -> None:
    with pytest.raises(Diverged, match=r"norm became (inf|nan) at step 3"):
        Divergence().see(3, 2.0, norm)
    with pytest.raises(InvalidLoss, match="became nan at step 3"):
        Divergence().see(3, math.nan, norm)


def test_a_job_that_diverged_says_what_to_change() -> None:
    explained = _explained(Diverged("the loss was 2"), None, None)
    assert (explained.code, explained.message, explained.param) == (
        "training_diverged",
        "the loss was 2",
        "hyperparameters",
    )


def test_the_end_is_foreseen_from_two_steps_with_validations_and_checkpoints_counted() -> None:
    forecast = Forecast(total_steps=100, steps_per_epoch=20, checkpoint_steps=50, valid_every=10)
    forecast.saved(2.0)
    assert forecast.seconds_left(0) is None
    forecast.stepped(9.0)  # the first warms up
    forecast.stepped(1.0)
    assert not forecast.ready
    forecast.stepped(1.0)
    forecast.validated(0.5, share=0.1)
    # 98 steps, 10 batches, 6 checkpoints (20, 40, 50, 60, 80, 100) with 10 times a batch each, and the result
    assert forecast.seconds_left(2) == pytest.approx(98 + 10 * 0.5 + 6 * 5.0 + 7 * 2.0, abs=1)
    forecast.fully_validated(3.0)
    assert forecast.seconds_left(80) == pytest.approx(20 + 2 * 0.5 + 1 * 3.0 + 2 * 2.0, abs=1)

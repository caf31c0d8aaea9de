"""Short runs of a tiny model that go wrong: each is noticed, and says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gateway.jobdir import BaseRef, Event, JobDir, Options, read_events
from tests.trainer.runs import Settings, train_in_process
from trainer.data.dataset import load_examples, read_bundle
from trainer.data.examples import Examples
from trainer.stopping import Diverged, InvalidLoss

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def examples(finished_job: JobDir, files: Path) -> Examples:
    """What `finished_job` learnt."""
    return load_examples(files / "train.jsonl", read_bundle(finished_job), 256)


@pytest.fixture
def settings(finished_job: JobDir) -> Settings:
    """A model that knows something is trained further, much too fast."""
    return Settings(batch_size=8, learning_rate_multiplier=50.0, start=finished_job.adapter)


def events_in(folder: Path) -> list[Event]:
    return [event for event, _ in read_events(JobDir(folder / "job").events_path(1))]


def warnings_in(folder: Path) -> list[str]:
    return [event.message for event in events_in(folder) if event.level == "warn"]


def test_a_model_that_got_worse_is_told_with_a_warning(
    settings: Settings, examples: Examples, tiny_ref: BaseRef, tmp_path: Path
) -> None:
    train_in_process(tmp_path, tiny_ref, examples, settings)
    (warning,) = warnings_in(tmp_path)
    assert warning.startswith("Training has made the model worse") and "a lower learning_rate_multiplier" in warning


def test_a_model_that_learnt_nothing_is_told_with_a_warning_and_one_that_did_is_not(
    examples: Examples, tiny_ref: BaseRef, tmp_path: Path
) -> None:
    train_in_process(tmp_path / "slow", tiny_ref, examples, Settings(batch_size=8, learning_rate_multiplier=1e-6))
    (warning,) = warnings_in(tmp_path / "slow")
    assert warning.startswith("The model has learnt nothing") and "a higher learning_rate_multiplier" in warning
    train_in_process(tmp_path / "well", tiny_ref, examples, Settings(batch_size=8))
    assert not warnings_in(tmp_path / "well")


def test_a_collapse_within_the_first_steps_is_a_divergence(
    settings: Settings, examples: Examples, tiny_ref: BaseRef, tmp_path: Path
) -> None:
    """What it settles at is no higher than the mean of its first ten steps; than its first step it is."""
    again = Examples.of([examples.sequences(number) for number in range(len(examples))] * 6)
    with pytest.raises(Diverged, match="on the examples of the first step"):
        train_in_process(tmp_path, tiny_ref, again, settings)
    losses = [event.data["train_loss"] for event in events_in(tmp_path) if event.type == "metrics"]
    assert 20 <= len(losses) < 30 and losses[-1] < 1.5 * sum(losses[:10]) / 10


@pytest.mark.parametrize("is_validated", [True, False])
def test_a_last_step_that_spoils_the_weights_is_noticed(
    is_validated: bool, examples: Examples, tiny_ref: BaseRef, tmp_path: Path
) -> None:
    """No later step has a loss to tell of it: the validation has, and without one the adapter's own witness."""
    settings = Settings(
        batch_size=40,
        learning_rate_multiplier=1e30,
        options=Options(scheduler="constant", warmup_ratio=0.0),
        validation=examples if is_validated else None,
    )
    with pytest.raises(InvalidLoss if is_validated else Diverged, match="a lower learning_rate_multiplier"):
        train_in_process(tmp_path, tiny_ref, examples, settings)
    assert not [event for event in events_in(tmp_path) if event.type == "checkpoint"]

"""Stored examples: what is read is what was written, and nothing is read that was written for something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gateway.chat.render import IGNORED, TrainingSequence
from gateway.jobdir import JobDir, Options
from tests.tiny_model import write_job
from trainer.__main__ import _examples
from trainer.check import run_check
from trainer.data.dataset import load_examples, read_bundle, stored_examples
from trainer.data.examples import Examples, StaleExamples, open_examples, write_examples

PAIRS = [
    [TrainingSequence([1, 2, 3], [IGNORED, 2, 3]), TrainingSequence([1, 9], [IGNORED, 9])],
    [TrainingSequence([4], [4])],
    [TrainingSequence([5, 6, 7, 8], [IGNORED, IGNORED, IGNORED, 8]), TrainingSequence([5], [IGNORED])],
]


@pytest.fixture
def job(tiny_base: Path, files: Path, tmp_path: Path) -> JobDir:
    """A job that was checked."""
    job = write_job(tmp_path / "job", tiny_base, files / "train.jsonl", validation=files / "valid.jsonl")
    job.write_check(run_check(job, job.read_spec()))
    return job


def as_pairs(examples: Examples) -> list[list[tuple[list[int], list[int]]]]:
    return [[(s.ids, s.labels) for s in examples.sequences(number)] for number in range(len(examples))]


def test_what_is_opened_is_what_was_written(tmp_path: Path) -> None:
    with write_examples(tmp_path / "training", "x") as writer:
        writer.extend(Examples.of(PAIRS[:2], [True, False]))
        writer.extend(Examples.of(PAIRS[2:]))
        assert not (tmp_path / "training").exists(), "it is not there before it is whole"
    opened, held = open_examples(tmp_path / "training", "x"), Examples.of(PAIRS, [True, False, True])
    assert as_pairs(opened) == as_pairs(held) == [[(s.ids, s.labels) for s in pair] for pair in PAIRS]
    assert opened.desirable.tolist() == held.desirable.tolist() == [1, 0, 1]
    assert opened.lengths().tolist() == held.lengths().tolist() == [3, 1, 4]
    assert opened.n_tokens == held.n_tokens == 11


def test_no_examples_at_all_can_be_written_too(tmp_path: Path) -> None:
    with write_examples(tmp_path / "training", "x"):
        pass
    opened = open_examples(tmp_path / "training", "x")
    assert (len(opened), opened.lengths().tolist()) == (0, [])


def test_a_writing_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), write_examples(tmp_path / "training", "x") as writer:
        writer.extend(Examples.of(PAIRS))
        raise OSError("the disk is full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("identity", ["y", "x"])
def test_stale_or_cut_examples_are_not_opened(identity: str, tmp_path: Path) -> None:
    with write_examples(tmp_path / "training", "x") as writer:
        writer.extend(Examples.of(PAIRS))
    if identity == "x":
        with (tmp_path / "training" / "ids").open("r+b") as file:
            file.truncate(4)
    with pytest.raises(StaleExamples):
        open_examples(tmp_path / "training", identity)


def test_the_check_stores_what_rendering_the_files_gives(job: JobDir) -> None:
    training, validation = stored_examples(job, job.read_spec())
    bundle = read_bundle(job)
    assert validation is not None
    for stored, name in ((training, "train.jsonl"), (validation, "valid.jsonl")):
        assert as_pairs(stored) == as_pairs(load_examples(job.data / name, bundle, 256))


def test_examples_of_other_options_are_written_again(job: JobDir) -> None:
    spec = job.read_spec()
    others = [
        replace(spec, max_length=64),
        replace(spec, turns="last"),
        replace(spec, template_digest="sha256:0"),
        replace(spec, options=Options(train_on="all")),
        replace(spec, training_file=replace(spec.training_file, digest="sha256:1")),
    ]
    for other in others:
        with pytest.raises(StaleExamples):
            stored_examples(job, other)
    assert len(_examples(job, others[0])[0]) == 40
    assert len(stored_examples(job, others[0])[0]) == 40


def test_a_file_with_a_problem_gets_no_examples(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text((files / "train.jsonl").read_text() + "oops\n")
    job = write_job(tmp_path / "job", tiny_base, path)
    assert run_check(job, job.read_spec()).error is not None
    assert list(job.examples.iterdir()) == []


def test_the_first_reply_is_what_is_learnt_after_a_prompt_and_half_of_what_is_learnt_whole() -> None:
    ids = [5, 6, 7, 8, 9, 10]
    turns = TrainingSequence(ids, [IGNORED, IGNORED, 7, 8, IGNORED, 10])
    examples = Examples.of([[turns], [TrainingSequence(ids, ids)], [TrainingSequence(ids, [IGNORED] * 5 + [10])]])
    assert [examples.first_reply(number) for number in range(3)] == [
        ([5, 6], [7, 8]),
        ([5, 6, 7], [8, 9, 10]),
        ([5, 6, 7, 8, 9], [10]),
    ]

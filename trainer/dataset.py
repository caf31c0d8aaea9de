"""A pinned JSONL file → sequences of ids and labels through the one renderer; and what the file is found to be.

Place in the flow: conversations → **dataset** → loop. One rule: ids and labels come from `gateway.chat.render`, nothing here
adds or takes away a token. No torch: the check runs without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.chat.bundle import Bundle
from gateway.chat.conversation import RenderError
from gateway.chat.render import IGNORED, TrainingSequence, render_example
from gateway.jobdir import FileRef, JobDir, JobSpec, TrainerError, Turns
from trainer.conversations import BadExample, parse_example
from trainer.examples import Examples, open_examples, write_examples
from trainer.jsonl import BadLine, read_jsonl

MIN_EXAMPLES = 10
_FORMAT = 1  # of what is rendered: another number, and examples that were stored before are not used
_PROBLEMS_KEPT = 20
_PROBLEMS_IN_MESSAGE = 3


@dataclass
class Survey:
    """What reading one file found. Counts are of one epoch."""

    n_examples: int = 0
    n_tokens: int = 0
    n_trained_tokens: int = 0
    n_truncated: int = 0
    n_problems: int = 0
    problems: list[BadLine] = field(default_factory=list)  # the first ones

    def add(self, sequences: list[TrainingSequence]) -> None:
        self.n_examples += 1
        self.n_tokens += sum(len(sequence.ids) for sequence in sequences)
        self.n_trained_tokens += sum(len(s.labels) - s.labels.count(IGNORED) for s in sequences)
        self.n_truncated += any(sequence.truncated for sequence in sequences)

    def add_problem(self, problem: BadLine) -> None:
        self.n_problems += 1
        if len(self.problems) < _PROBLEMS_KEPT:
            self.problems.append(problem)

    def error(self, kind: str, min_examples: int) -> TrainerError | None:
        """Why the file cannot be used, in OpenAI's codes; `kind` is "training" or "validation"."""
        if self.problems:
            shown = " · ".join(str(problem) for problem in self.problems[:_PROBLEMS_IN_MESSAGE])
            more = self.n_problems - _PROBLEMS_IN_MESSAGE
            rest = f" · and {more} more" if more > 0 else ""
            message = f"The {kind} file has {self.n_problems} invalid example(s). {shown}{rest}"
            return TrainerError(f"invalid_{kind}_file", message, f"{kind}_file")
        if self.n_examples < min_examples:
            message = (
                f"{kind.capitalize()} file has {self.n_examples} example(s), "
                f"but must have at least {min_examples} example{'s' if min_examples > 1 else ''}"
            )
            return TrainerError("invalid_n_examples", message, f"{kind}_file")
        return None


def read_bundle(job: JobDir) -> Bundle:
    """The template bundle that the job was given."""
    return Bundle.from_files({path.name: path.read_bytes() for path in job.template.iterdir() if path.is_file()})


def prepare_examples(job: JobDir, spec: JobSpec) -> tuple[Survey, Survey | None]:
    """Reads and renders every line of both files, and writes the examples beside them: memory does not grow with a file.

    A file with a problem gets no examples. Raises OSError for a disk that is full.
    """
    bundle = read_bundle(job)
    training = _prepare_file(job, spec, spec.training_file, "training", bundle)
    if spec.validation_file is None:
        return training, None
    return training, _prepare_file(job, spec, spec.validation_file, "validation", bundle)


def stored_examples(job: JobDir, spec: JobSpec) -> tuple[Examples, Examples | None]:
    """What `prepare_examples` wrote for this very spec: training and validation. Raises StaleExamples."""
    training = open_examples(job.examples / "training", _identity(spec, spec.training_file))
    if spec.validation_file is None:
        return training, None
    return training, open_examples(job.examples / "validation", _identity(spec, spec.validation_file))


def load_examples(path: Path, bundle: Bundle, max_length: int, turns: Turns = "all") -> Examples:
    """All conversations of a file that has no problem, in memory."""
    return Examples.of(map(_usable, render_file(path, bundle, max_length, turns)))


def _usable(found: list[TrainingSequence] | BadLine) -> list[TrainingSequence]:
    if isinstance(found, BadLine):
        raise ValueError(str(found))
    return found


def _prepare_file(job: JobDir, spec: JobSpec, file: FileRef, kind: str, bundle: Bundle) -> Survey:
    survey = Survey()
    try:
        with write_examples(job.examples / kind, _identity(spec, file)) as writer:
            for found in render_file(job.path / file.path, bundle, spec.max_length, spec.turns):
                if isinstance(found, BadLine):
                    survey.add_problem(found)
                    continue
                survey.add(found)
                if not survey.n_problems:
                    writer.add(found)
            if survey.n_problems:
                raise _Unusable
    except _Unusable:
        pass
    return survey


class _Unusable(Exception):
    """Ends the writing of examples that nobody may train on."""


def _identity(spec: JobSpec, file: FileRef) -> str:
    """Names all that a file's ids and labels follow from."""
    parts = [
        _FORMAT,
        file.digest,
        spec.template_digest,
        spec.max_length,
        spec.turns,
        spec.method,
        spec.options.train_on,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def render_file(
    path: Path, bundle: Bundle, max_length: int, turns: Turns = "all"
) -> Iterator[list[TrainingSequence] | BadLine]:
    """Each line's sequences, or what is wrong with the line."""
    for line in read_jsonl(path):
        yield render_line(line, bundle, max_length, turns)


def render_line(
    line: tuple[int, Any] | BadLine, bundle: Bundle, max_length: int, turns: Turns = "all"
) -> list[TrainingSequence] | BadLine:
    """A line as it was read → its sequences, or what is wrong with it."""
    if isinstance(line, BadLine):
        return line
    number, value = line
    try:
        example = parse_example(value)
        return render_example(bundle, example.messages, max_length, example.tools or None, turns=turns)
    except (BadExample, RenderError) as error:
        return BadLine(number, str(error))

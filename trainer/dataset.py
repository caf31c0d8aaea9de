"""A pinned JSONL file → sequences of ids and labels through the one renderer; and what the file is found to be.

Place in the flow: conversations → **dataset** → loop. One rule: ids and labels come from `gateway.chat.render`, nothing here
adds or takes away a token. No torch: the check runs without it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.chat.bundle import Bundle
from gateway.chat.conversation import RenderError
from gateway.chat.render import IGNORED, TrainingSequence, render_example
from gateway.jobdir import JobDir, TrainerError, Turns
from trainer.conversations import BadExample, parse_example
from trainer.jsonl import BadLine, read_jsonl

MIN_EXAMPLES = 10
_PROBLEMS_KEPT = 20
_PROBLEMS_IN_MESSAGE = 3


@dataclass
class Examples:
    """Conversations as flat arrays: sequence s is ids[starts[s]:starts[s + 1]], conversation c its sequences likewise."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    trained: bytearray = field(default_factory=bytearray)  # 1 where the id is also the label
    starts: array[int] = field(default_factory=lambda: array("q", [0]))
    conversations: array[int] = field(default_factory=lambda: array("q", [0]))

    def __len__(self) -> int:
        """How many conversations there are."""
        return len(self.conversations) - 1

    def append(self, sequences: list[TrainingSequence]) -> None:
        """Adds one conversation."""
        for sequence in sequences:
            self.ids.extend(sequence.ids)
            self.trained.extend(label != IGNORED for label in sequence.labels)
            self.starts.append(len(self.ids))
        self.conversations.append(len(self.starts) - 1)

    def sequences(self, conversation: int) -> list[TrainingSequence]:
        """The sequences of one conversation, as they were rendered."""
        found = []
        for number in range(self.conversations[conversation], self.conversations[conversation + 1]):
            span = slice(self.starts[number], self.starts[number + 1])
            ids = self.ids[span].tolist()
            labels = [i if trained else IGNORED for i, trained in zip(ids, self.trained[span], strict=True)]
            found.append(TrainingSequence(ids, labels))
        return found

    def lengths(self) -> array[int]:
        """The longest sequence of each conversation."""
        return array(
            "i",
            (
                max(self.starts[n + 1] - self.starts[n] for n in range(first, last))
                for first, last in zip(self.conversations, self.conversations[1:], strict=False)
            ),
        )


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


def survey_file(path: Path, bundle: Bundle, max_length: int, turns: Turns = "all") -> Survey:
    """Reads and renders every line, keeping only counts and the first problems: memory does not grow with the file."""
    survey = Survey()
    for found in render_file(path, bundle, max_length, turns):
        if isinstance(found, BadLine):
            survey.n_problems += 1
            if len(survey.problems) < _PROBLEMS_KEPT:
                survey.problems.append(found)
        else:
            survey.add(found)
    return survey


def load_examples(path: Path, bundle: Bundle, max_length: int, turns: Turns = "all") -> Examples:
    """All conversations of a file that was surveyed without a problem."""
    examples = Examples()
    for found in render_file(path, bundle, max_length, turns):
        if isinstance(found, BadLine):
            raise ValueError(f"{path.name} passed its check but now {found}")
        examples.append(found)
    return examples


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

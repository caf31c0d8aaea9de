"""What a file is found to be, counted as its lines are rendered.

Place in the flow: rendering → **survey** → dataset. Pure.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gateway.chat.render import IGNORED
from gateway.jobdir import TrainerError
from trainer.data.examples import Examples
from trainer.data.jsonl import parse_line
from trainer.data.lines import BadLine, Raw
from trainer.data.rendering import Conversation, Renderer

MIN_EXAMPLES = 10
_PROBLEMS_KEPT = 20
_PROBLEMS_IN_MESSAGE = 3


@dataclass
class Survey:
    """What reading one file found. Counts are of one epoch."""

    n_examples: int = 0
    n_tokens: int = 0
    n_trained_tokens: int = 0
    n_truncated: int = 0
    n_dropped: int = 0
    n_problems: int = 0
    n_sequences: int = 0
    longest: int = 0  # tokens of the longest conversation
    remarks: Counter[str] = field(default_factory=Counter)
    problems: list[BadLine] = field(default_factory=list)  # the first ones

    def add(self, found: list[Conversation] | BadLine) -> None:
        """What a line gave: no conversation where it was dropped."""
        if isinstance(found, BadLine):
            self.n_problems += 1
            if len(self.problems) < _PROBLEMS_KEPT:
                self.problems.append(found)
            return
        self.n_dropped += not found
        for conversation in found:
            n_tokens = sum(len(sequence.ids) for sequence in conversation.sequences)
            self.n_examples += 1
            self.n_sequences += len(conversation.sequences)
            self.n_tokens += n_tokens
            self.longest = max(self.longest, n_tokens)
            self.n_trained_tokens += sum(len(s.labels) - s.labels.count(IGNORED) for s in conversation.sequences)
            self.n_truncated += any(sequence.truncated for sequence in conversation.sequences)
            self.remarks.update(conversation.remarks)

    def merge(self, later: Survey) -> None:
        """Adds what the lines after these gave."""
        for name in (
            "n_examples",
            "n_tokens",
            "n_trained_tokens",
            "n_truncated",
            "n_dropped",
            "n_problems",
            "n_sequences",
        ):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.longest = max(self.longest, later.longest)
        self.remarks.update(later.remarks)
        self.problems = (self.problems + later.problems)[:_PROBLEMS_KEPT]

    def error(self, kind: str, min_examples: int) -> TrainerError | None:
        """Why the file cannot be used, in OpenAI's codes; `kind` is "training" or "validation"."""
        if self.problems:
            shown = " · ".join(str(problem)[:300] for problem in self.problems[:_PROBLEMS_IN_MESSAGE])
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


def render_chunk(renderer: Renderer, raws: list[Raw | BadLine]) -> tuple[Survey, Examples]:
    """Some lines of a file. The examples are none where one of them has a problem."""
    survey, conversations = Survey(), []
    for raw in raws:
        found = renderer.render(parse_line(raw))
        survey.add(found)
        if isinstance(found, list):
            conversations += found
    renderer.forget()
    return survey, _flat([] if survey.n_problems else conversations)


def _flat(conversations: list[Conversation]) -> Examples:
    return Examples.of((one.sequences for one in conversations), (one.desirable for one in conversations))

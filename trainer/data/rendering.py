"""Lines of one file → conversations as ids and labels, through the one renderer.

Place in the flow: forms → **rendering** → dataset. One rule: ids and labels come from `gateway.chat.render`, nothing here adds
or takes away a token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gateway.chat.bundle import Bundle
from gateway.chat.conversation import Message, RenderError
from gateway.chat.render import TrainingSequence, fitting_messages, render_example, render_replies
from gateway.jobdir import Method, TrainOn, Turns
from trainer.data.conversations import BadExample, Example
from trainer.data.forms import Form, form_of, unknown_form
from trainer.data.forms.alpaca import INSTRUCTION_HEADING
from trainer.data.lines import BadLine, Line

SPLIT = "that were too long and were split at the borders of turns"
UNPAIRED = "taken from pairs, the chosen reply as desirable and the rejected as undesirable"
_PLACE = re.compile(r"messages\[(\d+)\] ")


@dataclass(frozen=True)
class Rendering:
    """How a file is rendered; `method` None is what the file's form is for."""

    bundle: Bundle
    max_length: int
    turns: Turns = "all"
    train_on: TrainOn = "assistant"
    method: Method | None = None


@dataclass(slots=True)
class Conversation:
    """What counts once in a batch; of a preference pair the chosen sequence and then the rejected one."""

    sequences: list[TrainingSequence]
    desirable: bool = True
    remarks: tuple[str, ...] = ()


class Renderer:
    """Holds every line of a file to one form; None where no line of it has a known one."""

    def __init__(self, rendering: Rendering, form: Form | None) -> None:
        self._how, self._form = rendering, form
        self._method = rendering.method or (form.methods[0] if form else "supervised")
        self._headings = INSTRUCTION_HEADING in rendering.bundle.template.literal_text

    def render(self, line: Line | BadLine) -> list[Conversation] | BadLine:
        """A line's conversations, none where it is dropped; or what is wrong with it."""
        if isinstance(line, BadLine):
            return line
        try:
            return [found for example in self._read(line) for found in self._rendered(example)]
        except BadExample as error:
            return BadLine(line.number, error.reason, error.field, line.item)

    def forget(self) -> None:
        """Lets go of what is remembered of the lines so far: no later line goes on from them."""
        self._how.bundle.tokenizer.forget()

    def _read(self, line: Line) -> list[Example]:
        form = form_of(line.value)
        if self._form is None or not isinstance(line.value, dict):
            raise unknown_form(line.value)
        if form not in (None, self._form):
            raise BadExample(
                f"is in {form.name} ({form.keys}), but the file begins in {self._form.name} ({self._form.keys}); "
                "make one file of each"
            )
        return self._form.read(line.value, self._headings)

    def _rendered(self, example: Example) -> list[Conversation]:
        try:
            if self._method == "supervised":
                return self._supervised(example)
            return self._replies(example)
        except RenderError as error:
            raise _placed(error, example) from error

    def _supervised(self, example: Example) -> list[Conversation]:
        how, tools = self._how, example.tools or None
        found = render_example(
            how.bundle, example.messages, how.max_length, tools, turns=how.turns, train_on=how.train_on
        )
        is_cut = any(sequence.truncated for sequence in found)
        if self._form is None or not self._form.splits or not is_cut or how.turns == "last":
            return [Conversation(found, remarks=example.remarks)]
        parts = [
            render_example(how.bundle, part, how.max_length, tools, train_on=how.train_on)
            for part in self._split(example)
        ]
        if len(parts) == 1:
            return [Conversation(found, remarks=example.remarks)]
        first, *rest = parts
        return [Conversation(first, remarks=(*example.remarks, SPLIT)), *map(Conversation, rest)]

    def _split(self, example: Example) -> list[list[Message]]:
        """Pieces of whole turns that fit, each with the system message; a turn that is too long is one by itself."""
        system = [message for message in example.messages if message.role == "system"]
        rest = [message for message in example.messages if message.role != "system"]
        parts = []
        while rest:
            cut = fitting_messages(self._how.bundle, [*system, *rest], self._how.max_length, example.tools or None)
            cut -= len(system)
            if cut <= 0:
                cut = next((n for n, message in enumerate(rest) if n and message.role == "user"), len(rest))
            parts.append([*system, *rest[:cut]])
            rest = rest[cut:]
        return parts

    def _replies(self, example: Example) -> list[Conversation]:
        how = self._how
        before, chosen = example.messages[:-1], example.messages[-1]
        replies = [chosen] if example.rejected is None else [chosen, example.rejected]
        found = render_replies(
            how.bundle, before, replies, how.max_length, example.tools or None, train_on=how.train_on
        )
        if example.rejected is None:
            return [Conversation(found, example.desirable, example.remarks)]
        if found[0].ids == found[1].ids:
            raise BadExample(
                "are the same to the model, as shortened to its length: there is nothing to prefer", "replies"
            )
        if self._method == "kto":
            first, second = found
            return [Conversation([first], True, (*example.remarks, UNPAIRED)), Conversation([second], False)]
        return [Conversation(found, remarks=example.remarks)]


def _placed(error: RenderError, example: Example) -> BadExample:
    """What the template says of messages[n], said of where that message stands in its line."""
    reason = str(error)
    if (found := _PLACE.match(reason)) and int(found[1]) < len(example.paths):
        field = example.paths[int(found[1])]
        return BadExample(reason.removeprefix(f"messages[{found[1]}] "), field)
    return BadExample(reason)

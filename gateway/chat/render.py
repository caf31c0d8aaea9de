"""Messages → ids, for serving and for training: the same function makes both prompts.

Training, for each assistant turn: the prompt is what serving would send for the messages before it; the trained span is the
reply through the stop token that the server honours; all else is −100.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gateway.chat.bundle import Bundle
from gateway.chat.conversation import Message, Options, RenderError, ToolCall, Tools
from gateway.chat.frame import shared_beginning
from gateway.chat.sandbox import TooLong
from gateway.chat.speech import offered

IGNORED = -100
QUICK_CHARACTERS = 4000  # what can be rendered and tokenised within about a millisecond
_LONG_TURN = (
    200  # characters from which a turn to learn goes on from its prompt's ids: the prompt was written just before
)
_MESSAGE_WEIGHT = 20  # characters that a message counts for besides its own


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an engine is sent, and what ends its reply."""

    ids: list[int]
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    opens_reasoning: bool = False  # the prompt ends inside a reasoning block: the reply starts with thoughts


@dataclass(slots=True)
class TrainingSequence:
    """Ids and labels of equal length; labels are −100 where nothing is learnt."""

    ids: list[int]
    labels: list[int]
    truncated: bool = False


def render_prompt(
    bundle: Bundle, messages: Sequence[Message], tools: Tools | None = None, options: Options | None = None
) -> Prompt:
    """Ids that ask for the assistant's next reply. `options` are over the bundle's.

    Raises RenderError when the template cannot say it.
    """
    return _Writer(bundle, tools, options).prompt(messages)


def render_quickly(
    bundle: Bundle, messages: Sequence[Message], tools: Tools | None = None, options: Options | None = None
) -> Prompt | None:
    """The same, or None when it may take more than a few milliseconds: then it is work for a thread."""
    if tools or _size(messages, options) > QUICK_CHARACTERS:
        return None
    if any(message.tool_calls or message.role == "tool" for message in messages):
        return None  # the first of them probes the template
    try:
        return _Writer(bundle, tools, options, quick=True).prompt(messages)
    except TooLong:
        return None


def _size(messages: Sequence[Message], options: Options | None) -> int:
    """About how many characters are to be gone through; an option that is a list or a mapping is more than any bound."""
    said = sum(len(m.content) + len(m.reasoning or "") + len(m.name or "") for m in messages)
    for value in (options or {}).values():
        said += QUICK_CHARACTERS + 1 if isinstance(value, list | tuple | dict) else len(str(value)[:QUICK_CHARACTERS])
    return said + _MESSAGE_WEIGHT * len(messages)


def render_example(
    bundle: Bundle,
    messages: Sequence[Message],
    max_length: int,
    tools: Tools | None = None,
    options: Options | None = None,
    turns: Literal["all", "last"] = "all",
    train_on: Literal["assistant", "all"] = "assistant",
) -> list[TrainingSequence]:
    """Training sequences of one conversation, at least one. Turns whose prompts go on from one another share one.

    `turns` "last" learns the last of the assistant's turns that may be learnt, "all" each of them; `train_on` "all" learns
    the prompts too. Too long a conversation loses its oldest turns, turn by turn; a single turn that is too long by itself
    loses the start of its prompt, then the end of its reply. Raises RenderError when no assistant turn is to be trained.
    """
    learnt = [number for number, message in enumerate(messages) if message.role == "assistant" and message.weight != 0]
    if not learnt:
        raise RenderError("there is no assistant message to learn from (or all have weight 0)")
    if turns == "last":
        learnt = learnt[-1:]
    writer = _Writer(bundle, tools, options, learns_prompts=train_on == "all")
    sequences = _shared_sequences(writer, messages[: learnt[-1] + 1], frozenset(learnt), max_length)
    if sequences is not None:
        return sequences
    fitted, first = [], 0
    for turn in learnt:  # what had to go for one turn is too much for those after it
        (sequence,), first = _fitted(writer, messages[:turn], messages[turn : turn + 1], max_length, first)
        fitted.append(sequence)
    return fitted


def render_replies(
    bundle: Bundle,
    messages: Sequence[Message],
    replies: Sequence[Message],
    max_length: int,
    tools: Tools | None = None,
    options: Options | None = None,
    train_on: Literal["assistant", "all"] = "assistant",
) -> list[TrainingSequence]:
    """A sequence for each of several replies to the same messages, a preference pair's say; only the replies are learnt.

    The prompt is the same in all of them, also where it has to be shortened for the longest reply.
    """
    writer = _Writer(bundle, tools, options, learns_prompts=train_on == "all")
    return _fitted(writer, messages, replies, max_length, 0)[0]


def fitting_messages(bundle: Bundle, messages: Sequence[Message], max_length: int, tools: Tools | None = None) -> int:
    """How many messages fit together, from the first one through the last reply before a user's turn, or the end.

    0 when not even the first reply does.
    """
    writer = _Writer(bundle, tools, None)
    fitting = 0
    for number, message in enumerate(messages):
        if message.role == "assistant":
            if sum(map(len, writer.turn(messages[:number], message))) > max_length:
                break
            if number + 1 == len(messages) or messages[number + 1].role == "user":
                fitting = number + 1
    return fitting


def _shared_sequences(
    writer: _Writer, messages: Sequence[Message], learnt: frozenset[int], max_length: int
) -> list[TrainingSequence] | None:
    """None as soon as one is too long."""
    sequences: list[TrainingSequence] = []
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt, reply = writer.turn(messages[:number], message, learnt=number in learnt)
        open_ = sequences[-1] if sequences else None
        if open_ is None or prompt[: len(open_.ids)] != open_.ids:
            open_ = TrainingSequence([], [])
            sequences.append(open_)
        added = prompt[len(open_.ids) :]
        open_.ids += added + reply
        open_.labels += writer.prompt_labels(added) + (reply if number in learnt else [IGNORED] * len(reply))
        if len(open_.ids) > max_length:
            return None
    return [s for s in sequences if s.labels.count(IGNORED) < len(s.labels)]


def _fitted(
    writer: _Writer, before: Sequence[Message], replies: Sequence[Message], max_length: int, first: int
) -> tuple[list[TrainingSequence], int]:
    """The replies after as many of the messages as fit, of those that are no system message from number `first` on.

    Also the number of the first that is kept.
    """
    system = [message for message in before if message.role == "system"]
    said = [message for message in before if message.role != "system"]
    borders = [number for number in range(first + 1, len(said)) if said[number].role == "user"]
    while True:
        pairs = [writer.turn([*system, *said[first:]] if first else before, reply) for reply in replies]
        longest = max(len(reply) for _, reply in pairs)
        fits = len(pairs[0][0]) + longest <= max_length
        if fits or not borders:
            break
        first = borders.pop(0)
    room = max(1, max_length - longest)
    sequences = []
    for prompt, reply in pairs:
        prompt = prompt[-room:]
        reply = reply[: max_length - len(prompt)]
        labels = writer.prompt_labels(prompt) + reply
        sequences.append(TrainingSequence(prompt + reply, labels, truncated=first > 0 or not fits))
    return sequences, first


class _Writer:
    """Writes conversations through a bundle: text by its template, ids by its tokenizer, with one set of tools and options."""

    def __init__(
        self,
        bundle: Bundle,
        tools: Tools | None,
        options: Options | None,
        *,
        quick: bool = False,
        learns_prompts: bool = False,
    ) -> None:
        self._bundle, self._frame = bundle, bundle.frame
        self._template, self._tokenizer = bundle.template, bundle.tokenizer
        self._quick, self._learns_prompts = quick, learns_prompts
        mark_all = bundle.controls.mark_all
        try:
            self._tools = [mark_all(offered(tool)) for tool in tools] if tools else None
            self._options = {**bundle.options, **mark_all(options or {})}
        except RecursionError as error:
            raise RenderError("a tool or a render option is nested too deeply") from error

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        text = self._text([self._marked(message) for message in messages], generate=True)
        opens = self._opened_at(text) is not None
        return Prompt(self._ids(text), self._bundle.stop_ids, self._bundle.stop_strings, opens)

    def prompt_labels(self, ids: list[int]) -> list[int]:
        return list(ids) if self._learns_prompts else [IGNORED] * len(ids)

    def turn(self, before: Sequence[Message], reply: Message, *, learnt: bool = True) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and those of the reply as it stands after it, through the stop.

        Raises RenderError, too, when the reply is to be `learnt` and the template leaves out part of it.
        """
        marked, said = [self._marked(message) for message in before], self._marked(reply)
        prompt = self._text(marked, generate=True)
        written = self._reply(prompt, self._text([*marked, said], generate=False), said)
        prompt_ids, whole = self._ids(prompt, _LONG_TURN), self._ids(prompt + written, _LONG_TURN)
        if whole[: len(prompt_ids)] == prompt_ids:
            reply_ids = whole[len(prompt_ids) :]
        else:  # The tokenizer would merge across the border; serving does not, so neither does training.
            reply_ids = self._tokenizer.encode_continuation(written)
        if learnt:
            self._check_whole(reply, written, reply_ids)
        return prompt_ids, reply_ids

    def _check_whole(self, reply: Message, written: str, reply_ids: list[int]) -> None:
        name = self._template.name
        inline = self._inline_thoughts(reply)
        thoughts = self._bundle.controls.mark(reply.reasoning or (inline[0] if inline else "")).strip()
        if thoughts not in written:
            raise RenderError(
                f"the template '{name}' leaves the assistant's reasoning out here, so it cannot be learnt; leave it out of the "
                "example, or write through a render option that switches it on"
            )
        stop = next((i for i in reply_ids[:-1] if i in self._bundle.stop_ids), None)
        if stop is not None:
            raise RenderError(
                f"the template '{name}' writes {self._tokenizer.name_of(stop)!r} within a reply, where serving stops: what "
                "comes after it cannot be learnt"
            )

        for text in self._bundle.stop_strings:
            if 0 <= written.find(text) < len(written) - len(text):
                raise RenderError(
                    f"a reply holds {text!r}, at which serving stops under the template '{name}': what comes after it cannot "
                    "be learnt"
                )

    def _text(self, messages: list[Message], *, generate: bool) -> str:
        return self._template.text(
            messages, generate=generate, tools=self._tools, options=self._options, quick=self._quick
        )

    def _ids(self, text: str, long: int | None = None) -> list[int]:
        ids = self._tokenizer.encode(text) if long is None else self._tokenizer.encode(text, long)
        prefix = self._tokenizer.prefix_ids
        if not self._template.adds_bos or ids[: len(prefix)] == prefix:  # a template that writes BOS itself gets one
            return ids
        return prefix + ids

    def _reply(self, prompt: str, whole: str, said: Message) -> str:
        """What follows the prompt in the conversation as the template writes it, through the stop and no further."""
        opened = self._opened_at(prompt)
        base = prompt if opened is None else prompt[:opened]
        extra = ""
        if opened is None and not whole.startswith(prompt):
            base = shared_beginning(prompt, whole)
            extra = prompt[len(base) :]
        if not whole.startswith(base) or (extra and extra != self._frame.extra and not self._is_reasoning(extra)):
            if said.tool_calls:
                raise RenderError(
                    f"the template '{self._template.name}' writes the conversation before a tool call differently once the "
                    "call is in it, so the call cannot be learnt"
                )
            return f"{self._frame.lead}{said.content}{self._frame.tail}{self._frame.stop}"
        written = self._stopped(whole[len(base) :])
        if opened is not None:
            return self._in_reasoning(prompt[opened:], written, said)
        if extra:  # the prompt has the reasoning block, closed: the turn's own is not repeated
            return self._without_reasoning(written)
        return self._filled(written, said)

    def _stopped(self, written: str) -> str:
        """A turn cut after its stop; the stop is put there where the template has none."""
        frame = self._frame
        if frame.rest and written.endswith(frame.rest):
            return f"{written.removesuffix(frame.rest)}{frame.tail}{frame.stop}"
        ids = {self._tokenizer.id_of(name): at + len(name) for name, at in self._bundle.controls.find(written)}
        ends = [end for token_id, end in ids.items() if token_id in self._bundle.stop_ids]
        if ends:
            return written[: max(ends)]
        if frame.stop_id is None and frame.rest and frame.stop in written:
            return written[: written.rindex(frame.stop) + len(frame.stop)]
        return f"{written}{frame.tail}{frame.stop}"

    def _opened_at(self, prompt: str) -> int | None:
        """Where the reasoning that the prompt leaves open begins."""
        reasoning = self._bundle.speech.reasoning
        if reasoning is None or not prompt.rstrip().endswith(reasoning[0]):
            return None
        return prompt.rindex(reasoning[0])

    def _in_reasoning(self, opened: str, written: str, said: Message) -> str:
        """A turn's words after a prompt that has opened the reasoning. Thoughts that the template drops are put back."""
        open_, close = self._bundle.speech.reasoning or ("", "")
        thoughts = said.reasoning or ""
        bare = written.lstrip()
        if bare.startswith(open_):
            inner = bare[len(open_) :]
            held, closed, after = inner.partition(close)
            if closed and thoughts.strip() in held:
                return inner.removeprefix(opened[len(open_) :])
            bare = (after if closed else inner).lstrip("\n")
        elif bare.startswith(close):
            return f"{thoughts}{written}"
        return f"{thoughts}\n{close}\n\n{bare}"

    def _filled(self, written: str, said: Message) -> str:
        """A turn that begins with an empty reasoning block, with the thoughts in it."""
        reasoning = self._bundle.speech.reasoning
        if reasoning is None or not said.reasoning or said.reasoning.strip() in written:
            return written
        empty = re.match(rf"(\s*{re.escape(reasoning[0])})(\s*)({re.escape(reasoning[1])})", written)
        if empty is None:
            return written
        space = empty[2][: len(empty[2]) // 2]
        return f"{empty[1]}{space}{said.reasoning}{space}{written[empty.start(3) :]}"

    def _without_reasoning(self, written: str) -> str:
        open_, close = self._bundle.speech.reasoning or ("", "")
        if not open_ or not written.lstrip().startswith((open_, close)):
            return written
        return written.partition(close)[2].lstrip("\n")

    def _is_reasoning(self, extra: str) -> bool:
        reasoning = self._bundle.speech.reasoning
        return reasoning is not None and extra.strip().startswith(reasoning)

    def _marked(self, message: Message) -> Message:
        mark = self._bundle.controls.mark
        content, thoughts = mark(message.content), message.reasoning
        inline = self._inline_thoughts(message)
        if inline is not None and self._frame.writes_reasoning:  # the template decides where they go
            thoughts, content = inline[0].strip("\n"), mark(inline[1].lstrip("\n"))
        elif inline is not None:  # it knows none: their tags are tokens in the content, and no typed text
            open_, close = self._bundle.speech.reasoning or ("", "")
            content = f"{open_}{mark(inline[0])}{close}{mark(inline[1])}"
        return replace(
            message,
            content=content,
            tool_calls=tuple(ToolCall(mark(c.id), mark(c.name), mark(c.arguments)) for c in message.tool_calls),
            tool_call_id=None if message.tool_call_id is None else mark(message.tool_call_id),
            name=None if message.name is None else mark(message.name),
            reasoning=None if thoughts is None else mark(thoughts),
        )

    def _inline_thoughts(self, message: Message) -> tuple[str, str] | None:
        """The thoughts that an assistant's content begins with, and what comes after them."""
        reasoning = self._bundle.speech.reasoning
        if reasoning is None or message.role != "assistant" or message.reasoning is not None:
            return None
        bare = message.content.lstrip()
        if not bare.startswith(reasoning[0]) or reasoning[1] not in bare:
            return None
        thoughts, _, rest = bare[len(reasoning[0]) :].partition(reasoning[1])
        return thoughts, rest

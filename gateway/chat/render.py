"""Messages → ids, for serving and for training: the same function makes both prompts.

Training, for each assistant turn: the prompt is what serving would send for the messages before it; the trained span is the
reply through the stop token that the server honours; all else is −100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.chat.bundle import Bundle
from gateway.chat.conversation import Message, Options, RenderError, Tools

IGNORED = -100


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
    """Ids that ask for the assistant's next reply. Raises RenderError when the template cannot say it."""
    return Prompt(_prompt_ids(bundle, messages), bundle.stop_ids, bundle.stop_strings)


def render_example(
    bundle: Bundle,
    messages: Sequence[Message],
    max_length: int,
    tools: Tools | None = None,
    options: Options | None = None,
    turns: Literal["all", "last"] = "all",
) -> list[TrainingSequence]:
    """Training sequences of one conversation, at least one. Turns whose prompts go on from one another share one.

    Too long a conversation loses its oldest turns, turn by turn; a single turn that is too long by itself loses the
    start of its prompt, then the end of its reply. Raises RenderError when no assistant turn is to be trained.
    """
    learnt = [number for number, message in enumerate(messages) if message.role == "assistant" and message.weight != 0]
    if not learnt:
        raise RenderError("there is no assistant message to learn from (or all have weight 0)")
    sequences = _shared_sequences(bundle, messages)
    if all(len(sequence.ids) <= max_length for sequence in sequences):
        return sequences
    return [_fitted_turn(bundle, messages, turn, max_length) for turn in learnt]


def _shared_sequences(bundle: Bundle, messages: Sequence[Message]) -> list[TrainingSequence]:
    sequences: list[TrainingSequence] = []
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = _prompt_ids(bundle, messages[:number])
        reply = _reply_ids(bundle, messages[:number], prompt, message)
        open_ = sequences[-1] if sequences else None
        if open_ is None or prompt[: len(open_.ids)] != open_.ids:
            open_ = TrainingSequence([], [])
            sequences.append(open_)
        added = prompt[len(open_.ids) :]
        open_.ids += added + reply
        open_.labels += [IGNORED] * len(added) + (reply if message.weight != 0 else [IGNORED] * len(reply))
    return [s for s in sequences if any(label != IGNORED for label in s.labels)]


def _fitted_turn(bundle: Bundle, messages: Sequence[Message], turn: int, max_length: int) -> TrainingSequence:
    system = [message for message in messages[:turn] if message.role == "system"]
    history = [message for message in messages[:turn] if message.role != "system"]
    while True:
        before = [*system, *history]
        prompt = _prompt_ids(bundle, before)
        reply = _reply_ids(bundle, before, prompt, messages[turn])
        later_users = [n for n, message in enumerate(history) if n and message.role == "user"]
        if len(prompt) + len(reply) <= max_length or not later_users:
            break
        history = history[later_users[0] :]
    whole = len(system) + len(history) == turn and len(prompt) + len(reply) <= max_length
    room = max_length - len(reply)
    prompt = prompt[-room:] if room > 0 else prompt[-1:]
    reply = reply[: max_length - len(prompt)]
    return TrainingSequence(prompt + reply, [IGNORED] * len(prompt) + reply, truncated=not whole)


def _prompt_ids(bundle: Bundle, messages: Sequence[Message]) -> list[int]:
    ids = bundle.tokenizer.encode(_text(bundle, messages))
    return bundle.tokenizer.prefix_ids + ids if bundle.template.adds_bos else ids


def _reply_ids(bundle: Bundle, before: Sequence[Message], prompt: list[int], reply: Message) -> list[int]:
    """The reply as it stands after its prompt, through the stop."""
    frame = bundle.frame
    written = f"{frame.lead}{bundle.tokenizer.mark(reply.content)}{frame.tail}{frame.stop}"
    whole = bundle.tokenizer.encode(_text(bundle, before) + written)
    if bundle.template.adds_bos:
        whole = bundle.tokenizer.prefix_ids + whole
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    # The tokenizer would merge across the border; serving does not, so neither does training.
    return bundle.tokenizer.encode_continuation(written)


def _text(bundle: Bundle, messages: Sequence[Message]) -> str:
    mark = bundle.tokenizer.mark
    return bundle.template.text([Message(m.role, mark(m.content), m.weight) for m in messages], generate=True)

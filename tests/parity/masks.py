"""What a rendered training example must be, checked by other means than those it was rendered with."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.chat.bundle import Bundle
from gateway.chat.conversation import Message, Options, Tools
from gateway.chat.parse import ReplyReader
from gateway.chat.render import IGNORED, TrainingSequence, render_prompt
from gateway.chat.speech import ToolUse


def mask_problems(
    bundle: Bundle,
    messages: Sequence[Message],
    sequences: Sequence[TrainingSequence],
    tools: Tools | None = None,
    options: Options | None = None,
    *,
    reads_back: bool = True,
) -> list[str]:
    """What is wrong with the sequences of an untruncated conversation; nothing when all of it is right.

    Each learnt turn has one span that begins where the prompt that serving sends ends, runs through the first stop that serving
    honours, and is read back as the message; all else is −100.
    """
    problems, spans = [], {}
    for number, sequence in enumerate(sequences):
        if len(sequence.ids) != len(sequence.labels):
            problems.append(f"sequence {number} has {len(sequence.ids)} ids and {len(sequence.labels)} labels")
        if any(label not in (IGNORED, token) for token, label in zip(sequence.ids, sequence.labels, strict=False)):
            problems.append(f"sequence {number} learns other ids than it holds")
        for start, end in _spans(sequence.labels):
            spans[number, start] = sequence.ids[start:end]
    for turn, message in enumerate(messages):
        if message.role == "assistant" and message.weight != 0:
            problems += _turn_problems(bundle, messages, turn, sequences, spans, tools, options, reads_back)
    if spans:
        problems.append(f"{len(spans)} span(s) are learnt that belong to no turn")
    return problems


def _turn_problems(
    bundle: Bundle,
    messages: Sequence[Message],
    turn: int,
    sequences: Sequence[TrainingSequence],
    spans: dict[tuple[int, int], list[int]],
    tools: Tools | None,
    options: Options | None,
    reads_back: bool,
) -> list[str]:
    prompt = render_prompt(bundle, messages[:turn], tools, options)
    start = len(prompt.ids)
    homes = [n for n, s in enumerate(sequences) if s.ids[:start] == prompt.ids and (n, start) in spans]
    if len(homes) != 1:
        return [f"turn {turn}: {len(homes)} sequences learn right after the prompt that serving sends"]
    span = spans.pop((homes[0], start))
    problems = []
    stops = [n for n, token in enumerate(span) if token in prompt.stop_ids]
    if prompt.stop_strings:
        text = b"".join(map(bundle.tokenizer.token_bytes, span)).decode(errors="replace")
        if not any(text.endswith(stop) for stop in prompt.stop_strings) and stops != [len(span) - 1]:
            problems.append(f"turn {turn}: what is learnt ends with {text[-20:]!r}, not with a stop")
    elif stops != [len(span) - 1]:
        problems.append(f"turn {turn}: of {len(span)} ids learnt, those at {stops} would stop the reply")
    if reads_back:
        problems += _reading_problems(bundle, messages[turn], turn, span, tools, prompt.opens_reasoning)
    return problems


def _reading_problems(
    bundle: Bundle, message: Message, turn: int, span: list[int], tools: Tools | None, opens_reasoning: bool
) -> list[str]:
    reader = ReplyReader(bundle, tool_use=ToolUse(tuple(tools or ())), opens_reasoning=opens_reasoning)
    part = reader.feed(span)
    part.add(reader.finish(at_stop=True))
    problems = []
    if part.text.strip() != message.content.strip():
        problems.append(f"turn {turn}: reads back as {part.text[:60]!r}, and is {message.content[:60]!r}")
    if (
        message.reasoning is not None
        and bundle.speech.reasoning
        and part.reasoning.strip() != message.reasoning.strip()
    ):
        problems.append(f"turn {turn}: its reasoning reads back as {part.reasoning[:60]!r}")
    if [call.name for call in part.calls] != [call.name for call in message.tool_calls]:
        problems.append(f"turn {turn}: its calls read back as {[call.name for call in part.calls]}")
    return problems


def _spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of learnt labels: (start, end)."""
    edges = [n for n in range(len(labels) + 1) if _learnt(labels, n) != _learnt(labels, n - 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _learnt(labels: Sequence[int], at: int) -> bool:
    return 0 <= at < len(labels) and labels[at] != IGNORED

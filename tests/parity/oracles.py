"""Our ids beside those of others: transformers, FastChat, llama.cpp. Each comparison gives what differs, in words.

vLLM's `/v1/chat/completions/render` joins here as one more generator of `Finding`, once its set-up is there.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastchat.conversation import get_conv_template
from transformers import PreTrainedTokenizerFast

from gateway.chat.bundle import Bundle, bundle_of
from gateway.chat.conversation import Message, RenderError
from gateway.chat.fastchat import FastChatTemplate
from gateway.chat.jinja import JinjaTemplate, plain_messages
from gateway.chat.render import TrainingSequence, render_example, render_prompt
from gateway.chat.tokenizer import Tokenizer
from tests.parity.cases import Case
from tests.parity.masks import mask_problems

_IDEOGRAPHIC_SPACE = "\u3000"
_ESCAPED_MARK = "\\udb80"
Spoil = Callable[[list[TrainingSequence]], list[TrainingSequence]]


@dataclass(frozen=True)
class Finding:
    """One comparison. `verdict`: "same", "different", or "refused" (by us, with the reason)."""

    subject: str
    case: str
    verdict: str
    detail: str = ""


@lru_cache(maxsize=2)
def transformers_tokenizer(tokenizer_json: bytes) -> PreTrainedTokenizerFast:
    """Its named tokens are to be set."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(tokenizer_json)
        return PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)


def typed_text(tokenizer: Tokenizer, bundle: Bundle) -> str:
    """Control tokens as a user may type them: one that ends replies, and two more."""
    names = [bundle.frame.stop, *bundle.controls.names]
    known = [name for name in dict.fromkeys(names) if tokenizer.id_of(name) is not None and name.isprintable()]
    return " ".join(known[:3]) or "</s>"


def jinja_findings(
    template: JinjaTemplate, bundle: Bundle, oracle: PreTrainedTokenizerFast, cases: Sequence[Case], subject: str
) -> Iterator[Finding]:
    """Prompts beside `apply_chat_template`'s, with `sanitize_control_tokens` where control tokens are typed."""
    typed = typed_text(bundle.tokenizer, bundle)
    for case in cases:
        case = case.with_typed(typed)
        if case.learnt:
            continue
        given = plain_messages(case.messages, template.call_form if template.call_form is not None else None)
        theirs, their_error = _attempt(lambda: _apply(oracle, template, given, case))  # noqa: B023
        try:
            ours = render_prompt(bundle, case.messages, list(case.tools) or None, case.options).ids
        except RenderError as error:
            yield Finding(subject, case.name, "same" if their_error else "refused", str(error))
            continue
        if theirs is None:
            # Content that is null, which transformers leaves out: it is the one form that R1's templates take calls in.
            verdict = "refused" if "null" in str(template.call_form) and case.tools else "different"
            yield Finding(subject, case.name, verdict, f"transformers fails: {their_error}")
        elif _ESCAPED_MARK in oracle.decode(theirs):
            detail = (
                "transformers loses its marks where a template writes ASCII JSON, and typed control tokens come through"
            )
            yield Finding(subject, case.name, "refused", detail)
        else:
            yield _compared(subject, case.name, bundle.tokenizer, ours, theirs)


def fastchat_findings(
    template: FastChatTemplate, bundle: Bundle, oracle: PreTrainedTokenizerFast, cases: Sequence[Case], subject: str
) -> Iterator[Finding]:
    """Prompts beside the tokenized `get_prompt()`; what is typed must add no control token."""
    typed = typed_text(bundle.tokenizer, bundle)
    for case in cases:
        if case.learnt or case.tools or any(m.reasoning for m in case.messages) or case.options:
            continue
        said = case.with_typed(typed)
        try:
            ours = render_prompt(bundle, said.messages).ids
        except RenderError as error:
            yield Finding(subject, case.name, "refused", str(error))
            continue
        if case.typed:
            plain = render_prompt(bundle, case.with_typed("abc").messages).ids
            control = bundle.tokenizer.control_id_set
            kept = [i for i in ours if i in control] == [i for i in plain if i in control]
            detail = "" if kept else "typed control tokens became control tokens"
            yield Finding(subject, case.name, "same" if kept else "different", detail)
            continue
        theirs = oracle(_fastchat_text(template, case.messages))["input_ids"]
        prefix = bundle.tokenizer.prefix_ids
        if prefix and theirs[: 2 * len(prefix)] == prefix * 2:
            theirs = theirs[len(prefix) :]  # FastChat puts a second BOS before a template's own
        yield _compared(subject, case.name, bundle.tokenizer, ours, theirs)


def mask_findings(
    bundle: Bundle,
    cases: Sequence[Case],
    subject: str,
    oracle: PreTrainedTokenizerFast | None = None,
    spoil: Spoil | None = None,
) -> Iterator[Finding]:
    """What is learnt, by the rules of the design. `spoil` plants an error.

    What a Jinja template itself refuses to write (a system message, say) is agreed on when the `oracle` refuses it too.
    """
    typed = typed_text(bundle.tokenizer, bundle)
    for case in cases:
        if not case.learnt:
            continue
        case = case.with_typed(typed)
        tools = list(case.tools) or None
        try:
            sequences = render_example(bundle, case.messages, 100_000, tools, case.options)
        except RenderError as error:
            agreed = oracle is not None and _refuses(oracle, bundle.template, case)
            yield Finding(subject, case.name, "same" if agreed else "refused", str(error))
            continue
        if spoil is not None:
            sequences = spoil(sequences)
        problems = mask_problems(
            bundle, case.messages, sequences, tools, case.options, reads_back=_reads_back(bundle, case)
        )
        yield Finding(subject, case.name, "different" if problems else "same", "; ".join(problems))


def vocabulary_findings(name: str, tokenizer: Tokenizer, inputs: str, outputs: str) -> Iterator[Finding]:
    """Ids beside those that llama.cpp's own tests expect."""
    texts = inputs.split("\n__ggml_vocab_test__\n")
    for number, (text, line) in enumerate(zip(texts, outputs.split("\n"), strict=False)):
        yield _compared(name, f"expected {number}", tokenizer, tokenizer.encode(text), [int(i) for i in line.split()])


def llama_cpp_findings(name: str, path: str, tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Finding]:
    """Ids beside those of llama.cpp itself."""
    from tests.parity.llama_vocabulary import LlamaVocabulary

    with LlamaVocabulary(path) as llama:
        for number, text in enumerate(texts):
            found = _compared(name, f"live {number}", tokenizer, tokenizer.encode(text), llama.encode(text), text)
            if found.verdict == "different" and name == "deepseek-llm" and _IDEOGRAPHIC_SPACE in text:
                detail = (
                    "the same pattern is read differently by llama.cpp and by Oniguruma, the model's own, at U+3000"
                )
                found = Finding(name, "U+3000", "refused", detail)
            yield found


def sample_texts(count: int, seed: int = 3) -> list[str]:
    """Texts of many scripts, spaces and odd characters; the same ones each time."""
    chance = random.Random(seed)
    words = (
        "Hello don't I'LL 12345 naïve über ½ 日本語 한국어 Привет שלום مرحبا नमस्ते ไทย 😀👍🏽 … — ` ~~ == != x_1".split(
            " "
        )
    )
    words += ["\t", "\n", "\r\n", "    "]
    words += ["  ", "\n\n", "\t", " \n", "<|x|>", "ﬁ", "Ⅳ", "e\u0301", "\u200b", "\u00a0", "\u3000", "９", "🏳️‍🌈"]
    return [
        "".join(chance.choice(words) + chance.choice(["", " ", ""]) for _ in range(chance.randint(1, 12)))
        for _ in range(count)
    ]


def bundle_for(
    template: Any, tokenizer_json: bytes, eos_names: Sequence[str], fallback_eos: Sequence[int] = ()
) -> Bundle:
    """`eos_names` are the model's ends of text; those that the tokenizer lacks are left out."""
    added = {token["content"]: token["id"] for token in json.loads(tokenizer_json)["added_tokens"]}
    eos = [added[name] for name in eos_names if name in added]
    return bundle_of(template, tokenizer_json, eos or list(fallback_eos))


def _apply(
    oracle: PreTrainedTokenizerFast, template: JinjaTemplate, messages: list[dict[str, Any]], case: Case
) -> list[int]:
    oracle.chat_template = template.template
    found = oracle.apply_chat_template(
        messages,
        tools=list(case.tools) or None,
        add_generation_prompt=True,
        sanitize_control_tokens=case.typed,
        **case.options,
    )
    return list(found["input_ids"])


def _refuses(oracle: PreTrainedTokenizerFast, template: Any, case: Case) -> bool:
    given = plain_messages(case.messages, template.call_form)
    return _attempt(lambda: _apply(oracle, template, given, case))[0] is None


def _attempt(act: Callable[[], list[int]]) -> tuple[list[int] | None, str]:
    try:
        return act(), ""
    except Exception as error:  # whatever a template's author or transformers thought of
        return None, f"{type(error).__name__}: {error}"[:200]


def _fastchat_text(template: FastChatTemplate, messages: Sequence[Message]) -> str:
    """What FastChat's server makes of OpenAI's messages, by the library alone; neighbours of one role are one turn."""
    conversation = get_conv_template(template.name)
    system = [m.content for m in messages if m.role == "system"]
    if system:
        conversation.set_system_message("\n\n".join(system))
    turns: list[list[str]] = []
    for message in messages:
        if turns and turns[-1][0] == message.role:
            turns[-1][1] += f"\n\n{message.content}"
        elif message.role != "system":
            turns.append([message.role, message.content])
    empty = "\ue000"  # an empty reply would be taken for "generate here"
    for role, content in turns:
        conversation.append_message(conversation.roles[role == "assistant"], content or empty)
    conversation.append_message(conversation.roles[1], None)
    return str(conversation.get_prompt()).replace(empty, "")


def _reads_back(bundle: Bundle, case: Case) -> bool:
    """Whether the parser is to read the reply as it was.

    Not calls and reasoning in forms that are not parsed, not stops of plain text that somebody typed, not what SentencePiece
    cannot say ("▁"), nor Harmony's channels through it, which puts a space after each control token: no such model is known.
    """
    tokenizer, said, speech = bundle.tokenizer, case.messages[-1], bundle.speech
    if any(message.tool_calls for message in case.messages) and speech.tool_calls is None:
        return False
    if any(message.reasoning for message in case.messages):
        if speech.reasoning is None:
            return False
        written = bundle.template.text(case.messages, generate=False, options=case.options)
        if speech.reasoning[1] not in written:
            return False
    if case.typed and (bundle.frame.stop_id is None or not tokenizer.can_say(said.content)):
        return False
    spaced = tokenizer.encode(f"{bundle.controls.names[0]}x")[1:] != tokenizer.encode_continuation("x")
    return not (spaced and speech.tool_calls == "harmony")


def _compared(
    subject: str, case: str, tokenizer: Tokenizer, ours: list[int], theirs: list[int], text: str = ""
) -> Finding:
    if ours == theirs:
        return Finding(subject, case, "same")
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    shown = [re.sub(r"\s+", " ", tokenizer.decode(ids[max(0, at - 3) : at + 6])) for ids in (ours, theirs)]
    detail = f"from id {at} on: ours {ours[at : at + 4]} {shown[0]!r}, theirs {theirs[at : at + 4]} {shown[1]!r} {text[:40]!r}"
    return Finding(subject, case, "different", detail)

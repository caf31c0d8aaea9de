"""Prompts equal transformers' and fastchat's id for id; trained spans are replies through their stop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from fastchat.conversation import get_conv_template
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gateway.chat.bundle import Bundle, make_bundle
from gateway.chat.conversation import Message, RenderError
from gateway.chat.parse import ReplyReader
from gateway.chat.registry import TEMPLATE_NAMES, template_named
from gateway.chat.render import IGNORED, render_example, render_prompt
from tests.parity.masks import mask_problems
from tests.tiny_tokenizers import byte_level, sentencepiece_like

CHATML_JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3_JINJA = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@cache
def bundle_for(template: str) -> Bundle:
    if template in ("chatml", "llama-3"):
        return make_bundle(template, byte_level(), [2])
    return make_bundle(template, sentencepiece_like(), [2])


def transformers_tokenizer(content: bytes) -> PreTrainedTokenizerFast:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(content)
        return PreTrainedTokenizerFast(tokenizer_file=str(path))


EDGES = [
    [Message("user", "hello")],
    [Message("system", "Be brief."), Message("user", "hello  there ")],
    [Message("user", "a"), Message("assistant", "b"), Message("user", "c")],
    [Message("user", "naïve 😀 \n\n text"), Message("assistant", "\nstarts with a newline"), Message("user", " x")],
    [Message("user", "braces {system_message} {} %s {{ x }}"), Message("assistant", "ok."), Message("user", "?")],
]


@pytest.mark.parametrize("template", ["vicuna_v1.1", "alpaca", "llama-2"])
@pytest.mark.parametrize("messages", EDGES)
def test_fastchat_templates_give_the_ids_of_tokenizing_get_prompt(template: str, messages: list[Message]) -> None:
    conversation = get_conv_template(template)
    for message in messages:
        if message.role == "system":
            conversation.set_system_message(message.content)
        else:
            conversation.append_message(conversation.roles[message.role == "assistant"], message.content)
    conversation.append_message(conversation.roles[1], None)
    oracle = transformers_tokenizer(sentencepiece_like())
    assert render_prompt(bundle_for(template), messages).ids == oracle(conversation.get_prompt())["input_ids"]


@pytest.mark.parametrize(("template", "jinja"), [("chatml", CHATML_JINJA), ("llama-3", LLAMA_3_JINJA)])
@pytest.mark.parametrize("messages", EDGES)
def test_turn_templates_give_the_ids_of_apply_chat_template(template: str, jinja: str, messages: list[Message]) -> None:
    oracle = transformers_tokenizer(byte_level())
    dicts = [{"role": m.role, "content": m.content} for m in messages]
    expected = oracle.apply_chat_template(dicts, chat_template=jinja, add_generation_prompt=True)["input_ids"]
    assert render_prompt(bundle_for(template), messages).ids == expected


@pytest.mark.parametrize(("template", "jinja"), [("chatml", CHATML_JINJA), ("llama-3", LLAMA_3_JINJA)])
@pytest.mark.parametrize("typed", ["<|im_end|>", "a<|eot_id|>b <|im_start|>system\nx", "<|endoftext|>"])
def test_control_tokens_typed_by_a_user_are_characters_as_transformers_sanitizes_them(
    template: str, jinja: str, typed: str
) -> None:
    oracle = transformers_tokenizer(byte_level())
    prompt = render_prompt(bundle_for(template), [Message("user", typed)])
    expected = oracle.apply_chat_template(
        [{"role": "user", "content": typed}],
        chat_template=jinja,
        add_generation_prompt=True,
        sanitize_control_tokens=True,
    )["input_ids"]
    assert prompt.ids == expected
    assert typed in bundle_for(template).tokenizer.decode(prompt.ids)


def test_a_typed_end_of_text_never_becomes_the_control_token_in_vicuna() -> None:
    bundle = bundle_for("vicuna_v1.1")
    prompt = render_prompt(bundle, [Message("user", "one</s>two<s>")])
    assert prompt.ids.count(2) == 0
    assert prompt.ids.count(1) == 1, "only the BOS in front"


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_empty_content_is_content_and_not_a_generation_prompt(template: str) -> None:
    written = template_named(template)
    empty = [Message("user", ""), Message("assistant", ""), Message("user", "xxxx")]
    spoken = [Message("user", "qqqq"), Message("assistant", "rrrr"), Message("user", "xxxx")]
    text = written.text(spoken, generate=True)
    assert written.text(empty, generate=True) == text.replace("qqqq", "").replace("rrrr", "")


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_each_reply_is_learnt_after_the_prompt_that_serving_sends_through_the_stop(template: str) -> None:
    bundle = bundle_for(template)
    messages = [
        Message("system", "Be kind."),
        Message("user", "hello"),
        Message("assistant", "I am fine"),
        Message("user", "and?"),
        Message("assistant", "well, thanks"),
        Message("user", "good"),
        Message("assistant", "bye"),
    ]
    sequences = render_example(bundle, messages, 8192)
    assert mask_problems(bundle, messages, sequences) == []
    only_last = [replace(m, weight=0) if m.role == "assistant" else m for m in messages[:-1]] + messages[-1:]
    assert mask_problems(bundle, only_last, render_example(bundle, messages, 8192, turns="last")) == []


def test_a_mask_that_is_off_by_one_is_noticed() -> None:
    bundle = bundle_for("vicuna_v1.1")
    messages = [
        Message("user", "hello"),
        Message("assistant", "I am fine"),
        Message("user", "a"),
        Message("assistant", "b"),
    ]

    def spoil(change: Callable[[list[int], list[int], int, int], None]) -> list[str]:
        (sequence,) = render_example(bundle, messages, 4096)
        start = len(render_prompt(bundle, messages[:1]).ids)
        end = start + sequence.labels[start:].index(IGNORED)
        change(sequence.ids, sequence.labels, start, end)
        return mask_problems(bundle, messages, [sequence])

    assert spoil(lambda ids, labels, start, end: None) == []
    assert spoil(lambda ids, labels, start, end: labels.__setitem__(start, IGNORED))
    assert spoil(lambda ids, labels, start, end: labels.__setitem__(start - 1, ids[start - 1]))
    assert spoil(lambda ids, labels, start, end: labels.__setitem__(end - 1, IGNORED))
    assert spoil(lambda ids, labels, start, end: labels.__setitem__(end, ids[end]))
    assert spoil(lambda ids, labels, start, end: labels.__setitem__(0, ids[0]))
    assert spoil(lambda ids, labels, start, end: labels.__setitem__(start, ids[start] + 1))
    assert spoil(lambda ids, labels, start, end: ids.__setitem__(0, ids[0] + 1))


def test_weight_zero_stays_in_the_prompt_and_out_of_the_loss() -> None:
    bundle = bundle_for("vicuna_v1.1")
    messages = [
        Message("user", "a"),
        Message("assistant", "first", weight=0),
        Message("user", "b"),
        Message("assistant", "second", weight=1),
    ]
    (sequence,) = render_example(bundle, messages, 4096)
    prompt = render_prompt(bundle, messages[:3]).ids
    assert sequence.ids[: len(prompt)] == prompt
    assert sequence.labels[: len(prompt)] == [IGNORED] * len(prompt)


def test_a_conversation_without_a_trained_turn_is_refused_and_says_so() -> None:
    with pytest.raises(RenderError, match="no assistant message"):
        render_example(bundle_for("chatml"), [Message("user", "a")], 100)


def test_overlong_conversations_lose_their_oldest_turns_and_say_so() -> None:
    bundle = bundle_for("chatml")
    messages = [Message("system", "s")]
    for number in range(12):
        messages += [Message("user", f"question {number}"), Message("assistant", f"answer {number}")]
    sequences = render_example(bundle, messages, 120)
    assert len(sequences) == 12
    assert all(len(s.ids) == len(s.labels) <= 120 for s in sequences)
    assert sequences[-1].truncated
    assert not sequences[0].truncated
    assert sequences[-1].ids[-1] == bundle.stop_ids[0]
    assert "question 11" in bundle.tokenizer.decode(sequences[-1].ids)
    assert "question 0" not in bundle.tokenizer.decode(sequences[-1].ids)


def test_a_bundle_read_back_renders_the_same_and_keeps_its_digest() -> None:
    for template in ("chatml", "llama-3", "vicuna_v1.1", "chatglm2", "baize"):
        bundle = bundle_for(template)
        again = Bundle.from_files(bundle.to_files())
        assert again.digest == bundle.digest
        assert render_prompt(again, EDGES[1]).ids == render_prompt(bundle, EDGES[1]).ids


def test_a_conversation_that_starts_with_the_assistant_is_refused_where_the_template_cannot_say_it() -> None:
    with pytest.raises(RenderError, match="come from the user"):
        render_prompt(bundle_for("vicuna_v1.1"), [Message("assistant", "hi"), Message("user", "x")])


words = st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0\ufdd1\ufdd2\ufdd3"), max_size=30)


@settings(max_examples=60, deadline=None)
@given(template=st.sampled_from(TEMPLATE_NAMES), reply=words, splits=st.lists(st.integers(0, 40), max_size=6))
def test_replies_read_back_as_they_were_however_the_ids_are_split(template: str, reply: str, splits: list[int]) -> None:
    bundle = bundle_for(template)
    messages = [Message("user", "hello"), Message("assistant", reply)]
    (sequence,) = render_example(bundle, messages, 4096)
    prompt = render_prompt(bundle, messages[:1]).ids
    ids = sequence.ids[len(prompt) :]
    whole = ReplyReader(bundle)
    expected = whole.feed(ids).text + whole.finish(at_stop=True).text
    reader, text, at = ReplyReader(bundle), "", 0
    for cut in sorted(splits):
        text += reader.feed(ids[at : max(at, cut)]).text
        at = max(at, cut)
    text += reader.feed(ids[at:]).text
    text += reader.finish(at_stop=True).text
    assert text == expected
    stops = (*bundle.stop_strings, "\r\n", "\n\n")  # the two that rwkv and falcon write as one newline
    if not any(stop in f"{reply}\n" for stop in stops):
        assert expected.strip() == reply.strip()


@settings(max_examples=60, deadline=None)
@given(text=words, stop=st.text("abST oplé", min_size=1, max_size=4), width=st.integers(1, 5))
@example(text="é", stop="é", width=3)  # half of the next character is read together with the stop
def test_a_stop_string_cuts_the_reply_wherever_the_ids_are_split(text: str, stop: str, width: int) -> None:
    bundle = bundle_for("chatml")
    ids = bundle.tokenizer.encode(bundle.tokenizer.mark(text + stop + "rest"))
    reader, shown = ReplyReader(bundle, [stop], raw=True), ""
    for at in range(0, len(ids), width):
        shown += reader.feed(ids[at : at + width]).text
    shown += reader.finish(at_stop=reader.stopped).text
    whole = bundle.tokenizer.decode(ids)
    assert reader.stopped
    assert shown == whole[: whole.index(stop)]


@pytest.mark.parametrize("tokenizer", [sentencepiece_like, byte_level])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_ids_at_all_are_read_and_valid_text_reads_as_the_tokenizer_decodes_it(
    tokenizer: Callable[[], bytes], data: st.DataObject
) -> None:
    bundle = make_bundle("vicuna_v1.1" if tokenizer is sentencepiece_like else "chatml", tokenizer(), [2])
    ids = data.draw(st.lists(st.integers(0, bundle.tokenizer.vocab_size + 5), max_size=30))
    reader = ReplyReader(bundle, raw=True)
    split = "".join(reader.feed([token_id]).text for token_id in ids) + reader.finish(at_stop=False).text
    again = ReplyReader(bundle, raw=True)
    assert again.feed(ids).text + again.finish(at_stop=False).text == split
    text = data.draw(words)
    ids = bundle.tokenizer.encode(text)
    reader = ReplyReader(bundle, raw=True)
    shown = reader.feed(ids).text + reader.finish(at_stop=False).text
    if not set(ids) & bundle.tokenizer.control_id_set:
        # SentencePiece's decoder takes off the space that its encoder put in front; a reply goes on after a prompt.
        expected = shown.removeprefix(" ") if tokenizer is sentencepiece_like else shown
        assert expected == bundle.tokenizer.decode(ids)

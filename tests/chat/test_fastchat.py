"""fastchat's templates: which are taken, what ends their replies, and that a bundle goes on rendering as it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fastchat.conversation import (
    Conversation,
    SeparatorStyle,
    conv_templates,
    get_conv_template,
    register_conv_template,
)

from gateway.chat.bundle import TEMPLATE_FILE, TOKENIZER_FILE, Bundle, bundle_of, make_bundle
from gateway.chat.conversation import Message, RenderError
from gateway.chat.fastchat import FastChatTemplate
from gateway.chat.jinja import JinjaTemplate
from gateway.chat.registry import refused_templates, registered_templates, template_named
from gateway.chat.render import render_example, render_prompt
from gateway.chat.tokenizer import Tokenizer
from gateway.chat.validation import validate
from tests.tiny_tokenizers import byte_level, sentencepiece_like

SAID = [Message("system", "be kind"), Message("user", "hello"), Message("assistant", "hi"), Message("user", "bye")]

API_ONLY = {"chatgpt", "pplxai", "bard", "gemini", "steerlm"}
# Nothing in these stops a reply: the model's own end of text is put there, learnt and waited for.
COMPLETED = set(
    "raw chatglm chatglm2 chatglm3 codegeex deepseek-coder tulu stablelm openbuddy claude metamath mpt-30b-instruct "
    "polyglot_changgpt xgen baichuan-chat baichuan2-chat cutegpt stable-vicuna phind xdan-v1 solar "
    "deepseek-chat".split()  # the last has a stop, with a "▁" in it that SentencePiece cannot say
)


def test_all_of_fastchats_templates_are_taken_or_refused_with_a_reason() -> None:
    taken, refused = registered_templates(), refused_templates()
    assert set(conv_templates) <= taken.keys() | refused.keys()
    assert not taken.keys() & refused.keys()
    assert refused.keys() == API_ONLY | {"yuan2"}
    assert all("API" in refused[name] for name in API_ONLY)
    assert "where its prompt ends" in refused["yuan2"]
    assert len(conv_templates) == 83 and sum(isinstance(t, FastChatTemplate) for t in taken.values()) == 77


def test_a_refused_name_is_refused_with_the_reason() -> None:
    with pytest.raises(KeyError, match="not taken: it does not write a reply where its prompt ends"):
        template_named("yuan2")
    with pytest.raises(KeyError, match="there is no template 'nothing'"):
        template_named("nothing")


def test_templates_without_a_stop_are_completed_with_the_models_end_of_text() -> None:
    completed = set()
    for name, template in registered_templates().items():
        bundle = bundle_of(template, sentencepiece_like(), [2])
        text = template.text([Message("user", "u"), Message("assistant", "a")], generate=False)
        if bundle.frame.stop not in text.rpartition("a")[2] and bundle.frame.stop_id == 2:
            completed.add(name)
            (sequence,) = render_example(bundle, [Message("user", "u"), Message("assistant", "a")], 4096)
            assert sequence.labels[-1] == 2
    assert completed == COMPLETED


def test_a_template_without_a_stop_is_refused_for_a_model_that_names_no_end_of_text() -> None:
    tokenizer = Tokenizer(byte_level())
    (problem,) = validate(template_named("tulu"), tokenizer, ())
    assert "could stop it" in problem
    assert validate(template_named("tulu"), tokenizer, (2,)) == []
    assert validate(template_named("chatml"), tokenizer, ()) == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ messages[0].content }}", "leaves out what the assistant says"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out what the user says"),
        ("{% for m in messages[::-1] %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "where its prompt ends"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}" + "x" * 100_000 * 1, ""),
        (
            "{% for m in messages %}{{ m.content }}{{ 'x' * 300000 }}{% endfor %}",
            "characters for a conversation of a few words",
        ),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "ran for more than"),
        ("{{ raise_exception('no') }}", "failed: no"),
        ("{% if %}", "not valid Jinja: line 1"),
    ],
)
def test_what_is_wrong_with_a_template_is_said_when_it_is_registered(source: str, problem: str) -> None:
    problems = validate(JinjaTemplate("bad", source))
    if problem:
        assert any(problem in found for found in problems), problems
    else:
        assert problems == []


def test_examples_that_a_template_brings_come_first() -> None:
    text = template_named("one_shot").text([Message("user", "hello")], generate=True)
    conversation = get_conv_template("one_shot")
    conversation.append_message("Human", "hello")
    conversation.append_message("Assistant", None)
    assert text == conversation.get_prompt()
    assert "birthday" in text


def test_tools_are_refused_by_name() -> None:
    with pytest.raises(RenderError, match="'alpaca' cannot offer tools"):
        template_named("alpaca").text([Message("user", "x")], generate=True, tools=[{"type": "function"}])
    with pytest.raises(RenderError, match=r"messages\[1\] holds a tool's result"):
        template_named("alpaca").text([Message("user", "x"), Message("tool", "y")], generate=True)


@pytest.fixture
def another_vicuna() -> Iterator[None]:
    kept = conv_templates["vicuna_v1.1"]
    other = Conversation(name="vicuna_v1.1", roles=("A", "B"), sep_style=SeparatorStyle.ADD_COLON_SINGLE, sep="\n")
    register_conv_template(other, override=True)
    yield
    conv_templates["vicuna_v1.1"] = kept


def test_a_bundle_renders_as_it_was_made_whatever_the_library_registers_under_its_name(another_vicuna: None) -> None:
    kept = conv_templates["vicuna_v1.1"]
    made = bundle_of(template_named("vicuna_v1.1"), sentencepiece_like(), [2])  # read before the override
    again = Bundle.from_files(made.to_files())
    assert again.digest == made.digest
    assert render_prompt(again, SAID).ids == render_prompt(made, SAID).ids
    assert "USER: hello ASSISTANT: hi" in again.template.text(SAID, generate=True)
    assert "A: hello" in FastChatTemplate.named("vicuna_v1.1").text(SAID, generate=True)
    assert kept.roles == ("A", "B")


def test_a_bundle_refuses_a_library_that_writes_its_template_differently() -> None:
    files = make_bundle("vicuna_v1.1", sentencepiece_like(), [2]).to_files()
    written = json.loads(files[TEMPLATE_FILE])
    assert written["source"]["proof"]
    written["source"]["proof"] = "0" * 16  # as a later version would make it
    with pytest.raises(ValueError, match=r"fschat writes the template 'vicuna_v1\.1' differently"):
        Bundle.from_files({TEMPLATE_FILE: json.dumps(written).encode(), TOKENIZER_FILE: files[TOKENIZER_FILE]})


def test_the_digest_names_template_tokenizer_and_options() -> None:
    made = make_bundle("chatml", byte_level(), [2])
    assert make_bundle("chatml", byte_level(), [2]).digest == made.digest
    dated = made.with_options({"date": "2026-11-21"})
    others = [make_bundle("llama-3", byte_level(), [2]), make_bundle("chatml", byte_level(), [1]), dated]
    assert len({made.digest, *(other.digest for other in others)}) == 4
    assert Bundle.from_files(dated.to_files()).options == {"date": "2026-11-21"}


def test_the_options_of_a_bundle_stay_with_it_and_a_request_may_say_otherwise() -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
        "{% if add_generation_prompt %}<|im_start|>assistant\n{{ strftime_now('%Y') }}{{ 'deep' if deep }}{% endif %}"
    )
    template = JinjaTemplate("dated", source)
    bundle = bundle_of(template, byte_level(), [2], {"date": "1999-12-31", "deep": True})
    again = Bundle.from_files(bundle.to_files())
    said = [Message("user", "x")]
    assert again.tokenizer.decode(render_prompt(again, said).ids).endswith("assistant\n1999deep")
    told = render_prompt(again, said, options={"deep": False, "date": "2001-01-01"})
    assert again.tokenizer.decode(told.ids).endswith("assistant\n2001")


def test_a_default_system_text_is_an_option_of_every_kind_of_template() -> None:
    for name in ("vicuna_v1.1", "chatml"):
        text = template_named(name).text([Message("user", "x")], generate=True, options={"system": "BE NICE"})
        assert "BE NICE" in text
        text = template_named(name).text(SAID, generate=True, options={"system": "BE NICE"})
        assert "BE NICE" not in text

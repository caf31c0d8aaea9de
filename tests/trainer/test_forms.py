"""Every form that training data comes in: told from its keys, converted to what OpenAI's form would have been, and counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.chat.bundle import Bundle, bundle_of
from gateway.chat.conversation import Message, ToolCall
from gateway.chat.jinja import JinjaTemplate
from gateway.chat.registry import template_named
from gateway.chat.render import IGNORED, TrainingSequence, render_example, render_prompt
from gateway.jobdir import Check, Method, Options
from tests.tiny_model import write_job
from tests.tiny_tokenizers import byte_level
from trainer.check import run_check
from trainer.data.conversations import BadExample, Example
from trainer.data.dataset import stored_examples
from trainer.data.forms import FORMS, form_of
from trainer.data.lines import BadLine, Line
from trainer.data.rendering import SPLIT, UNPAIRED, Conversation, Renderer, Rendering

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
BAD = {"role": "assistant", "content": "No."}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}
FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
# One of each form, in the order of FORMS.
LINES: list[dict[str, Any]] = [
    {"input": {"messages": [USER]}, "preferred_output": [REPLY], "non_preferred_output": [BAD]},
    {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "No."}},
    {"conversations": [HUMAN, GPT]},
    {"instruction": "Hi", "input": "", "chosen": "Hello.", "rejected": "No."},
    {"instruction": "Hi", "input": "", "output": "Hello."},
    {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
    {"prompt": "Hi", "completion": "Hello.", "label": False},
    {"prompt": "Hi", "completion": "Hello."},
    {"messages": [USER, REPLY]},
]
# A template that writes tools and calls.
JINJA = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    tokenizer = byte_level()
    (end,) = (token["id"] for token in json.loads(tokenizer)["added_tokens"] if token["content"] == "<|im_end|>")
    return bundle_of(JinjaTemplate("own", JINJA, {"eos_token": "<|im_end|>"}), tokenizer, [end])


def read(line: dict[str, Any]) -> list[Example]:
    form = form_of(line)
    assert form is not None
    return form.read(line, False)


def rendered(
    bundle: Bundle, line: dict[str, Any], method: Method | None = None, **how: Any
) -> list[Conversation] | BadLine:
    return Renderer(Rendering(bundle, **{"max_length": 1000, **how}, method=method), form_of(line)).render(
        Line(1, line)
    )


def conversations(bundle: Bundle, line: dict[str, Any], method: Method | None = None, **how: Any) -> list[Conversation]:
    found = rendered(bundle, line, method, **how)
    assert isinstance(found, list), found
    return found


def learnt(bundle: Bundle, sequence: TrainingSequence) -> str:
    return bundle.tokenizer.decode([label for label in sequence.labels if label != IGNORED])


def test_each_form_is_told_by_its_keys_and_says_the_same_as_openais() -> None:
    assert [form_of(line) for line in LINES] == list(FORMS)
    for line in LINES:
        (example,) = read(line)
        assert example.messages == [Message("user", "Hi"), Message("assistant", "Hello.")]
        assert len(example.paths) == 2
        assert (example.rejected == Message("assistant", "No.")) == (
            "rejected" in str(line) or "non_preferred" in str(line)
        )
        assert example.desirable == ("label" not in line)


@pytest.mark.parametrize("value", [{"messages": [USER, REPLY], "id": 3, "label": "greeting", "instruction": "x"}])
def test_what_else_is_in_a_line_of_messages_makes_it_no_other_form(value: dict[str, Any]) -> None:
    assert form_of(value) == FORMS[-1]


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": [USER], "chosen": [REPLY], "rejected": [BAD]},
        {"chosen": [USER, REPLY], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": [USER, REPLY], "rejected": [USER, BAD], "messages": [USER, REPLY]},
        {"prompt": [USER], "completion": [REPLY], "label": True},
        {"messages": [USER, REPLY], "label": True},
        {"messages": [USER], "completion": REPLY, "label": True},
    ],
)
def test_trls_texts_may_be_lists_of_messages(line: dict[str, Any]) -> None:
    (example,) = read(line)
    assert example.messages == [Message("user", "Hi"), Message("assistant", "Hello.")]
    assert (example.rejected is None) == ("label" in line)


def test_alpacas_two_prompts_are_the_users_turn_and_under_headings_the_input_has_one_too() -> None:
    line = {"instruction": "Sum up.", "input": "One. Two.", "output": "Both."}
    (example,) = read(line)
    assert example.messages[0].content == "Sum up.\n\nOne. Two." and example.remarks == ("with an input",)
    assert read({**line, "input": ""})[0].messages[0].content == "Sum up."
    alpaca = bundle_of(template_named("alpaca"), byte_level(), [0])
    (found,) = conversations(alpaca, line)
    assert "### Instruction: Sum up.\n\n### Input: One. Two.\n\n### Response:" in alpaca.tokenizer.decode(
        found.sequences[0].ids
    )
    more = {**line, "system": "Be brief.", "history": [["a", "b"]]}
    assert [message.content for message in read(more)[0].messages] == [
        "Be brief.",
        "a",
        "b",
        "Sum up.\n\nOne. Two.",
        "Both.",
    ]


def test_sharegpts_calls_and_results_become_openais() -> None:
    call = {"from": "function_call", "value": '[{"name": "look", "arguments": {"at": "it"}}, {"name": "look"}]'}
    results = [{"from": "observation", "value": "a fjord"}, {"from": "observation", "value": "a boat"}]
    line = {"conversations": [HUMAN, call, *results, GPT], "tools": json.dumps([FUNCTION]), "system": "Look."}
    (example,) = read(line)
    assert example.tools == [TOOL]
    calls = (ToolCall("call00001", "look", '{"at": "it"}'), ToolCall("call00002", "look", "{}"))
    assert example.messages == [
        Message("system", "Look."),
        Message("user", "Hi"),
        Message("assistant", "", tool_calls=calls),
        Message("tool", "a fjord", tool_call_id="call00001"),
        Message("tool", "a boat", tool_call_id="call00002"),
        Message("assistant", "Hello."),
    ]
    assert example.paths == ("system", *(f"conversations[{number}]" for number in range(5)))


@pytest.mark.parametrize(
    ("turns", "kept"),
    [
        ([GPT, HUMAN, GPT], 2),
        ([HUMAN, GPT, HUMAN], 2),
        ([{"from": "system", "value": "s"}, HUMAN, GPT], 3),
        ([HUMAN, HUMAN, GPT], 0),
        ([HUMAN, GPT, GPT], 0),
        ([HUMAN, {"from": "observation", "value": "x"}, GPT], 0),
        ([HUMAN], 0),
        ([], 0),
    ],
)
def test_sharegpts_turns_that_are_no_turns_are_left_out(turns: list[dict[str, str]], kept: int) -> None:
    found = read({"conversations": turns})
    assert [len(example.messages) for example in found] == ([kept] if kept else [])


def test_a_long_sharegpt_conversation_is_split_at_its_turns_and_nothing_of_it_is_lost(bundle: Bundle) -> None:
    turns = [
        {"from": who, "value": f"{word} {number}"}
        for number in range(12)
        for who, word in (("human", "ask"), ("gpt", "say"))
    ]
    line = {"conversations": turns, "system": "Be brief."}
    (whole,) = conversations(bundle, line)[0].sequences
    limit = len(whole.ids) // 3
    found = conversations(bundle, line, max_length=limit)
    sequences = [one.sequences[0] for one in found]
    assert [len(one.sequences) for one in found] == [1] * len(found) and 3 <= len(found) <= 5
    assert all(len(sequence.ids) <= limit and not sequence.truncated for sequence in sequences)
    assert "".join(learnt(bundle, sequence) for sequence in sequences) == learnt(bundle, whole)
    system = render_prompt(bundle, [Message("system", "Be brief."), Message("user", "x")]).ids[:5]
    assert all(sequence.ids[:5] == system for sequence in sequences)
    assert [one.remarks for one in found] == [(SPLIT,), *[()] * (len(found) - 1)]


def test_a_turn_too_long_by_itself_is_split_off_and_shortened(bundle: Bundle) -> None:
    long = {"from": "human", "value": "word " * 100}
    found = conversations(bundle, {"conversations": [HUMAN, GPT, long, GPT, HUMAN, GPT]}, max_length=80)
    assert [one.sequences[0].truncated for one in found] == [False, True, False]


def test_a_pair_is_two_sequences_with_one_prompt_also_where_that_is_shortened(bundle: Bundle) -> None:
    before = [{"role": role, "content": f"{role} {number}"} for number in range(6) for role in ("user", "assistant")]
    line = {
        "input": {"messages": [*before, USER]},
        "preferred_output": [REPLY],
        "non_preferred_output": [{**BAD, "content": "n" * 40}],
    }
    for limit in (1000, 120):
        (pair,) = conversations(bundle, line, max_length=limit)
        chosen, rejected = pair.sequences
        prompts = [sequence.ids[: sequence.labels.count(IGNORED)] for sequence in pair.sequences]
        assert prompts[0] == prompts[1] and len(rejected.ids) <= limit
        assert [learnt(bundle, one) for one in pair.sequences] == ["Hello.<|im_end|>", "n" * 40 + "<|im_end|>"]
        assert chosen.truncated == rejected.truncated == (limit == 120)
    messages = [Message(m["role"], m["content"]) for m in [*before, USER]]  # type: ignore[arg-type]
    whole = conversations(bundle, line)[0].sequences[0]
    assert render_prompt(bundle, messages).ids == whole.ids[: whole.labels.count(IGNORED)]


def test_kto_takes_pairs_apart(bundle: Bundle) -> None:
    found = conversations(bundle, LINES[5], "kto")
    assert [(one.desirable, learnt(bundle, one.sequences[0])) for one in found] == [
        (True, "Hello.<|im_end|>"),
        (False, "No.<|im_end|>"),
    ]
    assert found[0].remarks == (UNPAIRED,)
    (judged,) = conversations(bundle, LINES[6], "kto")
    assert not judged.desirable and len(judged.sequences) == 1


def test_train_on_all_learns_the_prompts_but_no_turn_of_weight_0(bundle: Bundle) -> None:
    line = {"messages": [USER, {**REPLY, "weight": 0}, {**USER, "content": "Bye"}, BAD]}
    (found,) = conversations(bundle, line, train_on="all")
    (sequence,) = found.sequences
    said = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|im_start|>user\nBye"
    assert learnt(bundle, sequence).replace("\n<|im_start|>user\nBye", "<|im_start|>user\nBye").startswith(said)
    (plain,) = conversations(bundle, {"messages": [USER, REPLY]}, train_on="all")
    assert plain.sequences[0].labels == plain.sequences[0].ids
    (pair,) = conversations(bundle, LINES[0], train_on="all")
    assert all(sequence.labels == sequence.ids for sequence in pair.sequences)


def test_turns_of_a_long_conversation_are_shortened_as_one_by_one(bundle: Bundle) -> None:
    """The oldest turns that had to go for one reply are not tried again for the next: it comes to the same."""
    messages = [Message(role, f"{role} says {n}") for n in range(9) for role in ("user", "assistant")]  # type: ignore[arg-type]
    found = render_example(bundle, messages, 90)
    for place, sequence in zip(range(1, 18, 2), found, strict=True):
        (alone,) = render_example(bundle, messages[: place + 1], 90, turns="last")
        assert (sequence.ids, sequence.labels, sequence.truncated) == (alone.ids, alone.labels, alone.truncated)


@pytest.mark.parametrize(
    ("line", "field", "said"),
    [
        (
            {"input": {"messages": [USER, REPLY]}, "preferred_output": [REPLY]},
            "input.messages[1]",
            "is the assistant's",
        ),
        ({"input": [], "preferred_output": [REPLY]}, "input", "is an empty list; it must be an object"),
        ({**LINES[0], "non_preferred_output": [REPLY, BAD]}, "non_preferred_output", "is a list of 2 messages"),
        ({**LINES[0], "non_preferred_output": [USER]}, "non_preferred_output[0].role", "is from the user"),
        ({**LINES[0], "input": {"messages": [USER], "tools": [1]}}, "input.tools[0]", "must be {"),
        ({"conversations": [{"from": "moderator", "value": "x"}]}, "conversations[0].from", "is 'moderator'"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": 5}]}, "conversations[1].value", "is a number"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "{"}]}, "conversations[1].value", "is not JSON"),
        ({"conversations": [HUMAN, GPT], "tools": "[1]"}, "tools[0]", "must be {"),
        ({"conversations": [HUMAN], "chosen": HUMAN, "rejected": GPT}, "chosen.from", "is from the user"),
        ({"instruction": "x", "output": ""}, "output", "is empty"),
        ({"instruction": None, "output": "x"}, "instruction", "is missing or null"),
        ({"instruction": "a\0", "output": "x"}, "instruction", "NUL"),
        ({"instruction": "a", "output": "x", "history": [["a"]]}, "history[0]", "must be a pair"),
        ({"prompt": "x", "chosen": "a"}, "rejected", "is missing or null"),
        ({"chosen": [USER, REPLY], "rejected": [BAD]}, "rejected", "differs from 'chosen'"),
        ({"prompt": "Lo", "chosen": [USER, REPLY], "rejected": [USER, BAD]}, "prompt", "is not among the messages"),
        ({"prompt": "x", "completion": ""}, "completion", "is empty"),
        ({"messages": [USER], "label": True}, "completion", "is missing"),
        ({"messages": [USER, REPLY] * 1001}, "messages", "has 2002 messages"),
    ],
)
def test_what_is_wrong_is_named_by_its_field(line: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(BadExample) as error:
        read(line)
    assert error.value.field == field and said in error.value.reason


def test_what_a_template_cannot_write_is_named_where_it_stands_in_the_line() -> None:
    vicuna = bundle_of(template_named("vicuna_v1.1"), byte_level(), [0])
    call = {"from": "function_call", "value": '{"name": "look", "arguments": {}}'}
    found = rendered(vicuna, {"conversations": [HUMAN, call], "system": "x"})
    assert isinstance(found, BadLine)
    assert found.field == "conversations[1]" and found.said.startswith("conversations[1] holds a tool call")


# the check of a whole file


def checked(
    tmp_path: Path, base: Path, lines: Sequence[Any], method: Method, *, as_list: bool = False
) -> tuple[Check, Any]:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(lines, indent=2) if as_list else "".join(json.dumps(line) + "\n" for line in lines))
    job = write_job(tmp_path / "job", base, path)
    spec = replace(job.read_spec(), method=method)
    job.write_spec(spec)
    return run_check(job, spec), lambda: stored_examples(job, spec)[0]


@pytest.mark.parametrize("number", range(len(LINES)))
@pytest.mark.parametrize("as_list", [False, True], ids=["lines", "list"])
def test_a_file_of_each_form_passes_the_check_of_its_method(
    number: int, as_list: bool, tiny_base: Path, tmp_path: Path
) -> None:
    form, line = FORMS[number], LINES[number]
    check, stored = checked(tmp_path, tiny_base, [line] * 12, form.methods[0], as_list=as_list)
    assert (check.error, check.problems, check.n_examples) == (None, (), 12)
    assert check.notes[0].startswith(f"The training file is in {form.name} ({form.keys}): 12 examples, "), (
        "a pair is one"
    )
    assert "steps: " in check.notes[1] and "GiB of memory" in check.notes[1]
    assert len(stored().sequences(0)) == (2 if "dpo" in form.methods else 1)
    assert stored().desirable.all() == ("label" not in line)


def test_a_method_that_does_not_fit_the_data_is_refused_with_what_fits(tiny_base: Path, tmp_path: Path) -> None:
    error = checked(tmp_path, tiny_base, [LINES[4]] * 12, "dpo")[0].error
    assert error is not None and (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "is in Alpaca's form (instruction, input, output), which the method supervised can train on" in error.message
    assert "'dpo' needs input, preferred_output, non_preferred_output (OpenAI's preference form)" in error.message


def test_pairs_are_refused_for_supervised(tiny_base: Path, tmp_path: Path) -> None:
    error = checked(tmp_path, tiny_base, [LINES[0]] * 12, "supervised")[0].error
    assert error is not None and "the methods dpo, orpo, kto can train on" in error.message


def test_a_file_of_two_forms_is_refused_with_the_line(tiny_base: Path, tmp_path: Path) -> None:
    check, _ = checked(tmp_path, tiny_base, [*[LINES[4]] * 12, LINES[8], LINES[4], {"x": 1}], "supervised")
    assert [problem.split(":")[1].strip() for problem in check.problems] == ["Line 13", "Line 15"]
    assert "is in OpenAI's messages form (messages), but the file begins in Alpaca's form" in check.problems[0]
    assert "its keys are 'x'" in check.problems[1] or "instruction" in check.problems[1]


def test_what_was_dropped_split_and_shortened_is_told_with_counts(tiny_base: Path, tmp_path: Path) -> None:
    long = {"conversations": [HUMAN, {"from": "gpt", "value": "timer " * 20}] * 12}
    lines = [*[LINES[2]] * 10, {"conversations": [HUMAN, HUMAN]}, long, {"conversations": [GPT, HUMAN, GPT]}]
    check, stored = checked(tmp_path, tiny_base, lines, "supervised")
    assert check.error is None and check.n_examples == len(stored()) == 13
    assert f"(1 {SPLIT}; 1 without their first or last turns" in check.notes[0] and "; 1 dropped)" in check.notes[0]
    assert check.warnings == (
        "1 conversation of the training file is not trained on: human and model do not take turns in it",
    )
    assert check.n_truncated == 0


def test_train_on_all_is_in_what_is_stored(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text("".join(json.dumps(LINES[8]) + "\n" for _ in range(12)))
    job = write_job(tmp_path / "job", tiny_base, path)
    spec = replace(job.read_spec(), options=Options(train_on="all"))
    check = run_check(job, spec)
    assert check.n_trained_tokens == check.n_tokens
    assert stored_examples(job, spec)[0].trained.all()

"""The skills recipe: reading skill files, holding out, scoring."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from clients.recipes import skills
from clients.recipes.calls import parse_call, same_call, same_function, score
from clients.recipes.skill_files import SkillExample, SkillFileError, occurs, read_file, read_folder, split

DEMO_SKILLS = Path(skills.__file__).parent / "demo_skills"
GOOD = """#### Prompt:
ring(who="[who]") rings somebody.

#### Prompt Examples:

### User: Ring Ann
### Assistant: ring(who="Ann")

 #### Examples:

User: ring Bob now
Assistant: ring(who="Bob")
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "ring_examples.txt"
    path.write_text(text)
    return path


def test_both_kinds_of_examples_are_read_with_hashes_or_without(tmp_path: Path) -> None:
    assert read_file(written(tmp_path, GOOD)) == [
        SkillExample("ring", "Ring Ann", 'ring(who="Ann")'),
        SkillExample("ring", "ring Bob now", 'ring(who="Bob")'),
    ]


@pytest.mark.parametrize(
    ("line", "text", "complaint"),
    [
        (11, "### Usr: ring Bob now", "neither a heading nor a line"),
        (11, "### User:", "this User line is empty"),
        (12, "### Assistant: sure, I will", "is no call"),
        (12, '### Assistant: ring("Bob")', "is no call"),
        (12, "### Assistant:", "this Assistant line is empty"),
        (5, "#### Samples:", "unknown heading 'Samples'"),
        (2, "### User: too early", "neither a heading nor a line"),
        (1, "ring somebody", "before the first heading"),
    ],
)
def test_a_malformed_line_is_an_error_that_names_file_and_line(
    tmp_path: Path, line: int, text: str, complaint: str
) -> None:
    lines = GOOD.splitlines()
    lines[line - 1] = text
    path = written(tmp_path, "\n".join(lines))
    with pytest.raises(SkillFileError, match=re.escape(f"{path}:{line}: ")) as caught:
        read_file(path)
    assert complaint in str(caught.value)


def test_a_request_without_an_answer_is_an_error_at_the_request(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + "\nUser: ring Eve\n")
    with pytest.raises(SkillFileError, match=re.escape(f"{path}:14: this User line has no Assistant line")):
        read_file(path)


def test_an_answer_without_a_request_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + '\nAssistant: ring(who="Eve")\n')
    with pytest.raises(SkillFileError, match=re.escape(f"{path}:14: this Assistant line has no User line")):
        read_file(path)


def test_a_file_or_folder_without_examples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SkillFileError, match="no skill files"):
        read_folder(tmp_path)
    with pytest.raises(SkillFileError, match="without a single example"):
        read_file(written(tmp_path, "#### Prompt:\nring()\n"))


def test_a_request_asked_twice_is_kept_once(tmp_path: Path) -> None:
    written(tmp_path, GOOD + '\nUser: Ring Bob, now!\nAssistant: ring(who="Robert")\n')
    assert [example.answer for example in read_folder(tmp_path)] == ['ring(who="Ann")', 'ring(who="Bob")']


@pytest.mark.parametrize("seed", range(5))
def test_no_held_out_value_of_the_demo_skills_occurs_in_the_training_file(tmp_path: Path, seed: int) -> None:
    parts = split(read_folder(DEMO_SKILLS), 0.15, seed, unseen_values=True)
    skills.write_jsonl(tmp_path / "training.jsonl", parts.training)
    trained = (tmp_path / "training.jsonl").read_text()
    values = [value for example in parts.held_out for value in example.values]
    assert len(values) >= 36
    assert [value for value in values if occurs(value, trained)] == []


def test_demo_skills_hold_out_every_skill_and_each_value_stands_in_its_request() -> None:
    examples = read_folder(DEMO_SKILLS)
    parts = split(examples, 0.15, 0, unseen_values=True)
    assert {example.skill for example in parts.held_out} == {example.skill for example in examples}
    assert [one for one in examples if any(value not in one.request for value in one.values)] == []


def test_a_split_is_the_same_for_the_same_seed_and_loses_nothing() -> None:
    examples = read_folder(DEMO_SKILLS)
    parts = split(examples, 0.2, 3, unseen_values=False)
    assert parts == split(examples, 0.2, 3, unseen_values=False)
    assert parts.held_out != split(examples, 0.2, 4, unseen_values=False).held_out
    assert {one.request for one in parts.training} | {one.request for one in parts.held_out} == {
        one.request for one in examples
    }
    assert len(parts.training) + len(parts.held_out) == len(examples)


def test_an_example_whose_value_stands_elsewhere_is_never_held_out() -> None:
    examples = [
        SkillExample("ring", "ring Ann", 'ring(who="Ann")'),
        SkillExample("ring", "call ann, please", 'ring(who="ann")'),
        SkillExample("ring", "ring Bob", 'ring(who="Bob")'),
    ]
    for seed in range(10):
        assert [one.request for one in split(examples, 0.5, seed, unseen_values=True).held_out] == ["ring Bob"]


def test_a_share_outside_of_nought_and_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        split(read_folder(DEMO_SKILLS), 1.5, 0, unseen_values=True)


def test_training_lines_are_conversations_as_openai_takes_them(tmp_path: Path) -> None:
    skills.write_jsonl(tmp_path / "training.jsonl", [SkillExample("ring", "ring Zoë", 'ring(who="Zoë")')])
    assert json.loads((tmp_path / "training.jsonl").read_text()) == {
        "messages": [{"role": "user", "content": "ring Zoë"}, {"role": "assistant", "content": 'ring(who="Zoë")'}]
    }


@pytest.mark.parametrize(
    ("said", "same"),
    [
        ('f(a="1", b="2")', True),
        ('f(b="2", a="1")', True),
        (" f(a='1',b='2')\n", True),
        ('f(a="1", b="2", c="3")', False),
        ('f(a="1")', False),
        ('f(a="1", b="3")', False),
        ('g(a="1", b="2")', False),
        ('f("1", "2")', False),
    ],
)
def test_a_call_matches_whatever_the_order_and_quotes_of_its_arguments(said: str, same: bool) -> None:
    assert same_call(said, 'f(a="1", b="2")') is same


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "(",
        "f",
        "f(",
        'f(a="1"',
        "f(a=",
        "f(**x)",
        "f(a=b)",
        "f(g())",
        "a.f()",
        "\x00",
        "f() f()",
        "(" * 5000,
        "f(a='",
        "日本(",
        "lambda: 0",
    ],
)
def test_garbage_is_no_call_and_no_error(garbage: str) -> None:
    assert parse_call(garbage) is None
    assert not same_call(garbage, 'f(a="1")')


def test_a_cut_off_call_still_names_its_function() -> None:
    assert same_function('f(a="1', 'f(a="1")')
    assert not same_function("fact", 'f(a="1")')
    assert not same_function('ff(a="1")', 'f(a="1")')


def test_a_score_counts_exact_matches_call_matches_and_functions() -> None:
    wanted = ['f(a="1", b="2")'] * 4
    given = score(['f(a="1", b="2")', 'f(b="2", a="1")', 'f(a="1", b="7")', "hello"], wanted)
    assert (given.count, given.exact, given.call, given.function) == (4, 0.25, 0.5, 0.75)


def test_a_broken_skill_file_ends_the_recipe_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, "hello\n")
    assert skills.main(["--skills", str(tmp_path), "--model", "any"]) == 2
    assert "ring_examples.txt:1:" in capsys.readouterr().out.replace("\n", "")


def test_an_unreachable_server_ends_the_recipe_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--skills", str(DEMO_SKILLS), "--model", "any", "--base-url", "http://127.0.0.1:9/v1"]
    assert skills.main(arguments) == 1
    assert "127.0.0.1:9" in capsys.readouterr().out.replace("\n", "")

"""`--check`: what a training file is found to be, said in a way that its owner can act on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.chat.bundle import Bundle
from gateway.chat.render import IGNORED, render_example
from gateway.jobdir import Check, Hyperparameters, JobDir
from tests.tiny_model import write_examples, write_job
from tests.trainer.conftest import run_trainer
from trainer.auto import Resolved, auto_batch_size, auto_epochs, resolve
from trainer.check import run_check
from trainer.data.conversations import read_messages
from trainer.data.dataset import load_examples, read_bundle
from trainer.data.jsonl import read_lines
from trainer.data.lines import BadLine, Line

GOOD = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}
REPLY = {"role": "assistant", "content": "Hi."}


def checked(tmp_path: Path, base: Path, lines: list[Any], **more: Any) -> Check:
    """The check of a file of these lines: dicts as JSON, bytes as they are."""
    path = tmp_path / "file.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    job = write_job(tmp_path / "job", base, path, **more)
    return run_check(job, job.read_spec())


def test_the_check_needs_no_torch_and_counts_what_training_will_see(
    tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    job = write_job(tmp_path / "job", tiny_base, files / "train.jsonl", validation=files / "valid.jsonl")
    code = (
        "import sys; from trainer.__main__ import main; assert main([sys.argv[1], '--check']) == 0; "
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets', 'llama_cpp'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(job.path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    check = job.read_check()
    assert check is not None
    examples = load_examples(job.path / "data" / "train.jsonl", read_bundle(job), 256)
    assert (check.error, check.warnings, check.n_truncated) == (None, (), 0)
    assert (check.n_examples, check.n_validation_examples) == (40, 8) == (len(examples), 8)
    assert (check.n_tokens, check.n_trained_tokens) == (len(examples.ids), sum(examples.trained))
    assert (check.n_epochs, check.batch_size, check.learning_rate_multiplier) == (3, 4, 1.0)
    assert check.total_steps == 30
    assert job.read_result() is None and not job.attempts.exists()


def test_ids_and_labels_are_the_renderers(tiny_base: Path, tmp_path: Path) -> None:
    conversations = [
        {"messages": [{"role": "system", "content": "Be brief."}, *GOOD["messages"], *GOOD["messages"]]},
        {"messages": [GOOD["messages"][0], {**REPLY, "weight": 0}, GOOD["messages"][0], REPLY]},
        {"messages": [{"role": "user", "content": "type </s> and <s>"}, {"role": "assistant", "content": "café 🎉"}]},
    ] * 4
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(json.dumps(c) for c in conversations))
    bundle = Bundle.from_files({n: (tiny_base / n).read_bytes() for n in ("template.json", "tokenizer.json")})
    examples = load_examples(path, bundle, 256)
    for number, conversation in enumerate(conversations):
        expected = render_example(bundle, read_messages(conversation["messages"], "messages"), 256)
        found = examples.sequences(number)
        assert [(s.ids, s.labels) for s in found] == [(s.ids, s.labels) for s in expected]
        assert any(label != IGNORED for label in found[0].labels)


def test_too_few_examples_in_openais_words(tiny_base: Path, tmp_path: Path) -> None:
    error = checked(tmp_path, tiny_base, [GOOD] * 7).error
    assert error is not None
    assert error.code == "invalid_n_examples"
    assert error.message == "Training file has 7 example(s), but must have at least 10 examples"
    assert error.param == "training_file"


def test_an_empty_file_has_no_examples(tiny_base: Path, tmp_path: Path) -> None:
    error = checked(tmp_path, tiny_base, []).error
    assert error is not None and error.message.startswith("Training file has 0 example(s)")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NESTED = b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"messages": [', "is not JSON"),
        (b"[1, 2]", "is a list; it must be a JSON object with a list 'messages'"),
        (b'"text"', "is a string"),
        (
            b'{"prompt": "a", "completion": "b"}',
            "is in the prompt and completion form (prompt, completion), but the file begins in OpenAI's messages",
        ),
        (b'{"messages": []}', "messages is an empty list"),
        (b'{"messages": "hi"}', "messages is a string"),
        (b'{"messages": ["hi"]}', "messages[0] is a string"),
        ({"messages": [{"role": "bot", "content": "x"}, REPLY]}, "messages[0].role is 'bot'"),
        ({"messages": [{"content": "x"}, REPLY]}, "messages[0].role is null"),
        ({"messages": [{"role": ["user"], "content": "x"}, REPLY]}, "messages[0].role is ['user']"),
        ({"messages": [{"role": "user", "content": 5}, REPLY]}, "messages[0].content is a number"),
        ({"messages": [{"role": "user", "content": True}, REPLY]}, "messages[0].content is a boolean"),
        (
            {"messages": [{"role": "user", "content": ""}, REPLY]},
            "messages[0].content is empty, and the message is from the user",
        ),
        ({"messages": [GOOD["messages"][0], {"role": "assistant", "content": None}]}, "messages[1].content is empty"),
        ({"messages": [GOOD["messages"][0]]}, "messages has no assistant message"),
        ({"messages": [REPLY, GOOD["messages"][0]]}, "messages[1] is the last message and from the user"),
        (
            {"messages": [GOOD["messages"][0], {**REPLY, "weight": 0}]},
            "messages has the weight 0 for all assistant messages",
        ),
        ({"messages": [GOOD["messages"][0], {**REPLY, "weight": True}]}, "messages[1].weight is True"),
        ({"messages": [GOOD["messages"][0], {**REPLY, "weight": 2}]}, "messages[1].weight is 2"),
        ({"messages": [{**GOOD["messages"][0], "weight": 1}, REPLY]}, "only assistant messages may have one"),
        ({"messages": [REPLY, GOOD["messages"][0], REPLY]}, "first message"),
        ({**GOOD, "tools": [{"type": "function"}]}, "tools[0] must be"),
        ({**GOOD, "tools": {}, "functions": {"x": 1}}, "functions is an object; it must be a list"),
        ({**GOOD, "tools": [TOOL]}, "the template 'vicuna_v1.1' cannot offer tools to the model"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}, REPLY]},
            "messages[0].tool_call_id is 'a'",
        ),
        (
            {"messages": [{**GOOD["messages"][0], "tool_calls": [CALL]}, REPLY]},
            "messages[0].tool_calls is there on a message from the user",
        ),
        (
            {"messages": [GOOD["messages"][0], {**REPLY, "tool_calls": [{}]}]},
            "messages[1].tool_calls[0].id is null",
        ),
        (
            {"messages": [GOOD["messages"][0], {**REPLY, "tool_calls": [{**CALL, "id": 1}]}]},
            "messages[1].tool_calls[0].id is 1",
        ),
        (
            {"messages": [GOOD["messages"][0], {"role": "assistant", "function_call": {"name": "f"}}]},
            "messages[1].function_call.arguments is missing",
        ),
        (
            {
                "messages": [
                    GOOD["messages"][0],
                    {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}},
                ]
            },
            "is not JSON",
        ),
        ({"messages": [GOOD["messages"][0], {**REPLY, "tool_calls": [CALL]}]}, "messages[1] holds a tool call"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, REPLY]},
            "messages[0].content[0] is a content part of type 'image_url'; only text",
        ),
        ({"messages": [{"role": "user", "content": "a\0b"}, REPLY]}, "messages[0].content holds a NUL character"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair (\\ud83d)"),
        (b'{"messages": [{"role": "user", "content": "caf\xe9"}]}', "byte 47 (0xe9) is not UTF-8"),
        (b'{"messages": [], "messages": []}', "has the key 'messages' twice"),
        (b'{"messages": [], "x": NaN}', "holds NaN"),
        (b'{"messages": [], "x": -Infinity}', "holds -Infinity"),
        (b'{"messages": [], "x": 1e400}', "holds the number 1e400"),
        (b'{"messages": [], "x": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (NESTED, "nested too deeply"),
    ],
    ids=lambda value: value[:32] if isinstance(value, str) else "",
)
def test_a_bad_line_is_named_with_what_is_wrong(line: Any, said: str, tiny_base: Path, tmp_path: Path) -> None:
    check = checked(tmp_path, tiny_base, [GOOD] * 10 + [line])
    assert check.error is not None
    assert (check.error.code, check.error.param) == ("invalid_training_file", "training_file")
    assert "Line 11" in check.error.message and said in check.error.message
    assert len(check.error.message) < 500
    assert check.problems[0].startswith("Training file: Line 11: ")


def test_of_many_bad_lines_the_message_has_three_and_the_problems_are_twenty(tiny_base: Path, tmp_path: Path) -> None:
    check = checked(tmp_path, tiny_base, [{"messages": n} for n in range(50)])
    assert check.error is not None
    assert check.error.message.startswith("The training file has 50 invalid example(s). Line 1: ")
    assert check.error.message.endswith("and 47 more")
    assert len(check.problems) == 20 and check.problems[19].startswith("Training file: Line 20: ")


def test_the_validation_file_is_checked_likewise(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": 1}\n')
    job = write_job(tmp_path / "job", tiny_base, files / "train.jsonl", validation=broken)
    error = run_check(job, job.read_spec()).error
    assert error is not None
    assert (error.code, error.param) == ("invalid_validation_file", "validation_file")


def test_bom_crlf_blank_lines_and_no_last_newline_are_taken(tiny_base: Path, tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    path = tmp_path / "file.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([line] * 5) + b"\r\n\r\n" + b"\n".join([line] * 5))
    job = write_job(tmp_path / "job", tiny_base, path)
    check = run_check(job, job.read_spec())
    assert (check.error, check.n_examples) == (None, 10)


def test_content_in_text_parts_and_the_developer_role_are_taken(tiny_base: Path, tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}
    plain = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}, REPLY]}
    same = {"messages": [{"role": "developer", "content": "Be kind."}, parts, REPLY]}
    assert read_messages(plain["messages"], "messages") == read_messages(same["messages"], "messages")
    assert checked(tmp_path, tiny_base, [same] * 10).error is None


def test_an_overlong_line_is_refused_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(line + b"\n" + b'{"x": "' + b"a" * (5 << 20) + b'"}\n' + line)
    found = list(read_lines(path, limit_bytes=1 << 20))
    assert found[0] == Line(1, GOOD) and found[2] == Line(3, GOOD)
    assert found[1] == BadLine(2, "is longer than 1 MiB; split the example into shorter ones")


def test_a_line_of_100_mb_is_refused_in_bounded_memory(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    with path.open("wb") as file:
        file.write((files / "train.jsonl").read_bytes())
        file.truncate(file.tell() + (100 << 20))  # a sparse line of NULs
    job = write_job(tmp_path / "job", tiny_base, path)
    code = (
        "import sys; from trainer.__main__ import main; assert main([sys.argv[1], '--check']) == 0; "
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(job.path)], capture_output=True, text=True, check=True)
    check = job.read_check()
    assert check is not None and check.error is not None
    assert "Line 41: is longer than 8 MiB" in check.error.message
    assert int(done.stdout) < 160 << 10  # KiB, imports and all; the file is 100 MiB


def test_long_examples_are_shortened_and_counted(tiny_base: Path, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "milk and bread " * 200}, REPLY]}
    check = checked(tmp_path, tiny_base, [GOOD] * 9 + [long], max_length=128)
    assert check.error is None
    assert check.n_truncated == 1
    assert check.warnings[0].startswith("1 example of the training file is longer than 128 tokens and was shortened")


def test_the_check_can_be_run_by_hand_again(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", tiny_base, files / "train.jsonl")
    for _ in range(2):
        assert run_trainer(JobDir(job.path), "--check").returncode == 0
        assert job.read_check() is not None


def test_auto_follows_the_size_of_the_data_and_the_method() -> None:
    assert [auto_epochs(n) for n in (10, 33, 50, 1000, 10_000, 100_000)] == [10, 4, 3, 3, 2, 1]
    assert [auto_batch_size(n) for n in (10, 64, 1000, 10_000, 1_000_000)] == [4, 8, 8, 20, 64]
    assert [auto_epochs(n, "dpo") for n in (10, 300, 100_000)] == [10, 2, 1]
    assert [auto_batch_size(n, "kto") for n in (10, 300)] == [8, 16]
    assert resolve(Hyperparameters(), 10) == Resolved(10, 4, 1.0, None)
    assert resolve(Hyperparameters(), 300, "dpo") == Resolved(2, 8, 1.0, 0.1)
    asked = Hyperparameters(n_epochs=2, batch_size=64, learning_rate_multiplier=0.5, beta=0.3)
    assert resolve(asked, 10) == Resolved(2, 10, 0.5, None)
    assert resolve(asked, 10, "orpo") == Resolved(2, 10, 0.5, 0.3)


def test_a_bad_line_changes_nothing_of_the_others(tmp_path: Path) -> None:
    path = write_examples(tmp_path / "file.jsonl", 3)
    with path.open("ab") as file:
        file.write(b"oops\n" + json.dumps(GOOD).encode())
    kinds = [type(line).__name__ for line in read_lines(path)]
    assert kinds == ["Line", "Line", "Line", "BadLine", "Line"]

"""The preview shows just what a job would train, line by line, over HTTP and in the terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from gateway.chat.bundle import Bundle
from gateway.chat.conversation import Message
from gateway.chat.render import IGNORED, render_example
from gateway.terminal import draw_preview
from tests.server import Server

ROOT = Path(__file__).resolve().parent.parent
BASE = "tunegate-demo"
ASKED = {"role": "user", "content": "Set a timer for 5 minutes."}
REPLY = {"role": "assistant", "content": "timer(minutes=5)"}
GOOD = {"messages": [ASKED, REPLY]}
TWO = {"messages": [ASKED, REPLY | {"weight": 0}, ASKED, REPLY | {"content": "timer(</s>)"}]}


def preview(server: Server, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.base_url}/fine_tuning/preview", json={"model": BASE} | body, timeout=60)


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", "preview", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_runs_and_counts_are_those_of_the_sequences_that_a_job_trains_on(server: Server) -> None:
    found = preview(server, lines=[GOOD, TWO]).json()
    folder = server.data / "bases" / BASE
    bundle = Bundle.from_files({name: (folder / name).read_bytes() for name in ("template.json", "tokenizer.json")})
    assert found["template"] == {"id": "vicuna_v1.1", "version": bundle.digest}
    for line, example in zip(found["data"], (GOOD, TWO), strict=True):
        messages = [Message(**message) for message in example["messages"]]  # type: ignore[arg-type]
        (sequence,) = render_example(bundle, messages, found["max_length"])
        (shown,) = line["sequences"]
        trained = [label for label in sequence.labels if label != IGNORED]
        assert shown["n_tokens"] == line["n_tokens"] == len(sequence.ids)
        assert shown["n_trained_tokens"] == line["n_trained_tokens"] == len(trained)
        assert [token_id for run in shown["runs"] for token_id in run["token_ids"]] == sequence.ids
        assert all(run["n_tokens"] == len(run["token_ids"]) for run in shown["runs"])
        assert sum(run["n_tokens"] for run in shown["runs"] if run["trained"]) == len(trained)
        assert not shown["truncated"]
    assert found["summary"]["n_tokens"] == sum(line["n_tokens"] for line in found["data"])


def test_only_the_reply_and_its_stop_are_trained_and_typed_control_tokens_are_text(server: Server) -> None:
    (line,) = preview(server, lines=[TWO]).json()["data"]
    runs = line["sequences"][0]["runs"]
    trained = [run for run in runs if run["trained"]]
    assert "".join(run["text"] for run in trained).strip() == "timer(</s>)</s>"
    assert [(run["text"], run["n_tokens"]) for run in trained if run["control"]] == [("</s>", 1)]
    assert "timer(minutes=5)" in "".join(run["text"] for run in runs if not run["trained"]), "weight 0 is not learnt"


def test_problems_are_told_with_line_and_field_in_the_words_of_the_jobs_check(server: Server) -> None:
    found = preview(
        server,
        lines=[
            GOOD,
            "{not json",
            {"messages": [ASKED, {"role": "robot", "content": "x"}]},
            {"messages": [ASKED, REPLY | {"weight": 2}]},
            {"prompt": "x"},
        ],
    ).json()
    problems = {line["line"]: line["problem"] for line in found["data"] if "problem" in line}
    assert {line: problem["field"] for line, problem in problems.items()} == {
        2: None,
        3: "messages[1].role",
        4: "messages[1].weight",
        5: "messages",
    }
    assert "is not JSON" in problems[2]["message"] and "'robot'" in problems[3]["message"]
    assert (found["summary"]["n_problems"], found["summary"]["n_examples"]) == (4, 1)


def test_an_uploaded_file_is_previewed_by_its_id_and_lines_beyond_the_limit_are_counted(server: Server) -> None:
    content = b"".join(json.dumps(GOOD).encode() + b"\n" for _ in range(12))
    file = server.client().files.create(file=("train.jsonl", content), purpose="fine-tune")
    found = preview(server, training_file=file.id, limit=3).json()
    assert [line["line"] for line in found["data"]] == [1, 2, 3]
    summary = found["summary"]
    assert summary["n_examples"] == 12 and summary["complete"] and summary["error"] is None
    assert summary["n_tokens"] == 12 * found["data"][0]["n_tokens"]


def test_the_last_turn_alone_is_learnt_where_that_is_asked(server: Server) -> None:
    line = {"messages": [{"role": role, "content": "amber"} for role in ("user", "assistant") * 2]}
    learnt = []
    for turns in ("all", "last"):
        found = preview(server, lines=[line], tunegate={"turns": turns}).json()
        (sequence,) = found["data"][0]["sequences"]
        learnt.append(sum(run["trained"] and not run["control"] for run in sequence["runs"]))
    assert learnt == [2, 1]


def test_every_form_is_shown_pairs_with_both_replies_and_judged_replies_as_they_were_judged(server: Server) -> None:
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "amber"}]
    pair = {"prompt": "Hello", "chosen": "amber", "rejected": "lamps"}
    asked: list[tuple[list[dict[str, Any]], str]] = [
        ([{"conversations": turns}, {"conversations": turns[:1] * 2}], "supervised"),
        ([{"instruction": "Hello", "input": "there", "output": "amber"}], "supervised"),
        ([pair], "dpo"),
        ([{"prompt": "Hello", "completion": "amber", "label": False}], "kto"),
    ]
    shown = []
    for lines, method in asked:
        found = preview(server, lines=lines).json()
        assert found["summary"]["method"] == method and found["summary"]["n_problems"] == 0
        shown.append(found["data"])
    (conversation, dropped), (alpaca,), (preference,), (judged,) = shown
    assert dropped == {"line": 2, "dropped": True}
    assert "Hello\n\nthere" in "".join(run["text"] for run in alpaca["sequences"][0]["runs"])
    parts = {one["part"]: one["runs"][-2]["text"].strip() for one in preference["sequences"]}
    assert parts == {"chosen": "amber", "rejected": "lamps"} and judged["desirable"] is False
    assert conversation["n_tokens"] < 80


def test_prompts_are_learnt_too_where_that_is_asked_and_a_list_is_shown_by_its_items(
    server: Server, tmp_path: Path
) -> None:
    (line,) = preview(server, lines=[GOOD], tunegate={"train_on": "all"}).json()["data"]
    assert line["n_trained_tokens"] == line["n_tokens"]
    file = tmp_path / "train.json"
    file.write_text(json.dumps([GOOD] * 11 + [{"messages": []}], indent=1))
    found = cli(str(file), "--model", BASE, "--data", str(server.data), "--train-on", "all", "--limit", "1")
    assert found.returncode == 1 and "item 1 (line 2)" in found.stdout and "messages is an empty list" in found.stdout


def test_too_long_an_example_is_shown_as_it_is_shortened(server: Server) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 3000}, REPLY]}
    found = preview(server, lines=[long]).json()
    (line,) = found["data"]
    assert line["truncated"] and line["n_tokens"] <= found["max_length"]
    assert found["summary"]["n_truncated"] == 1
    assert "at least 10" in found["summary"]["error"], "one example is not enough for a job"


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({}, "training_file", 400),
        ({"lines": [], "training_file": "file-x"}, "lines", 400),
        ({"training_file": "file-nowhere"}, "training_file", 400),
        ({"lines": "x"}, "lines", 400),
        ({"lines": [], "tunegate": {"turns": "first"}}, "tunegate.turns", 400),
        ({"lines": [], "tunegate": {"turn": "all"}}, "tunegate.turn", 400),
        ({"lines": [], "tunegate": {"train_on": "none"}}, "tunegate.train_on", 400),
        ({"lines": [], "tunegate": {"chat_template_kwargs": {"messages": []}}}, "tunegate.chat_template_kwargs", 400),
        ({"lines": ["a\nb"]}, "lines", 400),
        ({"lines": [], "limit": 100_000}, "limit", 400),
        ({"lines": [], "colour": 1}, "colour", 400),
        ({"lines": [], "model": "gpt-9"}, "model", 404),
    ],
)
def test_a_preview_request_is_checked(server: Server, body: dict[str, Any], param: str, status: int) -> None:
    response = preview(server, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_the_command_shows_the_same_with_and_without_a_server_and_leaves_no_file(
    server: Server, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "train.jsonl", *[GOOD] * 11, TWO)
    before = len(list(server.client().files.list()))
    asked = cli(str(file), "--model", BASE, "--base-url", server.base_url)
    assert asked.returncode == 0, asked.stderr
    assert "⟦" in asked.stdout and "timer(minutes=5)</s>⟧" in asked.stdout
    assert "12 examples" in asked.stdout and "a job with the method supervised would take" in asked.stdout
    assert len(list(server.client().files.list())) == before
    local = cli(str(file), "--model", BASE, "--data", str(server.data))
    assert (local.returncode, local.stdout) == (0, asked.stdout)


def test_the_command_ends_with_1_when_a_job_would_fail_and_with_2_when_it_cannot_tell(
    tmp_path: Path, server: Server
) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", GOOD, "{")
    found = cli(str(bad), "--model", BASE, "--data", str(server.data))
    assert found.returncode == 1 and "line 2: is not JSON" in found.stdout
    assert "\n1 line cannot be used: a job on this file would fail" in found.stdout
    nobody = cli(str(bad), "--model", BASE, "--base-url", "http://127.0.0.1:1")
    assert nobody.returncode == 2 and "cannot reach" in nobody.stderr
    unknown = cli(str(bad), "--model", "gpt-9", "--base-url", server.base_url)
    assert unknown.returncode == 2 and "gpt-9" in unknown.stderr


def test_in_colour_trained_text_stands_out_and_control_characters_of_the_file_stay_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    runs = [
        {"text": "USER: \x1b]0;gone\x07[red]hi\u202e", "trained": False, "control": False, "n_tokens": 5},
        {"text": "yes", "trained": True, "control": False, "n_tokens": 1},
        {"text": "</s>", "trained": True, "control": True, "n_tokens": 1},
    ]
    counts = {"n_tokens": 7, "n_trained_tokens": 2, "truncated": False}
    shown = {
        "model": BASE,
        "max_length": 64,
        "template": {"id": "vicuna_v1.1"},
        "data": [{"line": 1, **counts, "sequences": [{"runs": runs, **counts}]}],
        "summary": counts
        | {"form": None, "n_examples": 1, "n_truncated": 0, "n_problems": 0, "complete": True, "error": None}
        | {"method": "supervised", "total_steps": 1, "n_epochs": 1, "batch_size": 1},
    }
    screen = io.StringIO()
    draw_preview(Console(file=screen, force_terminal=True, color_system="standard", highlight=False), shown)
    drawn = screen.getvalue()
    assert "\x1b]" not in drawn and "\x07" not in drawn and "\u202e" not in drawn
    assert "[red]hi" in drawn and "\x1b[1;32myes" in drawn and "\x1b[1;35m</s>" in drawn and "⟦" not in drawn

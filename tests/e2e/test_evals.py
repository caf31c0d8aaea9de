"""Evals through the strict SDK against a real server: runs over data, with and without a model, cancelled, deleted, killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests.server import Server

MODEL = "tunegate-demo"
SAME = {
    "type": "string_check",
    "name": "same",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.want }}",
    "operation": "eq",
}
NEAR = {
    "type": "text_similarity",
    "name": "near",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.want }}",
    "evaluation_metric": "rouge_l",
    "pass_threshold": 0.4,
}
ASKED = {
    "type": "completions",
    "model": MODEL,
    "input_messages": {
        "type": "template",
        "template": [{"role": "user", "content": "Repeat after me: {{ item.want }}"}],
    },
    "sampling_params": {"temperature": 0, "max_completion_tokens": 8},
}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def make(client: OpenAI, *criteria: Any, **fields: Any) -> Any:
    config: Any = {"type": "custom", "item_schema": {"type": "object"}, "include_sample_schema": True}
    return client.evals.create(data_source_config=config, testing_criteria=list(criteria) or [SAME], **fields)


def lines(*rows: Any) -> Any:
    return {"type": "file_content", "content": [{"item": item, "sample": sample} for item, sample in rows]}


def jsonl(*pairs: tuple[str, str]) -> Any:
    rows = [({"want": want}, {"output_text": said}) for want, said in pairs]
    return {"type": "jsonl", "source": lines(*rows)}


def asked(count: int, **fields: Any) -> Any:
    source = {"type": "file_content", "content": [{"item": {"want": f"word {n}"}} for n in range(count)]}
    return {**ASKED, **fields, "source": source}


def wait_over(client: OpenAI, run: Any) -> Any:
    deadline = time.monotonic() + 90
    while (found := client.evals.runs.retrieve(run.id, eval_id=run.eval_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_an_eval_is_read_back_changed_listed_and_deleted(client: OpenAI) -> None:
    made = [make(client, SAME, NEAR, name=f"eval {n}", metadata={"n": str(n)}) for n in range(3)]
    assert client.evals.retrieve(made[0].id).to_dict() == made[0].to_dict()
    changed = client.evals.update(made[0].id, name="another", metadata={"n": "x"})
    assert (changed.name, changed.metadata) == ("another", {"n": "x"})
    assert client.evals.retrieve(made[0].id).name == "another"
    assert [found.id for found in client.evals.list(limit=2, order="desc")][:3] == [one.id for one in made[::-1]]
    assert next(iter(client.evals.list(order="desc", order_by="updated_at"))).id in {one.id for one in made}
    run = client.evals.runs.create(made[0].id, data_source=jsonl(("a", "a")))
    assert client.evals.delete(made[0].id).deleted
    assert client.evals.delete(made[0].id).deleted
    with pytest.raises(NotFoundError):
        client.evals.retrieve(made[0].id)
    with pytest.raises(NotFoundError):
        client.evals.runs.retrieve(run.id, eval_id=made[0].id)


def test_a_run_judges_each_line_of_its_data(client: OpenAI) -> None:
    made = make(client, SAME, NEAR)
    data = jsonl(("the cat sat", "the cat sat"), ("the cat sat", "the cat stood"), ("the cat sat", "a dog"))
    run = client.evals.runs.create(made.id, data_source=data, name="three", metadata={"k": "v"})
    assert run.status == "queued"
    done = wait_over(client, run)
    assert done.status == "completed"
    assert (done.result_counts.total, done.result_counts.passed, done.result_counts.failed) == (3, 1, 2)
    counted = {one.testing_criteria: (one.passed, one.failed) for one in done.per_testing_criteria_results}
    assert counted == {"same": (1, 2), "near": (2, 1)}
    items = list(client.evals.runs.output_items.list(run.id, eval_id=made.id, limit=2))
    assert sorted(item.datasource_item_id for item in items) == [0, 1, 2]
    (second,) = [item for item in items if item.datasource_item_id == 1]
    assert [(result.name, result.passed) for result in second.results] == [("same", False), ("near", True)]
    found = client.evals.runs.output_items.retrieve(second.id, eval_id=made.id, run_id=run.id)
    assert found.to_dict() == second.to_dict()
    passed = list(client.evals.runs.output_items.list(run.id, eval_id=made.id, status="pass"))
    assert [item.datasource_item_id for item in passed] == [0]


def test_a_run_asks_the_model_and_counts_what_it_used(client: OpenAI) -> None:
    made = make(client, {**SAME, "operation": "ne", "reference": "nothing at all"})
    done = wait_over(client, client.evals.runs.create(made.id, data_source=asked(5)))
    assert (done.status, done.model, done.result_counts.passed) == ("completed", MODEL, 5)
    (usage,) = done.per_model_usage
    assert (usage.run_model_name, usage.invocation_count) == (MODEL, 5)
    items = list(client.evals.runs.output_items.list(done.id, eval_id=made.id))
    assert sum(item.sample.usage.total_tokens for item in items) == usage.total_tokens
    assert items[0].sample.input[0].content.startswith("Repeat after me: word")
    assert items[0].sample.output[0].role == "assistant"


def test_responses_are_asked_as_completions_are(client: OpenAI) -> None:
    made = make(client, {**SAME, "operation": "ne", "reference": "nothing at all"})
    done = wait_over(client, client.evals.runs.create(made.id, data_source=asked(2, type="responses")))
    assert (done.status, done.result_counts.passed) == ("completed", 2)


def test_stored_completions_are_judged_as_they_are(client: OpenAI) -> None:
    said = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Repeat after me: hello."}],
        max_tokens=5,
        store=True,
        metadata={"for": "evals"},
    )
    made = make(client, {**SAME, "reference": said.choices[0].message.content or ""})
    source: Any = {"type": "completions", "source": {"type": "stored_completions", "metadata": {"for": "evals"}}}
    done = wait_over(client, client.evals.runs.create(made.id, data_source=source))
    assert (done.result_counts.total, done.result_counts.passed) == (1, 1)


def test_a_file_is_read_and_one_that_is_none_fails_the_run(client: OpenAI) -> None:
    rows = "".join(json.dumps({"item": {"want": "a"}, "sample": {"output_text": said}}) + "\n" for said in "aab")
    made = make(client)
    for content, status in ((rows, "completed"), (rows + "no json\n", "failed")):
        file = client.files.create(file=("rows.jsonl", content.encode()), purpose="user_data")
        source: Any = {"type": "jsonl", "source": {"type": "file_id", "id": file.id}}
        done = wait_over(client, client.evals.runs.create(made.id, data_source=source))
        assert done.status == status
        assert ("line 4" in done.error.message) == (status == "failed")


def test_a_line_that_fails_ends_nothing_else(client: OpenAI) -> None:
    made = make(client)
    data = {
        "type": "jsonl",
        "source": lines(({"want": "a"}, {"output_text": "a"}), ({"other": 1}, {"output_text": "a"})),
    }
    done = wait_over(client, client.evals.runs.create(made.id, data_source=data))  # type: ignore[arg-type]
    assert (done.status, done.result_counts.passed, done.result_counts.errored) == ("completed", 1, 1)


def test_an_idempotency_key_makes_one_eval_and_one_run(client: OpenAI) -> None:
    of_eval, of_run = ({"Idempotency-Key": f"of-{what}"} for what in ("eval", "run"))
    first, again = (make(client, extra_headers=of_eval) for _ in range(2))
    assert first.id == again.id
    runs = [client.evals.runs.create(first.id, data_source=jsonl(("a", "a")), extra_headers=of_run) for _ in range(2)]
    assert runs[0].id == runs[1].id and len(list(client.evals.runs.list(first.id))) == 1
    assert wait_over(client, runs[0]).status == "completed"


def test_what_was_canceled_stays_canceled(client: OpenAI) -> None:
    made = make(client)
    run = client.evals.runs.create(made.id, data_source=asked(200))
    canceled = client.evals.runs.cancel(run.id, eval_id=made.id)
    assert canceled.status == "canceled"
    time.sleep(0.5)
    found = client.evals.runs.retrieve(run.id, eval_id=made.id)
    assert found.to_dict() == canceled.to_dict()
    assert client.evals.runs.cancel(run.id, eval_id=made.id).status == "canceled"
    assert client.evals.runs.delete(run.id, eval_id=made.id).deleted
    with pytest.raises(NotFoundError):
        client.evals.runs.retrieve(run.id, eval_id=made.id)


def test_runs_come_in_pages_that_stay_while_runs_are_added(client: OpenAI) -> None:
    made = make(client)
    runs = [client.evals.runs.create(made.id, data_source=jsonl(("a", "a"))).id for _ in range(5)]
    listed = []
    for run in client.evals.runs.list(made.id, limit=2, order="desc"):
        listed.append(run.id)
        if len(listed) == 1:
            client.evals.runs.create(made.id, data_source=jsonl(("a", "a")))
    assert listed == runs[::-1]


@pytest.mark.parametrize(
    ("source", "param"),
    [
        ({"type": "csv"}, "data_source"),
        ({"type": "jsonl", "source": {"type": "file_content", "content": []}}, "data_source.source.content"),
        ({"type": "jsonl", "source": {"type": "file_content", "content": [5]}}, "data_source.source.content[0]"),
        ({**ASKED, "source": lines(({}, {})), "input_messages": None}, "data_source.input_messages"),
        ({**ASKED, "source": lines(({}, {})), "model": None}, "data_source.model"),
        ({**ASKED, "source": lines(({}, {})), "sampling_params": {"n": 5}}, "data_source.sampling_params"),
        ({**ASKED, "source": lines(({}, {})), "sampling_params": {"top_p": 5}}, "top_p"),
    ],
)
def test_what_is_no_data_is_refused_by_name(client: OpenAI, source: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.evals.runs.create(make(client).id, data_source=source)
    assert refused.value.param == param


def test_two_criteria_of_one_name_are_refused(server: Server) -> None:
    config = {"type": "custom", "item_schema": {}}
    body = {"data_source_config": config, "testing_criteria": [SAME, SAME]}
    told = httpx.post(f"{server.base_url}/evals", json=body)
    assert (told.status_code, told.json()["error"]["param"]) == (400, "testing_criteria")


def test_a_kill_loses_no_run_and_no_response_that_was_acknowledged(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        with server.start().client() as client:
            made = make(client, {**SAME, "operation": "ne", "reference": "nothing at all"})
            run = client.evals.runs.create(made.id, data_source=asked(60))
            response = client.responses.create(model=MODEL, input="Repeat after me: hello.", background=True)
            while client.evals.runs.retrieve(run.id, eval_id=made.id).result_counts.total < 3:
                time.sleep(0.02)
            server.kill()
        with server.start().client() as client:
            done = wait_over(client, run)
            assert (done.status, done.result_counts.total, done.result_counts.passed) == ("completed", 60, 60)
            items = list(client.evals.runs.output_items.list(run.id, eval_id=made.id))
            assert sorted(item.datasource_item_id for item in items) == list(range(60))
            deadline = time.monotonic() + 60
            while client.responses.retrieve(response.id).status in ("queued", "in_progress"):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert client.responses.retrieve(response.id).output_text
    finally:
        server.stop()

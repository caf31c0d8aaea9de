"""Uploads in parts, and batches, on a real server: whole, resumable, cancelled, killed; never a line lost or doubled."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from tests.server import Server

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of this module's own, which may be killed."""
    server = Server(tmp_path_factory.mktemp("batches"), "[limits]\nbatch_lines = 3\n")
    try:
        yield server.start()
    finally:
        server.stop()


def lines(count: int, endpoint: str = "/v1/chat/completions", **body: Any) -> bytes:
    ask = {"model": "tunegate-demo", "messages": MESSAGES, "max_tokens": 4, **body}
    rows = [
        {"custom_id": f"line-{n}", "method": "POST", "url": endpoint, "body": {**ask, "seed": n}} for n in range(count)
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def create(server: Server, content: bytes, endpoint: str = "/v1/chat/completions", **options: Any) -> Batch:
    client = server.client()
    file = client.files.create(file=("asks.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,  # type: ignore[arg-type]
        completion_window="24h",
        **options,
    )


def ended(server: Server, batch: Batch, timeout_s: float = 90) -> Batch:
    deadline = time.monotonic() + timeout_s
    while batch.status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() < deadline, f"{batch}\n{server.log_tail()}"
        time.sleep(0.1)
        batch = server.client().batches.retrieve(batch.id)
    return batch


def rows_of(server: Server, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in server.client().files.content(file_id).text.splitlines()]


# uploads


def test_a_file_in_parts_is_the_file_of_their_order_and_is_refused_when_it_is_not_whole(own: Server) -> None:
    client = own.client()
    content = os.urandom(300_000)
    upload = client.uploads.create(bytes=len(content), filename="big.bin", mime_type="x/y", purpose="user_data")
    assert (upload.status, upload.expires_at - upload.created_at) == ("pending", 3600)
    last = client.uploads.parts.create(upload.id, data=content[200_000:])
    first = client.uploads.parts.create(upload.id, data=content[:200_000])
    for refused, param in (
        ({"part_ids": [first.id]}, "part_ids"),
        ({"part_ids": [first.id, first.id]}, "part_ids"),
        ({"part_ids": [first.id, "part_nothing"]}, "part_ids"),
        ({"part_ids": [last.id, first.id], "md5": hashlib.md5(content).hexdigest()}, "md5"),
        ({"part_ids": [first.id, last.id], "md5": "x"}, "md5"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.uploads.complete(upload.id, **refused)  # type: ignore[arg-type]
        assert error.value.param == param
    whole = client.uploads.complete(upload.id, part_ids=[first.id, last.id], md5=hashlib.md5(content).hexdigest())
    assert whole.status == "completed" and whole.file is not None
    assert client.files.content(whole.file.id).content == content
    again = client.uploads.complete(upload.id, part_ids=[first.id, last.id])
    assert again.file is not None and again.file.id == whole.file.id, "a retry makes no second file"
    with pytest.raises(openai.BadRequestError, match="is completed"):
        client.uploads.parts.create(upload.id, data=b"more")


def test_an_upload_goes_on_after_a_kill_with_the_parts_that_were_answered(own: Server) -> None:
    client = own.client()
    upload = client.uploads.create(bytes=6, filename="a.txt", mime_type="text/plain", purpose="user_data")
    part = client.uploads.parts.create(upload.id, data=b"abc")
    own.kill()
    own.start()
    listed = httpx.get(f"{own.base_url}/uploads/{upload.id}/parts").json()["data"]
    assert [(found["id"], found["bytes"]) for found in listed] == [(part.id, 3)]
    rest = client.uploads.parts.create(upload.id, data=b"def")
    whole = client.uploads.complete(upload.id, part_ids=[part.id, rest.id])
    assert whole.file is not None and client.files.content(whole.file.id).text == "abcdef"


def test_an_upload_that_is_completed_many_times_at_once_is_one_file(own: Server) -> None:
    client = own.client()
    for _ in range(5):
        upload = client.uploads.create(bytes=40, filename="a.txt", mime_type="text/plain", purpose="user_data")
        ids = [client.uploads.parts.create(upload.id, data=os.urandom(10)).id for _ in range(4)]
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: client.uploads.complete(upload.id, part_ids=ids).file, range(8)))  # noqa: B023
        assert len({file.id for file in found if file is not None}) == 1 and None not in found


def test_cancelled_uploads_stay_so_and_bounds_are_kept(own: Server) -> None:
    client = own.client()
    upload = client.uploads.create(bytes=3, filename="a.txt", mime_type="text/plain", purpose="user_data")
    client.uploads.parts.create(upload.id, data=b"abc")
    for _ in range(2):
        assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        client.uploads.complete(upload.id, part_ids=["part_x"])
    with pytest.raises(openai.BadRequestError) as error:
        client.uploads.create(bytes=1 << 50, filename="a", mime_type="x", purpose="user_data")
    assert error.value.param == "bytes"
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel("upload_nothing")


def test_an_idempotency_key_makes_one_upload_one_file_and_one_batch(own: Server) -> None:
    client, key = own.client(), {"Idempotency-Key": "the-same"}
    asked: dict[str, Any] = {"bytes": 3, "filename": "a", "mime_type": "x/y", "purpose": "user_data"}
    assert client.uploads.create(**asked, extra_headers=key).id == client.uploads.create(**asked, extra_headers=key).id
    with pytest.raises(openai.BadRequestError, match="other parameters"):
        client.uploads.create(**{**asked, "bytes": 4}, extra_headers=key)
    of_file = {"Idempotency-Key": "a-file"}
    file, again = (
        client.files.create(file=("a.jsonl", lines(1)), purpose="batch", extra_headers=of_file) for _ in range(2)
    )
    assert file.id == again.id
    first, second = (
        client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            extra_headers={"Idempotency-Key": "a-batch"},
        )
        for _ in range(2)
    )
    assert first.id == second.id
    ended(own, first)


# batches


def test_a_batch_answers_every_line_as_its_endpoint_would_and_tells_failures_apart(own: Server) -> None:
    good, bad = (
        lines(5),
        lines(1, max_tokens=-1).replace(b"line-0", b"bad-1")
        + lines(1, stream=True).replace(b"line-0", b"bad-2")
        + lines(1, background=True).replace(b"line-0", b"bad-3"),
    )
    batch = create(own, good + b"\n" + bad, metadata={"for": "test"})
    assert batch.status in ("validating", "in_progress") and batch.metadata == {"for": "test"}
    batch = ended(own, batch)
    assert batch.status == "completed", batch
    assert batch.request_counts is not None and batch.usage is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (8, 5, 3)
    answered = rows_of(own, batch.output_file_id)
    assert [row["custom_id"] for row in answered] == [f"line-{n}" for n in range(5)]
    live = own.client().chat.completions.create(
        model="tunegate-demo",
        messages=MESSAGES,
        max_tokens=4,
        seed=3,  # type: ignore[arg-type]
    )
    response = answered[3]["response"]
    assert response["status_code"] == 200 and response["request_id"].startswith("req_")
    assert response["body"]["choices"][0]["message"]["content"] == live.choices[0].message.content
    assert batch.usage.total_tokens == sum(row["response"]["body"]["usage"]["total_tokens"] for row in answered)
    failed = {row["custom_id"]: row["response"]["body"]["error"]["param"] for row in rows_of(own, batch.error_file_id)}
    assert failed == {"bad-1": "max_tokens", "bad-2": "stream", "bad-3": "background"}
    assert batch.id in {found.id for found in own.client().batches.list()}


def test_a_file_that_is_no_batch_fails_and_names_its_lines(own: Server) -> None:
    content = lines(1) + b"{\n" + lines(1) + b'{"custom_id": "x", "method": "GET", "url": "/v1/x", "body": {}}\n'
    batch = ended(own, create(own, content))
    assert batch.status == "failed" and batch.errors is not None and batch.errors.data is not None
    assert [(error.line, error.code) for error in batch.errors.data] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "invalid_method"),
    ]
    with pytest.raises(openai.BadRequestError) as refused:
        create(own, lines(1), "/v1/images/generations")
    assert refused.value.param == "endpoint"
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        own.client().batches.cancel(batch.id)


def test_a_cancelled_batch_keeps_what_was_answered_and_says_of_the_rest_that_it_was_not(own: Server) -> None:
    batch = create(own, lines(60, max_tokens=200, ignore_eos=True))
    deadline = time.monotonic() + 60
    while not (counts := own.client().batches.retrieve(batch.id).request_counts) or counts.completed < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert own.client().batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(own, own.client().batches.cancel(batch.id), 20)
    answered, rest = rows_of(own, batch.output_file_id), rows_of(own, batch.error_file_id)
    assert batch.status == "cancelled" and len(answered) >= 2 and rest
    assert {row["custom_id"] for row in answered + rest} == {f"line-{n}" for n in range(60)}
    assert {row["error"]["code"] for row in rest} == {"batch_cancelled"}
    assert own.client().batches.cancel(batch.id).status == "cancelled"


def test_killed_again_and_again_a_batch_loses_and_doubles_no_line(own: Server) -> None:
    batch = create(own, lines(40, max_tokens=30, ignore_eos=True))
    for _ in range(3):
        before = own.client().batches.retrieve(batch.id).request_counts
        deadline = time.monotonic() + 60
        while (now := own.client().batches.retrieve(batch.id).request_counts) == before and now.completed < 40:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        own.kill()
        own.start()
    batch = ended(own, batch)
    assert batch.status == "completed" and batch.request_counts is not None
    assert batch.request_counts.completed == 40
    told = Counter(row["custom_id"] for row in rows_of(own, batch.output_file_id))
    assert told == Counter(f"line-{n}" for n in range(40))


def test_a_batch_whose_day_is_over_keeps_what_was_answered_and_says_expired(own: Server) -> None:
    batch = create(own, lines(60, max_tokens=200, ignore_eos=True))
    deadline = time.monotonic() + 60
    while not (counts := own.client().batches.retrieve(batch.id).request_counts) or counts.completed < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    own.kill()
    with (
        closing(sqlite3.connect(own.data / "tunegate.db")) as database,
        database,
    ):  # the day goes by while nobody is there
        database.execute("UPDATE batches SET expires_at = ? WHERE id = ?", (int(time.time()) - 1, batch.id))
    own.start()
    batch = ended(own, batch, 20)
    answered, rest = rows_of(own, batch.output_file_id), rows_of(own, batch.error_file_id)
    assert batch.status == "expired" and batch.expired_at and len(answered) >= 2 and rest
    assert {row["custom_id"] for row in answered + rest} == {f"line-{n}" for n in range(60)}
    assert {row["error"]["code"] for row in rest} == {"batch_expired"}


def test_next_to_live_requests_one_line_is_asked_at_a_time(own: Server) -> None:
    batch = create(own, lines(60, max_tokens=60, ignore_eos=True))
    with own.client().chat.completions.create(
        model="tunegate-demo",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=900,
        n=4,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        next(iter(stream))
        deadline = time.monotonic() + 60
        while own.running_sequences() > 4 + 1:  # the lines that were there before it
            assert time.monotonic() < deadline
        seen = [own.running_sequences() for _ in range(12)]
    # Four replies and a line; had the replies ended meanwhile, four lines and no more.
    assert 5 in seen and max(seen) == 5, seen
    own.client().batches.cancel(batch.id)
    ended(own, batch)


def test_the_input_may_be_deleted_while_its_batch_runs(own: Server) -> None:
    batch = create(own, lines(12, max_tokens=40))
    own.client().files.delete(batch.input_file_id)
    assert ended(own, batch).status == "completed"
    blobs = {path.name for path in (own.data / "blobs").glob("??/*")}
    digest = hashlib.sha256(lines(12, max_tokens=40)).hexdigest()
    assert digest not in blobs, "its bytes go with the batch"

"""What a key may use, and what it has used: rates with OpenAI's headers, jobs, storage; usage counted once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.access import Caller
from gateway.errors import RateLimited, StoreUnavailable
from gateway.limits import Bucket, duration
from gateway.metering import Meter
from gateway.store import Store
from gateway.store.metering import GROUPS, sum_counts
from tests.server import Server
from tests.test_keys import LINES, bearer, check_error, client, make_key, tunegate

ASK: dict[str, Any] = {
    "model": "tunegate-demo",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 5,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that needs a key, with an alias."""
    server = Server(tmp_path_factory.mktemp("limited"), '[aliases]\n"gpt-4o-mini" = "tunegate-demo"\n')
    make_key(server.data, "--scopes", "admin")
    try:
        yield server.start()
    finally:
        server.stop()


def test_requests_a_minute_are_told_in_openais_headers_and_one_too_many_is_429(limited: Server) -> None:
    _, key = make_key(limited.data, "--requests-per-minute", "3")
    left = []
    for _ in range(3):
        response = httpx.get(f"{limited.base_url}/models", headers=bearer(key))
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        left.append(int(response.headers["x-ratelimit-remaining-requests"]))
        assert "x-ratelimit-limit-tokens" not in response.headers
    assert left == [2, 1, 0]
    response = httpx.get(f"{limited.base_url}/models", headers=bearer(key))
    message = check_error(response, 429, "rate_limit_exceeded")
    assert "limit 3" in message and 1 <= int(response.headers["retry-after"]) <= 20
    assert response.headers["x-ratelimit-reset-requests"].endswith("s")
    with pytest.raises(openai.RateLimitError):
        client(limited, key).models.list()


def test_tokens_a_minute_are_taken_for_the_prompt_and_owed_for_the_reply(limited: Server) -> None:
    _, key = make_key(limited.data, "--tokens-per-minute", "60")
    mine = client(limited, key)
    reply = mine.chat.completions.create(**{**ASK, "max_tokens": 80})
    assert reply.usage is not None and reply.usage.completion_tokens == 80, "no reply is cut short"
    with pytest.raises(openai.RateLimitError) as refused:
        mine.chat.completions.create(**ASK)
    assert refused.value.response.headers["x-ratelimit-remaining-tokens"] == "0"
    assert int(refused.value.response.headers["retry-after"]) > 20, "what was taken beyond is paid first"
    _, small = make_key(limited.data, "--tokens-per-minute", "5")
    with pytest.raises(openai.RateLimitError, match="too large"):
        client(limited, small).chat.completions.create(**ASK)


def test_a_project_has_no_more_jobs_at_once_and_no_more_bytes_than_its_key_allows(limited: Server) -> None:
    options = ("--project", "small", "--jobs", "0", "--storage", f"{len(LINES) * 2}")
    mine = client(limited, make_key(limited.data, *options)[1])
    file = mine.files.create(file=("a.jsonl", LINES), purpose="fine-tune")
    mine.files.create(file=("b.jsonl", LINES), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as refused:
        mine.files.create(file=("c.jsonl", LINES), purpose="fine-tune")
    assert refused.value.code == "storage_limit_exceeded"
    with pytest.raises(openai.RateLimitError, match="may have 0 at once"):
        mine.fine_tuning.jobs.create(training_file=file.id, model="tunegate-demo")
    mine.files.delete(file.id)
    announced: dict[str, Any] = {"bytes": len(LINES), "filename": "c", "mime_type": "x/y", "purpose": "fine-tune"}
    upload = mine.uploads.create(**announced)
    for room_is_taken in (
        lambda: mine.uploads.create(**announced),
        lambda: mine.files.create(file=("c.jsonl", LINES), purpose="fine-tune"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            room_is_taken()
        assert refused.value.code == "storage_limit_exceeded"
    mine.uploads.cancel(upload.id)
    mine.files.create(file=("c.jsonl", LINES), purpose="fine-tune")


def test_usage_is_counted_once_by_key_and_model_for_whole_cut_and_streamed_replies(limited: Server) -> None:
    key_id, key = make_key(limited.data, "--project", "counted")
    mine = client(limited, key)
    began = int(time.time())
    whole = mine.chat.completions.create(**ASK)
    streamed = list(mine.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    aliased = mine.completions.create(model="gpt-4o-mini", prompt=["a b", "c d"], max_tokens=3)
    assert whole.usage and streamed[-1].usage and aliased.usage
    expected = {
        "tunegate-demo": (
            2,
            whole.usage.prompt_tokens + streamed[-1].usage.prompt_tokens,
            whole.usage.completion_tokens + streamed[-1].usage.completion_tokens,
        ),
        "gpt-4o-mini": (2, aliased.usage.prompt_tokens, aliased.usage.completion_tokens),
    }
    _, admin_key = make_key(limited.data, "--scopes", "admin")
    admin = client(limited, admin_key).with_options(admin_api_key=admin_key)
    deadline = time.monotonic() + 10
    while True:
        page = admin.admin.organization.usage.completions(
            start_time=began - 120, bucket_width="1m", api_key_ids=[key_id], group_by=["model", "project_id"], limit=9
        )
        found: dict[str, tuple[int, int, int]] = {}
        for bucket in page.data:
            for result in bucket.results:
                assert result.object == "organization.usage.completions.result" and result.project_id == "counted"
                one = (result.num_model_requests, result.input_tokens, result.output_tokens)
                sums = found.get(str(result.model), (0, 0, 0))
                found[str(result.model)] = (sums[0] + one[0], sums[1] + one[1], sums[2] + one[2])
        if found == expected:
            break
        assert time.monotonic() < deadline, (found, expected)
        time.sleep(0.1)
    shown = tunegate("usage", data=limited.data).stdout
    assert f"{key_id} (test)" in shown and "gpt-4o-mini" in shown
    refused = httpx.get(f"{limited.base_url}/organization/usage/completions?start_time=1", headers=bearer(key))
    check_error(refused, 403, "insufficient_permissions")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "start_time"),
        ("start_time=x", "start_time"),
        ("start_time=99999999&end_time=3", "end_time"),
        ("start_time=1&bucket_width=2d", "bucket_width"),
        ("start_time=1&limit=999", "limit"),
        ("start_time=1&group_by[]=colour", "group_by"),
        ("start_time=1&batch=x", "batch"),
        ("start_time=1&nothing=x", "nothing"),
    ],
)
def test_a_usage_query_that_makes_no_sense_names_its_parameter(limited: Server, query: str, param: str) -> None:
    _, key = make_key(limited.data, "--scopes", "admin")
    response = httpx.get(f"{limited.base_url}/organization/usage/completions?{query}", headers=bearer(key))
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


@pytest.mark.anyio
async def test_counts_that_could_not_be_written_are_written_once_later(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "tunegate.db")
    meter, caller = Meter(), Caller(project_id="p", key_id="key_1")
    meter.add(caller, "m", "completions", 3, 2, 1)
    store.close()
    with pytest.raises(StoreUnavailable):
        await meter.flush(store)
    meter.add(caller, "m", "completions", 3, 2, 1)
    store = Store.open(tmp_path / "tunegate.db")
    await asyncio.gather(meter.flush(store), meter.flush(store))
    now = int(time.time())
    rows = await store.read(
        lambda connection: sum_counts(connection, "completions", now - 100, now + 1, width_s=101, group_by=GROUPS)
    )
    assert [(row["requests"], row["input_tokens"], row["output_tokens"], row["cached_tokens"]) for row in rows] == [
        (2, 6, 4, 2)
    ]
    store.close()


def test_a_level_rises_evenly_and_a_debt_is_paid_first() -> None:
    bucket = Bucket(None, 6000)
    bucket.take_tokens(6000)
    bucket.owe_tokens(50)
    with pytest.raises(RateLimited) as refused:
        bucket.take_request()
    assert refused.value.retry_after_s == 1
    deadline = time.monotonic() + 5
    while True:
        try:
            bucket.take_request()
            break
        except RateLimited:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert [duration(0.12), duration(1), duration(59.2), duration(360)] == ["120ms", "1s", "1m0s", "6m0s"]

"""What the worker refuses, and that a client which goes away costs nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from tests.llama_worker.running import RunningWorker, request

LONG = {"prompt": [1, 2, 3], "max_tokens": 4000, "ignore_eos": True}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/version"),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("POST", "/v1/embeddings"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("GET", "/no/such/path"),
    ],
)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Bearer worker-key-for-test", "worker-key-for-tests"]
)
def test_nothing_but_health_is_open_without_the_key(
    worker: RunningWorker, method: str, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header}
    response = httpx.request(method, worker.client.base_url.join(path), headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_health_is_open(worker: RunningWorker) -> None:
    assert httpx.get(worker.client.base_url.join("/health")).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", None),
        ("model", 5),
        ("prompt", None),
        ("prompt", []),
        ("prompt", "text"),
        ("prompt", [1, 320]),
        ("prompt", [1, -1]),
        ("prompt", [1, 2.0]),
        ("prompt", [True]),
        ("prompt", [[1]]),
        ("prompt", [2**70]),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", "6"),
        ("max_tokens", 10**12),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", False),
        ("temperature", 1e9),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 2),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", [1]),
        ("seed", "x"),
        ("seed", 1.5),
        ("n", 0),
        ("n", 9),
        ("n", 10**9),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("stop_token_ids", 5),
        ("stop_token_ids", [320]),
        ("stop_token_ids", [1] * 257),
        ("ignore_eos", 1),
        ("min_tokens", -1),
        ("min_tokens", 7),
        ("logit_bias", [1]),
        ("logit_bias", {"320": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": "much"}),
        ("stream", "yes"),
        ("stream_options", 5),
        ("stream_options", {"include_usage": 1}),
    ],
)
def test_a_bad_value_is_refused_by_name(worker: RunningWorker, field: str, value: Any) -> None:
    response = worker.post(**{field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] in (field, "include_usage")
    assert error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b"5", b'{"temperature": NaN}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_body_that_is_not_an_object_is_refused(worker: RunningWorker, body: bytes) -> None:
    response = worker.client.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_body_over_the_cap_is_refused(worker: RunningWorker) -> None:
    assert worker.client.post("/v1/completions", content=b" " * (8 * 2**20 + 1)).status_code == 413


def test_unknown_fields_are_ignored(worker: RunningWorker) -> None:
    assert worker.ids(cache_salt="x", return_token_ids=True, skip_special_tokens=False, best_of=99) == worker.ids()


@pytest.mark.parametrize(
    ("length", "max_tokens", "param"), [(512, 1, "prompt"), (10_000, 1, "prompt"), (500, 13, "max_tokens")]
)
def test_what_does_not_fit_the_context_is_refused(
    worker: RunningWorker, length: int, max_tokens: int, param: str
) -> None:
    response = worker.post(prompt=[5] * length, max_tokens=max_tokens)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "512" in error["message"]


def test_an_unknown_model_is_not_found(worker: RunningWorker) -> None:
    response = worker.post(model="nobody")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "nobody" in response.json()["error"]["message"]


def test_unknown_paths_and_methods_get_the_error_object(worker: RunningWorker) -> None:
    assert worker.client.get("/nowhere").status_code == 404
    response = worker.client.get("/v1/completions")
    assert response.status_code == 405
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_stream_closed_by_its_client_frees_its_place_within_a_second(slow_worker: RunningWorker) -> None:
    with slow_worker.client.stream("POST", "/v1/completions", json=request(**LONG, stream=True)) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert slow_worker.metric("sequences_running") == 1
    slow_worker.wait_metric("sequences_running", 0, timeout_s=1)


def test_a_unary_request_given_up_by_its_client_frees_its_place_within_a_second(slow_worker: RunningWorker) -> None:
    with pytest.raises(httpx.ReadTimeout):
        slow_worker.client.post("/v1/completions", json=request(**LONG), timeout=httpx.Timeout(5, read=0.3))
    slow_worker.wait_metric("sequences_running", 0, timeout_s=1)


def test_a_full_queue_refuses_with_retry_after_and_a_queued_client_may_leave(slow_worker: RunningWorker) -> None:
    url, headers = slow_worker.client.base_url.join("/v1/completions"), dict(slow_worker.client.headers)
    with (
        httpx.Client(headers=headers, timeout=30) as client,
        client.stream("POST", url, json=request(**LONG, stream=True)) as one,
        client.stream("POST", url, json=request(**LONG, stream=True)) as two,
    ):
        lines = [response.iter_lines() for response in (one, two)]  # kept: a dropped iterator closes its stream
        assert [next(stream)[:6] for stream in lines] == ["data: "] * 2
        with ThreadPoolExecutor(1) as pool:
            queued = pool.submit(client.post, url, json=request(**LONG), timeout=httpx.Timeout(5, read=3))
            slow_worker.wait_metric("requests_waiting", 1, timeout_s=10)
            refused = slow_worker.post()
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert isinstance(queued.exception(), httpx.ReadTimeout)
        slow_worker.wait_metric("requests_waiting", 0, timeout_s=1)
        assert slow_worker.metric("sequences_running") == 2
    slow_worker.wait_metric("sequences_running", 0, timeout_s=1)
    assert slow_worker.post().status_code == 200


def test_a_long_prompt_does_not_stall_a_running_stream(slow_worker: RunningWorker) -> None:
    with slow_worker.client.stream("POST", "/v1/completions", json=request(**LONG, stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        before = slow_worker.metric("generated_tokens_total")
        assert slow_worker.post(prompt=[5] * 1280, max_tokens=1).status_code == 200
        during = slow_worker.metric("generated_tokens_total") - before
    assert during >= 1280 // 64  # a token of the stream for every chunk of the prompt
    slow_worker.wait_metric("sequences_running", 0, timeout_s=1)


def test_a_hundred_closed_streams_leave_nothing_behind(worker: RunningWorker) -> None:
    process = psutil.Process(worker.process.pid)
    worker.ids()
    files = process.num_fds()
    for index in range(100):
        body = request(prompt=[1, 2, 3 + index], max_tokens=500, ignore_eos=True, stream=True)
        with worker.client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    worker.wait_metric("sequences_running", 0, timeout_s=1)
    assert worker.post().status_code == 200
    assert process.num_fds() <= files + 1  # one more kept-alive connection at most
    assert process.children() == []


COUNTED = ["cached_tokens_total", "prompt_tokens_total", "generated_tokens_total"]
COUNTED += [f'step_seconds_count{{kind="{kind}"}}' for kind in ("prompt", "decode")]


def test_the_metrics_tell_of_queue_running_tokens_cache_kv_and_steps(worker: RunningWorker) -> None:
    worker.ids(prompt=[7] * 40)
    before = {name: worker.metric(name) for name in COUNTED}
    worker.ids(prompt=[7] * 40, max_tokens=4)
    gained = {name: worker.metric(name) - before[name] for name in COUNTED}
    assert gained["cached_tokens_total"] == 32 and gained["prompt_tokens_total"] == 8
    assert gained["generated_tokens_total"] == 4
    assert gained['step_seconds_count{kind="decode"}'] == 3 and gained['step_seconds_count{kind="prompt"}'] == 1
    text = worker.client.get("/metrics").text
    for gauge in ("requests_waiting", "sequences_running", "kv_positions_used", "kv_positions", "adapters_in_memory"):
        assert f"# TYPE tunegate_worker_{gauge} gauge" in text
    assert worker.metric("kv_positions") > worker.metric("kv_positions_used")

"""A llama worker as a child process, for tests that speak to it over a real port."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

KEY = "worker-key-for-tests"
START_TIMEOUT_S = 60


class RunningWorker:
    """A worker process and a client of it."""

    def __init__(self, folder: Path, model: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model_path = model
        self.ready_file = folder / "ready.json"
        self.log_file = folder / "log"
        key_file = folder / "key"
        key_file.write_text(KEY + "\n")
        command = [sys.executable, "-m", "gateway.llama_worker", "--model", str(model), "--served-name", "base"]
        command += ["--key-file", str(key_file), "--ready-file", str(self.ready_file), *arguments]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, env={**os.environ, **(environment or {})})
        self.client = httpx.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    def wait_ready(self) -> RunningWorker:
        """Returns when the ready-file is there; fails with the log when the process ends first."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.ready_file.exists():
            assert self.process.poll() is None, self.log_file.read_text()
            assert time.monotonic() < deadline, self.log_file.read_text()
            time.sleep(0.01)
        self.client.base_url = httpx.URL(f"http://127.0.0.1:{self.ready()['port']}")
        return self

    def ready(self) -> dict[str, Any]:
        """What the ready-file says."""
        return dict(json.loads(self.ready_file.read_text()))

    def post(self, **fields: Any) -> httpx.Response:
        """A completion request over greedy, six-token defaults; the raw response."""
        return self.client.post("/v1/completions", json=request(**fields))

    def complete(self, **fields: Any) -> dict[str, Any]:
        """A completion that must succeed; the body."""
        response = self.post(**fields)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def ids(self, **fields: Any) -> list[int]:
        """The token ids of the only choice."""
        (choice,) = self.complete(**fields)["choices"]
        return list(choice["token_ids"])

    def ids_together(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        """The token ids of each request, all sent at once."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda fields: self.ids(**fields), requests))

    def stream(self, **fields: Any) -> list[dict[str, Any]]:
        """The frames of a stream that ends with [DONE], without it."""
        with self.client.stream("POST", "/v1/completions", json=request(stream=True, **fields)) as response:
            assert response.status_code == 200, response.read()
            payloads = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert payloads[-1] == "[DONE]"
        return [json.loads(payload) for payload in payloads[:-1]]

    def load(self, name: str, folder: Path) -> httpx.Response:
        """Asks for an adapter."""
        return self.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> httpx.Response:
        """Asks for an adapter to go."""
        return self.client.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def metric(self, name: str) -> float:
        """The value of one line of /metrics."""
        found = re.search(rf"^tunegate_worker_{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    def wait_metric(self, name: str, value: float, timeout_s: float) -> None:
        """Returns when a metric has a value."""
        deadline = time.monotonic() + timeout_s
        while (now := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {now} after {timeout_s} s, not {value}"
            time.sleep(0.005)

    def close(self) -> None:
        """Ends the process, kindly first."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextmanager
def running(folder: Path, model: Path, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Any]:
    """A worker that is ready, ended on leaving."""
    worker = RunningWorker(folder, model, *arguments, environment=environment)
    try:
        yield worker.wait_ready()
    finally:
        worker.close()


@contextmanager
def hanging_request(worker: RunningWorker, **fields: Any) -> Iterator[socket.socket]:
    """A stream that nobody reads; the connection is closed on leaving."""
    content = json.dumps(request(stream=True, **fields)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", worker.ready()["port"])) as connection:
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        yield connection


def request(**fields: Any) -> dict[str, Any]:
    """A valid body; `fields` win."""
    return {"model": "base", "prompt": [1, 5, 6, 7], "max_tokens": 6, "temperature": 0, **fields}


def prompt(length: int, salt: int = 0) -> list[int]:
    """A prompt of so many ids, different for each salt."""
    return [3 + (7 * index * (salt + 1) + salt) % 250 for index in range(length)]

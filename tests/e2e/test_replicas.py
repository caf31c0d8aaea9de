"""Two real workers behind one gateway: one dies, one more comes, one leaves, all under load, and nobody who asks notices."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.settings import DEMO_MODEL_PATH
from tests.e2e import training
from tests.e2e.test_kills import is_alive
from tests.server import ROOT, Server, free_port

pytestmark = pytest.mark.timeout(900)  # real training, on however many cores there are

BASE = "tunegate-demo"
QUESTION = [{"role": "user", "content": "Tell me a long story about the sea, with a beginning, a middle and an end."}]


def settings(replicas: int, metrics_port: int, more: str = "") -> str:
    return (
        f"metrics_port = {metrics_port}\n{more}\n[bases.{BASE}]\npath = '{DEMO_MODEL_PATH}'\nthreads = 1\nmax_seqs = 4\n"
        f"[[engines]]\nkind = 'llama'\nmodel = '{BASE}'\nreplicas = {replicas}\n"
    )


class Gateway(Server):
    """A gateway with replicas, whose metrics can be read."""

    def __init__(self, folder: Path, replicas: int) -> None:
        self.metrics_port = free_port()
        super().__init__(folder, settings(replicas, self.metrics_port))

    def reload(self, text: str) -> None:
        assert self.process is not None
        self.config.write_text(text)
        self.process.send_signal(signal.SIGHUP)

    def pid_of(self, place: int) -> int:
        folder = self.data / "engines" / BASE / (f"@{place}" if place > 1 else ".")
        return int(json.loads((folder / "ready.json").read_text())["pid"])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's values over all labels but those that are given."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        found = [
            float(value)
            for label_text, value in re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE)
            if all(f'{label}="{wanted}"' in label_text for label, wanted in labels.items())
        ]
        return sum(found)

    def adapters(self) -> list[float]:
        """How many each of the first two replicas has verified."""
        return [self.metric("tunegate_replica_adapters", replica=f"{BASE} #{place}") for place in (1, 2)]

    def ready_replicas(self) -> float:
        return self.metric("tunegate_replica_ready")


def until(condition: Any, what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


class Load:
    """Streams one after another on some threads, each counted by how it ended."""

    def __init__(self, server: Server, model: str) -> None:
        self._server, self._model = server, model
        self._over = threading.Event()
        self.ends: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self) -> None:
        body = {"model": self._model, "messages": QUESTION, "max_tokens": 60, "stream": True, "ignore_eos": True}
        with httpx.Client(timeout=60) as client:
            while not self._over.is_set():
                with client.stream("POST", f"{self._server.base_url}/chat/completions", json=body) as response:
                    text = "".join(response.iter_text())
                self._count(response.status_code, text)

    def _count(self, status: int, text: str) -> None:
        if status == 200 and text.endswith("data: [DONE]\n\n"):
            self.ends["whole"] += 1
        elif status == 200 and '"delta"' in text and '"error"' in text.rsplit("data: ", 1)[1] and "[DONE]" not in text:
            self.ends["broken off"] += 1
        else:
            self.failures.append(f"{status}: {text[:300]}")

    def until_whole(self, count: int) -> None:
        """Returns when so many more are through."""
        wanted = self.ends["whole"] + count
        until(lambda: self.ends["whole"] >= wanted or self.failures, "the load makes progress")

    @contextmanager
    def under_way(self, threads: int = 6) -> Iterator[Load]:
        running = [threading.Thread(target=self.run) for _ in range(threads)]
        for thread in running:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()
            for thread in running:
                thread.join()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("replicas"), 2)
    try:
        gateway.start()
        until(lambda: gateway.ready_replicas() == 2, "both replicas are ready")
        yield gateway
    finally:
        gateway.stop()


@pytest.fixture(scope="module")
def tuned(two: Gateway) -> str:
    """A model that was trained while both serve."""
    client = two.client()
    job = training.create(client, BASE, training.upload(client, training.examples("gamma")))
    ended = training.wait_for_end(client, job.id)
    assert ended.fine_tuned_model is not None, (ended.error, training.messages(client, job.id), two.log_tail())
    return ended.fine_tuned_model


def test_an_adapter_trained_while_both_serve_is_verified_on_both(two: Gateway, tuned: str) -> None:
    until(
        lambda: (
            two.metric("tunegate_replica_adapters") == 2 * two.metric("tunegate_replica_adapters", replica=f"{BASE} #1")
        ),
        "",
    )
    assert two.metric("tunegate_replica_adapters") >= 2
    with Load(two, tuned).under_way() as load:
        load.until_whole(12)
    assert not load.failures and not load.ends["broken off"]
    answered = [two.metric("tunegate_requests_chosen_total", replica=f"{BASE} #{place}") for place in (1, 2)]
    assert min(answered) > 0, "both answer"
    assert training.ask(two.client(), tuned, "What is cedar 2?").startswith("gamma")


def test_a_killed_replica_costs_only_the_replies_that_it_had_begun(two: Gateway, tuned: str) -> None:
    with Load(two, tuned).under_way() as load:
        for place in (1, 2):
            load.until_whole(6)
            until(lambda: two.metric("tunegate_replica_in_flight", replica=f"{BASE} #{place}") > 0, "it is at work")  # noqa: B023
            killed = two.pid_of(place)
            os.kill(killed, signal.SIGKILL)
            load.until_whole(6)
            until(lambda: two.ready_replicas() == 2, "it is back")
            assert two.pid_of(place) != killed
        assert not load.failures, two.log_tail()
        load.until_whole(6)
    assert not load.failures
    assert load.ends["broken off"] <= 12, "no more than were under way"
    assert two.metric("tunegate_replica_faults_total", fault="lost") > 0
    assert min(two.adapters()) > 0 and len(set(two.adapters())) == 1, "it has its adapters back"


def test_replicas_come_and_go_under_load_without_a_failed_request(two: Gateway, tuned: str) -> None:
    # One prompt of the base: its home is busy with some of them, and the others go where least is under way, the third too.
    with Load(two, tuned).under_way(2) as of_tuned, Load(two, BASE).under_way() as load:
        load.until_whole(3)
        two.reload(settings(3, two.metrics_port))
        until(lambda: two.ready_replicas() == 3, "the third has joined")
        third = f"{BASE} #3"
        until(lambda: two.metric("tunegate_requests_chosen_total", replica=third) > 3, "it is asked")
        assert two.metric("tunegate_replica_adapters", replica=third) > 0
        pids = [two.pid_of(place) for place in (1, 2, 3)]
        two.reload(settings(1, two.metrics_port))
        until(lambda: two.ready_replicas() == 1 and not two.metric("tunegate_replicas_leaving"), "two have left")
        load.until_whole(6)
        assert [is_alive(pid) for pid in pids] == [True, False, False]
        two.reload(settings(2, two.metrics_port))
        until(lambda: two.ready_replicas() == 2, "the second is back")
    for each in (load, of_tuned):
        assert not each.failures, (each.failures, two.log_tail())
        assert each.ends["whole"] and not each.ends["broken off"], two.log_tail()


def test_bad_settings_are_refused_with_a_log_line_and_the_old_ones_stay(two: Gateway) -> None:
    before = [two.pid_of(place) for place in (1, 2)]
    now = settings(2, two.metrics_port)
    vllm = now.replace("'llama'", "'vllm'\nurls = ['http://h:1']").replace("replicas = 2", "")
    for wrong, words in (
        ("nonsense = [", "is not valid TOML"),
        (now.replace("replicas = 2", "replicas = 0"), "replicas = 0; it is 1 to 64"),
        (vllm, "taken at the next start only"),
    ):
        two.reload(wrong)
        until(lambda: words in two.log_tail(200), f"the log says: {words}", 20)  # noqa: B023
    two.reload(settings(2, two.metrics_port, "organization = 'other'"))
    until(lambda: "taken at the next start: organization" in two.log_tail(200), "what is not taken is named", 20)
    assert [two.pid_of(place) for place in (1, 2)] == before
    assert two.ready_replicas() == 2


def test_a_gateway_whose_terminal_is_closed_ends_and_does_not_read_its_settings(tmp_path: Path) -> None:
    server = Server(tmp_path, f"[bases.{BASE}]\npath = '{DEMO_MODEL_PATH}'\nstart = 'on_demand'\n")
    terminal, its_side = os.openpty()
    command = [sys.executable, "-m", "gateway", "serve", "--port", str(server.port), "--data", str(server.data)]
    with server.log.open("wb") as log:
        server.process = subprocess.Popen(
            [*command, "--config", str(server.config)],
            cwd=ROOT,
            stdin=its_side,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # its terminal, as a login shell's is
        )
    os.close(its_side)
    try:
        server.wait_ready()
        server.process.send_signal(signal.SIGHUP)
        until(
            lambda: "[[engines]] is as the settings have it" in server.log_tail(),
            "it is read while the terminal is there",
        )
        os.close(terminal)
        assert server.process.wait(30) == -signal.SIGTERM, "as if it had been told to end"
        assert "Application shutdown complete" in server.log_tail()
    finally:
        server.stop()


def test_replies_under_way_are_finished_when_the_gateway_is_told_to_end(tmp_path: Path) -> None:
    """And the next start with fewer replicas ends no worker too few."""
    gateway = Gateway(tmp_path, 2)
    gateway.start()
    until(lambda: gateway.ready_replicas() == 2, "both replicas are ready")
    pids = [gateway.pid_of(place) for place in (1, 2)]
    body = {"model": BASE, "messages": QUESTION, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{gateway.base_url}/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_text()
        text = next(lines)
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGTERM)
        text += "".join(lines)
    assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text
    gateway.process.wait(60)
    assert not any(map(is_alive, pids))
    gateway.start()
    until(lambda: gateway.ready_replicas() == 2, "both replicas are ready")
    pids = [gateway.pid_of(place) for place in (1, 2)]
    gateway.kill()
    gateway.config.write_text(settings(1, gateway.metrics_port))
    gateway.start()
    try:
        assert gateway.pid_of(1) == pids[0], "it is taken over"
        assert not is_alive(pids[1]), "nobody asks for it any more"
    finally:
        gateway.stop()

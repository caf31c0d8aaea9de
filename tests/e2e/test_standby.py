"""The trainer that stands by, in a real server: it trains the jobs, dies without harm, and does not outlive the gateway."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.jobdir import process_start_time
from tests.e2e import training
from tests.server import Server

pytestmark = pytest.mark.timeout(1200)  # real training, on however many cores there are


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, '[jobs]\nstandby = "always"\n')
    try:
        yield server.start()
    finally:
        server.stop()


def standby_of(server: Server, *, other_than: int = 0) -> int:
    """The pid of the gateway's child that stands by, once there is one."""
    assert server.process is not None
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
                stands_by = b"trainer.processes.standby" in (process / "cmdline").read_bytes()
                if parent == server.process.pid and stands_by and int(process.name) != other_than:
                    return int(process.name)
        time.sleep(0.1)
    raise AssertionError(f"no trainer stands by: {server.log_tail()}")


def until_gone(pid: int, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while process_start_time(pid) is not None:
        assert time.monotonic() < deadline, f"{pid} is still there"
        time.sleep(0.02)


def test_jobs_succeed_with_a_standby_and_without_and_none_is_left_behind_by_a_killed_gateway(server: Server) -> None:
    client = server.client()
    waiting = standby_of(server)
    file_id = training.upload(client, training.examples("omega", 12))

    def train() -> int:
        job = training.create(client, "tunegate-demo", file_id, n_epochs=1)
        ended = training.wait_for_end(client, job.id)
        assert ended.status == "succeeded", (ended.error, training.messages(client, job.id), server.log_tail())
        return int(json.loads((server.data / "jobs" / job.id / "lock").read_text())["pid"])

    train()
    second = standby_of(server, other_than=waiting)
    os.kill(second, signal.SIGKILL)
    assert train() != second
    last = standby_of(server, other_than=second)
    server.kill()
    until_gone(last)
    server.start()  # it takes the engine over, and ends it when it is stopped

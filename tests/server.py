"""A real `tunegate serve` on a free port, in a process of its own, for tests that walk through the front door."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from openai import OpenAI

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """One data folder and the gateway on it. `start` returns when it is ready; it may be killed and started again."""

    def __init__(self, folder: Path, settings: str = "", environment: dict[str, str] | None = None) -> None:
        """`settings` is the text of the TOML file that it starts with, `environment` what is added to ours."""
        folder.mkdir(parents=True, exist_ok=True)
        self.data = folder / "data"
        self.log = folder / "server.log"
        self.config = folder / "tunegate.toml"
        self.config.write_text(settings)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._environment = environment or {}

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self, *, wait: bool = True, timeout_s: float = 120) -> Server:
        command = [sys.executable, "-m", "gateway", "serve", "--port", str(self.port)]
        command += ["--data", str(self.data), "--config", str(self.config)]
        with self.log.open("ab") as log:
            environment = {**os.environ, **self._environment}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if wait:
            self.wait_ready(timeout_s)
        return self

    def wait_ready(self, timeout_s: float = 120) -> None:
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log_tail()}"
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log_tail()}")

    def client(self) -> OpenAI:
        """The SDK as a user has it, in its strict mode, and without its own retries, which would hide a 5xx."""
        return OpenAI(base_url=self.base_url, api_key="unused", max_retries=0, _strict_response_validation=True)

    def running_sequences(self, base: str = "tunegate-demo") -> int:
        """How many sequences the base's engine is working on, from its own metrics."""
        folder = self.data / "engines" / base
        port = json.loads((folder / "ready.json").read_text())["port"]
        key = (folder / "key").read_text().strip()
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {key}"}).text
        counts = [
            line.rsplit(" ", 1)[1]
            for line in text.splitlines()
            if re.match(r"\w+_(sequences_running|requests_waiting) ", line)
        ]
        assert counts, text
        return int(sum(float(count) for count in counts))

    def kill(self) -> None:
        """SIGKILL to the gateway alone: its engines and trainers are left as a crash would leave them."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, and wait: engines end with it."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

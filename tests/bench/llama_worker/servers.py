"""The three servers of the comparison as children, each with the bodies that it takes and the frames that it sends."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gateway.engines.llama_launch import huge_pages
from tests.bench.llama_worker import build
from tests.llama_worker.running import KEY, RunningWorker

START_TIMEOUT_S = 180
SPARE_POSITIONS = 128


@dataclass(frozen=True)
class Setting:
    """What all servers are started with."""

    model: Path
    adapters: list[Path]  # GGUF files
    context: int  # positions a sequence
    sequences: int
    threads: int
    flash_attention: bool


@dataclass(frozen=True)
class Ask:
    """One request: a prompt, the adapter (None: the base) and how many tokens to generate."""

    prompt: list[int]
    adapter: int | None
    tokens: int


class Server:
    """A child that listens; `path`, `body` and `ended` say how it is asked and when a stream is over."""

    name = ""
    path = ""
    ended = b""
    first = b"data: "
    headers = ""
    takes_adapters = True

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.port = 0
        self.command: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def body(self, ask: Ask) -> dict[str, Any]:
        raise NotImplementedError

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)

    def _spawn(self, command: list[str], log: Path) -> None:
        self.command = command
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace").strip().splitlines()[-5:]
                raise build.PeerUnavailable(f"{self.name} did not start: {' / '.join(tail)}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self._probe}", timeout=2) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    _probe = "/health"


class Ours(Server):
    """The llama worker."""

    name = "tunegate"
    path = "/v1/completions"
    ended = b"data: [DONE]"
    headers = f"authorization: Bearer {KEY}\r\n"

    def __init__(self, setting: Setting, folder: Path, in_memory: int = 16) -> None:
        super().__init__(setting, folder)
        arguments = ["--ctx", str(setting.context), "--max-seqs", str(setting.sequences)]
        arguments += ["--max-adapters", str(in_memory)]
        arguments += ["--threads", str(setting.threads)]
        arguments += ["--fastest"] if setting.flash_attention else []
        environment = huge_pages(os.environ)  # as the gateway starts it
        self.worker = RunningWorker(folder / "tunegate", setting.model, *arguments, environment=environment)
        try:
            self.worker.wait_ready()
        except BaseException:
            self.worker.close()
            raise
        self.port = self.worker.ready()["port"]
        self.command = [*(f"{name}={value}" for name, value in environment.items())]
        self.command += ["python", "-m", "gateway.llama_worker", *arguments]
        for index, path in enumerate(setting.adapters):
            self.worker.load(f"adapter-{index}", path.parent).raise_for_status()

    def body(self, ask: Ask) -> dict[str, Any]:
        model = "base" if ask.adapter is None else f"adapter-{ask.adapter}"
        fields = {"model": model, "prompt": ask.prompt, "max_tokens": ask.tokens, "temperature": 0, "ignore_eos": True}
        return {**fields, "stream": True}

    def __enter__(self) -> Ours:
        return self

    def python_cost(self) -> tuple[float, float, int]:
        """(CPU seconds of the loop outside llama.cpp, CPU seconds of the HTTP thread, decode steps) so far."""
        text = self.worker.client.get("/metrics").text
        values = dict(re.findall(r'^tunegate_worker_(\w+(?:{kind="decode"})?) (\S+)$', text, re.MULTILINE))
        steps = values.get('step_seconds_count{kind="decode"}', "0")
        return float(values["loop_cpu_seconds"]), float(values["http_cpu_seconds"]), int(float(steps))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.close()


class LlamaServer(Server):
    """llama.cpp's own server, its prompt cache on."""

    name = "llama-server"
    path = "/completion"
    ended = b'"stop":true'

    def __init__(self, setting: Setting, folder: Path) -> None:
        super().__init__(setting, folder)
        self.port = free_port()
        self._adapters = len(setting.adapters)
        command = [str(build.llama_server()), "--model", str(setting.model), "--port", str(self.port)]
        command += ["--ctx-size", str(setting.context * setting.sequences), "--parallel", str(setting.sequences)]
        command += ["--threads", str(setting.threads), "--threads-batch", str(setting.threads)]
        command += ["--flash-attn", "on" if setting.flash_attention else "off", "--cache-prompt"]
        if setting.adapters:
            command += ["--lora-init-without-apply", "--lora", ",".join(str(path) for path in setting.adapters)]
        self._spawn(command, folder / "llama-server.log")

    def body(self, ask: Ask) -> dict[str, Any]:
        fields: dict[str, Any] = {"prompt": ask.prompt, "n_predict": ask.tokens, "temperature": 0, "ignore_eos": True}
        if self._adapters:
            scales = [{"id": index, "scale": float(index == ask.adapter)} for index in range(self._adapters)]
            fields["lora"] = scales
        return {**fields, "stream": True, "cache_prompt": True}


class LlamaCppPython(Server):
    """The server that llama-cpp-python brings: one request at a time, no adapter per request, text prompts."""

    name = "llama-cpp-python"
    path = "/v1/completions"
    ended = b"data: [DONE]"
    takes_adapters = False
    _probe = "/v1/models"

    def __init__(self, setting: Setting, folder: Path) -> None:
        super().__init__(setting, folder)
        self.port = free_port()
        command = [str(build.llama_cpp_python()), "-m", "llama_cpp.server", "--model", str(setting.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--n_ctx", str(setting.context)]
        command += ["--n_threads", str(setting.threads), "--n_threads_batch", str(setting.threads)]
        command += ["--flash_attn", str(setting.flash_attention), "--interrupt_requests", "False"]
        self._spawn(command, folder / "llama-cpp-python.log")

    def body(self, ask: Ask) -> dict[str, Any]:
        # Characters that the random vocabulary does not hold become one byte token each; BOS and a space come first.
        text = "".join(chr(97 + token % 26) for token in ask.prompt[4:])
        return {"prompt": text, "max_tokens": ask.tokens, "temperature": 0, "stream": True}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def encode(server: Server, ask: Ask) -> bytes:
    """The request as bytes: built before the clock starts."""
    content = json.dumps(server.body(ask)).encode()
    head = f"POST {server.path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n{server.headers}"
    return f"{head}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content


def shown(servers: Sequence[Server]) -> str:
    """Every server's command line, for the head of the table."""
    home = str(Path.home())
    return "\n".join(f"  {server.name}: {' '.join(server.command).replace(home, '~')}" for server in servers)


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]

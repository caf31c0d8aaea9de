"""`make demo`: the whole loop on this machine, before and after, through the unmodified OpenAI SDK.

Starts `tunegate serve` unless one answers already, asks the demo model, fine-tunes it with the recipe in
`clients/recipes/skills.py`, and leaves the server up. `--stop` ends it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from openai import OpenAI

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tunegate-demo"
SKILLS = ROOT / "clients" / "recipes" / "demo_skills"
READY_TIMEOUT_S = 600
STOP_TIMEOUT_S = 60


class DemoFailed(Exception):
    """The demo cannot go on; the message says why and what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the server's data folder")
    parser.add_argument("--stop", action="store_true", help="stop the server on that data folder")
    arguments = parser.parse_args()
    data: Path = arguments.data.absolute()
    try:
        if arguments.stop:
            print(stop(data))
        else:
            show(arguments.port, data)
    except DemoFailed as failure:
        print(f"\ndemo: {failure}", file=sys.stderr)
        return 1
    return 0


def show(port: int, data: Path) -> None:
    """The demo from start to end. Raises DemoFailed."""
    root = f"http://127.0.0.1:{port}"
    if is_tunegate(root, port):
        print(f"A Tunegate server answers on {root} already; using it.")
        wait_ready(root, None, data)
    else:
        wait_ready(root, start(port, data), data)
    recipe = [sys.executable, "-m", "clients.recipes.skills", "--base-url", f"{root}/v1"]
    recipe += ["--skills", str(SKILLS), "--model", MODEL]
    if subprocess.run(recipe, cwd=ROOT).returncode != 0:
        raise DemoFailed(
            f"the recipe failed; the server's log is {log_file(data)}, and it is still up: `make stop` ends it"
        )
    print(next_steps(root, newest_tuned_model(f"{root}/v1"), data))


def is_tunegate(root: str, port: int) -> bool:
    """Whether Tunegate answers on the port; False when nobody does. Raises DemoFailed when it is a stranger."""
    try:
        answer = httpx.get(f"{root}/readyz", timeout=5)
        if "engines" in answer.json():
            return True
    except httpx.ConnectError:
        return False
    except (httpx.HTTPError, ValueError, TypeError):
        pass
    raise DemoFailed(f"port {port} is taken by another program; choose a free one: `make demo PORT={port + 1}`")


def start(port: int, data: Path) -> subprocess.Popen[bytes]:
    """The server, in a session of its own so that it outlives this command; it writes to a log in the data folder."""
    data.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gateway", "serve", "--port", str(port), "--data", str(data)]
    with log_file(data).open("ab") as log:
        server = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    print(f"Starting `tunegate serve` on http://127.0.0.1:{port} (log: {log_file(data)}; {stop_hint(data)} ends it).")
    return server


def wait_ready(root: str, server: subprocess.Popen[bytes] | None, data: Path) -> None:
    """Return once `/readyz` says 200. Raises DemoFailed with the log's end when the server gives up."""
    started = time.monotonic()
    state = "starting"
    while (elapsed_s := time.monotonic() - started) < READY_TIMEOUT_S:
        if server is not None and server.poll() is not None:
            tail = "\n".join(log_file(data).read_text(errors="replace").splitlines()[-15:])
            raise DemoFailed(f"the server ended with exit code {server.returncode}; its last words:\n{tail}")
        try:
            answer = httpx.get(f"{root}/readyz", timeout=5)
            if answer.status_code == 200:
                progress(f"ready after {elapsed_s:.0f} s\n")
                return
            waiting = [name for name, ready in answer.json()["engines"].items() if not ready]
            state = f"waiting for {', '.join(waiting) or 'the bases'}"
        except httpx.HTTPError:
            pass
        progress(f"{state}, {elapsed_s:.0f} s")
        time.sleep(0.5)
    raise DemoFailed(f"not ready after {READY_TIMEOUT_S} s; the server's log is {log_file(data)}")


def progress(line: str) -> None:
    """Write over the last line on a terminal; elsewhere only what ends with a newline is shown."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="", flush=True)
    elif line.endswith("\n"):
        print(line, end="", flush=True)


def newest_tuned_model(base_url: str) -> str:
    """The name of the model that the last succeeded job made."""
    with OpenAI(base_url=base_url, api_key="unused") as client:
        for job in client.fine_tuning.jobs.list(limit=20):
            if job.fine_tuned_model:
                return job.fine_tuned_model
    raise DemoFailed("the recipe ended well, but no job names a tuned model")


def next_steps(root: str, tuned: str, data: Path) -> str:
    """What to do with the tuned model, and how to end the server."""
    messages = [{"role": "user", "content": first_request()}]
    body = json.dumps({"model": tuned, "messages": messages, "temperature": 0, "max_tokens": 60}, ensure_ascii=False)
    quoted = body.replace("'", "'\\''")
    return f"""
The tuned model is {tuned}. The server stays up on {root}; {stop_hint(data)} ends it. Try:

  curl {root}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{quoted}'
"""


def stop_hint(data: Path) -> str:
    return "`make stop`" if data == ROOT / "data" else f"`make stop DATA={data}`"


def first_request() -> str:
    """Something to ask: the first example of the first skill file."""
    for path in sorted(SKILLS.glob("*.txt")):
        for line in path.read_text().splitlines():
            if line.startswith("### User:"):
                return line.removeprefix("### User:").strip()
    return "Hello"


def stop(data: Path) -> str:
    """End the server that holds the data folder's lock, and say so. Raises DemoFailed when it will not go."""
    lock = data / "lock"
    pid = holder(lock)
    if pid is None:
        return f"No server runs on {data}."
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        if holder(lock) is None:
            return f"Stopped the server on {data} (pid {pid})."
        time.sleep(0.1)
    raise DemoFailed(f"the server (pid {pid}) did not end within {STOP_TIMEOUT_S} s of SIGTERM")


def holder(lock: Path) -> int | None:
    """The pid of the process that holds the lock now; None when it is free."""
    try:
        with lock.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(json.loads(file.read())["pid"])
            return None
    except FileNotFoundError:
        return None


def log_file(data: Path) -> Path:
    return data / "server.log"


if __name__ == "__main__":
    sys.exit(main())

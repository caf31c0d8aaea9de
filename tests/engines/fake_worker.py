"""A worker that misbehaves in the way its first argument says; for what the real one cannot be made to do.

Speaks enough of the dialect, on a real port and as a real process, to be taken for a worker.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gateway.jobdir import process_start_time, write_json


def main() -> None:
    misdeed, *rest = sys.argv[1:]
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    if misdeed == "crash":
        print("no such model, says llama.cpp")
        sys.exit(3)
    if misdeed.startswith("sleep:"):
        time.sleep(float(misdeed.removeprefix("sleep:")))
    if misdeed == "never-ready":
        time.sleep(600)
    if misdeed == "ignores-sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    digest = "sha256:other" if misdeed == "wrong-digest" else "sha256:base"
    sleeps = misdeed in ("sleeps", "never-wakes")
    key = Path(options["--key-file"]).read_text()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            allowed = self.headers["authorization"] == f"Bearer {key}" or self.path == "/health"
            models = {"data": [{"id": options["--served-name"], "parent": None}]}
            version = {"base_digest": digest, "max_model_len": 64, "sleeps": sleeps}
            bodies = {"/health": {}, "/version": version, "/v1/models": models, "/is_sleeping": {"is_sleeping": False}}
            self.answer(200 if allowed else 401, json.dumps(bodies[self.path]).encode() if allowed else b"{}")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"] or 0))
            known = sleeps and self.path.startswith(("/sleep?", "/wake_up"))
            ill = misdeed == "never-wakes" and self.path == "/wake_up"
            self.answer(500 if ill else 200 if known else 404, b"{}")

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    start_time = process_start_time(os.getpid())
    write_json(
        Path(options["--ready-file"]), {"pid": os.getpid(), "start_time": start_time, "port": server.server_port}
    )
    server.serve_forever()


main()

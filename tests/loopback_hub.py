"""A hub on loopback that speaks as huggingface.co does: model info, resolve with a redirect for large files, ranges, tokens."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 100_000  # from here on a file is kept apart, as git-lfs does, and downloaded from another host


@dataclass
class Hub:
    """Serves each folder of `root` as the model ORG/NAME. What it was asked for is in `requests`."""

    root: Path
    port: int = 0
    commit: str = "c0ffee" * 6 + "c0ff"
    token: str | None = None  # what it asks for, when set
    break_after_bytes: int | None = None  # once: the next large file's connection is closed there
    stall_after_bytes: int | None = None  # large files stop there, and their connection stays open
    spoil: bool = False  # large files come with a byte changed
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked(self, name: str, method: str = "GET") -> list[dict[str, str]]:
        """The headers of the requests whose path ends so."""
        return [headers for how, path, headers in self.requests if how == method and path.endswith(name)]

    def take_break(self) -> int | None:
        with self.lock:
            found, self.break_after_bytes = self.break_after_bytes, None
            return found


@contextmanager
def loopback_hub(root: Path) -> Iterator[Hub]:
    hub = Hub(root)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *arguments: object) -> None: ...

    def _answer(self, with_body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append((self.command, path, headers))
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":  # signed addresses, which need no token
            self._send_file(hub.root.joinpath(*parts[1:]), with_body, large=True)
            return
        if hub.token is not None and headers.get("authorization") != f"Bearer {hub.token}":
            self._send(401, b'{"error":"Access to this model is restricted"}', {"X-Error-Code": "GatedRepo"})
        elif parts[:2] == ["api", "models"]:
            self._send_info(*parts[2:4])
        elif len(parts) == 5 and parts[2] == "resolve":
            self._send_resolved(hub.root.joinpath(parts[0], parts[1], parts[4]), with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send_info(self, organization: str, name: str) -> None:
        folder = self.hub.root / organization / name
        if not folder.is_dir():
            self._send(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        siblings = []
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            sibling = {"rfilename": path.name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            if len(content) >= LARGE_BYTES:
                sibling["lfs"] = {
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 134,
                }
            siblings.append(sibling)
        body = {"_id": "1", "id": f"{organization}/{name}", "sha": self.hub.commit, "siblings": siblings, "tags": []}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send_resolved(self, path: Path, with_body: bool) -> None:
        if not path.is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif path.stat().st_size >= LARGE_BYTES:
            where = "/".join(("cdn", *path.relative_to(self.hub.root).parts))
            self._send(302, b"", {"Location": f"http://localhost:{self.hub.port}/{where}"})
        else:
            self._send_file(path, with_body, large=False)

    def _send_file(self, path: Path, with_body: bool, *, large: bool) -> None:
        content = path.read_bytes()
        if large and self.hub.spoil:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if first >= len(content) > 0 and asked:
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        extra = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if asked else {}
        cut = self.hub.take_break() if large and with_body else None
        self.send_response(206 if asked else 200)
        for name, value in {**extra, "Content-Length": str(len(content) - first), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        stall = self.hub.stall_after_bytes if large else None
        if with_body:
            end = cut if stall is None else stall
            self.wfile.write(content[first:] if end is None else content[first : first + end])
        while self.hub.stall_after_bytes is not None and stall is not None:
            time.sleep(0.02)
        if stall is not None:
            self.close_connection = True
        if cut is not None:
            self.close_connection = True

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

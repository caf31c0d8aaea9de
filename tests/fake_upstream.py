"""An OpenAI-compatible server that does what a real one cannot be made to do, byte for byte, on a real port.

What it does with a request, its `user` field says: a name in `ANSWERS`, or one of "hang", "close", "close once".
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
from dataclasses import dataclass, field
from typing import Any

KEY = "sk-upstream-0123456789"


def answer(status: str, body: bytes, **headers: str) -> bytes:
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{head}content-length: {len(body)}\r\n\r\n".encode() + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


ODD = [
    b": keep-alive\r\n\r\n",
    b'data: {"x" :1 ,\n',
    b'data:"\xf0\x9f\x8d',
    b'\x8e"}\n\n\x00\xff',
    b"data:[DONE]\r\n\r\n",
]
ODD_JSON = b'{ "b":1,\r\n"a" : 1e400, "\xff": [NaN]} trailing'
ODD_ERROR = b'{"error" : {"message":"I am a teapot","type":"tea","param":null,"code":"short","extra":[1]}}\n'
BEGUN = b'data: {"choices":[{"delta":{"content":"Once"}}]}\n\n'
JSON = "application/json"

ANSWERS = {
    "odd stream": chunked(*ODD),
    "odd json": answer("200 OK", ODD_JSON, content_type="application/json; x=y"),
    "odd error": answer("418 Tea", ODD_ERROR, content_type=JSON, retry_after="3", set_cookie="a=b", server="secret"),
    "rate limit": answer("429 Slow", ODD_ERROR, content_type=JSON, retry_after="9"),
    "redirect": answer("307 There", b"", location="http://127.0.0.1:1/v1/chat/completions"),
    "bad key": answer("401 No", b'{"error":{"message":"Incorrect API key provided: ' + KEY.encode() + b'"}}'),
    "tells the key": answer("400 No", b"you sent Bearer " + KEY.encode(), content_type="text/plain"),
    "breaks off": chunked(BEGUN, b'data: {"cho', end=b""),
    "breaks off in json": answer("200 OK", b"{" * 100, content_type=JSON)[:-50],
}


@dataclass
class Asked:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    closed: threading.Event = field(default_factory=threading.Event)  # by the other side, while it waited


class FakeUpstream:
    """Listens from the start until `stop`."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.asked: list[Asked] = []
        self._context = context
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def stop(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with plain:
            try:
                connection = self._context.wrap_socket(plain, server_side=True) if self._context else plain
                with connection, connection.makefile("rb") as file:
                    while self._answer(connection, file):
                        pass
            except (OSError, ssl.SSLError):
                return  # the other side is gone

    def _answer(self, connection: socket.socket, file: Any) -> bool:
        line = file.readline().decode()
        if not line:
            return False
        headers = {}
        while (header := file.readline().decode().strip()) != "":
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        body = json.loads(file.read(int(headers["content-length"])))
        asked = Asked(line.split()[1], headers, body)
        self.asked.append(asked)
        what = body.get("user", "odd json")
        if what == "hang":
            if not file.read(1):
                asked.closed.set()
            return False
        if what == "close" or (what == "close once" and sum(a.body.get("user") == what for a in self.asked) == 1):
            return False
        connection.sendall(ANSWERS.get(what, ANSWERS["odd json"]))
        return "breaks off" not in what

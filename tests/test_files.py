"""/v1/files over a real port: through OpenAI's SDK with strict validation, and with requests that no SDK would send."""

from __future__ import annotations

import asyncio
import hashlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import orjson
import pytest
import uvicorn
from sqlalchemy import update
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import TunegateError
from gateway.exports import Exports
from gateway.routes import files
from gateway.routes.body import ClientLeft
from gateway.settings import LimitSettings, Settings
from gateway.store import Store, tables
from gateway.store.blobs import Blobs
from gateway.store.datadir import DataDir
from gateway.store.sweep import sweep_all
from gateway.wire.files import clean_filename

LIMIT_BYTES = 3_000_000
LINES = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n' * 20


@dataclass
class Jobs:
    """In the supervisor's place: how often it was told that a job may come."""

    foreseen: int = 0

    def foresee(self) -> None:
        self.foreseen += 1


@dataclass
class Server:
    url: str
    store: Store
    blobs: Blobs
    loop: asyncio.AbstractEventLoop
    jobs: Jobs

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.url + "/v1", api_key="unused", max_retries=0, _strict_response_validation=True
        )

    def post(
        self, body: bytes, content_type: str = "multipart/form-data; boundary=B", **headers: str
    ) -> httpx.Response:
        return httpx.post(
            self.url + "/v1/files", content=body, headers={"Content-Type": content_type, **headers}, timeout=20
        )

    def leftovers(self) -> list[Path]:
        return list((self.blobs.folder / "tmp").iterdir())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serve(tmp_path / "data") as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for many requests that must not change it."""
    with serve(tmp_path_factory.mktemp("data")) as running:
        yield running


@contextmanager
def serve(data: Path) -> Iterator[Server]:
    """A server of these routes alone, on a real port, from which errors come as the whole gateway sends them."""
    data_dir = DataDir.open(data)
    store, blobs = Store.open(data_dir.database), Blobs(data_dir.blobs)
    asyncio.run(sweep_all(store, blobs))
    app = Starlette(routes=files.routes, exception_handlers={TunegateError: tell, ClientLeft: say_nothing})
    app.state.store, app.state.blobs = store, blobs
    app.state.exports = Exports(store, blobs, data / "exports")
    app.state.settings = Settings(limits=LimitSettings(file_bytes=LIMIT_BYTES))
    app.state.supervisor = jobs = Jobs()
    listener = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(uvicorn_server.serve([listener]),))
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", store, blobs, loop, jobs)
    finally:
        uvicorn_server.should_exit = True
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        store.close()
        data_dir.close()


async def tell(_: Request, error: TunegateError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == 413:
        headers["Connection"] = "close"
    return Response(orjson.dumps(error.body()), error.status, headers, "application/json")


async def say_nothing(_: Request, __: ClientLeft) -> Response:
    return Response(status_code=400)


def form(*parts: tuple[str, bytes]) -> bytes:
    """A multipart body with the boundary B; each part is its Content-Disposition after `form-data; ` and its bytes."""
    opened = b"".join(
        b"--B\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"
        for disposition, content in parts
    )
    return opened + b"--B--\r\n"


FILE = ('name="file"; filename="a.jsonl"', LINES)
PURPOSE = ('name="purpose"', b"fine-tune")


# the SDK's way


def test_a_file_lives_its_whole_life_through_the_strict_sdk(server: Server) -> None:
    with server.client as client:
        began = int(time.time())
        file = client.files.create(file=("train.jsonl", LINES), purpose="fine-tune")
        assert file.id.startswith("file-") and len(file.id) == 27
        assert (file.object, file.bytes, file.filename, file.purpose, file.status) == (
            "file",
            len(LINES),
            "train.jsonl",
            "fine-tune",
            "processed",
        )
        assert began <= file.created_at <= time.time() and file.expires_at is None
        assert client.files.retrieve(file.id) == file
        assert list(client.files.list()) == [file]
        content = client.files.content(file.id)
        assert content.read() == LINES
        assert content.response.headers["content-type"] == "application/jsonl"
        assert content.response.headers["content-disposition"].startswith('attachment; filename="train.jsonl"')
        assert content.response.headers["content-length"] == str(len(LINES))
        deleted = client.files.delete(file.id)
        assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
        for ask in (client.files.retrieve, client.files.content):
            with pytest.raises(openai.NotFoundError) as caught:
                ask(file.id)
            assert caught.value.body == {
                "message": f"No such File object: {file.id}",
                "type": "invalid_request_error",
                "param": "id",
                "code": None,
            }
        assert list(client.files.list()) == []
        assert client.files.delete(file.id).deleted  # the SDK repeats a delete whose reply it lost


@pytest.mark.parametrize("purpose", ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"])
def test_each_purpose_is_taken_and_listed_and_shown_as_the_strict_sdk_knows_it(server: Server, purpose: str) -> None:
    with server.client as client:
        file = client.files.create(file=("a.txt", b"x"), purpose=purpose)  # type: ignore[arg-type]
        assert file.purpose == ("user_data" if purpose == "evals" else purpose)
        assert [f.id for f in client.files.list(purpose=purpose)] == [file.id]
        assert list(client.files.list(purpose="fine-tune-results")) == []
        assert file.expires_at == (file.created_at + 30 * 86_400 if purpose == "batch" else None)


def test_a_list_is_walked_in_pages_while_files_are_added_and_deleted(server: Server) -> None:
    with server.client as client:
        ids = [client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(7)]
        seen = []
        for file in client.files.list(limit=2):
            seen.append(file.id)
            client.files.delete(file.id)
            client.files.create(file=("new.txt", b"x"), purpose="user_data")
        assert seen == ids[::-1]
        ids = [file.id for file in client.files.list(order="asc")]
        assert ids == [file.id for file in client.files.list(order="asc", limit=3)] and len(ids) == 7
        page = client.files.list(limit=3, order="asc")
        assert page.has_more and page.model_extra == {"object": "list", "first_id": ids[0], "last_id": ids[2]}
        assert list(client.files.list(after="file-unknown")) == []


def test_a_file_is_hidden_once_it_expires_and_its_bytes_go(server: Server) -> None:
    with server.client as client:
        file = client.files.create(
            file=("a.txt", b"to expire"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert file.expires_at == file.created_at + 3600
        assert client.files.retrieve(file.id) == file
        over = update(tables.files).values(expires_at=int(time.time()) - 1)
        asyncio.run_coroutine_threadsafe(server.store.write(lambda c: c.execute(over) and None), server.loop).result()
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
        assert list(client.files.list()) == []
        blob = server.blobs.path(hashlib.sha256(b"to expire").hexdigest())
        assert blob.exists()
        client.files.create(file=("b.txt", b"another"), purpose="user_data")
        assert not blob.exists()


def test_a_training_file_says_that_a_job_may_come(server: Server) -> None:
    for purpose, foreseen in (("batch", 0), ("fine-tune", 1), ("evals", 1)):
        assert server.post(form(FILE, ('name="purpose"', purpose.encode()))).status_code == 200
        assert server.jobs.foreseen == foreseen


def test_a_key_whose_file_was_deleted_makes_another(server: Server) -> None:
    made = []
    for _ in range(2):
        response = server.post(form(PURPOSE, FILE), **{"Idempotency-Key": "again"})
        assert response.status_code == 200, response.text
        made.append(response.json()["id"])
        server.client.files.delete(made[-1])
    assert made[0] != made[1]


def test_equal_files_share_their_bytes_and_the_last_one_takes_them_along(server: Server) -> None:
    with server.client as client:
        first, second = (client.files.create(file=("a.txt", LINES), purpose="user_data") for _ in range(2))
        blob = server.blobs.path(hashlib.sha256(LINES).hexdigest())
        client.files.delete(first.id)
        assert blob.exists() and client.files.content(second.id).read() == LINES
        client.files.delete(second.id)
        assert not blob.exists()


def test_uploads_and_deletions_of_equal_bytes_at_once_never_leave_a_row_without_bytes(server: Server) -> None:
    async def churn(client: openai.AsyncOpenAI) -> None:
        for _ in range(8):
            file = await client.files.create(file=("a.txt", LINES), purpose="user_data")
            assert (await client.files.content(file.id)).read() == LINES
            await client.files.delete(file.id)

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
            await asyncio.gather(*(churn(client) for _ in range(6)))

    asyncio.run(run())
    assert server.blobs.digests() == set() and server.leftovers() == []


def test_a_file_of_several_chunks_comes_back_byte_for_byte(server: Server) -> None:
    content = b"\r\n--B\r\n\r--\r\n".join(hashlib.sha256(bytes([n % 256])).digest() * 50 for n in range(1500))
    assert 2_000_000 < len(content) < LIMIT_BYTES
    with server.client as client:
        file = client.files.create(file=("big.bin", io.BytesIO(content)), purpose="user_data")
        assert file.bytes == len(content)
        assert client.files.content(file.id).read() == content


def test_what_was_uploaded_is_there_after_a_restart(tmp_path: Path) -> None:
    with serve(tmp_path) as before, before.client as client:
        file = client.files.create(file=("train.jsonl", LINES), purpose="fine-tune")
    with serve(tmp_path) as after, after.client as client:
        assert client.files.retrieve(file.id) == file
        assert client.files.content(file.id).read() == LINES


# what is refused


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (form(FILE), "purpose", "must provide 'purpose'"),
        (form(FILE, ('name="purpose"', b"fine-tuned")), "purpose", "not one of"),
        (form(FILE, ('name="purpose"', b"fine-tune-results")), "purpose", "not one of"),
        (form(PURPOSE), "file", "must provide 'file'"),
        (form(PURPOSE, ('name="file"', b"text")), "file", "needs a filename"),
        (form(PURPOSE, ('name="file"; filename="a"', b"")), "file", "empty"),
        (form(('name="purpose"; filename="p"', b"fine-tune"), FILE), "purpose", "must be text"),
        (form(PURPOSE, FILE, FILE), "file", "more than once"),
        (form(PURPOSE, PURPOSE, FILE), "purpose", "more than once"),
        (form(PURPOSE, ('name="tags"', b"x"), FILE), "tags", "Unrecognized"),
        (form(*[('name="purpose"', b"fine-tune")] * 10_000), "purpose", "more than once"),
        (form(('name="purpose"', b"x" * 5000), FILE), "purpose", "longer than"),
        (form(PURPOSE, ('name="expires_after[seconds]"', b"3600"), FILE), "expires_after.anchor", "missing"),
        (form(PURPOSE, ('name="expires_after[anchor]"', b"now"), FILE), "expires_after.anchor", "'now'"),
        (
            form(PURPOSE, ('name="expires_after[anchor]"', b"created_at"), FILE),
            "expires_after.seconds",
            "missing",
        ),
        *(
            (
                form(
                    PURPOSE,
                    ('name="expires_after[anchor]"', b"created_at"),
                    ('name="expires_after[seconds]"', seconds),
                    FILE,
                ),
                "expires_after.seconds",
                "3600",
            )
            for seconds in (b"3599", b"2592001", b"1e4", b"-3600", b"", "３６００".encode(), b"9" * 4000)
        ),
        (form(('name="', b"x")), None, None),
        (form(("", b"x")), None, "Content-Disposition"),
        (b"--B\r\n\r\nno headers\r\n--B--\r\n", None, "Content-Disposition"),
        (b"--B\r\n" + b"X: y\r\n" * 50 + b"\r\n\r\n--B--\r\n", None, "header count"),
        (b"--B\r\nX: " + b"y" * 10_000 + b"\r\n\r\n\r\n--B--\r\n", None, "header size"),
        (form(PURPOSE, FILE)[:-8], None, "breaks off"),
        (b"", None, "breaks off"),
        (b"{}", None, "cannot be read"),
        (b"--B--\r\n", "file", "must provide 'file'"),
        (
            b"--B\r\nContent-Disposition: form-data; name=purpose\r\nContent-Transfer-Encoding: base64\r\n\r\n"
            b"ZmluZS10dW5l\r\n--B--\r\n",
            "purpose",
            "Content-Transfer-Encoding",
        ),
    ],
)
def test_a_bad_form_gets_openais_error_object_and_leaves_nothing(
    shared: Server, body: bytes, param: str | None, words: str | None
) -> None:
    response = shared.post(body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    if words is not None:
        assert error["param"] == param and words in error["message"]
    assert shared.leftovers() == [] and shared.blobs.digests() == set()
    good = shared.post(form(PURPOSE, FILE))
    assert good.status_code == 200
    httpx.delete(f"{shared.url}/v1/files/{good.json()['id']}")


@pytest.mark.parametrize(
    ("content_type", "headers", "status"),
    [
        ("application/json", {}, 415),
        ("", {}, 415),
        ("multipart/form-data", {}, 400),
        ("multipart/form-data; boundary=" + "B" * 300, {}, 400),
        ("multipart/form-data; boundary=B", {"Content-Encoding": "gzip"}, 415),
    ],
)
def test_what_is_no_plain_multipart_form_is_refused(
    shared: Server, content_type: str, headers: dict[str, str], status: int
) -> None:
    assert shared.post(form(PURPOSE, FILE), content_type, **headers).status_code == status


def test_the_sdk_is_told_that_a_file_is_too_large(server: Server) -> None:
    with server.client as client, pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("big.bin", bytes(LIMIT_BYTES + 1)), purpose="user_data")
    assert caught.value.status_code == 413 and caught.value.param == "file"
    assert server.leftovers() == [] and server.blobs.digests() == set()


def test_a_file_of_just_the_limit_is_taken(server: Server) -> None:
    with server.client as client:
        assert client.files.create(file=("big.bin", bytes(LIMIT_BYTES)), purpose="user_data").bytes == LIMIT_BYTES


def test_an_endless_upload_is_cut_off_while_it_is_read(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    sent = 0
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=B\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        opening = form(FILE).removesuffix(b"\r\n--B--\r\n")
        connection.sendall(b"%x\r\n%s\r\n" % (len(opening), opening))
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        try:
            while sent < 50 * LIMIT_BYTES:
                connection.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert sent < 10 * LIMIT_BYTES
    assert server.leftovers() == []


def test_a_client_that_leaves_during_its_upload_leaves_nothing(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=B\r\n"
            b"Content-Length: 2500000\r\n\r\n" + form(PURPOSE, FILE).removesuffix(b"\r\n--B--\r\n") + bytes(1_500_000)
        )
        wait_until(lambda: bool(server.leftovers()))
    wait_until(lambda: not server.leftovers())
    assert server.blobs.digests() == set()
    with server.client as client:
        assert list(client.files.list()) == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=-1", "limit"),
        ("limit=10001", "limit"),
        ("limit=ten", "limit"),
        ("limit=%C2%B2", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("order=up", "order"),
    ],
)
def test_a_list_with_a_bad_parameter_names_it(shared: Server, query: str, param: str) -> None:
    response = httpx.get(f"{shared.url}/v1/files?{query}")
    assert response.status_code == 400 and response.json()["error"]["param"] == param


@pytest.mark.parametrize("file_id", ["file-unknown", "..%2f..%2flock", "%00", "%ff", "x" * 3000])
def test_an_unknown_id_is_not_found(shared: Server, file_id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        assert httpx.request(method, f"{shared.url}/v1/files/{file_id}{path}").status_code == 404


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"train.jsonl", "train.jsonl"),
        (b"../../etc/passwd", "passwd"),
        (b"C:\\data\\train.jsonl", "train.jsonl"),
        ("données.jsonl".encode(), "données.jsonl"),
        ("e\u0301.txt".encode(), "é.txt"),
        (b"\xff.txt", "\ufffd.txt"),
        (b"a\x00b\x1b[2J\n.txt", "ab[2J.txt"),
        ("\u202egnp.exe".encode(), "gnp.exe"),
        (b"say %22hi%22.txt", 'say "hi".txt'),
        (b"x" * 300 + b".jsonl", "x" * 249 + ".jsonl"),
        (b"x" * 300, "x" * 255),
        (b"", "upload"),
        (b"..", "upload"),
        (b"a/", "upload"),
    ],
)
def test_a_filename_is_made_fit_to_be_shown(raw: bytes, shown: str) -> None:
    assert clean_filename(raw) == shown


def test_a_filename_of_any_characters_survives_the_headers_of_its_content(server: Server) -> None:
    with server.client as client:
        file = client.files.create(file=("a “b” é\\;x.csv", b"1,2"), purpose="user_data")
        headers = client.files.content(file.id).response.headers
    assert headers["content-disposition"].endswith("filename*=UTF-8''" + "%3Bx.csv")
    assert headers["content-type"] == "text/csv; charset=utf-8" and headers["x-content-type-options"] == "nosniff"


def wait_until(holds: object, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.01)

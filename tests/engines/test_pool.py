"""Replicas as one engine: what fails before the first byte is asked again elsewhere, once; after it, never.

The replicas are fakes on real ports where a real engine cannot be made to do what they do, and real workers for the rest.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.engines.adapters import AdapterRejected
from gateway.engines.breaker import FAILURES, BreakerState
from gateway.engines.client import Deadlines, EngineClient
from gateway.engines.kinds import llama_engine, remote_llama_engine
from gateway.engines.pool import Pool
from gateway.engines.replica import Replica
from gateway.errors import EngineError, EngineTimeout, EngineUnavailable, RequestError
from tests.engines.parts import QUICK, At, pool_of, tiny_base, until, with_other_weights, witnessed_adapter

pytestmark = pytest.mark.anyio

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
SHORT = {"model": "tiny", "prompt": [1]}  # nothing is warm: it goes where least is under way, the first of equals


def event(data: bytes) -> bytes:
    body = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(body), body)


def reply(text: str) -> bytes:
    return HEAD + event(json.dumps({"choices": [], "text": text}).encode()) + event(b"[DONE]") + b"0\r\n\r\n"


def refusal(status: int) -> bytes:
    body = b'{"error":{"message":"no"}}'
    return b"HTTP/1.1 %d X\r\nretry-after: 7\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body


class Fake:
    """An engine that answers every request with these bytes and then closes, or waits where there are none."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            self.asked.append(json.loads(await reader.readexactly(size)))
            if self.answer is None:
                await reader.read()
            else:
                writer.write(self.answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def served(*fakes: Fake, **deadlines: float) -> AsyncIterator[tuple[EngineClient, Pool]]:
    servers = [await asyncio.start_server(fake.accept, "127.0.0.1", 0) for fake in fakes]
    pool = pool_of(*(At(server.sockets[0].getsockname()[1]) for server in servers))
    client = EngineClient(pool, Deadlines(**{"first_token_s": 5.0, "between_tokens_s": 5.0, **deadlines}))
    try:
        yield client, pool
    finally:
        client.close()
        for server in servers:
            server.close()
    assert pool.uses == 0 and all(replica.in_flight == 0 for replica in pool.replicas)


async def read(client: EngineClient, body: dict[str, Any] | None = None) -> list[str]:
    stream = await client.stream(body or SHORT)
    try:
        texts: list[str] = []
        while frames := await stream.frames():
            texts += [frame["text"] for frame in frames]
        return texts
    finally:
        stream.cancel()


# What vLLM's front sends when its engine has died: an error as the first event of a stream.
GONE = HEAD + event(b'{"error":{"message":"EngineCore is gone","code":500}}') + event(b"[DONE]") + b"0\r\n\r\n"


@pytest.mark.parametrize("answer", [b"", HEAD, GONE, refusal(500), refusal(502), refusal(503), refusal(429)])
async def test_what_fails_before_the_first_event_is_asked_of_another(answer: bytes) -> None:
    bad, good = Fake(answer), Fake(reply("good"))
    async with served(bad, good) as (client, pool):
        assert await read(client) == ["good"]
        assert len(bad.asked) == len(good.asked) == 1
        assert pool.replicas[0].retried == 1


async def test_one_that_cannot_be_reached_is_passed_over() -> None:
    async with served(Fake(reply("good"))) as (client, pool):
        pool.replicas = (*pool_of(At(1)).replicas, Replica("good", pool.replicas[0].engine))
        assert await read(client) == ["good"]
        assert pool.replicas[0].faults["connect"] == 1


async def test_it_is_asked_again_once_and_not_twice() -> None:
    fakes = [Fake(b""), Fake(b""), Fake(reply("good"))]
    async with served(*fakes) as (client, _):
        with pytest.raises(EngineUnavailable, match="before it answered"):
            await read(client)
    assert [len(fake.asked) for fake in fakes] == [1, 1, 0]


async def test_after_the_first_event_nothing_is_asked_again() -> None:
    begun = HEAD + event(b'{"choices":[],"text":"begun"}')
    first, second = Fake(begun), Fake(reply("good"))
    async with served(first, second) as (client, _):
        stream = await client.stream(SHORT)
        assert [frame["text"] for frame in await stream.frames()] == ["begun"]
        with pytest.raises(EngineError, match="in the middle"):
            await stream.frames()
    assert second.asked == []


async def test_a_fault_of_the_client_is_not_asked_again_and_no_fault_of_the_engine() -> None:
    first, second = Fake(refusal(400)), Fake(reply("good"))
    async with served(first, second) as (client, pool):
        for _ in range(FAILURES + 1):
            with pytest.raises(RequestError):
                await read(client)
        assert pool.replicas[0].breaker.closed
    assert second.asked == []


async def test_a_client_that_leaves_cancels_it_wherever_it_is() -> None:
    silent, other = Fake(None), Fake(reply("good"))
    async with served(silent, other) as (client, pool):
        stream = await client.stream(SHORT)
        await until(lambda: silent.asked, 5)
        assert pool.replicas[0].in_flight == 1
        stream.cancel()
        assert pool.replicas[0].in_flight == 0
        assert await stream.frames() == []
    assert other.asked == []


async def test_a_hung_one_costs_its_request_a_deadline_and_rests_after_three() -> None:
    hung, good = Fake(None), Fake(reply("good"))
    async with served(hung, good, first_token_s=0.2) as (client, pool):
        for _ in range(FAILURES):
            with pytest.raises(EngineTimeout):
                await read(client)
        assert pool.replicas[0].faults["timeout"] == FAILURES
        assert [await read(client) for _ in range(3)] == [["good"]] * 3
    assert len(hung.asked) == FAILURES


async def test_a_breaker_opens_lets_one_probe_through_and_closes_when_it_is_answered() -> None:
    shaky, good = Fake(refusal(500)), Fake(reply("good"))
    async with served(shaky, good) as (client, pool):
        breaker = pool.replicas[0].breaker
        for _ in range(FAILURES + 5):
            assert await read(client) == ["good"]
        assert len(shaky.asked) == FAILURES, "it rests"
        breaker.until = 0.0  # the rest is over
        shaky.answer = None
        probe = await client.stream(SHORT)
        await until(lambda: len(shaky.asked) == FAILURES + 1, 5)
        assert await read(client) == ["good"] and len(shaky.asked) == FAILURES + 1, "one probe"
        probe.cancel()
        shaky.answer = reply("well again")
        assert await read(client) == ["well again"]
        assert breaker.state(0.0) is BreakerState.CLOSED


async def test_where_all_rest_requests_are_sent_all_the_same() -> None:
    only = Fake(refusal(500))
    async with served(only) as (client, _):
        for _ in range(FAILURES + 2):
            with pytest.raises(EngineError, match="answered 500"):
                await read(client)
        only.answer = reply("well")
        assert await read(client) == ["well"]


async def test_each_replica_is_asked_by_its_own_name_for_the_base() -> None:
    fake = Fake(reply("good"))
    async with served(fake) as (client, pool):
        pool.replicas = (Replica("elsewhere", pool.replicas[0].engine, served_name="org/tiny-1B"),)
        await read(client)
        await read(client, SHORT | {"model": "tuned@0123"})
    assert [body["model"] for body in fake.asked] == ["org/tiny-1B", "tuned@0123"]


async def test_one_that_leaves_answers_its_last_requests_and_no_other() -> None:
    leaver, stayer = Fake(None), Fake(reply("stays"))
    async with served(leaver, stayer) as (client, pool):
        leaving = pool.replicas[0]
        stopped = asyncio.Event()
        leaving.engine.stop = _noted(stopped)  # type: ignore[attr-defined]
        stream = await client.stream(SHORT)
        await pool.change([leaving], [])
        assert [await read(client) for _ in range(3)] == [["stays"]] * 3
        assert pool.leavers == [leaving] and not stopped.is_set()
        stream.cancel()
        await asyncio.wait_for(stopped.wait(), 5)
        await until(lambda: not pool.leavers, 5)


async def test_a_pool_that_is_stopped_ends_its_leavers_and_their_places_are_free_again() -> None:
    stops: list[str] = []
    ending = asyncio.Event()

    async def stop() -> None:
        ending.set()
        await asyncio.sleep(0.1)
        stops.append("whole")

    waiting, gone = At(1), At(2)
    waiting.stop = gone.stop = stop  # type: ignore[attr-defined]
    pool = pool_of(waiting, gone)
    pool.replicas[0].in_flight = 1
    await pool.change(pool.replicas, [])
    await asyncio.wait_for(ending.wait(), 5)
    await pool.stop()
    assert stops == ["whole", "whole"], "one whose last reply runs is not waited for, one that ends is not cut short"
    assert pool.leavers == []


class Startable(At):
    """Ready some moments after its start, and not after its stop."""

    def __init__(self, log: list[str], name: str) -> None:
        super().__init__(1)
        self.ready, self._log, self._name = False, log, name

    def set_desired(self, adapters: Any) -> None: ...

    async def start(self) -> None:
        self._log.append(f"start {self._name}")
        asyncio.get_running_loop().call_later(0.2, setattr, self, "ready", True)

    async def stop(self) -> None:
        self._log.append(f"stop {self._name}")
        self.ready = False


async def test_replicas_that_are_started_otherwise_are_renewed_one_after_the_other() -> None:
    log: list[str] = []

    def replica(place: int, age: str, *, has_place: bool = True) -> Replica:
        return Replica(f"tiny #{place}", Startable(log, f"{age} {place}"), has_place=has_place)

    pool = Pool("tiny", [replica(1, "old"), replica(2, "old")])
    await pool.start()
    await until(lambda: all(each.engine.ready for each in pool.replicas), 5)
    changing = asyncio.create_task(pool.change(pool.replicas, [replica(1, "new"), replica(2, "new")]))
    while not changing.done():
        assert pool.ready, "one can be asked at any moment"
        await asyncio.sleep(0.01)
    assert log[2:] == ["stop old 1", "start new 1", "stop old 2", "start new 2"]
    await until(lambda: all(each.engine.ready for each in pool.replicas), 5)
    log.clear()
    elsewhere = [replica(place, "remote", has_place=False) for place in (1, 2)]
    await pool.change(pool.replicas, elsewhere)
    await until(lambda: not pool.leavers, 5)
    assert log[:2] == ["start remote 1", "start remote 2"], "nobody's place is taken, so they come first"
    assert list(pool.replicas) == elsewhere
    await pool.stop()


def _noted(event: asyncio.Event) -> Any:
    async def stop() -> None:
        event.set()

    return stop


async def test_an_adapter_is_there_with_the_first_and_the_others_follow(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    engines = [llama_engine(base, tmp_path / f"engine{n}", max_seqs=2, threads=1, timings=QUICK) for n in (1, 2)]
    pool = pool_of(*engines)
    await engines[0].start()
    await engines[0].wait_ready(30)
    adapter = await witnessed_adapter(engines[0], tmp_path, "a")
    wrong = with_other_weights(adapter, tmp_path / "wrong", base, alpha=32.0)
    try:
        assert await pool.ensure_adapter(adapter) is not None, "one is enough"
        assert pool.serves(adapter.engine_name) and not engines[1].serves(adapter.engine_name)
        for _ in range(8):
            assert pool.choose({"model": adapter.engine_name, "prompt": []}).engine is engines[0]
        await pool.start()
        await until(lambda: engines[1].serves(adapter.engine_name))
        away = remote_llama_engine(base, engines[0].endpoint, timings=QUICK)  # the same worker, by its address
        away.set_desired([adapter])
        await away.start()
        await away.wait_ready(30)
        assert away.serves(adapter.engine_name)
        await away.stop()
        assert engines[0].ready, "it is only asked"
        with pytest.raises(AdapterRejected):
            await pool.ensure_adapter(wrong)
        assert not any(wrong.engine_name in engine.adapters for engine in engines)
        await pool.drop_adapter(adapter.engine_name)
        assert not any(engine.adapters for engine in engines)
        with pytest.raises(EngineUnavailable):
            pool.choose({"model": adapter.engine_name, "prompt": []})
        await pool.ensure_adapter(adapter)
        late = llama_engine(base, tmp_path / "engine3", max_seqs=2, threads=1, timings=QUICK)
        await pool.change([pool.replicas[0]], [Replica("tiny #3", late)])
        await until(lambda: late.serves(adapter.engine_name))
        assert engines[0] not in [replica.engine for replica in pool.replicas]
    finally:
        await pool.stop()
        await asyncio.gather(*(engine.stop() for engine in engines))

"""Engines that come when they are wanted and go when they are not, within what memory there is."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.client import Deadlines, EngineClient
from gateway.engines.engine import Engine
from gateway.engines.kinds import llama_engine
from gateway.engines.residents import Resident, Residents
from gateway.errors import EngineUnavailable
from gateway.jobdir import read_json
from tests.engines.parts import QUICK, kill_gateway_when, pool_of, tiny_base, until, witnessed_adapter

pytestmark = pytest.mark.anyio

MakeResident = Callable[..., Resident]
FAKE = (sys.executable, "-m", "tests.engines.fake_worker")


def worker(resident: Resident) -> Engine:
    """The one engine of a resident."""
    engine = resident.engine.replicas[0].engine
    assert isinstance(engine, Engine)
    return engine


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[MakeResident]:
    """`make(name, …)` gives an engine whose worker starts in a moment; all are stopped at the end."""
    engines: list[Engine] = []

    def make(
        name: str,
        memory_bytes: int = 1,
        *,
        on_demand: bool = True,
        idle_unload_s: float | None = None,
        misdeed: str = "well",
    ) -> Resident:
        model = tmp_path / f"{name}.gguf"
        model.touch()
        base = PreparedBase(name, tmp_path, model, "sha256:base", "LlamaForCausalLM", 64, "vicuna_v1.1", (2,))
        command = (*FAKE, misdeed)
        engine = llama_engine(base, tmp_path / "engines" / name, command=command, timings=QUICK)
        engines.append(engine)
        return Resident(pool_of(engine, name=name), memory_bytes, on_demand, idle_unload_s)

    yield make
    await asyncio.gather(*(engine.stop() for engine in engines))


async def test_one_on_demand_rests_until_it_is_held(make: MakeResident) -> None:
    residents, resident = Residents(), make("a")
    await residents.add(resident)
    engine = resident.engine
    assert engine.resting and not engine.started
    await asyncio.gather(engine.hold(), engine.hold())
    assert engine.ready and not engine.resting and engine.uses == 2
    engine.release()
    assert engine.uses == 1


async def test_one_that_is_always_there_is_started_and_never_stopped(make: MakeResident) -> None:
    residents = Residents(memory_bytes=10)
    always, other = make("always", 8, on_demand=False), make("other", 8)
    for resident in (always, other):
        await residents.add(resident)
    await always.engine.wait_ready(10)
    with pytest.raises(EngineUnavailable, match="busy or always there") as refused:
        await other.engine.hold()
    assert refused.value.retry_after_s and other.engine.uses == 0 and always.engine.ready


async def test_the_one_idle_longest_makes_room(make: MakeResident) -> None:
    residents = Residents(memory_bytes=10)
    a, b, c = (make(name, 5) for name in "abc")
    for resident in (a, b, c):
        await residents.add(resident)
    for resident in (a, b, a):
        await resident.engine.hold()
        resident.engine.release()
    await c.engine.hold()
    assert (a.engine.ready, b.engine.started, c.engine.ready) == (True, False, True)


async def test_what_is_in_use_is_not_stopped_and_the_request_is_told_to_come_back(make: MakeResident) -> None:
    residents = Residents(memory_bytes=10)
    a, b = make("a", 6), make("b", 6)
    for resident in (a, b):
        await residents.add(resident)
    await a.engine.hold()
    with pytest.raises(EngineUnavailable, match="6 of 10"):
        await b.engine.hold()
    assert a.engine.ready
    a.engine.release()
    await b.engine.hold()
    assert b.engine.ready and not a.engine.started


async def test_nobody_is_stopped_for_one_that_does_not_fit_anyway(make: MakeResident) -> None:
    residents = Residents(memory_bytes=10)
    a, b, giant = make("a", 4), make("b", 4), make("giant", 11)
    for resident in (a, b, giant):
        await residents.add(resident)
    for resident in (a, b):
        await resident.engine.hold()
        resident.engine.release()
    with pytest.raises(EngineUnavailable):
        await giant.engine.hold()
    assert a.engine.ready and b.engine.ready


async def test_one_that_is_asked_for_while_room_is_made_is_not_stopped(make: MakeResident) -> None:
    residents = Residents(memory_bytes=10)
    a, b, large = make("a", 5), make("b", 5), make("large", 10)
    for resident in (a, b, large):
        await residents.add(resident)
    for resident in (a, b):
        await resident.engine.hold()
        resident.engine.release()
    held: list[asyncio.Task[None]] = []

    def hold_b(engine: Engine) -> None:
        if engine.state == "stopping" and not held:
            held.append(asyncio.create_task(b.engine.hold()))

    worker(a).on_change(hold_b)
    with pytest.raises(EngineUnavailable):
        await large.engine.hold()
    await held[0]
    assert b.engine.ready and worker(b).restarts == 0 and not large.engine.started


async def test_who_gives_up_while_room_is_made_leaves_no_engine_half_stopped(make: MakeResident) -> None:
    residents = Residents(memory_bytes=10, start_wait_s=10)
    a, b = make("a", 6), make("b", 6)
    for resident in (a, b):
        await residents.add(resident)
    await a.engine.hold()
    a.engine.release()
    asking = asyncio.create_task(b.engine.hold())
    worker(a).on_change(lambda engine: asking.cancel() if engine.state == "stopping" else False)
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not a.engine.started and worker(a).state == "stopped" and b.engine.uses == 0
    await a.engine.hold()
    assert a.engine.ready


async def test_idle_ones_are_unloaded_and_come_back(make: MakeResident) -> None:
    residents = Residents()
    brief, lasting = make("brief", idle_unload_s=0.2), make("lasting", idle_unload_s=None)
    for resident in (brief, lasting):
        await residents.add(resident)
        await resident.engine.hold()
    residents.start()
    await asyncio.sleep(1.5)
    assert brief.engine.ready  # it is held
    for resident in (brief, lasting):
        resident.engine.release()
    await until(lambda: brief.engine.resting, 10)
    assert lasting.engine.ready
    await brief.engine.hold()
    assert brief.engine.ready
    await residents.stop()
    assert not brief.engine.started and not lasting.engine.started


async def test_a_request_waits_for_its_model_only_so_long(make: MakeResident) -> None:
    residents, slow = Residents(start_wait_s=0.5), make("slow", misdeed="never-ready")
    await residents.add(slow)
    with pytest.raises(EngineUnavailable, match="not ready"):
        await slow.engine.hold()
    assert slow.engine.uses == 0


async def test_a_worker_that_a_killed_gateway_left_is_taken_over_and_not_forgotten(
    make: MakeResident, tmp_path: Path
) -> None:
    left = make("left")
    await kill_gateway_when("spawned", worker(left).base, tmp_path / "engines" / "left", (*FAKE, "well"))
    pid = read_json(tmp_path / "engines" / "left" / "spawn.json")["pid"]
    await Residents().add(left)
    await left.engine.wait_ready(10)
    assert worker(left).pid == pid


async def test_a_stream_holds_its_engine_to_its_end(make: MakeResident) -> None:
    """The fake worker has no completions: the stream begins and ends with a refusal."""
    residents, resident = Residents(), make("a")
    await residents.add(resident)
    engine = resident.engine
    client = EngineClient(engine, Deadlines(5, 5))
    stream = await client.stream({"model": "a"})
    assert engine.ready and engine.uses == 1
    stream.cancel()
    stream.cancel()
    assert engine.uses == 0
    refused = await client.stream({"model": "a"})
    with pytest.raises(Exception, match="answered"):
        await refused.frames()
    assert engine.uses == 0
    client.close()


async def test_adapters_are_back_when_an_engine_that_rested_is_brought(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    only = llama_engine(base, tmp_path / "engine", max_seqs=2, threads=1, timings=QUICK)
    engine = pool_of(only)
    residents = Residents()
    await residents.add(Resident(engine, 1, on_demand=True, idle_unload_s=None))
    await engine.hold()
    adapter = await witnessed_adapter(only, tmp_path, "a")
    engine.release()
    await engine.stop()
    assert await engine.ensure_adapter(adapter) is not None  # it brings the engine itself
    await engine.stop()
    assert engine.resting and not engine.serves(adapter.engine_name)
    await engine.hold()
    assert engine.serves(adapter.engine_name)
    await engine.stop()

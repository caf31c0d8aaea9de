"""What a real vLLM does while a job trains on its machine, under each policy."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import pytest

from gateway.engines.client import Deadlines, EngineClient
from gateway.engines.engine import Engine
from gateway.engines.pool import ASLEEP_WAITING, Pool
from gateway.errors import EngineUnavailable
from gateway.jobs.sharing import Sharing
from tests.engines.parts import pool_of
from tests.vllm.starting import ask

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]


@dataclass
class Job:
    """A job's events, as (level, message)."""

    told: list[tuple[str, str]] = field(default_factory=list)

    async def tell(self, message: str, level: str) -> None:
        self.told.append((level, message))


@pytest.fixture
def job() -> Job:
    return Job()


@pytest.fixture
def pool(engine: Engine) -> Pool:
    return pool_of(engine, name="own")


async def answered(pool: Pool) -> str:
    client = EngineClient(pool, Deadlines(30, 30))
    stream = await client.stream(
        {"model": "own", "prompt": [1, 300, 400], "max_tokens": 3, "stream": True, "return_token_ids": True}
    )
    text = ""
    while frames := await stream.frames():
        text += "".join(choice["text"] for frame in frames for choice in frame["choices"])
    client.close()
    return text


async def test_an_engine_sleeps_while_a_job_trains_and_requests_wait_for_it(
    engine: Engine, pool: Pool, job: Job
) -> None:
    address, sharing = engine.endpoint, Sharing("sleep", lambda: [pool])
    async with sharing.training(job.tell, asyncio.Event()):
        assert engine.state == "asleep" and not pool.ready
        assert (await ask(address, "/is_sleeping")).json() == {"is_sleeping": True}
        waiting = asyncio.create_task(answered(pool))
        async with sharing.training(job.tell, asyncio.Event()):  # a second job at once
            await asyncio.sleep(0.3)
        assert not waiting.done(), "it waits"
        assert engine.state == "asleep", "the first job still trains"
    assert engine.ready
    assert await asyncio.wait_for(waiting, 30)
    assert [level for level, _ in job.told] == ["info", "warn", "info"]
    assert "'own' sleeps while the job trains" in job.told[0][1]
    assert "keeps its memory" in job.told[1][1], "what could not be done on a CPU is said"
    assert "is awake" in job.told[2][1]


async def test_more_requests_than_may_wait_are_told_to_come_back(engine: Engine, pool: Pool, job: Job) -> None:
    async with Sharing("sleep", lambda: [pool]).training(job.tell, asyncio.Event()):
        waiting = [asyncio.create_task(pool.hold()) for _ in range(ASLEEP_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(EngineUnavailable, match="wait for it already"):
            await pool.hold()
    await asyncio.gather(*waiting)
    for _ in waiting:
        pool.release()


async def test_a_job_waits_until_nobody_is_answered(engine: Engine, pool: Pool, job: Job) -> None:
    await pool.hold()
    released_at = 0.0

    async def release() -> None:
        nonlocal released_at
        await asyncio.sleep(0.5)
        released_at = time.monotonic()
        pool.release()

    releasing = asyncio.create_task(release())
    async with Sharing("wait", lambda: [pool], idle_s=0.5).training(job.tell, asyncio.Event()):
        assert time.monotonic() - released_at >= 0.5
        assert engine.ready, "they share the machine"
    await releasing
    assert [message for _, message in job.told] == ["The job waits until the engines have answered nobody for 0.5 s"]


async def test_beside_changes_nothing(engine: Engine, pool: Pool, job: Job) -> None:
    async with Sharing("beside", lambda: [pool]).training(job.tell, asyncio.Event()):
        assert await answered(pool)
    assert job.told == []

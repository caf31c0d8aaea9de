"""A job that is paused: its trainer ends behind its next step, nothing is lost, and it goes on when somebody says so."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from gateway.jobs.sharing import Sharing
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import open_workshop, until

pytestmark = pytest.mark.anyio


async def test_a_running_job_stops_behind_its_next_step_and_goes_on_from_it(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    plan = Plan(adapter=str(adapter), steps=9, checkpoint_every=9, gate=str(gate), gate_at=4)
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create()
        await until(lambda: len(shop.steps(job.id)) == 3)
        assert (await shop.supervisor.pause(job.id, "default")).status == "running"
        assert (await shop.supervisor.pause(job.id, "default")).pause == "asked", "pausing twice is once"
        await until(shop.folder_of(job.id).pause.exists)
        gate.touch()
        parked = await shop.wait_for(job.id, "queued")
        assert parked.pause == "paused" and parked.started_at is not None
        messages = await shop.messages(job.id)
        assert "The trainer stops behind its next step, and the job is paused then" in messages
        assert messages[-1].startswith("The job is paused behind step 4; ")
        assert await shop.checkpoints(job.id) == [], "that one is nobody's model"
        await asyncio.sleep(1.5)  # longer than the supervisor takes to look for work
        assert (await shop.job(job.id)).status == "queued", "nobody starts it"
        assert (await shop.supervisor.resume(job.id, "default")).pause == "resumed"
        ended = await shop.wait_for(job.id, "succeeded")
        assert ended.started_at == parked.started_at
        messages = await shop.messages(job.id)
        assert "The job is resumed" in messages
        assert not [text for text in messages if "The trainer was gone" in text], "no fault is told of"
        assert len({pid for pid, _, _ in shop.steps(job.id)}) == 2


async def test_a_trainer_that_tells_more_with_each_look_is_paused_all_the_same(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    plan = Plan(adapter=str(adapter), steps=5000, step_s=0.001, checkpoint_every=5000)
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create()
        await until(lambda: shop.steps(job.id))
        await shop.supervisor.pause(job.id, "default")
        await shop.wait_for(job.id, "queued")
        assert len(shop.steps(job.id)) < 4000


async def test_a_job_paused_before_it_runs_waits_and_another_passes_it(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter), check_s=0.3)) as shop:
        first = await shop.create()
        await shop.supervisor.pause(first.id, "default")
        second = await shop.create()
        await shop.wait_for(second.id, "succeeded")
        assert (await shop.job(first.id)).status == "queued"
        await shop.supervisor.resume(first.id, "default")
        ended = await shop.wait_for(first.id, "succeeded")
        assert (await shop.supervisor.pause(first.id, "default")).status == ended.status, "what is over stays as it is"


async def test_a_job_that_waits_until_nobody_is_answered_is_paused_at_once(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        shop.supervisor._sharing = Sharing("wait", lambda: [shop.pool], idle_s=0.0)
        shop.pool.uses += 1  # a reply that does not end
        job = await shop.create()
        await shop.wait_for(job.id, "running")
        await shop.supervisor.pause(job.id, "default")
        await shop.wait_for(job.id, "queued")
        assert (await shop.messages(job.id))[-1].startswith("The job is paused before its first step; ")
        assert shop.steps(job.id) == []
        shop.pool.uses -= 1
        await shop.supervisor.resume(job.id, "default")
        await shop.wait_for(job.id, "succeeded")


async def test_a_paused_job_can_be_cancelled(tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter), check_s=0.3)) as shop:
        job = await shop.create()
        await shop.supervisor.pause(job.id, "default")
        await shop.wait_for(job.id, "queued")
        assert (await shop.supervisor.cancel(job.id, "default")).status == "cancelled"
        assert (await shop.supervisor.resume(job.id, "default")).status == "cancelled"


async def test_a_job_whose_trainer_dies_while_it_is_to_be_paused_is_paused_where_it_was(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    plan = Plan(adapter=str(adapter), steps=9, checkpoint_every=2, gate=str(gate), gate_at=4, kill_at={"1": 4})
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create()
        await until(lambda: len(shop.steps(job.id)) == 3)
        await shop.supervisor.pause(job.id, "default")
        gate.touch()
        await shop.wait_for(job.id, "queued")
        assert (await shop.messages(job.id))[-1].startswith("The job is paused behind step 2; ")
        await shop.supervisor.resume(job.id, "default")
        await shop.wait_for(job.id, "succeeded")
        assert [step for _, _, step in shop.steps(job.id)] == [1, 2, 3, 3, 4, 5, 6, 7, 8, 9]


async def test_resuming_before_the_trainer_has_paused_lets_it_work_on(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    plan = Plan(adapter=str(adapter), steps=9, gate=str(gate), gate_at=4)
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create()
        pause = shop.folder_of(job.id).pause
        await until(lambda: len(shop.steps(job.id)) == 3)
        await shop.supervisor.pause(job.id, "default")
        await until(pause.exists)
        await shop.supervisor.resume(job.id, "default")
        await until(lambda: not pause.exists())
        gate.touch()
        await shop.wait_for(job.id, "succeeded")
        assert len({pid for pid, _, _ in shop.steps(job.id)}) == 1

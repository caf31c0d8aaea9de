"""A job that is paused: its trainer ends behind a checkpoint, nothing is lost, and it goes on when somebody says so."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import open_workshop

pytestmark = pytest.mark.anyio


async def test_a_running_job_stops_behind_its_next_checkpoint_and_goes_on_from_it(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    plan = Plan(adapter=str(adapter), steps=9, checkpoint_every=3, step_s=0.3, gate=str(gate), gate_at=2)
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create()
        await shop.wait_for(job.id, "running")
        assert (await shop.supervisor.pause(job.id, "default")).status == "running"
        assert (await shop.supervisor.pause(job.id, "default")).pause == "asked", "pausing twice is once"
        gate.touch()
        parked = await shop.wait_for(job.id, "queued")
        assert parked.pause == "paused" and parked.started_at is not None
        messages = await shop.messages(job.id)
        assert messages[-1].startswith("The job is paused behind the checkpoint at step ")
        assert "Checkpoint created at step 3" in messages
        await asyncio.sleep(1.5)  # longer than the supervisor takes to look for work
        assert (await shop.job(job.id)).status == "queued", "nobody starts it"
        assert (await shop.supervisor.resume(job.id, "default")).pause == "resumed"
        ended = await shop.wait_for(job.id, "succeeded")
        assert ended.started_at == parked.started_at
        messages = await shop.messages(job.id)
        assert "The job is resumed" in messages
        assert not [text for text in messages if "The trainer was gone" in text], "no fault is told of"
        assert len({pid for pid, _, _ in shop.steps(job.id)}) == 2


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


async def test_a_paused_job_can_be_cancelled(tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter), check_s=0.3)) as shop:
        job = await shop.create()
        await shop.supervisor.pause(job.id, "default")
        await shop.wait_for(job.id, "queued")
        assert (await shop.supervisor.cancel(job.id, "default")).status == "cancelled"
        assert (await shop.supervisor.resume(job.id, "default")).status == "cancelled"

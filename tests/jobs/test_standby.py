"""A trainer that stands by: jobs are given to it, and lose nothing where it is not there, not fit, slow or dead."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from gateway.jobdir import process_start_time
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import Workshop, open_workshop, until

pytestmark = pytest.mark.anyio


async def trained_by(shop: Workshop, **fields: object) -> set[int]:
    """The pids that trained a new job, which succeeds."""
    job = await shop.create(**fields)
    job = await shop.wait_for(job.id, "succeeded")
    return {pid for pid, _, _ in shop.steps(job.id)}


async def standing_pid(shop: Workshop) -> int:
    await until(lambda: shop.standby.ready)
    assert shop.standby.pid is not None
    return shop.standby.pid


async def test_each_job_is_given_to_the_standby_that_waits_and_another_takes_its_place(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(str(adapter)), standby="always") as shop:
        first = await standing_pid(shop)
        assert await trained_by(shop) == {first}
        second = await standing_pid(shop)
        assert await trained_by(shop) == {second}
        assert first != second
        last = await standing_pid(shop)
    assert process_start_time(last) is None, "it ends with the gateway"


async def test_a_job_of_another_number_of_threads_gets_a_trainer_of_its_own(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(str(adapter)), standby="always") as shop:
        waiting = await standing_pid(shop)
        shop.standby._threads += 1
        assert waiting not in await trained_by(shop)


async def test_never_means_that_nothing_stands_by_before_or_after_a_job(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(str(adapter)), standby="never") as shop:
        shop.supervisor.foresee()
        await asyncio.sleep(0)
        assert shop.standby.pid is None
        await trained_by(shop)
        shop.write_plan(Plan(check_error=["invalid_training_file", "it is bad", "training_file"]))
        bad = await shop.create()
        await shop.wait_for(bad.id, "failed")
        await until(lambda: shop.standby.pid is None)


async def test_auto_begins_with_a_file_to_train_on(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(str(adapter)), standby="auto") as shop:
        assert shop.standby.pid is None
        shop.supervisor.foresee()
        waiting = await standing_pid(shop)
        assert await trained_by(shop) == {waiting}


@pytest.mark.parametrize("trouble", ["check", "train", "never ready"])
async def test_a_standby_that_dies_or_hangs_costs_the_job_nothing(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path, trouble: str
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(str(adapter), standby=trouble), standby="always") as shop:
        await until(lambda: shop.standby.pid is not None)
        if trouble != "never ready":
            await standing_pid(shop)
        job = await shop.create()
        await shop.wait_for(job.id, "succeeded")
        assert not [event for event in await shop.events(job.id) if event.level != "info"]
        assert {attempt for _, attempt, _ in shop.steps(job.id)} == {1}


async def test_a_standby_killed_while_it_waits_is_replaced_when_a_job_comes(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(str(adapter)), standby="always") as shop:
        killed = await standing_pid(shop)
        os.kill(killed, signal.SIGKILL)
        await until(lambda: shop.standby.pid is None)
        pids = await trained_by(shop)
        assert len(pids) == 1 and killed not in pids


async def test_a_cancelled_check_ends_the_standby_that_makes_it(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(str(adapter), check_s=60), standby="always") as shop:
        checking = await standing_pid(shop)
        job = await shop.create()
        await until(lambda: shop.folder_of(job.id).is_locked())
        await shop.supervisor.cancel(job.id, "default")
        await until(lambda: process_start_time(checking) is None)
        assert (await shop.job(job.id)).status == "cancelled"

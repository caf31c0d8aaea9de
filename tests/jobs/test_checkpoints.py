"""Checkpoints are models while their job still trains: listed with their rows, loaded at their first use, dropped in order."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from gateway.engines.first_use import NotServable
from gateway.errors import EngineUnavailable, ModelNotFound
from gateway.jobs.names import checkpoint_name
from gateway.jobs.sweeping import sweep_deleted
from gateway.store.checkpoints import select_checkpoint_page
from tests.engines.parts import as_adapter as adapter_in
from tests.engines.parts import with_other_weights
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import Workshop, open_workshop, until, with_bundle

pytestmark = pytest.mark.anyio


def every_step(adapter: Path, steps: int, **fields: object) -> Plan:
    """A checkpoint at each step, all with the same weights."""
    adapters = {str(step): str(adapter) for step in range(1, steps + 1)}
    plan = Plan(adapter=str(adapter), steps=steps, checkpoint_every=1, checkpoint_adapters=adapters)
    return replace(plan, **fields)  # type: ignore[arg-type]


async def listed(shop: Workshop, job_id: str) -> list[int]:
    return [row.step_number for row in await shop.models() if row.job_id == job_id and row.step_number is not None]


async def until_listed(shop: Workshop, job_id: str, steps: list[int]) -> None:
    for _ in range(1000):
        if await listed(shop, job_id) == steps:
            return
        await asyncio.sleep(0.02)
    raise AssertionError((await listed(shop, job_id), await shop.messages(job_id), shop.log(job_id)))


async def test_a_checkpoint_answers_while_its_job_trains_and_is_loaded_only_when_it_is_asked_for(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    plan = every_step(adapter, 4, gate=str(gate), gate_at=3)
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create()
        await until_listed(shop, job.id, [1, 2])
        first, second = (checkpoint_name(job, "local", step) for step in (1, 2))
        assert [row.name for row in await shop.models()] == [first, second]
        assert all((shop.data_dir.adapters / row.adapter_path).is_dir() for row in await shop.models())
        loaded = set(engine.adapters)
        assert not [name for name in loaded if name.startswith(second)], "nobody has asked for it"
        tokens = await asyncio.gather(*(shop.ask(second) for _ in range(3)))
        assert len(tokens[0]) == 4 and tokens[0] == tokens[1] == tokens[2]
        assert len(set(engine.adapters) - loaded) == 1, "loaded once, and no other with it"
        assert tokens[0] != await shop.ask("tiny")
        assert (await shop.job(job.id)).status == "running"
        gate.touch()
        ended = await shop.wait_for(job.id, "succeeded")
        assert await shop.ask(str(ended.fine_tuned_model)) == tokens[0]


async def test_the_last_three_are_kept_and_those_before_go_in_good_order(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    plan = every_step(adapter, 5, gate=str(gate), gate_at=4)
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        shop.supervisor._checkpoints = replace(shop.supervisor._checkpoints, linger_s=0.0)
        job = await shop.create()
        await until_listed(shop, job.id, [1, 2, 3])
        names = [checkpoint_name(job, "local", step) for step in range(1, 6)]
        await shop.ask(names[0])
        gate.touch()
        ended = await shop.wait_for(job.id, "succeeded")
        assert await listed(shop, job.id) == [3, 4, 5]
        assert [c.step_number for c in await shop.checkpoints(ended.id)] == [1, 2, 3, 4, 5]
        page = await shop.store.read(lambda c: select_checkpoint_page(c, ended.id, limit=2))
        assert ([c.step_number for c in page.items], page.has_more) == ([5, 4], True)
        page = await shop.store.read(lambda c: select_checkpoint_page(c, ended.id, limit=2, after=page.items[-1].id))
        assert ([c.step_number for c in page.items], page.has_more) == ([3], False), "a client is told what it can ask"
        for gone in names[:2]:
            with pytest.raises(ModelNotFound):
                await shop.ask(gone)
        await until(lambda: not [name for name in engine.adapters if name.startswith(names[0])])
        for kept in names[2:]:
            assert len(await shop.ask(kept)) == 4


async def test_what_the_witness_refuses_is_told_to_who_asks_and_ends_no_job(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    wrong = with_other_weights(adapter_in(adapter, "a"), tmp_path / "wrong", base, alpha=16.0)
    with_bundle(wrong.path, base.digest)
    spoiled = shutil.copytree(adapter, tmp_path / "spoiled")
    (spoiled / "witness.json").unlink()
    plan = Plan(adapter=str(adapter), steps=9, checkpoint_adapters={"3": str(wrong.path), "6": str(spoiled)})
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        ended = await shop.wait_for((await shop.create()).id, "succeeded")
        assert await listed(shop, ended.id) == [3], "what lacks a file is not even listed"
        warned = [event.message for event in await shop.events(ended.id) if event.level == "warn"]
        assert len(warned) == 1 and "ckpt-step-6" in warned[0] and "witness.json" in warned[0]
        name = checkpoint_name(ended, "local", 3)
        before = set(engine.adapters)
        for _ in range(2):
            with pytest.raises(NotServable, match=r"cannot be served: .*alpha") as refused:
                await shop.ask(name)
            assert (refused.value.status, refused.value.param) == (400, "model") and name in refused.value.message
        assert set(engine.adapters) == before and shop.pool.uses == 0


async def test_a_request_for_a_checkpoint_waits_for_an_engine_that_sleeps_while_the_job_trains(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    async with open_workshop(tmp_path, base, engine, every_step(adapter, 2, gate=str(gate), gate_at=2)) as shop:
        job = await shop.create()
        await until_listed(shop, job.id, [1])
        engine._asleep = True  # as `Engine.sleep` leaves a vLLM; a llama worker cannot
        engine._ready.clear()
        asking = asyncio.create_task(shop.ask(checkpoint_name(job, "local", 1)))
        await until(lambda: shop.pool._waiting == 1)
        assert not asking.done()
        engine._asleep = False
        engine._ready.set()
        assert len(await asking) == 4
        engine._ready.clear()
        with pytest.raises(EngineUnavailable):
            await shop.ask(checkpoint_name(job, "local", 1))
        engine._ready.set()
        gate.touch()
        await shop.wait_for(job.id, "succeeded")


@pytest.mark.parametrize("how", ["failed", "cancelled"])
async def test_what_was_listed_stays_usable_when_its_job_does_not_succeed(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path, how: str
) -> None:
    gate = tmp_path / "gate"
    plan = every_step(adapter, 3, gate=str(gate), gate_at=3, fail=["trainer_error", "of no use"])
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create()
        await until_listed(shop, job.id, [1, 2])
        if how == "cancelled":
            await shop.supervisor.cancel(job.id, "default")
        else:
            gate.touch()
            await shop.wait_for(job.id, "failed")
        kept = await listed(shop, job.id)
        assert kept in ([1, 2], [1, 2, 3])
        for step in kept:
            assert len(await shop.ask(checkpoint_name(job, "local", step))) == 4


async def test_what_a_trainer_wrote_while_no_gateway_was_there_is_told_and_listed_before_the_job_ends(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    async with open_workshop(tmp_path, base, engine, every_step(adapter, 5, gate=str(gate), gate_at=2)) as shop:
        job = await shop.create()
        await until_listed(shop, job.id, [1])
        folder = shop.folder_of(job.id)
    gate.touch()
    await until((folder.path / "result.json").exists)
    await until(lambda: not folder.is_locked())
    async with open_workshop(tmp_path, base, engine) as shop:
        await shop.wait_for(job.id, "succeeded")
        told = [event.data["step"] for event in await shop.events(job.id) if event.type == "metrics" and event.data]
        assert told == [1, 2, 3, 4, 5]
        assert await listed(shop, job.id) == [3, 4, 5]


def test_files_that_somebody_kept_just_now_are_left_to_the_next_sweep(tmp_path: Path) -> None:
    for digest in ("aa", "bb", "cc"):
        (tmp_path / digest).mkdir()
    os.utime(tmp_path / "bb", (1, 1))
    ever, now = {"sha256:aa", "sha256:bb", "sha256:cc"}, {"sha256:cc"}
    assert sweep_deleted(tmp_path, ever, now, after_s=60) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aa", "cc"]
    assert sweep_deleted(tmp_path, ever, now) == 1

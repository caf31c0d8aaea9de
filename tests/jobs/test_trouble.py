"""Trainers that die, hang, lose the race or must be ended: one job, one trainer at a time, one end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from gateway.jobdir import process_start_time
from gateway.jobs.memory import MemoryEvents
from gateway.store import events as event_statements
from gateway.store import jobs as statements
from gateway.store.events import NewEvent
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import FAKE_TRAINER, Workshop, open_workshop, until

pytestmark = pytest.mark.anyio


async def trained_up_to(shop: Workshop, job_id: str, step: int) -> int:
    """The trainer's pid, once that step is taken."""
    await until(lambda: any(taken >= step for _, _, taken in shop.steps(job_id)))
    return shop.steps(job_id)[-1][0]


async def test_a_killed_trainer_is_resumed_from_its_checkpoint_and_its_undone_steps_are_forgotten(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    plan = Plan(adapter=str(adapter), steps=8, kill_at={"1": 6})
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        ended = await shop.wait_for((await shop.create()).id, "succeeded")
        steps = [(attempt, step) for _, attempt, step in shop.steps(ended.id)]
        assert steps == [(1, n) for n in range(1, 6)] + [(2, n) for n in range(4, 9)]
        events = await shop.events(ended.id)
        told = [event.data["step"] for event in events if event.type == "metrics" and event.data]
        assert told == list(range(1, 9)), "steps 4 and 5 of the first attempt were undone"
        (resumed,) = [event for event in events if event.level == "warn"]
        assert "was killed by SIGKILL" in resumed.message and "about to die at step 6" in resumed.message
        assert "from the checkpoint at step 3" in resumed.message
        assert [c.step_number for c in await shop.checkpoints(ended.id)] == [3, 6]
        assert ended.attempt == 2


async def test_a_trainer_that_never_gets_further_fails_the_job_with_its_last_words(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(always_kill_at=2)) as shop:
        ended = await shop.wait_for((await shop.create()).id, "failed")
        assert ended.error is not None and ended.error["code"] == "trainer_failed"
        assert "about to die at step 2" in ended.error["message"]
        assert [attempt for _, attempt, _ in shop.steps(ended.id)] == [1, 2, 3]


async def test_a_trainer_that_the_system_kills_for_want_of_memory_fails_the_job_with_what_to_change(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    vmstat = tmp_path / "machine" / "proc" / "vmstat"
    vmstat.parent.mkdir(parents=True)
    vmstat.write_text("oom_kill 0\n")
    async with open_workshop(tmp_path, base, engine, Plan(always_kill_at=2, oom_vmstat=str(vmstat))) as shop:
        ended = await shop.wait_for((await shop.create()).id, "failed")
        assert ended.error is not None
        assert (ended.error["code"], ended.error["param"]) == ("out_of_memory", "hyperparameters")
        for change in ("batch_size (it was 4)", "max_length (it was ", 'quantization "nf4"'):
            assert change in ended.error["message"]
        warned = [event.message for event in await shop.events(ended.id) if event.level == "warn"]
        assert len(warned) == 2 and all("killed by the system, which was out of memory" in text for text in warned)


@pytest.mark.parametrize(
    ("group", "place"),
    [
        ("0::/job\n", "sys/fs/cgroup/job/memory.events"),
        ("3:cpu:/\n2:memory:/job\n0::/\n", "sys/fs/cgroup/memory/job/memory.oom_control"),
        ("", "proc/vmstat"),
    ],
)
def test_who_was_killed_for_want_of_memory_is_read_where_the_kernel_says_it(
    tmp_path: Path, group: str, place: str
) -> None:
    events = MemoryEvents(tmp_path)
    assert events.oom_kills() is None
    for path, content in (("proc/self/cgroup", group), (place, "low 0\noom 2\noom_kill 1\noom_kill_disable 0\n")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    assert events.oom_kills() == 1


async def test_each_new_checkpoint_renews_the_budget(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    kills = {str(attempt): attempt + 1 for attempt in range(1, 7)}
    plan = Plan(adapter=str(adapter), steps=8, checkpoint_every=1, kill_at=kills)
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        ended = await shop.wait_for((await shop.create()).id, "succeeded")
        assert [step for _, _, step in shop.steps(ended.id)] == list(range(1, 9))
        assert ended.attempt == 7


async def test_a_trainer_that_says_nothing_is_ended_and_resumed(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    plan = Plan(adapter=str(adapter), hang_at={"1": 5}, ignore_term=True)
    async with open_workshop(tmp_path, base, engine, plan, hang_timeout_s=1.0) as shop:
        job = await shop.create()
        pid = await trained_up_to(shop, job.id, 4)
        ended = await shop.wait_for(job.id, "succeeded")
        assert process_start_time(pid) is None, "TERM was ignored, so KILL ended it"
        assert any("said nothing for 1 s and was ended" in text for text in await shop.messages(ended.id))
        assert [step for _, _, step in shop.steps(ended.id)] == [1, 2, 3, 4, 4, 5, 6]


async def test_cancelling_a_running_job_ends_its_trainer_and_nothing_is_published(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    plan = Plan(adapter=str(adapter), gate=str(tmp_path / "never"), ignore_term=True)
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create()
        pid = await trained_up_to(shop, job.id, 2)
        began = time.monotonic()
        cancelled = await shop.supervisor.cancel(job.id, "default")
        assert cancelled.status == "cancelled" and cancelled.finished_at is not None
        assert time.monotonic() - began < 2, "the answer does not wait for the trainer"
        await until(lambda: process_start_time(pid) is None)
        again = await shop.supervisor.cancel(job.id, "default")
        assert again == await shop.job(job.id) == cancelled
        assert (await shop.messages(job.id))[-1] == "The job was cancelled"
        assert await shop.models() == []
        other = await shop.create()
        shop.write_plan(Plan(adapter=str(adapter)))
        await shop.wait_for(other.id, "succeeded")


async def test_a_job_can_be_cancelled_while_its_files_are_checked_and_while_it_waits(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(gate=str(tmp_path / "never"))) as shop:
        running = await shop.create()
        await shop.wait_for(running.id, "running")
        waiting = await shop.create()
        await shop.wait_for(waiting.id, "queued")
        shop.write_plan(Plan(check_s=600))
        checked = await shop.create()
        await until((shop.folder_of(checked.id).path / "check.process.json").exists)
        await until(shop.folder_of(checked.id).is_locked)
        for job in (waiting, checked, running):
            assert (await shop.supervisor.cancel(job.id, "default")).status == "cancelled"
        await until(lambda: not shop.folder_of(checked.id).is_locked())
        await until(lambda: not shop.folder_of(running.id).is_locked())
        assert [(await shop.job(job.id)).status for job in (waiting, checked, running)] == ["cancelled"] * 3
        assert shop.steps(waiting.id) == shop.steps(checked.id) == []


async def test_a_stranger_who_has_the_trainers_pid_is_left_alone(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    stranger = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
    try:
        async with open_workshop(tmp_path, base, engine, Plan(gate=str(tmp_path / "never"))) as shop:
            job = await shop.create()
            pid = await trained_up_to(shop, job.id, 2)
            record = {"pid": stranger.pid, "start_time": (process_start_time(stranger.pid) or 0) - 1}
            (shop.folder_of(job.id).path / "lock").write_text(json.dumps(record))
            assert shop.folder_of(job.id).is_locked() and shop.folder_of(job.id).holder() is None
            await shop.supervisor.cancel(job.id, "default")
            await until(lambda: process_start_time(pid) is None)  # our own child needs no record
            assert process_start_time(stranger.pid) is not None
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_trainer_that_somebody_else_started_is_taken_over_and_not_doubled(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    plan = Plan(adapter=str(adapter), gate=str(gate), gate_at=1)
    async with open_workshop(tmp_path, base, engine, plan, parallel=1) as shop:
        blocker = await shop.create()
        await shop.wait_for(blocker.id, "running")
        job = await shop.create()
        await shop.wait_for(job.id, "queued")
        by_hand = await asyncio.create_subprocess_exec(
            sys.executable, str(FAKE_TRAINER), str(shop.plan_file), str(shop.folder_of(job.id).path)
        )
        await until(shop.folder_of(job.id).is_locked)
        gate.touch()
        for waited in (blocker, job):
            await shop.wait_for(waited.id, "succeeded")
        assert await by_hand.wait() == 0
        assert {pid for pid, _, _ in shop.steps(job.id)} == {by_hand.pid}


async def test_of_two_trainers_that_start_together_one_trains(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    plan = Plan(adapter=str(adapter), before_lock_s=0.5, gate=str(gate))
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create()
        await shop.wait_for(job.id, "running")
        # While the supervisor's own trainer is still on its way to the lock, another takes it.
        rival_plan = tmp_path / "rival.json"
        rival_plan.write_text(json.dumps({"adapter": str(adapter), "gate": str(gate)}))
        rival = await asyncio.create_subprocess_exec(
            sys.executable, str(FAKE_TRAINER), str(rival_plan), str(shop.folder_of(job.id).path)
        )
        await trained_up_to(shop, job.id, 2)
        await asyncio.sleep(1.0)
        gate.touch()
        await shop.wait_for(job.id, "succeeded")
        assert await rival.wait() == 0
        assert len({pid for pid, _, _ in shop.steps(job.id)}) == 1
        assert [step for _, _, step in shop.steps(job.id)] == [1, 2, 3, 4, 5, 6]


async def test_a_database_that_cannot_write_for_a_while_costs_no_event(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    """Another process holds the write lock past the busy timeout: what was read is read again."""
    plan = Plan(adapter=str(adapter), steps=30, step_s=0.2, checkpoint_every=10)
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create()
        await trained_up_to(shop, job.id, 2)
        locker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import sqlite3,sys,time; c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5);"
            "c.execute('BEGIN IMMEDIATE'); time.sleep(8)",
            str(shop.data_dir.database),
        )
        assert await locker.wait() == 0
        ended = await shop.wait_for(job.id, "succeeded")
        told = [event.data["step"] for event in await shop.events(ended.id) if event.type == "metrics" and event.data]
        assert told == list(range(1, 31))


async def test_a_trainer_killed_from_outside_goes_on_in_a_new_one(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter), gate=str(gate), gate_at=5)) as shop:
        job = await shop.create()
        pid = await trained_up_to(shop, job.id, 4)
        os.kill(pid, signal.SIGKILL)
        gate.touch()
        await shop.wait_for(job.id, "succeeded")
        assert len({pid for pid, _, _ in shop.steps(job.id)}) == 2
        events = await shop.store.read(lambda c: event_statements.select_metrics(c, job.id))
        assert [event.data["step"] for event in events if event.data] == [1, 2, 3, 4, 5, 6]


async def test_a_trainer_whose_record_names_a_stranger_is_waited_for_and_the_stranger_left_alone(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    stranger = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
    try:
        async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter), gate=str(gate))) as shop:
            job = await shop.create()
            await trained_up_to(shop, job.id, 2)
            await shop.supervisor.stop()
            record = {"pid": stranger.pid, "start_time": (process_start_time(stranger.pid) or 0) - 1}
            (shop.folder_of(job.id).path / "lock").write_text(json.dumps(record))
        async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
            await asyncio.sleep(1.0)
            gate.touch()
            await shop.wait_for(job.id, "succeeded")
            assert len({pid for pid, _, _ in shop.steps(job.id)}) == 1
            other = await shop.create()
            await shop.supervisor.cancel(other.id, "default")
        assert process_start_time(stranger.pid) is not None
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_gateway_that_stops_leaves_its_trainer_at_work_for_the_next(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    plan = Plan(adapter=str(adapter), gate=str(gate))
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create()
        pid = await trained_up_to(shop, job.id, 2)
    assert process_start_time(pid) is not None
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        gate.touch()
        await shop.wait_for(job.id, "succeeded")
        assert {pid for pid, _, _ in shop.steps(job.id)} == {pid}


async def test_what_killed_requests_and_finished_jobs_leave_is_swept(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        job = await shop.wait_for((await shop.create()).id, "succeeded")
        folder = shop.folder_of(job.id)
        await until(lambda: not folder.checkpoints.exists())
        assert folder.adapter.is_dir()
        (shop.data_dir.jobs / "ftjob-neverAnswered" / "data").mkdir(parents=True)
        (shop.data_dir.jobs / "notes of the owner").mkdir()
    async with open_workshop(tmp_path, base, engine) as shop:
        assert {path.name for path in shop.data_dir.jobs.iterdir()} == {job.id, "notes of the owner"}


async def test_events_stay_in_their_order_when_the_clock_jumps_back(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(gate=str(tmp_path / "never"))) as shop:
        job = await shop.create()
        await trained_up_to(shop, job.id, 2)
        for n, created_at in enumerate((4_000_000_000, 1_000_000_000, 2_000_000_000)):
            event = NewEvent(f"event {n}", created_at=created_at)
            assert await shop.store.write(lambda c, event=event: statements.insert_running_event(c, job.id, event))
        assert (await shop.messages(job.id))[-3:] == ["event 0", "event 1", "event 2"]
        await shop.supervisor.cancel(job.id, "default")
        await until(lambda: not shop.folder_of(job.id).is_locked())

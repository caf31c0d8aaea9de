"""`kill -9` of the gateway at any moment: what was acknowledged is done, by one trainer, once."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.jobdir import process_start_time
from gateway.jobs.barrier import VARIABLE
from gateway.store import events as event_statements
from gateway.store import jobs as statements
from gateway.store import models as model_statements
from gateway.store.database import Store
from gateway.store.events import Event
from gateway.store.jobs import Job
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import read_steps, until

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parent.parent.parent


class Mortal:
    """A gateway that is started and killed again and again over the same folder."""

    def __init__(self, folder: Path, base: PreparedBase, plan: Plan) -> None:
        self.folder, self.base, self.plan = folder, base, plan
        self.process: asyncio.subprocess.Process | None = None
        self.job_id = ""

    async def start(self, *, create: bool = False, barrier: str = "") -> None:
        spec = {"folder": self.folder, "plan": asdict(self.plan), "base": asdict(self.base), "create": create}
        with (self.folder / "gateway.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                "env",
                f"{VARIABLE}={barrier}",
                sys.executable,
                "-m",
                "tests.jobs.killed_gateway",
                json.dumps(spec, default=str),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
            )
        if create:
            assert self.process.stdout is not None
            said = await asyncio.wait_for(self.process.stdout.readline(), 60)
            self.job_id = said.decode().strip()
            assert self.job_id.startswith("ftjob-"), self.log()

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            assert await self.process.wait() == 0, self.log()

    async def wait_for_end(self, timeout_s: float = 60) -> Job:
        store = await asyncio.to_thread(Store.open, self.folder / "data" / "tunegate.db")
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    job = await store.read(lambda c: statements.select_job(c, self.job_id))
                    assert job is not None, "an acknowledged job is lost"
                    if job.is_over:
                        return job
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(self.log()) from None
        finally:
            await asyncio.to_thread(store.close)

    async def events(self) -> list[Event]:
        store = await asyncio.to_thread(Store.open, self.folder / "data" / "tunegate.db")
        try:
            return (await store.read(lambda c: event_statements.select_events(c, self.job_id, limit=1000))).items[::-1]
        finally:
            await asyncio.to_thread(store.close)

    async def models(self) -> list[str]:
        store = await asyncio.to_thread(Store.open, self.folder / "data" / "tunegate.db")
        try:
            return [row.name for row in await store.read(model_statements.list_all)]
        finally:
            await asyncio.to_thread(store.close)

    @property
    def steps(self) -> list[tuple[int, int, int]]:
        return read_steps(self.folder / "data" / "jobs" / self.job_id)

    def log(self) -> str:
        return (self.folder / "gateway.log").read_text()[-4000:]


def assert_told_once(events: list[Event], steps: int) -> None:
    messages = [event.message for event in events]
    for once in ("Files validated, moving job to queued state", "Fine-tuning job started"):
        assert messages.count(once) == 1, messages
    assert messages.count("The job has successfully completed") == 1, messages
    assert [event.data["step"] for event in events if event.type == "metrics" and event.data] == list(
        range(1, steps + 1)
    )


async def test_a_gateway_killed_ten_times_leaves_one_trainer_and_a_model(
    tmp_path: Path, base: PreparedBase, adapter: Path
) -> None:
    """The trainer takes its lock late, so that kills land between its start and its lock too."""
    plan = Plan(adapter=str(adapter), steps=160, step_s=0.1, checkpoint_every=40, before_lock_s=0.4, check_s=0.3)
    gateway = Mortal(tmp_path, base, plan)
    chance = random.Random(14)
    try:
        await gateway.start(create=True)
        for _ in range(10):
            await asyncio.sleep(chance.uniform(0.0, 0.6))
            await gateway.kill()
            await gateway.start()
            await asyncio.sleep(1.0)  # or it would be killed before it had begun
        job = await gateway.wait_for_end()
        assert job.status == "succeeded", (job.error, gateway.log())
        assert len({pid for pid, _, _ in gateway.steps}) == 1, "exactly one trainer, ever"
        assert [step for _, _, step in gateway.steps] == list(range(1, 161))
        assert_told_once(await gateway.events(), 160)
        assert await gateway.models() == [job.fine_tuned_model]
    finally:
        await gateway.stop()


@pytest.mark.parametrize("pause_s", [0.0, 0.3])
async def test_a_kill_while_the_job_is_new_loses_nothing(
    tmp_path: Path, base: PreparedBase, adapter: Path, pause_s: float
) -> None:
    gateway = Mortal(tmp_path, base, Plan(adapter=str(adapter), check_s=0.2, before_lock_s=0.1))
    try:
        await gateway.start(create=True)
        await asyncio.sleep(pause_s)
        await gateway.kill()
        await gateway.start()
        job = await gateway.wait_for_end()
        assert job.status == "succeeded", (job.error, gateway.log())
        assert len({pid for pid, _, _ in gateway.steps}) == 1
        assert_told_once(await gateway.events(), 6)
    finally:
        await gateway.stop()


async def test_a_kill_just_before_the_publishing_commit_publishes_once_after_the_restart(
    tmp_path: Path, base: PreparedBase, adapter: Path
) -> None:
    gateway = Mortal(tmp_path, base, Plan(adapter=str(adapter), checkpoint_adapters={"6": str(adapter)}))
    barrier = tmp_path / "barrier"
    try:
        await gateway.start(create=True, barrier=f"before-publication-commit:{barrier}")
        await until(Path(f"{barrier}.reached").exists)
        await gateway.kill()
        (checkpoint,) = await gateway.models()
        assert checkpoint.endswith(":ckpt-step-6")
        await gateway.start()
        job = await gateway.wait_for_end()
        assert job.status == "succeeded", (job.error, gateway.log())
        assert await gateway.models() == [checkpoint, job.fine_tuned_model]
        assert_told_once(await gateway.events(), 6)
    finally:
        await gateway.stop()


@pytest.mark.parametrize("point", ["before-checkpoint-commit", "after-checkpoint-commit"])
async def test_a_kill_while_a_checkpoint_is_listed_lists_it_once_and_keeps_the_last_three(
    tmp_path: Path, base: PreparedBase, adapter: Path, point: str
) -> None:
    """At the fourth, which is the first that drops another."""
    gate, barrier = tmp_path / "gate", tmp_path / "barrier"
    adapters = {str(number): str(adapter) for number in range(1, 7)}
    plan = Plan(
        adapter=str(adapter), checkpoint_every=1, checkpoint_adapters=adapters, gate=str(gate), gate_at=4, step_s=0.1
    )
    gateway = Mortal(tmp_path, base, plan)
    try:
        await gateway.start(create=True)
        for _ in range(600):
            if len(await gateway.models()) == 3:
                break
            await asyncio.sleep(0.05)
        await gateway.kill()
        await gateway.start(barrier=f"{point}:{barrier}")
        gate.touch()
        await until(Path(f"{barrier}.reached").exists)
        await gateway.kill()
        folders = list((tmp_path / "data" / "adapters").iterdir())
        assert len(folders) == 1, "linked before it is listed; the same weights are kept once"
        listed = [name.rpartition("-")[2] for name in await gateway.models()]
        assert len(listed) == 3 and (listed == ["1", "2", "3"]) == (point == "before-checkpoint-commit")
        await gateway.start()
        job = await gateway.wait_for_end()
        assert job.status == "succeeded", (job.error, gateway.log())
        *checkpoints, final = await gateway.models()
        assert final == job.fine_tuned_model
        assert [name.rpartition("-")[2] for name in checkpoints] == ["4", "5", "6"]
        assert_told_once(await gateway.events(), 6)
    finally:
        await gateway.stop()


async def test_a_job_cancelled_just_before_a_kill_has_no_trainer_after_the_restart(
    tmp_path: Path, base: PreparedBase, adapter: Path
) -> None:
    gateway = Mortal(tmp_path, base, Plan(adapter=str(adapter), gate=str(tmp_path / "never")))
    try:
        await gateway.start(create=True)
        await until(lambda: len(gateway.steps) >= 2)
        trainer = gateway.steps[0][0]
        await gateway.kill()
        assert process_start_time(trainer) is not None, "the trainer outlives its gateway"
        store = await asyncio.to_thread(Store.open, tmp_path / "data" / "tunegate.db")
        assert await store.write(lambda c: statements.cancel_job(c, gateway.job_id, "The job was cancelled"))
        await asyncio.to_thread(store.close)
        await gateway.start()
        await until(lambda: process_start_time(trainer) is None)
        assert (await gateway.wait_for_end()).status == "cancelled"
        assert await gateway.models() == []
    finally:
        await gateway.stop()


async def test_a_trainer_that_died_with_its_gateway_is_resumed(
    tmp_path: Path, base: PreparedBase, adapter: Path
) -> None:
    gateway = Mortal(tmp_path, base, Plan(adapter=str(adapter), kill_at={"1": 5}, gate=str(tmp_path / "g"), gate_at=5))
    try:
        await gateway.start(create=True)
        await until(lambda: len(gateway.steps) >= 4)
        await gateway.kill()
        (tmp_path / "g").touch()
        await until(lambda: process_start_time(gateway.steps[0][0]) is None)
        await gateway.start()
        job = await gateway.wait_for_end()
        assert job.status == "succeeded", (job.error, gateway.log())
        assert [step for _, _, step in gateway.steps] == [1, 2, 3, 4, 4, 5, 6]
        assert_told_once(await gateway.events(), 6)
    finally:
        await gateway.stop()

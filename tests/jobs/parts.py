"""A workshop: everything that a job needs, real but for the trainer, which is a process that keeps the contract and no more."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gateway.bases import PreparedBase
from gateway.chat.bundle import Bundle, make_bundle
from gateway.engines.adapters import Adapter
from gateway.engines.catalog import Base, Catalog, TunedModel
from gateway.engines.client import Deadlines
from gateway.engines.engine import Engine
from gateway.engines.kinds import llama_engine
from gateway.engines.pool import Pool
from gateway.errors import EngineUnavailable
from gateway.jobdir import JobDir
from gateway.jobs.launcher import Launcher, child_environment
from gateway.jobs.memory import MemoryEvents
from gateway.jobs.standby import Standby
from gateway.jobs.supervisor import Supervisor
from gateway.settings import JobSettings, Settings
from gateway.store import checkpoints as checkpoint_statements
from gateway.store import events as event_statements
from gateway.store import files as file_statements
from gateway.store import jobs as statements
from gateway.store import models as model_statements
from gateway.store.blobs import Blobs
from gateway.store.checkpoints import Checkpoint
from gateway.store.database import Store
from gateway.store.datadir import DataDir
from gateway.store.events import Event
from gateway.store.jobs import Job
from gateway.store.models import ModelRow
from gateway.wire.fine_tuning import CreateJob, parse_create
from tests.engines.parts import QUICK, as_adapter, pool_of, write_manifest
from tests.jobs.fake_trainer import Plan
from tests.tiny_tokenizers import sentencepiece_like

FAKE_TRAINER = Path(__file__).parent / "fake_trainer.py"
FAKE_STANDBY = Path(__file__).parent / "fake_standby.py"
ASKED = {"ignore_eos": True, "stream": True, "return_token_ids": True}
LINES = b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n' * 12


def base_bundle() -> Bundle:
    return make_bundle("vicuna_v1.1", sentencepiece_like(), [2])


def with_bundle(adapter: Path, base_digest: str) -> Path:
    """Gives an adapter's folder the template bundle that a trainer would have put into it."""
    for name, content in base_bundle().to_files().items():
        (adapter / "template" / name).write_bytes(content)
    write_manifest(adapter, base_digest)
    return adapter


class Workshop:
    """One data folder and the supervisor over it."""

    def __init__(
        self, folder: Path, prepared: PreparedBase, engine: Engine | None, plan: Plan, jobs: dict[str, Any]
    ) -> None:
        self.folder = folder
        self.plan_file = folder / "plan.json"
        self.write_plan(plan)
        self.data_dir = DataDir.open(folder / "data")
        self.store = Store.open(self.data_dir.database)
        self.blobs = Blobs(self.data_dir.blobs)
        self.catalog = Catalog(Deadlines(10, 10))
        self.engine = engine or llama_engine(
            prepared, self.data_dir.engines / "tiny", max_seqs=4, threads=1, timings=QUICK
        )
        self.pool = pool_of(self.engine)
        self.catalog.add_base(
            Base("tiny", base_bundle(), self.pool, "tiny", self.engine.max_model_len, 1, prepared), ["gpt-4o-mini"]
        )
        self.engine_is_there = True
        settings = JobSettings(**jobs)
        self.standby = Standby(
            settings.standby,
            settings.trainer_threads,
            self.data_dir.path,
            lambda: child_environment(os.environ),
            (sys.executable, str(FAKE_STANDBY), str(self.plan_file)),
        )
        self.supervisor = Supervisor(
            self.store,
            self.blobs,
            self.data_dir,
            Settings(jobs=settings),
            self.catalog,
            self._engine_of,
            Launcher(
                (sys.executable, str(FAKE_TRAINER), str(self.plan_file)), self.standby if "standby" in jobs else None
            ),
            memory=MemoryEvents(folder / "machine"),
        )

    def _engine_of(self, base: str) -> Pool:
        if not self.engine_is_there:
            raise EngineUnavailable(f"the base '{base}' is being prepared")
        return self.pool

    def write_plan(self, plan: Plan) -> None:
        self.plan_file.write_text(json.dumps(asdict(plan)))

    async def close(self) -> None:
        await self.supervisor.stop()
        self.catalog.close()
        await asyncio.to_thread(self.store.close)
        self.data_dir.close()

    # what a client does

    async def upload(self, content: bytes = LINES, purpose: str = "fine-tune", project_id: str = "default") -> str:
        async with self.blobs.putting(content) as blob:
            file = await self.store.write(
                lambda c: file_statements.insert_file(
                    c, blob, filename="a.jsonl", purpose=purpose, created_at=int(time.time()), project_id=project_id
                )
            )
        return file.id

    async def create(self, key: str | None = None, **fields: Any) -> Job:
        body = {"model": "tiny", **fields}
        if "training_file" not in body:
            body["training_file"] = await self.upload()
        return await self.supervisor.create(self.request(**body), key, "default")

    def request(self, **body: Any) -> CreateJob:
        return parse_create(body)

    async def job(self, job_id: str) -> Job:
        job = await self.store.read(lambda c: statements.select_job(c, job_id))
        assert job is not None
        return job

    async def events(self, job_id: str) -> list[Event]:
        """Oldest first."""
        page = await self.store.read(lambda c: event_statements.select_events(c, job_id, limit=1000))
        return page.items[::-1]

    async def messages(self, job_id: str) -> list[str]:
        return [event.message for event in await self.events(job_id)]

    async def checkpoints(self, job_id: str) -> list[Checkpoint]:
        return await self.store.read(lambda c: checkpoint_statements.select_checkpoints(c, job_id))

    async def models(self) -> list[ModelRow]:
        return await self.store.read(model_statements.list_all)

    async def serve_rows(self) -> None:
        """What a start does with the models that the database has: `House` does it."""
        for row in await self.models():
            adapter = Adapter(row.engine_name, Path(row.adapter_path), "tiny", row.adapter_digest)
            if row.step_number is None:
                self.pool.set_desired([*self.pool._desired.values(), adapter])
            else:
                self.pool.first_use.offer([adapter])
            self.catalog.publish(
                TunedModel(row.name, row.base, base_bundle(), row.engine_name, row.created_at, row.owned_by)
            )

    async def ask(self, model: str) -> list[int]:
        """The tokens of a short reply, as a request gets them. Raises what a client is told."""
        served = self.catalog.resolve(model, "default")
        body = {"model": served.engine_model, "prompt": [1, 5, 6], "max_tokens": 4, "temperature": 0, **ASKED}
        stream = await served.client.stream(body)
        tokens: list[int] = []
        while frames := await stream.frames():
            for frame in frames:
                for choice in frame["choices"]:
                    tokens += choice["token_ids"] or []
        return tokens

    async def wait_for(self, job_id: str, *statuses: str, timeout_s: float = 60) -> Job:
        job = await self.job(job_id)
        deadline = time.monotonic() + timeout_s
        while job.status not in statuses:
            assert not job.is_over, (job.status, job.error, await self.messages(job_id))
            assert time.monotonic() < deadline, (job.status, await self.messages(job_id), self.log(job_id))
            await asyncio.sleep(0.02)
            job = await self.job(job_id)
        return job

    # what only a test looks at

    def folder_of(self, job_id: str) -> JobDir:
        return JobDir(self.data_dir.jobs / job_id)

    def steps(self, job_id: str) -> list[tuple[int, int, int]]:
        """(pid, attempt, step) of every step that any trainer took."""
        return read_steps(self.data_dir.jobs / job_id)

    def log(self, job_id: str) -> str:
        path = self.data_dir.jobs / job_id / "trainer.log"
        return path.read_text(errors="replace") if path.exists() else ""


@asynccontextmanager
async def open_workshop(
    folder: Path, prepared: PreparedBase, engine: Engine | None, plan: Plan | None = None, **jobs: Any
) -> AsyncIterator[Workshop]:
    workshop = Workshop(folder, prepared, engine, plan or Plan(), jobs)
    await workshop.supervisor.start()
    try:
        yield workshop
    finally:
        await workshop.close()


def read_steps(folder: Path) -> list[tuple[int, int, int]]:
    path = folder / "steps.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(pid), int(attempt), int(step)) for pid, attempt, step in (line.split() for line in lines)]


def engine_name(folder: Path, public_name: str) -> str:
    return as_adapter(folder, public_name).engine_name


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        await asyncio.sleep(0.01)

"""What training made becomes a model: checked, kept, loaded and verified on an engine, then published in one transaction.

Its one rule: `succeeded` is written together with the model's row, after an engine has loaded the adapter and reproduced
what the trainer saw, and only while the job is running. Names follow from the job, so publishing again after a kill is
the same. The job's checkpoints are models before that: see `checkpoints`.
"""

from __future__ import annotations

import asyncio
import csv
import io
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection

from gateway.engines.adapters import AdapterRejected
from gateway.engines.catalog import Base, Catalog
from gateway.engines.pool import Pool
from gateway.errors import EngineError
from gateway.jobdir import JobDir, Result
from gateway.jobs.barrier import pass_barrier
from gateway.jobs.candidate import Candidate, keep_adapter
from gateway.jobs.names import model_name
from gateway.jobs.training import JobCancelled, JobFailed
from gateway.store import events as event_statements
from gateway.store import jobs as statements
from gateway.store import models as model_statements
from gateway.store.blobs import BlobRef, Blobs
from gateway.store.database import Store
from gateway.store.events import Event, Level, NewEvent
from gateway.store.files import RESULT_PURPOSE, insert_file
from gateway.store.jobs import Job

logger = logging.getLogger("tunegate.jobs")

T = TypeVar("T")

ENGINE_WAIT_S = 900.0
ENGINE_RETRY_S = 2.0
RESULT_FILENAME = "step_metrics.csv"
RESULT_COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}


@dataclass(frozen=True)
class Publication:
    """`await publish(…)` for a job whose trainer left a result that succeeded."""

    store: Store
    blobs: Blobs
    adapters_dir: Path
    organization: str
    catalog: Catalog
    engines: Callable[[str], Pool]
    engine_wait_s: float = ENGINE_WAIT_S

    async def publish(self, job: Job, folder: JobDir, result: Result, stop: asyncio.Event) -> None:
        """The job succeeded and its model is served. Raises JobFailed, and JobCancelled where a cancel was first."""
        begun: list[Candidate] = []
        try:
            base = await self._find_base(job, stop)
            source, name = folder.adapter, model_name(job, self.organization)
            final = await asyncio.to_thread(self._keep, job, base, source, name)
            begun.append(final)
            await self._load(job, final, stop)
            await asyncio.to_thread(pass_barrier, "before-publication-commit")
            await self._commit(job, result, final)
        except AdapterRejected as error:
            await self._drop(job, begun)
            raise JobFailed("adapter_not_servable", f"The trained adapter cannot be served: {error.message}") from error
        except (JobCancelled, JobFailed):
            await self._drop(job, begun)
            raise
        self.catalog.publish(final.served())
        logger.info("job %s: %s is served", job.id, final.row.name)

    async def _find_base(self, job: Job, stop: asyncio.Event) -> Base:
        """The job's base, which may still be being prepared when the gateway has just started."""
        deadline = time.monotonic() + self.engine_wait_s
        while True:
            try:
                return self.catalog.base(job.base)
            except KeyError:
                if time.monotonic() > deadline:
                    raise JobFailed(
                        "engine_unavailable", f"The base '{job.base}' is not served any more; see the settings' [bases]"
                    ) from None
            await _unless_stopped(asyncio.sleep(ENGINE_RETRY_S), stop)

    def _keep(self, job: Job, base: Base, source: Path, name: str) -> Candidate:
        return keep_adapter(
            job,
            base.bundle,
            source,
            self.adapters_dir,
            base_digest=base.prepared.digest,
            gguf=base.prepared.gguf is not None,
            max_rank=self.engines(job.base).max_lora_rank,
            name=name,
            owned_by=self.organization,
        )

    async def _load(self, job: Job, candidate: Candidate, stop: asyncio.Event) -> None:
        """Has the engine load and verify. Waits for an engine that is not there, but not for ever; for one that sleeps while
        another job trains, as long as that takes.

        Raises AdapterRejected, JobFailed, JobCancelled.
        """
        deadline = time.monotonic() + self.engine_wait_s
        told = False
        while True:
            try:
                engine = self.engines(job.base)
                if not engine.ready and not told:
                    told = True
                    await self._tell(job, "The model is trained and waits for its engine to be ready")
                report = await _unless_stopped(engine.ensure_adapter(candidate.adapter), stop)
                if report is not None and report.warning:
                    await self._tell(job, f"{candidate.row.name}: {report.warning}", "warn")
                return
            except EngineError as error:
                logger.warning("job %s: %s", job.id, error.message)
                if self._sleeps(job.base):
                    deadline = time.monotonic() + self.engine_wait_s
                elif time.monotonic() > deadline:
                    raise JobFailed(
                        "engine_unavailable",
                        f"The model was trained, but no engine loaded it within {self.engine_wait_s:g} s: {error.message}",
                    ) from error
            await _unless_stopped(asyncio.sleep(ENGINE_RETRY_S), stop)

    def _sleeps(self, base: str) -> bool:
        try:
            return self.engines(base).asleep
        except EngineError:
            return False

    async def _commit(self, job: Job, result: Result, final: Candidate) -> None:
        metrics = await self.store.read(lambda connection: event_statements.select_metrics(connection, job.id))
        async with self.blobs.putting(write_csv(metrics)) as blob:
            await self.store.write(lambda connection: self._publish_row(connection, job, result, final, blob))

    def _publish_row(self, connection: Connection, job: Job, result: Result, final: Candidate, blob: BlobRef) -> None:
        """The one transaction."""
        name = final.row.name
        file = insert_file(
            connection,
            blob,
            filename=RESULT_FILENAME,
            purpose=RESULT_PURPOSE,
            created_at=int(time.time()),
            project_id=job.project_id,
        )
        events = [
            NewEvent(f"New fine-tuned model created: {name}"),
            NewEvent("The job has successfully completed"),
        ]
        if not statements.succeed_job(connection, job.id, name, result.trained_tokens, [file.id], events):
            raise JobCancelled  # undoes the file's row
        model_statements.insert_model(connection, final.row)

    async def _drop(self, job: Job, candidates: list[Candidate]) -> None:
        for candidate in candidates:
            try:
                await self.engines(job.base).drop_adapter(candidate.adapter.engine_name)
            except EngineError:  # it is not there: nor is the adapter, for it is not desired
                logger.info("job %s: no engine to drop %s from", job.id, candidate.row.name)

    async def _tell(self, job: Job, message: str, level: Level = "info") -> None:
        event = NewEvent(message, level=level)
        await self.store.write(lambda connection: statements.insert_running_event(connection, job.id, event))


async def _unless_stopped(work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T:
    """What `work` gives, unless the job is cancelled first: JobCancelled."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise JobCancelled
        return working.result()
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


def write_csv(metrics: Iterable[Event]) -> bytes:
    """A job's result file: one line a step; what was not measured at a step is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(RESULT_COLUMNS)
    for event in metrics:
        data = event.data or {}
        writer.writerow(["" if data.get(name) is None else data[name] for name in RESULT_COLUMNS.values()])
    return text.getvalue().encode()

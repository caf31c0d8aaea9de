"""A job's checkpoints as models, while it still trains: kept and listed in one step, loaded when first asked for.

    prepare     checked and linked to its digest under adapters/, before anything names it
    insert      its row, in the transaction that stores the checkpoint; the rows of all but the last three go in the same one
    serve       from then on it is found; those that went take no new request, and are unloaded when their replies are over

Its one rule: the rows are the truth. Whatever is killed between two of these is done again from the trainer's events, and the
next start serves what the rows say. A job that fails or is cancelled keeps what was listed. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Connection

from gateway.engines.adapters import MAX_RANK, AdapterRejected
from gateway.engines.catalog import Catalog
from gateway.engines.pool import Pool
from gateway.errors import EngineError, TunegateError
from gateway.jobdir import JobDir
from gateway.jobs.barrier import pass_barrier
from gateway.jobs.candidate import Candidate, keep_adapter
from gateway.jobs.folder import adapter_checkpoints
from gateway.jobs.sweeping import sweep_deleted
from gateway.store import models as model_statements
from gateway.store.checkpoints import NewCheckpoint
from gateway.store.database import Store
from gateway.store.events import NewEvent, insert_events
from gateway.store.jobs import Job
from gateway.store.models import ModelRow

logger = logging.getLogger("tunegate.jobs")

SERVED = 3  # of a job
LINGER_S = 5.0  # requests that found a model are rendered still, and have not reached its engine
SWEEP_AFTER_S = 1200.0  # longer than an adapter waits for its last reply, or a trained one for its engine


@dataclass(frozen=True)
class Prepared:
    """Checkpoints of one reading of a trainer's events: those that can be served, and why others cannot."""

    candidates: tuple[Candidate, ...] = ()
    refused: tuple[tuple[NewCheckpoint, str], ...] = ()


@dataclass(frozen=True)
class Change:
    """What one transaction made of them."""

    listed: tuple[Candidate, ...]
    dropped: tuple[ModelRow, ...]


@dataclass(frozen=True)
class Checkpoints:
    """`prepare`, `insert` and `serve` for each reading; `await stop()` at the end."""

    store: Store
    adapters_dir: Path
    organization: str
    catalog: Catalog
    engines: Callable[[str], Pool]
    linger_s: float = LINGER_S
    _drops: set[asyncio.Task[None]] = field(default_factory=set)

    async def prepare(self, job: Job, folder: JobDir, checkpoints: Sequence[NewCheckpoint]) -> Prepared:
        """Checks and keeps the newest of them; those that the trainer has dropped already are nobody's any more."""
        if not checkpoints:
            return Prepared()
        prepared = await asyncio.to_thread(self._prepare_now, job, folder, checkpoints[-SERVED:])
        await asyncio.to_thread(pass_barrier, "before-checkpoint-commit")
        return prepared

    def insert(self, connection: Connection, job: Job, prepared: Prepared) -> Change:
        """Within the transaction that stores the checkpoints."""
        for checkpoint, why in prepared.refused:
            message = f"The checkpoint {checkpoint.name} is not served: {why}"
            key = f"{job.id}/refused/{checkpoint.step_number}"
            insert_events(connection, job.id, [NewEvent(message, level="warn", source_key=key)])
        if not prepared.candidates:
            return Change((), ())
        new = [c for c in prepared.candidates if not model_statements.was_named(connection, job.project_id, c.row.name)]
        for candidate in new:
            model_statements.insert_model(connection, candidate.row)
        dropped = model_statements.checkpoints_of(connection, job.id)[:-SERVED]
        for row in dropped:
            model_statements.delete(connection, row.project_id, row.name)
        gone = {row.name for row in dropped}
        return Change(tuple(c for c in new if c.row.name not in gone), tuple(dropped))

    async def serve(self, change: Change) -> None:
        """Lets requests find what is listed, and no more what was dropped."""
        if change.listed or change.dropped:
            await asyncio.to_thread(pass_barrier, "after-checkpoint-commit")
        for candidate in change.listed:
            self._offer(candidate)
            logger.info("%s is listed", candidate.row.name)
        for row in change.dropped:
            self.catalog.withdraw(row.name)
            task = asyncio.create_task(self._drop(row), name=f"drop {row.engine_name}")
            self._drops.add(task)
            task.add_done_callback(self._drops.discard)

    async def stop(self) -> None:
        """What was not unloaded yet is not desired by the next start."""
        for task in self._drops:
            task.cancel()
        await asyncio.gather(*self._drops, return_exceptions=True)

    def _offer(self, candidate: Candidate) -> None:
        """A base that is not there yet takes its models from the rows when it comes."""
        try:
            self.catalog.base(candidate.row.base).engine.first_use.offer([candidate.adapter])
            self.catalog.publish(candidate.served())
        except KeyError:
            logger.info("%s waits for its base", candidate.row.name)

    def _prepare_now(self, job: Job, folder: JobDir, checkpoints: Sequence[NewCheckpoint]) -> Prepared:
        of_job = folder.read_spec().base
        bundle, digest, gguf, max_rank = None, of_job.digest, of_job.gguf is not None, MAX_RANK
        try:
            base = self.catalog.base(job.base)
            bundle, digest, gguf = base.bundle, base.prepared.digest, base.prepared.gguf is not None
            max_rank = self.engines(job.base).max_lora_rank
        except (KeyError, EngineError):  # it is being prepared: then its engine says at the first load what it takes
            pass
        candidates, refused = [], []
        for checkpoint in checkpoints:
            step = checkpoint.step_number
            source = adapter_checkpoints(folder).get(step)
            if source is None:
                continue
            try:
                candidates.append(
                    keep_adapter(
                        job,
                        bundle,
                        source,
                        self.adapters_dir,
                        base_digest=digest,
                        gguf=gguf,
                        max_rank=max_rank,
                        name=checkpoint.name,
                        owned_by=self.organization,
                        step=step,
                    )
                )
            except (AdapterRejected, OSError) as error:
                if step not in adapter_checkpoints(folder):  # dropped by the trainer meanwhile
                    continue
                if not isinstance(error, AdapterRejected):
                    raise
                refused.append((checkpoint, error.message))
        return Prepared(tuple(candidates), tuple(refused))

    async def _drop(self, row: ModelRow) -> None:
        await asyncio.sleep(self.linger_s)
        try:
            await self.engines(row.base).drop_adapter(row.engine_name)
        except EngineError as error:  # it is not there: nor is the adapter, for it is not desired
            logger.info("%s is not unloaded: %s", row.engine_name, error.message)
        try:
            ever, now = await self.store.read(model_statements.select_digests)
        except TunegateError as error:
            logger.warning("%s: its files stay until the next start: %s", row.name, error.message)
            return
        await asyncio.to_thread(sweep_deleted, self.adapters_dir, ever, now, SWEEP_AFTER_S)

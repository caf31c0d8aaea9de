"""A job is created: its base and files found, its folder built, and then its row, with its first events, committed.

Its one rule: what is acknowledged can run. The folder is whole on the disk before the row is there; a request that fails in
between leaves nothing, or a folder that the next start sweeps.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from gateway.chat.bundle import Bundle
from gateway.chat.conversation import RenderError
from gateway.engines.catalog import Base, Catalog
from gateway.errors import RateLimited, RequestError, TunegateError
from gateway.jobdir import BaseRef, FileRef, Hyperparameters, JobSpec, Launch
from gateway.jobs.folder import TRAINING_FILE, VALIDATION_FILE, build_folder, remove_folder
from gateway.jobs.options import Settled, settle
from gateway.jobs.start import Start, find_start
from gateway.jobs.torchrun import launch_for
from gateway.jobs.tracking import Trackers
from gateway.settings import JobSettings
from gateway.store import files as file_statements
from gateway.store import jobs as statements
from gateway.store.blobs import Blobs
from gateway.store.database import Store
from gateway.store.files import File
from gateway.store.ids import new_id
from gateway.store.jobs import Job

if TYPE_CHECKING:
    from gateway.wire.fine_tuning import CreateJob

PURPOSE = "fine-tune"
FULL_RETRY_AFTER_S = 60


@dataclass(frozen=True)
class Creation:
    """`await create(request)` gives the job's row, committed."""

    store: Store
    blobs: Blobs
    jobs_dir: Path
    settings: JobSettings
    catalog: Catalog
    trackers: Trackers
    launch: Launch

    async def create(
        self, request: CreateJob, idempotency_key: str | None, project_id: str, max_active: int | None = None
    ) -> Job:
        """The new job, or the one that an earlier request with the same key made.

        RequestError names what is wrong with the request; RateLimited when as many jobs wait as may, or the project has
        `max_active` that are not over.
        """
        if idempotency_key is not None:
            earlier = await self.store.read(
                lambda connection: statements.select_by_idempotency_key(connection, project_id, idempotency_key)
            )
            if earlier is not None:
                return _same(earlier, request)
        base = _tunable(self.catalog.base_for_tuning(request.model, project_id))
        inputs = await self.store.read(lambda connection: _find_inputs(connection, request, project_id))
        start = await find_start(self.store, self.catalog, request.model, base, project_id)
        asked, places = request.how.options, request.how.places
        settled = await asyncio.to_thread(settle, asked, places, base, None if start is None else start.lora)
        job = _new_job(request, base, settled, start, idempotency_key, project_id)
        await asyncio.to_thread(self._build, job, base, inputs, settled, start)
        try:
            stored = await self.store.write(lambda connection: self._insert(connection, job, request, max_active))
        except TunegateError:
            await asyncio.to_thread(remove_folder, self.jobs_dir / job.id)
            raise
        if stored.id != job.id:
            await asyncio.to_thread(remove_folder, self.jobs_dir / job.id)
        return stored

    def _build(self, job: Job, base: Base, inputs: dict[str, File], settled: Settled, start: Start | None) -> None:
        refs = {
            place: FileRef(file.id, file.filename, f"sha256:{file.digest}", place) for place, file in inputs.items()
        }
        bundle = bundle_for(base, job.rendering.get("chat_template_kwargs", {}))
        trackers = self.trackers.of(job.integrations)
        spec = JobSpec(
            job_id=job.id,
            model=job.model,
            created_at=job.created_at,
            base=_base_ref(base),
            training_file=refs[TRAINING_FILE],
            validation_file=refs.get(VALIDATION_FILE),
            seed=job.seed,
            threads=self.settings.trainer_threads,
            max_length=settled.max_length,
            template_digest=bundle.digest,
            method=job.method,
            hyperparameters=Hyperparameters(**job.hyperparameters),
            lora=settled.lora,
            options=settled.options,
            turns=job.rendering.get("turns", "all"),
            launch=launch_for(self.launch, job.method),
            starts_from=None if start is None else job.model,
            integrations=job.integrations,
            trackers=trackers,
            predictions=self.trackers.settings.predictions if trackers else 0,
        )
        linked = {place: self.blobs.path(file.digest) for place, file in inputs.items()}
        linked |= {} if start is None else start.files()
        try:
            build_folder(self.jobs_dir / job.id, spec, linked, bundle.to_files())
        except FileNotFoundError as error:  # deleted since its row was read
            if start is not None and error.filename in map(str, start.files().values()):
                raise RequestError(
                    f"'{job.model}' was deleted while the job was being created.", param="model"
                ) from error
            raise RequestError(
                "A file of this job was deleted while the job was being created; upload it again.",
                param="training_file",
            ) from error

    def _insert(self, connection: Connection, job: Job, request: CreateJob, max_active: int | None) -> Job:
        if job.idempotency_key is not None:
            earlier = statements.select_by_idempotency_key(connection, job.project_id, job.idempotency_key)
            if earlier is not None:
                return _same(earlier, request)
        waiting = statements.count_waiting(connection)
        if waiting >= self.settings.queued:
            raise RateLimited(
                f"{waiting} fine-tuning jobs are waiting already, as many as may (`queued` under [jobs] in the "
                "settings). Try again when one is done, or cancel one.",
                retry_after_s=FULL_RETRY_AFTER_S,
            )
        if max_active is not None and (active := statements.count_active(connection, job.project_id)) >= max_active:
            raise too_many_jobs(active, max_active)
        validating = f"Validating training file: {job.training_file}"
        if job.validation_file is not None:
            validating += f" and validation file: {job.validation_file}"
        told = [f"Created fine-tuning job: {job.id}", validating]
        if job.named_base is not None:
            told.append(f"Training goes on from {job.model}")
        statements.insert_job(connection, job, told)
        return job


def _base_ref(base: Base) -> BaseRef:
    served = base.prepared
    gguf, hf = (None if path is None else str(path) for path in (served.gguf, served.hf))
    return BaseRef(base.name, str(served.path), gguf, served.digest, hf)


def too_many_jobs(active: int, max_active: int) -> RateLimited:
    return RateLimited(
        f"{active} jobs of this project are not over yet, and this key may have {max_active} at once (`--jobs` of `tunegate "
        "keys create`; fine-tuning jobs and batches count). Try again when one is done, or cancel one.",
        retry_after_s=FULL_RETRY_AFTER_S,
    )


def bundle_for(base: Base, options: dict[str, Any]) -> Bundle:
    """The base's bundle, with a job's own options over its own. RequestError when the template does not take them. Blocks."""
    if not options:
        return base.bundle
    try:
        return base.bundle.with_options({**base.bundle.options, **options})
    except (ValueError, RenderError) as error:
        raise RequestError(
            f"'tunegate.chat_template_kwargs': {error}", param="tunegate.chat_template_kwargs"
        ) from error


def _find_inputs(connection: Connection, request: CreateJob, project_id: str) -> dict[str, File]:
    """The rows of the input files, by their place in the job's folder."""
    found = {TRAINING_FILE: _find_file(connection, request.training_file, "training_file", project_id)}
    if request.validation_file is not None:
        found[VALIDATION_FILE] = _find_file(connection, request.validation_file, "validation_file", project_id)
    return found


def _find_file(connection: Connection, file_id: str, param: str, project_id: str) -> File:
    file = file_statements.select_file(connection, file_id, now=int(time.time()), project_id=project_id)
    if file is None:
        raise RequestError(
            f"{file_id[:100]} does not exist. Upload it first, with the purpose '{PURPOSE}'.", param=param
        )
    if file.purpose != PURPOSE:
        raise RequestError(
            f"{file_id} was uploaded with the purpose '{file.purpose}'; a {param} needs the purpose '{PURPOSE}'.",
            param=param,
        )
    return file


def _tunable(base: Base) -> Base:
    if not base.engine.takes_adapters:
        raise RequestError(
            f"'{base.name}' is served by an engine that takes no adapters while it runs. Start it with --enable-lora and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, or tune another base.",
            param="model",
        )
    if base.prepared.untrainable is not None:
        raise RequestError(
            f"'{base.name}' is served, but cannot be tuned here: {base.prepared.untrainable}"[:2000], param="model"
        )
    return base


def _new_job(
    request: CreateJob,
    base: Base,
    settled: Settled,
    start: Start | None,
    idempotency_key: str | None,
    project_id: str,
) -> Job:
    return Job(
        id=new_id("ftjob-"),
        created_at=int(time.time()),
        model=request.model,
        base=base.name,
        training_file=request.training_file,
        validation_file=request.validation_file,
        suffix=request.suffix,
        seed=request.seed if request.seed is not None else secrets.randbelow(2**31),
        hyperparameters=dict(request.how.hyperparameters),
        metadata=request.metadata,
        rendering=request.rendering.to_json(),
        method=request.how.method,
        options=dict(request.how.options),
        settled=settled.to_json(),
        integrations=request.integrations,
        named_base=None if start is None else start.named_base,
        idempotency_key=idempotency_key,
        project_id=project_id,
    )


def _same(earlier: Job, request: CreateJob) -> Job:
    """The job of an earlier request with this key; RequestError when it asked for something else."""
    wanted: dict[str, Any] = {
        "model": request.model,
        "training_file": request.training_file,
        "validation_file": request.validation_file,
        "suffix": request.suffix,
        "method": request.how.method,
        "hyperparameters": request.how.hyperparameters,
        "metadata": request.metadata,
        "integrations": request.integrations,
    }
    differing = [name for name, value in wanted.items() if getattr(earlier, name) != value]
    if (request.rendering.to_json(), request.how.options) != (earlier.rendering, earlier.options):
        differing.append("tunegate")
    if request.seed is not None and request.seed != earlier.seed:
        differing.append("seed")
    if differing:
        raise RequestError(
            f"The Idempotency-Key {earlier.idempotency_key!r} was used for job {earlier.id} with another "
            f"{', '.join(differing)}. Use a new key for another job.",
            param=differing[0],
        )
    return earlier

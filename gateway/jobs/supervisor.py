"""The life of every job: validating_files → queued → running → succeeded | failed | cancelled. One object in the gateway.

Its one rule: the database says what is to be done and the job's folder what was done; memory holds neither. Whoever
starts after a kill finds the same work: check the files, claim the next, take over or start the trainer, publish.

In the order of its life: `start` sweeps and takes up, `_main` looks for work when woken and on ticks, one task drives each
job that is validating or running, `stop` lets go of everything and leaves the trainers at work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from gateway.engines.adapters import sweep_adapters
from gateway.engines.catalog import Catalog
from gateway.engines.handle import ProcessHandle, exit_text
from gateway.engines.pool import Pool
from gateway.errors import NotFound, StoreUnavailable
from gateway.jobdir import LOCKED_EXIT_CODE, BaseRef, Check, JobDir, TrainerError
from gateway.jobs.checkpoints import Checkpoints
from gateway.jobs.creation import Creation
from gateway.jobs.folder import last_log_line, sweep_folders, tidy_folder
from gateway.jobs.launcher import Launcher, adopt_check, adopt_trainer
from gateway.jobs.memory import MemoryEvents
from gateway.jobs.names import checkpoint_name
from gateway.jobs.publication import Publication
from gateway.jobs.sharing import Sharing
from gateway.jobs.sweeping import sweep_deleted
from gateway.jobs.torchrun import read_launch
from gateway.jobs.tracking import Trackers
from gateway.jobs.training import END_GRACE_S, POLL_S, JobCancelled, JobFailed, JobPaused, Training
from gateway.settings import Settings
from gateway.store import jobs as statements
from gateway.store import models as model_statements
from gateway.store.blobs import Blobs
from gateway.store.database import Store
from gateway.store.datadir import DataDir
from gateway.store.events import Level, NewEvent
from gateway.store.jobs import Job

if TYPE_CHECKING:
    from gateway.wire.fine_tuning import CreateJob

logger = logging.getLogger("tunegate.jobs")

TICK_S = 1.0
CHECK_TIMEOUT_S = 1800.0
STRAY_WATCH_S = 20.0  # a trainer that was started just before may take its lock this late
RETRY_S = 1.0
MAX_FAULTS = 5  # errors of our own in a row, before the job is given up


@dataclass
class _Drive:
    """A job that is being driven. `stop` is set when it was cancelled, `pause` while it is to be paused."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    pause: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Supervisor:
    """`await start()`, then `create` and `cancel` for the routes; `await stop()` at the end."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        data_dir: DataDir,
        settings: Settings,
        catalog: Catalog,
        engines: Callable[[str], Pool],
        launcher: Launcher | None = None,
        pools: Callable[[], Iterable[Pool]] = tuple,
        memory: MemoryEvents | None = None,
    ) -> None:
        """`engines` gives the engine of a base by its name, or raises EngineUnavailable; `pools` gives all."""
        self._store = store
        self._data_dir = data_dir
        self._settings = settings
        self._launcher = launcher or Launcher(tracking=settings.tracking)
        self._memory = memory or MemoryEvents()
        trackers = Trackers(settings.tracking, data_dir.tracking)
        self._creation = Creation(
            store, blobs, data_dir.jobs, settings.jobs, catalog, trackers, read_launch(settings.jobs)
        )
        self._publication = Publication(store, blobs, data_dir.adapters, settings.organization, catalog, engines)
        self._checkpoints = Checkpoints(store, data_dir.adapters, settings.organization, catalog, engines)
        self._sharing = Sharing(settings.jobs.share, pools)
        self._drives: dict[str, _Drive] = {}
        self._checking = asyncio.Semaphore(1)
        self._wake = asyncio.Event()
        self._main_task: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._preparing: set[asyncio.Task[None]] = set()
        self._next_base: BaseRef | None = None  # that of the last job, as a guess
        self._rested = settings.jobs.standby != "always"  # whether the launcher knows that no job is at work

    # for the routes

    async def create(
        self, request: CreateJob, idempotency_key: str | None, project_id: str, max_active: int | None = None
    ) -> Job:
        """The job, committed; see `Creation.create`."""
        job = await self._creation.create(request, idempotency_key, project_id, max_active)
        self._wake.set()
        self._prepare(self._expect(self._folder(job.id)))
        return job

    def foresee(self) -> None:
        """A job may come: a file to train on is there."""
        if not self._drives:
            self._rested = False
            self._prepare(self._launcher.foresee(self._next_base))

    async def cancel(self, job_id: str, project_id: str) -> Job:
        """The job after it was cancelled, or as it ended before. Its trainer is gone within seconds. Raises NotFound."""

        def cancel_now(connection: Connection) -> tuple[Job, bool]:
            if statements.select_job(connection, job_id, project_id) is None:
                raise unknown_job(job_id)
            cancelled = statements.cancel_job(connection, job_id, "The job was cancelled")
            job = statements.select_job(connection, job_id, project_id)
            assert job is not None
            return job, cancelled

        job, cancelled = await self._store.write(cancel_now)
        if cancelled:
            if (drive := self._drives.get(job_id)) is not None:
                drive.stop.set()
            self._end_later(job_id)
            self._wake.set()
        return job

    async def pause(self, job_id: str, project_id: str) -> Job:
        """The job, which starts no trainer from now on; one that runs ends behind its next step. Raises NotFound."""
        return await self._change(job_id, project_id, statements.pause_job)

    async def resume(self, job_id: str, project_id: str) -> Job:
        """The job, which goes on where it was. Raises NotFound."""
        return await self._change(job_id, project_id, statements.resume_job)

    async def _change(self, job_id: str, project_id: str, change: Callable[[Connection, str], bool]) -> Job:
        def change_now(connection: Connection) -> Job:
            if statements.select_job(connection, job_id, project_id) is None:
                raise unknown_job(job_id)
            change(connection, job_id)
            job = statements.select_job(connection, job_id, project_id)
            assert job is not None
            return job

        job = await self._store.write(change_now)
        if (drive := self._drives.get(job_id)) is not None:
            drive.pause.set() if job.pause == "asked" else drive.pause.clear()
        self._wake.set()
        return job

    @property
    def busy(self) -> bool:
        """Whether a job is being driven: its files checked, its trainer followed, its model published."""
        return bool(self._drives)

    # in the order of its life

    async def start(self) -> None:
        """Sweeps what killed requests left, ends trainers of jobs that are over, and takes up all others."""
        await asyncio.to_thread(sweep_adapters, self._data_dir.adapters)
        ever, now = await self._store.read(model_statements.select_digests)
        if swept := await asyncio.to_thread(sweep_deleted, self._data_dir.adapters, ever, now):
            logger.info("Removed %d adapter(s) whose models were deleted", swept)
        known = await self._store.read(statements.select_statuses)
        if known:  # an empty database beside folders is more likely a lost one than a start with strays: keep them
            for name in await asyncio.to_thread(sweep_folders, self._data_dir.jobs, known.keys()):
                logger.info("Removed the folder of job %s, which was never acknowledged", name)
        for job_id, status in known.items():
            if status not in statements.ACTIVE and await asyncio.to_thread(self._folder(job_id).is_locked):
                self._end_later(job_id)
        self._main_task = asyncio.create_task(self._main(), name="jobs")

    async def stop(self) -> None:
        """Lets go of every job; trainers go on, and the next start takes them over. Those of cancelled jobs end first."""
        cancelled = [drive.task for drive in self._drives.values() if drive.task is not None and drive.stop.is_set()]
        if cancelled:
            await asyncio.wait(cancelled, timeout=END_GRACE_S + 1.0)
        tasks = [self._main_task, *(drive.task for drive in self._drives.values()), *self._ending, *self._preparing]
        running = [task for task in tasks if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._launcher.close()
        await self._checkpoints.stop()

    async def _main(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._take_up()
            except StoreUnavailable as error:
                logger.warning("jobs wait: %s", error.message)
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _take_up(self) -> None:
        """Starts a task for each job that needs one: to be validated, running already, or claimed now."""
        active = await self._store.read(
            lambda connection: statements.select_with_status(connection, *statements.ACTIVE)
        )
        for job in active:
            if job.status != "queued":
                self._drive(job.id)
        if any(job.status == "queued" for job in active):
            while await self._claim() is not None:
                pass
        if self._drives:
            self._rested = False
        elif not self._rested:
            self._rested = True
            self._prepare(self._launcher.rest(self._next_base))

    async def _claim(self) -> Job | None:
        event = NewEvent("Fine-tuning job started")
        parallel = self._settings.jobs.parallel
        job = await self._store.write(lambda connection: statements.claim_job(connection, parallel, event))
        if job is not None:
            self._drive(job.id)
        return job

    def _drive(self, job_id: str) -> None:
        if job_id in self._drives:
            return
        drive = _Drive()
        self._drives[job_id] = drive
        drive.task = asyncio.create_task(self._drive_safely(job_id, drive.stop), name=f"job {job_id}")
        drive.task.add_done_callback(lambda _: self._let_go(job_id))

    def _let_go(self, job_id: str) -> None:
        self._drives.pop(job_id, None)
        self._wake.set()

    async def _drive_safely(self, job_id: str, stop: asyncio.Event) -> None:
        """The boundary of one job: its faults are its own, and what may pass is tried again."""
        faults = 0
        while True:
            try:
                return await self._advance(job_id, stop)
            except JobCancelled:
                return
            except JobFailed as failure:
                error = failure.error
            except StoreUnavailable as unavailable:
                logger.warning("job %s waits: %s", job_id, unavailable.message)
                error = None
            except Exception as fault:  # a fault of ours, or of the machine
                logger.exception("job %s", job_id)
                faults += 1
                error = None
                if faults >= MAX_FAULTS:
                    error = TrainerError("server_error", f"The server could not go on with this job: {fault!r:.300}")
            try:
                if error is not None:
                    await self._fail(job_id, error)
                    return
            except StoreUnavailable as unavailable:
                logger.warning("job %s waits: %s", job_id, unavailable.message)
            await asyncio.sleep(RETRY_S * 2 ** min(faults, 5))

    async def _advance(self, job_id: str, stop: asyncio.Event) -> None:
        """One stage of a job, from what the database says now."""
        job = await self._store.read(lambda connection: statements.select_job(connection, job_id))
        if job is None or job.status not in ("validating_files", "running"):
            return
        folder = self._folder(job.id)
        if not await asyncio.to_thread((folder.path / "job.json").exists):
            raise JobFailed("server_error", f"The job's folder {folder.path} is gone")
        if job.status == "validating_files":
            async with self._checking:
                await self._validate(job, folder, stop)
        else:
            await self._train_and_publish(job, folder, stop)

    # validating_files → queued

    async def _validate(self, job: Job, folder: JobDir, stop: asyncio.Event) -> None:
        check = await self._check(folder, stop)
        if check.error is not None:
            await self._fail(job.id, check.error, [NewEvent(text, level="error") for text in check.problems])
            return
        events = [NewEvent(text) for text in check.notes]
        events += [NewEvent(text, level="warn") for text in check.warnings]
        events.append(NewEvent("Files validated, moving job to queued state"))
        found = asdict(check)
        await self._store.write(lambda connection: statements.queue_job(connection, job.id, found, events))

    async def _check(self, folder: JobDir, stop: asyncio.Event) -> Check:
        """What the trainer finds in the job's files. Raises JobFailed, JobCancelled."""
        deadline = time.monotonic() + CHECK_TIMEOUT_S
        left = await adopt_check(folder)
        if stop.is_set():
            raise JobCancelled
        while (check := await asyncio.to_thread(folder.read_check)) is None:
            process = left or await self._launcher.check(folder)
            left = None
            try:
                while not await process.wait(POLL_S):
                    if stop.is_set() or time.monotonic() > deadline:
                        await process.end(END_GRACE_S)
                        break
            finally:
                process.close()
            if stop.is_set():
                raise JobCancelled
            if time.monotonic() > deadline:
                raise JobFailed(
                    "file_check_failed", f"The files could not be checked within {CHECK_TIMEOUT_S:g} s; split them"
                )
            if process.exit_code == LOCKED_EXIT_CODE:
                await asyncio.sleep(POLL_S)  # a check whose gateway was killed is at work
            elif process.exit_code is not None and await asyncio.to_thread(folder.read_check) is None:
                line = await asyncio.to_thread(last_log_line, folder)
                raise JobFailed(
                    "file_check_failed", f"The check of the files {exit_text(process.exit_code)}: {line or 'no output'}"
                )
        return check

    # running → succeeded | failed

    async def _train_and_publish(self, job: Job, folder: JobDir, stop: asyncio.Event) -> None:
        organization = self._settings.organization
        drive = self._drives[job.id]
        drive.pause.set() if job.pause == "asked" else drive.pause.clear()
        training = Training(
            self._store,
            self._launcher,
            folder,
            job,
            name_checkpoint=lambda step: checkpoint_name(job, organization, step),
            checkpoints=self._checkpoints,
            memory=self._memory,
            hang_timeout_s=self._settings.jobs.hang_timeout_s,
            stop=stop,
            pause=drive.pause,
        )
        try:
            async with self._sharing.training(lambda text, level: self._tell(job, text, level), stop, drive.pause):
                result = await training.run()
        except JobPaused as paused:
            step = paused.step
            await self._store.write(lambda connection: statements.park_job(connection, job.id, step))
            return
        if result.status == "failed":
            error = result.error or TrainerError("trainer_failed", "The trainer failed and gave no reason")
            raise JobFailed(error.code, error.message, error.param)
        await self._publication.publish(job, folder, result, stop)
        await asyncio.to_thread(tidy_folder, folder)

    async def _tell(self, job: Job, message: str, level: Level) -> None:
        event = NewEvent(message, level=level)
        await self._store.write(lambda connection: statements.insert_running_event(connection, job.id, event))

    async def _fail(self, job_id: str, error: TrainerError, told: Sequence[NewEvent] = ()) -> None:
        raw = asdict(error)
        message = f"The job failed: {error.message}"
        if await self._store.write(lambda connection: statements.fail_job(connection, job_id, raw, message, told=told)):
            logger.warning("job %s failed: %s (%s)", job_id, error.message, error.code)
            await asyncio.to_thread(tidy_folder, self._folder(job_id))

    # a trainer that stands by

    def _prepare(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="standby")
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)

    async def _expect(self, folder: JobDir) -> None:
        """A trainer that is getting ready for the job, unless as many as may are at work: it would take their processors."""
        try:
            spec = await asyncio.to_thread(folder.read_spec)
        except OSError:  # an earlier request's job, which is over
            return
        self._next_base = spec.base
        others = self._drives.keys() - {folder.path.name}
        if len(others) < self._settings.jobs.parallel and spec.launch.processes == 1:
            self._rested = False
            await self._launcher.expect(spec.base)

    # trainers of jobs that are over

    def _end_later(self, job_id: str) -> None:
        task = asyncio.create_task(self._end_trainer(self._folder(job_id)), name=f"end {job_id}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end_trainer(self, folder: JobDir) -> None:
        """Ends whoever holds the lock of a job that is over, also one that takes it only now."""
        until = time.monotonic() + STRAY_WATCH_S
        while time.monotonic() < until:
            trainer: ProcessHandle | None = await adopt_trainer(folder)
            if trainer is not None:
                try:
                    await trainer.end(END_GRACE_S)
                finally:
                    trainer.close()
            await asyncio.sleep(POLL_S)
        await asyncio.to_thread(tidy_folder, folder)

    def _folder(self, job_id: str) -> JobDir:
        return JobDir(self._data_dir.jobs / job_id)


def unknown_job(job_id: str) -> NotFound:
    return NotFound(f"Could not find fine tune: {job_id[:100]}", param="fine_tune_id", code="fine_tune_not_found")

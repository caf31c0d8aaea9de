"""One job's training: a trainer started or taken over, its events stored while it works, a new one where it died.

In the order of its life: adopt or start → follow → result, or start again. There is never a second trainer: nothing is
started while the job's lock is held, and should two be started all the same, the lock lets one work and the other
leaves with LOCKED_EXIT_CODE. Runs on the gateway's loop; files are looked at on threads.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import replace

from sqlalchemy import Connection

from gateway.engines.handle import ProcessHandle, exit_text
from gateway.errors import StoreUnavailable
from gateway.jobdir import LOCKED_EXIT_CODE, PAUSED_EXIT_CODE, JobDir, Result, TrainerError, out_of_memory_message
from gateway.jobs.checkpoints import Change, Checkpoints, Prepared
from gateway.jobs.folder import has_attempts, last_log_line, newest_checkpoint
from gateway.jobs.launcher import Launcher, adopt_trainer
from gateway.jobs.memory import MemoryEvents
from gateway.jobs.reading import read_progress
from gateway.store import jobs as statements
from gateway.store.database import Store
from gateway.store.events import NewEvent
from gateway.store.jobs import Job, Progress

logger = logging.getLogger("tunegate.jobs")

POLL_S = 0.1
END_GRACE_S = 5.0
MAX_ATTEMPTS = 3  # trainers that end without a result and without a new checkpoint
MAX_CONTENDED = 20
RETRY_S = 1.0


class JobCancelled(Exception):
    """The job is over in the database: nothing more is done for it."""


class JobPaused(Exception):
    """There is no trainer, as somebody asked; `step` is the newest checkpoint's, 0 where there is none."""

    def __init__(self, step: int) -> None:
        super().__init__(f"paused at step {step}")
        self.step = step


class JobFailed(Exception):
    """The job cannot go on, and why."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = TrainerError(code, message, param)


class Training:
    """`await run()` gives the result. `stop` is set when the job was cancelled: its trainer is ended then.

    `pause` is set while the job is to be paused: its trainer is told so, and ends behind a checkpoint at its next step. One
    that ends otherwise is not started again either.
    """

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        folder: JobDir,
        job: Job,
        *,
        name_checkpoint: Callable[[int], str],
        checkpoints: Checkpoints,
        memory: MemoryEvents,
        hang_timeout_s: float,
        stop: asyncio.Event,
        pause: asyncio.Event | None = None,
    ) -> None:
        self.job = job  # with the cursor as it was last stored
        self._store = store
        self._launcher = launcher
        self._folder = folder
        self._name_checkpoint = name_checkpoint
        self._checkpoints = checkpoints
        self._memory = memory
        self._starved = False  # the last trainer was killed for want of memory
        self._hang_timeout_s = hang_timeout_s
        self._stop = stop
        self._to_pause = pause or asyncio.Event()
        self._was_paused = False  # by us: the next trainer is no new try
        self._contended = 0

    async def run(self) -> Result:
        """What the trainer left. Raises JobCancelled, JobFailed, JobPaused."""
        ended: str | None = None
        while True:
            if await asyncio.to_thread(self._folder.is_locked):
                ended = await self._follow(await adopt_trainer(self._folder))
            self._raise_if_stopped()
            result = await self._read_result()
            if result is not None:
                while await self._store_progress():  # of one that ended while no gateway was there
                    self._raise_if_stopped()
                return result
            if self._to_pause.is_set():
                raise JobPaused(await asyncio.to_thread(newest_checkpoint, self._folder))
            ended = await self._follow(await self._start(ended))

    async def _start(self, ended: str | None) -> ProcessHandle:
        """A trainer; unless it is the first, the job's events say why, and it may be refused."""
        folder, job = self._folder, self.job
        await asyncio.to_thread(folder.pause.unlink, missing_ok=True)
        resumed = self._was_paused or job.pause == "resumed"
        self._was_paused = False
        if ended is None and not resumed and await asyncio.to_thread(has_attempts, folder):
            ended = "The trainer was gone"
        if ended:
            step = await asyncio.to_thread(newest_checkpoint, folder)
            resumes = await self._store.read(lambda connection: statements.count_resumes(connection, job.id, step))
            # The attempt that wrote the checkpoint made progress; the one that began at nothing did not.
            if resumes >= (MAX_ATTEMPTS if step else MAX_ATTEMPTS - 1):
                if self._starved:
                    message = await asyncio.to_thread(self._out_of_memory_message)
                    raise JobFailed("out_of_memory", f"{message} (the system killed the trainer)", "hyperparameters")
                raise JobFailed(
                    "trainer_failed",
                    f"Training ended {MAX_ATTEMPTS} times without getting any further. {_sentence(ended)}",
                )
            where = f"from the checkpoint at step {step}" if step else "from the beginning"
            event = NewEvent(f"{_sentence(ended)} Training goes on {where}.", level="warn")
            if not await self._store.write(
                lambda connection: statements.insert_resume(connection, job.id, step, resumes + 1, event)
            ):
                raise JobCancelled
            await self._pause(min(0.5 * 2**resumes, 10.0))
            self._raise_if_stopped()
        return await self._launcher.train(folder)

    async def _follow(self, trainer: ProcessHandle | None) -> str | None:
        """Stores what the trainer writes until it is gone; why it ended, None when it only found the lock taken.

        None for `trainer` is one whose process is unknown: it is there as long as the lock is held.
        """
        hung = False
        killed_before = await asyncio.to_thread(self._memory.oom_kills)
        asked_to_pause: bool | None = None  # so that a file which an earlier gateway left is gone with the first look
        heard_at = time.monotonic()  # never the wall clock: it may jump
        try:
            while True:
                if self._to_pause.is_set() != asked_to_pause:  # first: a trainer may tell more with each look
                    asked_to_pause = self._to_pause.is_set()
                    await asyncio.to_thread(_ask_to_pause, self._folder, asked_to_pause)
                # In this order: what it wrote before it ended is read after it ended.
                alive = not trainer.exited if trainer else await asyncio.to_thread(self._folder.is_locked)
                if await self._store_progress():
                    heard_at = time.monotonic()
                    continue
                if not alive:
                    break
                if self._stop.is_set() and trainer is not None:
                    await trainer.end(END_GRACE_S)
                elif trainer is not None and time.monotonic() - heard_at > self._hang_timeout_s:
                    hung = True
                    logger.warning("job %s: its trainer is silent and is ended", self.job.id)
                    await trainer.end(END_GRACE_S)
                elif trainer is not None:
                    await trainer.wait(POLL_S)
                else:
                    self._raise_if_stopped()
                    await asyncio.sleep(POLL_S)
                    trainer = await adopt_trainer(self._folder)
        finally:
            if trainer is not None:
                trainer.close()
        if trainer is not None and trainer.exit_code == LOCKED_EXIT_CODE:
            await self._contend()
            return None
        if trainer is not None and trainer.exit_code == PAUSED_EXIT_CODE:
            self._was_paused = True
            return None
        if hung:
            return f"The trainer said nothing for {self._hang_timeout_s:g} s and was ended"
        exit_code = trainer.exit_code if trainer else None
        how = exit_text(exit_code)
        killed = await asyncio.to_thread(self._memory.oom_kills)
        told = killed is not None and killed_before is not None
        self._starved = told and killed != killed_before and exit_code in (None, -signal.SIGKILL)
        if self._starved:
            how = "was killed by the system, which was out of memory"
        elif exit_code == -signal.SIGKILL and not told:
            how += " (by the system, it may be, for want of memory)"
        line = await asyncio.to_thread(last_log_line, self._folder)
        return f"The trainer {how}" + (f": {line}" if line else "")

    async def _contend(self) -> None:
        """Another trainer had the lock. Looks again; gives up when it is never there to be seen."""
        self._contended += 1
        if self._contended > MAX_CONTENDED:
            raise JobFailed("trainer_failed", "Trainers find the job's lock taken, but nobody holds it")
        await self._pause(POLL_S)

    async def _store_progress(self) -> bool:
        """Stores one batch of what was written; whether there was any."""
        progress = await asyncio.to_thread(read_progress, self._folder, self.job, self._name_checkpoint)
        if progress is None:
            return False
        job = self.job
        try:
            prepared = await self._checkpoints.prepare(job, self._folder, progress.checkpoints)
            change = await self._store.write(lambda connection: self._insert(connection, progress, prepared))
        except StoreUnavailable as error:
            logger.warning("job %s: its events wait: %s", job.id, error.message)
            await asyncio.sleep(RETRY_S)
            return True
        if change is not None:
            self.job = replace(job, attempt=progress.attempt, cursor_offset=progress.offset)
            await self._checkpoints.serve(change)
            return True
        current = await self._store.read(lambda connection: statements.select_job(connection, job.id))
        if current is None or current.status != "running":
            self._stop.set()
            return False
        self.job = current
        return True

    def _insert(self, connection: Connection, progress: Progress, prepared: Prepared) -> Change | None:
        """Events, checkpoints and their models at once; None when the job or its cursor is another by now."""
        if not statements.store_progress(connection, self.job, progress):
            return None
        return self._checkpoints.insert(connection, self.job, prepared)

    async def _read_result(self) -> Result | None:
        try:
            return await asyncio.to_thread(self._folder.read_result)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise JobFailed("trainer_failed", f"The trainer's result.json cannot be read: {error}") from error

    def _out_of_memory_message(self) -> str:
        return out_of_memory_message(self._folder.read_spec(), self._folder.read_check())

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            pass

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise JobCancelled


def _ask_to_pause(folder: JobDir, to_pause: bool) -> None:
    folder.pause.touch() if to_pause else folder.pause.unlink(missing_ok=True)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."

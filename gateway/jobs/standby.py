"""A spare trainer: a process that has imported what takes seconds, and waits on a pipe to be given a job.

Its one rule: a spare only ever saves time. One that is not there, not fit for the job, or dies, costs the job nothing but that;
the job's lock says who trains, as without one. The spare ends when its pipe closes, however the gateway ended, unless it is
at work on a job: then it goes on, and the next gateway finds it by the lock or the check's record.

    never    a spare is started with a job, to import while the job's files are checked
    auto     and another when that job is over, for some minutes, where there is memory; also when a training file arrives
    always   there is one from the start, whenever no job trains

The other end is trainer/processes/standby.py. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from gateway.engines.handle import ProcessHandle, exit_text
from gateway.jobdir import LOCKED_EXIT_CODE, BaseRef, JobDir, JobSpec
from gateway.jobs.priority import give_way

logger = logging.getLogger("tunegate.jobs")

Mode = Literal["auto", "always", "never"]

COMMAND = (sys.executable, "-m", "trainer.processes.standby")
TAKEN_WAIT_S = 10.0
END_GRACE_S = 2.0
CHECK_GRACE_S = 1800.0
LINGER_S = 900.0  # how long "auto" keeps a spare that nobody needs
RETRY_S = 60.0
LEAST_MEMORY_BYTES = 4 << 30  # available, for a spare that is kept beside what serves: it takes 0.5 GB


class Spare:
    """The process, its two pipes, and what it has said."""

    def __init__(self, handle: ProcessHandle, commands: int, answers: int, *, relaxed: bool) -> None:
        self.handle = handle
        self.relaxed = relaxed
        self.ready = False
        self.base: BaseRef | None = None  # the last that it was told to load
        self._commands, self._answers = commands, answers
        self._unread = b""
        self._asked: asyncio.Future[str | None] | None = None

    def listen(self) -> None:
        """On the loop's thread, once."""
        self.handle.watch()
        for pipe in (self._commands, self._answers):  # what is long at work may leave its pipe full
            os.set_blocking(pipe, False)
        asyncio.get_running_loop().add_reader(self._answers, self._read)

    @property
    def busy(self) -> bool:
        return self._asked is not None and not self._asked.done()

    def tell(self, command: dict[str, Any]) -> None:
        with contextlib.suppress(
            OSError
        ):  # it is gone, which is noticed by its exit, or takes no more: then it is no use
            os.write(self._commands, json.dumps(command).encode() + b"\n")

    def ask(self, command: dict[str, Any]) -> asyncio.Future[str | None]:
        """Its answer to come; None when it ended without one."""
        self._asked = asyncio.get_running_loop().create_future()
        self.tell(command)
        return self._asked

    def hang_up(self) -> None:
        """Closes the pipes: it ends, unless it is at work."""
        if self._commands >= 0:
            asyncio.get_running_loop().remove_reader(self._answers)
            os.close(self._commands)
            os.close(self._answers)
            self._commands = self._answers = -1
        self._answer(None)

    def _read(self) -> None:
        try:
            said = os.read(self._answers, 4096)
        except BlockingIOError:
            return
        if not said:
            self.hang_up()
            return
        *lines, self._unread = (self._unread + said).split(b"\n")
        for line in lines:
            if line == b"ready":
                self.ready = True
            else:
                self._answer(line.decode(errors="replace"))

    def _answer(self, said: str | None) -> None:
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(said)


class CheckErrand:
    """A check that a spare was given; to its caller it is like a process of its own."""

    def __init__(self, spare: Spare, answer: asyncio.Future[str | None]) -> None:
        self.exit_code: int | None = None
        self._spare, self._answer = spare, answer

    async def wait(self, timeout_s: float) -> bool:
        """Whether the check is done; one that died with its spare looks as if it had found the lock taken: try again."""
        await asyncio.wait([self._answer], timeout=timeout_s)
        if not self._answer.done():
            return False
        said = self._answer.result()
        self.exit_code = LOCKED_EXIT_CODE if said is None else int(said.removeprefix("checked "))
        return True

    async def end(self, grace_s: float) -> bool:
        return await self._spare.handle.end(grace_s)

    def close(self) -> None:
        pass


class Standby:
    """At most one spare. `expect` when a job is near, `rest` when none is at work; `check` and `train` give it work."""

    def __init__(
        self,
        mode: Mode,
        threads: int,
        folder: Path,
        environment: Callable[[], dict[str, str]],
        command: tuple[str, ...] = COMMAND,
    ) -> None:
        """`threads` are what it trains with; `folder` is where it waits and has its log."""
        self._mode, self._threads, self._folder = mode, threads, folder
        self._environment, self._command = environment, command
        self._spare: Spare | None = None
        self._starting = asyncio.Lock()
        self._later: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the spare that is there."""
        return self._spare.handle.pid if self._spare is not None else None

    @property
    def ready(self) -> bool:
        return self._spare is not None and self._spare.ready and not self._spare.handle.exited

    async def expect(self, base: BaseRef | None, *, relaxed: bool = False) -> None:
        """There is a spare, or one on its way, with this base; a `relaxed` one gets ready when the processors are idle."""
        self._cancel_later()
        async with self._starting:
            if self._closed:
                return
            if self._spare is None:
                await self._start(relaxed)
            if base is not None and self._spare is not None and self._spare.base != base:
                self._spare.base = base
                self._spare.tell({"do": "load", "base": asdict(base), "relaxed": relaxed})

    async def foresee(self, base: BaseRef | None) -> None:
        """A job may come: there is a spare, if the mode and the memory have it so."""
        if self._may_wait():
            await self.expect(base)

    async def rest(self, base: BaseRef | None) -> None:
        """No job is at work: keeps a spare for the next one, or none, as the mode and the memory have it."""
        if not self._may_wait():
            self._let_go()
            return
        await self.expect(base, relaxed=True)
        if self._mode == "auto":
            self._cancel_later()
            self._later = asyncio.get_running_loop().call_later(LINGER_S, self._let_go)

    def check(self, folder: JobDir) -> CheckErrand | None:
        """A check that has begun in the spare; None when there is no spare that is ready."""
        spare = self._spare
        if spare is None or not self.ready or spare.busy:
            return None
        return CheckErrand(spare, spare.ask({"do": "check", "job": str(folder.path)}))

    async def train(self, folder: JobDir, spec: JobSpec) -> ProcessHandle | None:
        """The spare, which holds the job's lock now (or found it taken and ends); None when the job needs another trainer."""
        spare = self._spare
        if spare is None or spare.busy:
            return None
        if not self._fits(spec):
            self._let_go()  # its memory, and what it may still be importing, is in the way of the one that is started
            return None
        self._release()
        if spare.relaxed and not spare.ready:  # it would go on getting ready as slowly as it began
            await self._end(spare, 0)
            return None
        answer = spare.ask({"do": "train", "job": str(folder.path)})
        try:
            await asyncio.wait([answer], timeout=TAKEN_WAIT_S)
        finally:
            taken = answer.done() and answer.result() == "taken"
            spare.hang_up()
        if taken or (await spare.handle.wait(0.5) and spare.handle.exit_code == LOCKED_EXIT_CODE):
            return spare.handle
        logger.warning("job %s: the standby did not take it; a trainer is started", spec.job_id)
        await self._end(spare, 0)
        return None

    async def close(self) -> None:
        """Ends the spare; one that checks a job's files goes on with that."""
        self._closed = True
        self._cancel_later()
        spare = self._release()
        if spare is not None and not spare.busy:
            await self._end(spare)
        elif spare is not None:
            spare.hang_up()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _may_wait(self) -> bool:
        return self._mode == "always" or (self._mode == "auto" and _available_bytes() >= LEAST_MEMORY_BYTES)

    def _fits(self, spec: JobSpec) -> bool:
        """Whether the spare is what would be started for this job: its threads, no key, nothing that the imports left out."""
        is_plain = spec.options.quantization == "none" and spec.launch.processes == 1
        return is_plain and spec.threads == self._threads and not spec.needs_keys

    async def _start(self, relaxed: bool) -> None:
        starting = asyncio.ensure_future(asyncio.to_thread(self._spawn, relaxed))
        try:
            spare = await asyncio.shield(starting)
        except asyncio.CancelledError:
            (await starting).handle.close()  # the pipes' other ends close with this process
            raise
        except OSError as error:
            logger.warning("no trainer stands by: %s", error)
            return
        spare.listen()
        self._spare = spare
        self._watching = asyncio.create_task(self._watch(spare), name="standby")

    def _spawn(self, relaxed: bool) -> Spare:
        stdin, commands = os.pipe()
        answers, stdout = os.pipe()
        arguments = ["--threads", str(self._threads), *(["--relaxed"] if relaxed else [])]
        try:
            with (self._folder / "standby.log").open("wb") as log:
                child = subprocess.Popen(
                    [*self._command, *arguments],
                    stdin=stdin,
                    stdout=stdout,
                    stderr=log,
                    cwd=self._folder,
                    env=self._environment(),
                    start_new_session=True,
                )
        except OSError:
            os.close(commands)
            os.close(answers)
            raise
        finally:
            os.close(stdin)
            os.close(stdout)
        give_way(child.pid)
        return Spare(ProcessHandle.of_child(child), commands, answers, relaxed=relaxed)

    async def _watch(self, spare: Spare) -> None:
        """Notices the end of a spare that nobody took."""
        while not await spare.handle.wait(3600):
            pass
        self._spare = None
        spare.hang_up()
        spare.handle.close()
        logger.warning("the trainer that stood by %s; see standby.log", exit_text(spare.handle.exit_code))
        if self._mode == "always":
            self._later = asyncio.get_running_loop().call_later(RETRY_S, lambda: self._soon(self.rest(None)))

    def _release(self) -> Spare | None:
        """The spare, which is not ours from here on."""
        spare, self._spare = self._spare, None
        if spare is not None and self._watching is not None:
            self._watching.cancel()
        return spare

    def _let_go(self) -> None:
        if (spare := self._release()) is not None:
            self._soon(self._end(spare, CHECK_GRACE_S if spare.busy else END_GRACE_S))

    async def _end(self, spare: Spare, grace_s: float = END_GRACE_S) -> None:
        spare.hang_up()
        if not await spare.handle.wait(grace_s):
            await spare.handle.kill()
        spare.handle.close()

    def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _cancel_later(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))

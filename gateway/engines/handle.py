"""A process held by a pidfd: what `spawn` hands to `process`.

Its one rule: a pid is never trusted alone. A handle is opened for a pid *and* a start time, and every signal goes through
the pidfd, so it cannot reach a stranger who was given the pid later. Runs in the gateway; Linux only (pidfd, /proc).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess

from gateway.jobdir import process_start_time

KILL_WAIT_S = 10.0  # a process in an uninterruptible sleep outlives SIGKILL; longer than this nobody waits for it


class ProcessHandle:
    """One live process, ours by birth (`child`) or by adoption. `watch()` first, then wait, then `close()`."""

    def __init__(self, pid: int, start_time: int, fd: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self.start_time = start_time
        self.exit_code: int | None = None  # known of children only; negative is a signal's number
        self._fd = fd
        self._child = child
        self._exited = asyncio.Event()
        self._watching = False

    @classmethod
    def open(cls, pid: int, start_time: int) -> ProcessHandle | None:
        """The process that has this pid and this start time; None when it is gone, even if the pid lives on."""
        try:
            fd = os.pidfd_open(pid)
        except (ProcessLookupError, OverflowError, ValueError, OSError):
            return None
        # In this order: had the process died in between, the pid's next owner would show another start time.
        if process_start_time(pid) != start_time:
            os.close(fd)
            return None
        return cls(pid, start_time, fd)

    @classmethod
    def of_child(cls, child: subprocess.Popen[bytes]) -> ProcessHandle:
        """A child of this process. Its pid cannot be reused before we reap it, so there is nothing to compare."""
        return cls(child.pid, process_start_time(child.pid) or 0, os.pidfd_open(child.pid), child)

    def watch(self) -> None:
        """Starts noticing the exit. On the loop's thread, once."""
        self._watching = True
        asyncio.get_running_loop().add_reader(self._fd, self._on_exit)

    @property
    def exited(self) -> bool:
        return self._exited.is_set()

    async def wait(self, timeout_s: float) -> bool:
        """Whether the process exited within the time; returns at once when it does."""
        if self._exited.is_set():
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._exited.wait()
        except TimeoutError:
            return False
        return True

    async def end(self, grace_s: float) -> bool:
        """SIGTERM, then after the grace SIGKILL to its group. Whether it is gone; waits at most grace + 10 s."""
        self._send(signal.SIGTERM)
        if grace_s > 0 and await self.wait(grace_s):
            return True
        return await self.kill()

    async def kill(self) -> bool:
        """SIGKILL to the process and its group. Whether it is gone; waits at most 10 s."""
        if not self.exited:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)  # it leads its group (spawned with a session of its own)
            self._send(signal.SIGKILL)
        return await self.wait(KILL_WAIT_S)

    def close(self) -> None:
        """Lets go without ending it."""
        if self._fd >= 0:
            self._unwatch()
            os.close(self._fd)
            self._fd = -1
        if self._child is not None and self._child.returncode is None:
            self._child.returncode = 0  # released on purpose: Popen must not complain that it still runs
            self._child = None

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def _on_exit(self) -> None:
        self._unwatch()
        if self._child is not None:
            # Not reaped yet, so the pid, and with it the group's id, is still ours: take its children along.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.exit_code = self._child.wait()
        self._exited.set()

    def _unwatch(self) -> None:
        if self._watching:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._watching = False


def exit_text(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is None:
        return "ended"  # an adopted process: only its parent learns the code
    if exit_code < 0:
        try:
            return f"was killed by {signal.Signals(-exit_code).name}"
        except ValueError:
            return f"was killed by signal {-exit_code}"
    return f"exited with code {exit_code}"

"""The state machine of a worker process, against a real process that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from gateway.engines.handle import ProcessHandle
from gateway.engines.kinds import llama_engine
from gateway.errors import EngineUnavailable
from gateway.jobdir import process_start_time, read_json, write_json
from tests.engines.parts import QUICK, is_alive, kill_gateway_when, until

pytestmark = pytest.mark.anyio
FAKE = (sys.executable, "-m", "tests.engines.fake_worker")


def base(tmp_path: Path) -> PreparedBase:
    return PreparedBase(
        "tiny", tmp_path, tmp_path / "model.gguf", "sha256:base", "LlamaForCausalLM", 64, "vicuna_v1.1", (2,)
    )


@asynccontextmanager
async def running(tmp_path: Path, misdeed: str = "none", **options: Any) -> AsyncIterator[Engine]:
    engine = llama_engine(
        base(tmp_path), tmp_path / "engine", command=(*FAKE, misdeed), **{"timings": QUICK, **options}
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def test_a_worker_becomes_ready_and_is_gone_after_stop(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await engine.wait_ready(30)
        pid = engine.pid
        assert pid is not None and is_alive(pid) and engine.state == "ready"
        assert engine.endpoint.key == (tmp_path / "engine/key").read_text()
        assert stat.S_IMODE((tmp_path / "engine/key").stat().st_mode) == 0o600
        assert os.getsid(pid) == pid
    assert not is_alive(pid) and engine.state == "stopped"
    with pytest.raises(EngineUnavailable, match="not ready"):
        _ = engine.endpoint


async def test_a_killed_worker_comes_back_with_another_key(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await engine.wait_ready(30)
        pid, key = engine.pid, engine.endpoint.key
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not engine.ready, 2)
        assert "SIGKILL" in (engine.reason or "")
        await engine.wait_ready(30)
        assert engine.pid != pid and engine.endpoint.key != key and engine.reason is None


async def test_a_stopped_worker_is_taken_for_hung_killed_and_replaced(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await engine.wait_ready(30)
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: not engine.ready, 10)
        assert "hung" in (engine.reason or "")
        await engine.wait_ready(30)
        assert engine.pid != pid and not is_alive(pid)


async def test_a_worker_that_crashes_at_its_start_is_tried_again_and_its_last_words_are_shown(tmp_path: Path) -> None:
    async with running(tmp_path, "crash") as engine:
        await until(lambda: engine.restarts >= 4)
        with pytest.raises(EngineUnavailable, match=r"exited with code 3 .* in a row.*no such model, says llama\.cpp"):
            await engine.wait_ready(0.01)


async def test_a_worker_that_is_never_ready_is_replaced_after_the_deadline(tmp_path: Path) -> None:
    async with running(tmp_path, "never-ready", timings=replace(QUICK, start_timeout_s=0.5)) as engine:
        await until(lambda: engine.restarts == 1)
        assert "was not ready after 0.5 s" in (engine.reason or "")
        await until(lambda: engine.state == "starting")


async def test_a_worker_of_another_base_is_never_ready(tmp_path: Path) -> None:
    async with running(tmp_path, "wrong-digest") as engine:
        await until(lambda: engine.restarts >= 2)
        assert "sha256:other; it should be sha256:base" in (engine.reason or "")


async def test_a_worker_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    async with running(tmp_path, "ignores-sigterm", timings=replace(QUICK, stop_grace_s=0.2)) as engine:
        await engine.wait_ready(30)
        pid = engine.pid
    assert pid is not None and not is_alive(pid)


async def test_stop_while_the_worker_is_being_started_leaves_no_process(tmp_path: Path) -> None:
    for delay_s in (0, 0.001, 0.01, 0.1):
        async with running(tmp_path, "sleep:30"):
            await asyncio.sleep(delay_s)
        record = tmp_path / "engine/spawn.json"
        assert not record.exists() or not is_alive(read_json(record)["pid"])


async def test_a_worker_is_kept_on_request_and_taken_over_by_the_next_start(tmp_path: Path) -> None:
    async with running(tmp_path) as first:
        await first.wait_ready(30)
        pid, key = first.pid, first.endpoint.key
        await first.stop(keep_process=True)
    assert pid is not None and is_alive(pid)
    async with running(tmp_path) as second:
        await second.wait_ready(30)
        assert second.pid == pid and second.endpoint.key == key and second.restarts == 0
    assert not is_alive(pid)


async def test_a_worker_of_a_killed_gateway_is_taken_over_and_its_death_noticed(tmp_path: Path) -> None:
    await kill_gateway_when("ready", base(tmp_path), tmp_path / "engine", (*FAKE, "none"))
    pid = read_json(tmp_path / "engine/spawn.json")["pid"]
    async with running(tmp_path) as engine:
        await engine.wait_ready(30)
        assert engine.pid == pid and engine.restarts == 0
        os.kill(pid, signal.SIGKILL)
        await until(lambda: engine.restarts == 1, 2)
        await engine.wait_ready(30)
        assert engine.pid != pid


async def test_a_worker_that_was_not_ready_when_its_gateway_was_killed_is_taken_over(tmp_path: Path) -> None:
    await kill_gateway_when("spawned", base(tmp_path), tmp_path / "engine", (*FAKE, "sleep:2"))
    pid = read_json(tmp_path / "engine/spawn.json")["pid"]
    assert not (tmp_path / "engine/ready.json").exists()
    async with running(tmp_path, "sleep:2") as engine:
        await engine.wait_ready(30)
        assert engine.pid == pid and engine.restarts == 0


async def test_a_worker_that_was_killed_out_of_the_record_is_found_by_its_command_line_and_ended(
    tmp_path: Path,
) -> None:
    await kill_gateway_when("spawned", base(tmp_path), tmp_path / "engine", (*FAKE, "never-ready"))
    pid = read_json(tmp_path / "engine/spawn.json")["pid"]
    (tmp_path / "engine/spawn.json").unlink()  # as if the kill had come between the fork and the record
    async with running(tmp_path) as engine:
        await engine.wait_ready(30)
        assert engine.pid != pid and not is_alive(pid)


async def test_a_worker_with_other_settings_is_ended_and_replaced(tmp_path: Path) -> None:
    async with running(tmp_path) as first:
        await first.wait_ready(30)
        pid = first.pid
        await first.stop(keep_process=True)
    assert pid is not None
    async with running(tmp_path, max_seqs=3) as second:
        await second.wait_ready(30)
        assert second.pid != pid and not is_alive(pid)


async def test_a_worker_whose_key_was_lost_is_replaced(tmp_path: Path) -> None:
    async with running(tmp_path) as first:
        await first.wait_ready(30)
        pid = first.pid
        await first.stop(keep_process=True)
    assert pid is not None
    (tmp_path / "engine/key").write_text("another")
    async with running(tmp_path) as second:
        await second.wait_ready(30)
        assert second.pid != pid and not is_alive(pid)


@pytest.mark.parametrize("also", [(), ("start_time",)])
async def test_a_stranger_who_has_the_pid_now_is_not_touched(tmp_path: Path, also: tuple[str, ...]) -> None:
    async with running(tmp_path) as first:
        await first.wait_ready(30)
    stranger = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        of_the_stranger = {"pid": stranger.pid} | {name: process_start_time(stranger.pid) for name in also}
        for name in ("spawn.json", "ready.json"):
            path = tmp_path / "engine" / name
            write_json(path, read_json(path) | of_the_stranger)
        async with running(tmp_path) as engine:
            await engine.wait_ready(30)
            assert engine.pid != stranger.pid
        assert stranger.returncode is None and is_alive(stranger.pid)
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_worker_whose_folder_was_moved_is_ended_and_replaced(tmp_path: Path) -> None:
    async with running(tmp_path) as first:
        await first.wait_ready(30)
        pid = first.pid
        await first.stop(keep_process=True)
    assert pid is not None
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "engine").rename(tmp_path / "elsewhere/engine")
    async with running(tmp_path / "elsewhere") as second:
        await second.wait_ready(30)
        assert second.pid != pid and not is_alive(pid)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"pid": true, "start_time": 1}', b'{"pid": -1, "start_time": 1}', b"\xff", b'{"pid":1}'],
)
async def test_records_that_make_no_sense_are_taken_as_absent(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "engine").mkdir()
    for name in ("spawn.json", "ready.json"):
        (tmp_path / "engine" / name).write_bytes(content)
    async with running(tmp_path) as engine:
        await engine.wait_ready(30)
        assert json.loads((tmp_path / "engine/spawn.json").read_bytes())["pid"] == engine.pid


async def test_a_log_that_grew_long_is_put_aside_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/worker.log").write_bytes(b"x" * (5 << 20))
    async with running(tmp_path) as engine:
        await engine.wait_ready(30)
    assert (tmp_path / "engine/worker.log").stat().st_size < 1 << 20
    assert (tmp_path / "engine/worker.log.1").stat().st_size == 5 << 20


async def test_a_folder_that_cannot_be_written_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "engine").write_text("a file where the folder should be")
    async with running(tmp_path) as engine:
        await until(lambda: engine.restarts >= 2)
        assert "engine" in (engine.reason or "")
        (tmp_path / "engine").unlink()
        await engine.wait_ready(30)


async def test_a_handle_is_only_given_for_the_right_start_time() -> None:
    pid = os.getpid()
    start_time = process_start_time(pid)
    assert start_time is not None
    assert ProcessHandle.open(pid, start_time + 1) is None
    assert ProcessHandle.open(2**22 + 1, start_time) is None
    handle = ProcessHandle.open(pid, start_time)
    assert handle is not None
    handle.close()


async def test_restarts_leave_no_descriptor_and_no_child_behind(tmp_path: Path) -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    async with running(tmp_path) as engine:
        await engine.wait_ready(30)
        descriptors = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            pid = engine.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not engine.ready, 5)
            await engine.wait_ready(30)
        assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert children() <= before


async def test_the_key_stands_in_no_command_line_and_in_no_record(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await engine.wait_ready(30)
        shown = command_line(engine.pid) + (tmp_path / "engine/spawn.json").read_text()
        assert engine.endpoint.key not in shown


def command_line(pid: int | None) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()

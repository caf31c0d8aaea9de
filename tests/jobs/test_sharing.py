"""Nobody sleeps for a job that is over, whatever went wrong. The engine is a fake: a real one that sleeps needs vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from gateway.engines.kinds import llama_engine
from gateway.errors import StoreUnavailable
from gateway.jobs.sharing import Sharing
from tests.engines.parts import QUICK, pool_of
from tests.jobs.parts import until

pytestmark = pytest.mark.anyio


def sleeping_engine(tmp_path: Path) -> Engine:
    (tmp_path / "model.gguf").touch()
    base = PreparedBase("a", tmp_path, tmp_path / "model.gguf", "sha256:base", "LlamaForCausalLM", 64, "", (2,))
    command = (sys.executable, "-m", "tests.engines.fake_worker", "sleeps")
    return llama_engine(base, tmp_path / "engine", command=command, timings=QUICK)


async def test_an_engine_is_woken_though_no_event_can_be_written(tmp_path: Path) -> None:
    engine = sleeping_engine(tmp_path)
    sharing = Sharing("sleep", lambda: [pool_of(engine, name="a")])
    seen: list[str] = []

    async def tell(message: str, level: str) -> None:
        seen.append(engine.state)
        raise StoreUnavailable("the disk is full")

    await engine.start()
    try:
        await engine.wait_ready(60)
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                async with sharing.training(tell, asyncio.Event()):
                    raise AssertionError("it does not train")
            assert engine.state == "ready"
        assert seen == ["asleep", "ready"] * 2
    finally:
        await engine.stop()


async def test_an_engine_that_gets_ready_while_a_job_trains_sleeps_too(tmp_path: Path) -> None:
    engine = sleeping_engine(tmp_path)
    told: list[str] = []

    async def tell(message: str, level: str) -> None:
        told.append(message)

    def sleeps() -> list[str]:
        return [text for text in told if "sleeps while the job trains" in text]

    await engine.start()
    try:
        async with Sharing("sleep", lambda: [pool_of(engine, name="a")]).training(tell, asyncio.Event()):
            await until(lambda: len(sleeps()) == 1)
            before = engine.pid
            assert before is not None and engine.state == "asleep"
            os.kill(before, signal.SIGKILL)
            await until(lambda: len(sleeps()) == 2)
            assert engine.state == "asleep" and engine.pid != before
        assert engine.state == "ready"
        assert sum("is awake" in text for text in told) == 1
    finally:
        await engine.stop()

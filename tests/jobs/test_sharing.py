"""Nobody sleeps for a job that is over, whatever went wrong. The engine is a fake: a real one that sleeps needs vLLM."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.kinds import llama_engine
from gateway.errors import StoreUnavailable
from gateway.jobs.sharing import Sharing
from tests.engines.parts import QUICK, pool_of

pytestmark = pytest.mark.anyio


async def test_an_engine_is_woken_though_no_event_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    base = PreparedBase("a", tmp_path, tmp_path / "model.gguf", "sha256:base", "LlamaForCausalLM", 64, "", (2,))
    command = (sys.executable, "-m", "tests.engines.fake_worker", "sleeps")
    engine = llama_engine(base, tmp_path / "engine", command=command, timings=QUICK)
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

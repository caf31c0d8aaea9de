"""What kills the worker: requests in flight get an error, adapters come back, and one that kills it twice stays away."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.engines.adapters import Adapter, AdapterRejected
from gateway.engines.client import Deadlines, EngineClient
from gateway.engines.engine import Engine, Standing
from gateway.engines.kinds import llama_engine
from gateway.engines.pool import Pool
from gateway.engines.replica import Replica
from gateway.errors import EngineError
from tests.engines.crashing_worker import POISON
from tests.engines.parts import ANYTHING_GOES, QUICK, as_adapter, tiny_base, until, write_adapter

pytestmark = pytest.mark.anyio
CRASHING = (sys.executable, "-m", "tests.engines.crashing_worker")
START_S = 120


@pytest.fixture
async def desired(tmp_path: Path) -> list[Adapter]:
    """One that the worker dies of, between two that are good; their witnesses say nothing."""
    folders = [write_adapter(tmp_path / name, tiny_base(tmp_path / "base").digest) for name in ("a", "bad", "z")]
    (folders[1] / "crash").touch()
    return [as_adapter(folder, folder.name) for folder in folders]


def engine_of(tmp_path: Path) -> Engine:
    base, timings = tiny_base(tmp_path / "base"), replace(QUICK, backoff_max_s=0.1)
    folder = tmp_path / "engine"
    return llama_engine(
        base, folder, max_seqs=2, threads=1, command=CRASHING, timings=timings, tolerances=ANYTHING_GOES
    )


async def test_an_adapter_that_kills_the_worker_is_tried_twice_and_the_others_come_up(
    tmp_path: Path, desired: list[Adapter]
) -> None:
    engine = engine_of(tmp_path)
    engine.set_desired(desired)
    await engine.start()
    await engine.wait_ready(START_S)
    standings = [engine.adapters[adapter.engine_name].standing for adapter in desired]
    assert standings == [Standing.SERVED, Standing.UNSERVABLE, Standing.SERVED]
    error = engine.adapters[desired[1].engine_name].error
    assert error is not None and "died 2 times" in error.message and desired[1].engine_name in error.message
    assert engine.restarts == 2
    await engine.stop()

    heir = engine_of(tmp_path)  # of the next gateway
    heir.set_desired(desired)
    await heir.start()
    try:
        await heir.wait_ready(START_S)
        assert heir.restarts == 0 and heir.serves(desired[0].engine_name) and not heir.serves(desired[1].engine_name)
        with pytest.raises(AdapterRejected, match="died 2 times"):
            await heir.ensure_adapter(desired[1])
        assert heir.restarts == 0
        (desired[1].path / "crash").unlink()  # what is in another folder under another name is another adapter
        other = as_adapter(shutil.copytree(desired[1].path, tmp_path / "other"), "other")
        await heir.ensure_adapter(other)
        assert heir.serves(other.engine_name)
    finally:
        await heir.stop()


async def test_a_crash_in_the_midst_of_replies_is_an_error_of_each_and_the_adapters_come_back(
    tmp_path: Path, desired: list[Adapter]
) -> None:
    engine = engine_of(tmp_path)
    engine.set_desired([desired[0]])
    pool = Pool(engine.base.name, [Replica("the one", engine)])
    client = EngineClient(pool, Deadlines(first_token_s=60, between_tokens_s=60))
    fields = {"max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
    alive = {"model": desired[0].engine_name, "prompt": [1, 5, 6], "logit_bias": {str(POISON): -100}, **fields}
    await engine.start()
    try:
        await engine.wait_ready(START_S)
        stream = await client.stream(alive)
        assert await stream.frames()
        with pytest.raises(EngineError):
            await (await client.stream(alive | {"prompt": [1, POISON]})).frames()
        with pytest.raises(EngineError):
            while await stream.frames():
                pass
        await until(lambda: engine.restarts == 1)
        await engine.wait_ready(START_S)
        assert engine.serves(desired[0].engine_name)
        again = await client.stream(alive)
        assert await again.frames()
        again.cancel()
    finally:
        client.close()
        await engine.stop()

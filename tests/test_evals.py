"""The runner of evals alone, over a real store that cannot serve for a moment; and what such work waits for."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest

from gateway.access import Caller
from gateway.engines.catalog import Catalog
from gateway.engines.client import Deadlines
from gateway.errors import EngineUnavailable, RateLimited
from gateway.evals.runner import WAITING, EvalRunner
from gateway.grading.graders import Graders
from gateway.inference import Inference
from gateway.patience import ask_patiently
from gateway.store import evals as statements
from gateway.store.blobs import Blobs
from gateway.store.database import Store
from gateway.store.evals import Eval, EvalRun

pytestmark = pytest.mark.anyio

N_LINES = 200
CHECK = {
    "type": "string_check",
    "name": "same",
    "input": "{{ sample.output_text }}",
    "operation": "eq",
    "reference": "x",
}


async def test_a_store_that_cannot_serve_for_a_moment_fails_no_run_and_loses_no_line(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "tunegate.db", busy_timeout_s=0.05)
    inference = Inference(Catalog(Deadlines(1, 1)), 8)
    started = asyncio.Event()
    runner = EvalRunner(store, Blobs(tmp_path / "blobs"), inference, Graders(inference), started)
    content = [{"item": {}, "sample": {"output_text": "x"}} for _ in range(N_LINES)]
    source = {"type": "jsonl", "source": {"type": "file_content", "content": content}}
    made = Eval("eval_1", "default", 1, 1, "e", {}, [CHECK], None)
    run = EvalRun("run_1", "default", 1, "eval_1", "r", "", source, None, "queued")
    await store.write(lambda c: statements.insert_eval(c, made))
    await store.write(lambda c: statements.insert_run(c, run))
    intruder = sqlite3.connect(tmp_path / "tunegate.db", isolation_level=None)
    runner.begin(run, Caller())
    await asyncio.sleep(0.1)
    waiting = await store.read(statements.select_open_runs)
    assert [one.status for one in waiting] == ["queued"], "the models may not be there yet"
    started.set()
    while not await store.read(lambda c: statements.select_numbers(c, "run_1")):
        pass
    intruder.execute("BEGIN IMMEDIATE")
    await asyncio.sleep(0.3)
    intruder.execute("ROLLBACK")
    intruder.close()
    async with asyncio.timeout(30):
        while await store.read(statements.select_open_runs):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)
    found = await store.read(lambda c: statements.select_run(c, "eval_1", "run_1", "default"))
    assert found is not None and found.status == "completed" and found.summary is not None
    assert found.summary["result_counts"]["passed"] == N_LINES
    await runner.stop()
    store.close()


async def test_no_more_runs_are_taken_than_may_wait(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "tunegate.db")
    inference = Inference(Catalog(Deadlines(1, 1)), 8)
    runner = EvalRunner(store, Blobs(tmp_path / "blobs"), inference, Graders(inference), asyncio.Event())
    for number in range(WAITING):
        runner.require_place()
        runner.begin(EvalRun(f"run_{number}", "default", 1, "eval_1", "r", "", {}, None, "queued"), Caller())
    with pytest.raises(RateLimited):
        runner.require_place()
    await runner.stop()
    store.close()


async def test_what_passes_is_waited_for_and_what_does_not_is_not() -> None:
    answers = [EngineUnavailable("on its way", retry_after_s=1), RateLimited("busy"), "here"]

    async def ask() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    began = time.monotonic()
    assert await ask_patiently(ask) == "here" and time.monotonic() - began >= 2
    answers[:] = [RateLimited("larger than a minute's tokens", code="request_too_large"), "never asked"]
    with pytest.raises(RateLimited):
        await ask_patiently(ask)
    answers[:] = [EngineUnavailable("on its way"), "never asked"]
    with pytest.raises(EngineUnavailable):
        await ask_patiently(ask, patience_s=0)

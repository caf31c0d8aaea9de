"""`/v1/fine_tuning/jobs` as the unmodified SDK walks it, in strict mode, over real parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from gateway.errors import TunegateError
from gateway.routes.fine_tuning import routes
from gateway.settings import Settings
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import Workshop, open_workshop

pytestmark = pytest.mark.anyio


async def tell(_: Request, error: Exception) -> Response:
    assert isinstance(error, TunegateError)
    return JSONResponse(error.body(), error.status)


@asynccontextmanager
async def front_door(shop: Workshop) -> AsyncIterator[AsyncOpenAI]:
    app = Starlette(routes=routes, exception_handlers={TunegateError: tell})
    app.state.settings, app.state.store, app.state.supervisor = Settings(), shop.store, shop.supervisor
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
        yield AsyncOpenAI(
            base_url="http://testserver/v1",
            api_key="unused",
            max_retries=0,
            http_client=http,
            _strict_response_validation=True,
        )


async def refused(call: Any) -> dict[str, Any]:
    """The status and the four fields of the error that a call is answered with."""
    with pytest.raises(openai.APIStatusError) as error:
        await call
    body = error.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["message"]
    return {"status": error.value.status_code, **body}


async def test_the_sdk_walks_a_jobs_whole_life(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    plan = Plan(adapter=str(adapter), checkpoint_adapters={"3": str(adapter)})
    async with open_workshop(tmp_path, base, engine, plan) as shop, front_door(shop) as client:
        jobs = client.fine_tuning.jobs
        job = await jobs.create(model="tiny", training_file=await shop.upload(), metadata={"team": "a"}, seed=3)
        assert (job.status, job.object, job.seed, job.metadata) == (
            "validating_files",
            "fine_tuning.job",
            3,
            {"team": "a"},
        )
        await shop.wait_for(job.id, "succeeded")
        job = await jobs.retrieve(job.id)
        assert job.status == "succeeded" and job.fine_tuned_model and len(job.result_files) == 1
        assert job.hyperparameters.n_epochs == 2 and job.trained_tokens == 200
        events = [event async for event in jobs.list_events(job.id, limit=4)]
        assert len(events) == 14 and events[0].message == "The job has successfully completed"
        assert len({event.id for event in events}) == 14
        checkpoints = [c async for c in jobs.checkpoints.list(job.id, limit=1)]
        assert [c.step_number for c in checkpoints] == [6, 3] and checkpoints[0].metrics.train_loss is not None
        error = await refused(jobs.cancel(job.id))
        assert error["status"] == 400 and "succeeded" in error["message"]


async def test_lists_are_newest_first_by_pages_and_filtered_by_metadata(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    plan = Plan(gate=str(tmp_path / "never"))
    async with open_workshop(tmp_path, base, engine, plan) as shop, front_door(shop) as client:
        odd = 'quote " and é'
        metadata: list[dict[str, str] | None] = [None, {"team": "a", "n": "1"}, {"team": "b"}, {odd: "x"}, None]
        made = [(await shop.create(metadata=m)).id for m in metadata]
        jobs = client.fine_tuning.jobs
        assert [job.id async for job in jobs.list(limit=2)] == made[::-1]
        first = await jobs.list(limit=2)
        assert first.has_more and [job.id for job in first.data] == made[:2:-1]
        assert [job.id async for job in jobs.list(metadata={"team": "a"})] == [made[1]]
        assert [job.id async for job in jobs.list(metadata={"team": "a", "n": "2"})] == []
        assert [job.id async for job in jobs.list(metadata={odd: "x"})] == [made[3]]
        assert [job.id async for job in jobs.list(extra_query={"metadata": "null"})] == [made[4], made[0]]
        for job_id in made:
            cancelled = await jobs.cancel(job_id)
            assert cancelled.status == "cancelled" and (await jobs.cancel(job_id)).id == job_id
    assert not any(shop.folder_of(job_id).is_locked() for job_id in made), "stopping waits for what it is to end"


async def test_bad_requests_get_the_right_error(tmp_path: Path, base: PreparedBase, engine: Engine) -> None:
    async with open_workshop(tmp_path, base, engine) as shop, front_door(shop) as client:
        jobs, file_id = client.fine_tuning.jobs, await shop.upload()
        unknown = await refused(jobs.create(model="no-such-model", training_file=file_id))
        assert (unknown["status"], unknown["code"], unknown["param"]) == (404, "model_not_found", "model")
        absent = await refused(jobs.create(model="tiny", training_file="file-x"))
        assert (absent["status"], absent["param"]) == (400, "training_file") and "file-x does not exist" in absent[
            "message"
        ]
        absent = await refused(jobs.create(model="tiny", training_file=file_id, validation_file="file-y"))
        assert absent["param"] == "validation_file"
        batch = await shop.upload(purpose="batch")
        wrong = await refused(jobs.create(model="tiny", training_file=batch))
        assert wrong["param"] == "training_file" and "'batch'" in wrong["message"]
        unknown = await refused(jobs.create(model="tiny", training_file=file_id, extra_body={"lora_rank": 4}))
        assert (unknown["status"], unknown["param"]) == (400, "lora_rank")
        for call in (jobs.retrieve, jobs.cancel, jobs.list_events, jobs.checkpoints.list):
            assert (await refused(call("ftjob-none")))["status"] == 404
        for limit in (101, -1):
            assert (await refused(jobs.list(limit=limit)))["param"] == "limit"
        assert list(shop.data_dir.jobs.iterdir()) == [], "what was refused leaves no folder"


async def test_one_idempotency_key_makes_one_job(tmp_path: Path, base: PreparedBase, engine: Engine) -> None:
    plan = Plan(gate=str(tmp_path / "never"))
    async with open_workshop(tmp_path, base, engine, plan) as shop, front_door(shop) as client:
        jobs, file_id = client.fine_tuning.jobs, await shop.upload()
        header = {"Idempotency-Key": "one"}
        answers = await asyncio.gather(
            *(jobs.create(model="tiny", training_file=file_id, extra_headers=header) for _ in range(5))
        )
        assert len({job.id for job in answers}) == 1
        again = await jobs.create(model="tiny", training_file=file_id, extra_headers=header)
        assert again.id == answers[0].id
        other = await refused(jobs.create(model="tiny", training_file=file_id, suffix="b", extra_headers=header))
        assert (other["status"], other["param"]) == (400, "suffix")
        assert len([job async for job in jobs.list()]) == 1
        assert [path.name for path in shop.data_dir.jobs.iterdir()] == [again.id]
        await jobs.cancel(again.id)


async def test_as_many_jobs_wait_as_the_settings_say(tmp_path: Path, base: PreparedBase, engine: Engine) -> None:
    plan = Plan(gate=str(tmp_path / "never"))
    async with open_workshop(tmp_path, base, engine, plan, queued=2) as shop, front_door(shop) as client:
        jobs, file_id = client.fine_tuning.jobs, await shop.upload()
        made = [(await jobs.create(model="tiny", training_file=file_id)).id]
        await shop.wait_for(made[0], "running")
        made += [(await jobs.create(model="tiny", training_file=file_id)).id for _ in range(2)]
        full = await refused(jobs.create(model="tiny", training_file=file_id))
        assert (full["status"], full["code"]) == (429, "rate_limit_exceeded") and "2 fine-tuning jobs" in full[
            "message"
        ]
        await jobs.cancel(made[2])
        made.append((await jobs.create(model="tiny", training_file=file_id)).id)
        assert len(list(shop.data_dir.jobs.iterdir())) == 4
        for job_id in made:
            await jobs.cancel(job_id)


async def test_a_job_whose_adapter_the_engine_would_not_take_is_refused_when_it_is_created(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop, front_door(shop) as client:
        engine.max_lora_rank = 8
        try:
            call = client.fine_tuning.jobs.create(model="tiny", training_file=await shop.upload())
            error = await refused(call)
        finally:
            engine.max_lora_rank = None
        assert (error["status"], error["param"]) == (400, "model")
        assert "rank 8 at most" in error["message"] and "--max-lora-rank 16" in error["message"]
        engine.version["adapters"] = False
        try:
            error = await refused(client.fine_tuning.jobs.create(model="tiny", training_file=await shop.upload()))
        finally:
            del engine.version["adapters"]
        assert "takes no adapters" in error["message"]

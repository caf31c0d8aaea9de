"""`/v1/fine_tuning/jobs`: create, list, retrieve, cancel, events, checkpoints."""

from __future__ import annotations

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.errors import RequestError
from gateway.jobs.supervisor import unknown_job
from gateway.routes import caller_of, project_of
from gateway.routes.body import read_asked
from gateway.store import checkpoints as checkpoint_statements
from gateway.store import events as event_statements
from gateway.store import jobs as statements
from gateway.store.checkpoints import Checkpoint
from gateway.store.events import Event
from gateway.store.jobs import Job
from gateway.store.pages import Page
from gateway.wire import fine_tuning as wire
from gateway.wire.page import list_body, parse_page


async def create_job(request: Request) -> Response:
    """A job that is answered is committed. With an Idempotency-Key there is one job, however often it is asked for."""
    state = request.app.state
    key = wire.parse_idempotency_key(request.headers.get("idempotency-key"))
    asked = wire.parse_create(await read_asked(request.receive, state.settings, "fine_tuning"))
    caller = caller_of(request.scope)
    job = await state.supervisor.create(asked, key, caller.project_id, caller.limits.jobs)
    return _answer(request, job)


async def list_jobs(request: Request) -> Response:
    query = parse_page(request.query_params)
    filtered = wire.parse_list_filter(request.query_params)
    project_id = project_of(request)
    page = await request.app.state.store.read(
        lambda connection: statements.select_jobs(
            connection,
            limit=query.limit,
            after=query.after,
            order=query.order,
            metadata=filtered.metadata,
            project_id=project_id,
        )
    )
    organization = request.app.state.settings.organization
    return JSONResponse(list_body([wire.job_object(job, organization) for job in page.items], page.has_more))


async def retrieve_job(request: Request) -> Response:
    job_id, project_id = request.path_params["job_id"], project_of(request)
    return _answer(request, await request.app.state.store.read(lambda c: _find(c, job_id, project_id)))


async def cancel_job(request: Request) -> Response:
    """Cancelling twice is fine. A job that ended otherwise cannot be cancelled: 400, never 409, which the SDK retries."""
    job = await request.app.state.supervisor.cancel(request.path_params["job_id"], project_of(request))
    if job.status != "cancelled":
        raise RequestError(
            f"Job {job.id} has {job.status} and cannot be cancelled any more; only a job that is validating its files, "
            "queued or running can be.",
            code="invalid_job_status",
        )
    return _answer(request, job)


async def pause_job(request: Request) -> Response:
    """OpenAI's enum has no state for it: a paused job is shown as queued, and its events tell. Pausing twice is fine."""
    job = await request.app.state.supervisor.pause(request.path_params["job_id"], project_of(request))
    return _answer(request, _unless_over(job, "paused"))


async def resume_job(request: Request) -> Response:
    """The job goes on from its newest checkpoint. Resuming one that is not paused changes nothing."""
    job = await request.app.state.supervisor.resume(request.path_params["job_id"], project_of(request))
    return _answer(request, _unless_over(job, "resumed"))


def _unless_over(job: Job, what: str) -> Job:
    if job.is_over:
        raise RequestError(f"Job {job.id} has {job.status} and cannot be {what} any more.", code="invalid_job_status")
    return job


async def list_events(request: Request) -> Response:
    """Newest first, unless `order` is "asc"."""
    job_id, project_id = request.path_params["job_id"], project_of(request)
    query = parse_page(request.query_params)

    def read(connection: Connection) -> Page[Event]:
        _find(connection, job_id, project_id)
        return event_statements.select_events(
            connection, job_id, limit=query.limit, after=query.after, order=query.order
        )

    page = await request.app.state.store.read(read)
    return JSONResponse(list_body([wire.event_object(event) for event in page.items], page.has_more))


async def list_checkpoints(request: Request) -> Response:
    """Newest first, unless `order` is "asc"."""
    job_id, project_id = request.path_params["job_id"], project_of(request)
    query = parse_page(request.query_params, default_limit=10)

    def read(connection: Connection) -> Page[Checkpoint]:
        _find(connection, job_id, project_id)
        return checkpoint_statements.select_checkpoint_page(
            connection, job_id, limit=query.limit, after=query.after, order=query.order
        )

    page = await request.app.state.store.read(read)
    return JSONResponse(list_body([wire.checkpoint_object(item) for item in page.items], page.has_more))


def _find(connection: Connection, job_id: str, project_id: str) -> Job:
    job = statements.select_job(connection, job_id, project_id)
    if job is None:
        raise unknown_job(job_id)
    return job


def _answer(request: Request, job: Job) -> Response:
    return JSONResponse(wire.job_object(job, request.app.state.settings.organization))


routes = [
    Route("/v1/fine_tuning/jobs", create_job, methods=["POST"]),
    Route("/v1/fine_tuning/jobs", list_jobs, methods=["GET"]),
    Route("/v1/fine_tuning/jobs/{job_id}", retrieve_job, methods=["GET"]),
    Route("/v1/fine_tuning/jobs/{job_id}/cancel", cancel_job, methods=["POST"]),
    Route("/v1/fine_tuning/jobs/{job_id}/pause", pause_job, methods=["POST"]),
    Route("/v1/fine_tuning/jobs/{job_id}/resume", resume_job, methods=["POST"]),
    Route("/v1/fine_tuning/jobs/{job_id}/events", list_events, methods=["GET"]),
    Route("/v1/fine_tuning/jobs/{job_id}/checkpoints", list_checkpoints, methods=["GET"]),
]

"""`/v1/evals`: what is tested, runs of it over data, and what became of each line."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.errors import NotFound, RequestError
from gateway.evals.runner import EvalRunner
from gateway.routes import caller_of, project_of
from gateway.routes.body import read_json
from gateway.routes.idempotency import idempotency_key
from gateway.store import evals as statements
from gateway.store import idempotency
from gateway.store.evals import Eval, EvalItem, EvalRun
from gateway.store.ids import new_id
from gateway.store.pages import Page
from gateway.wire import evals as wire
from gateway.wire.fields import show
from gateway.wire.page import list_body, parse_page

Summaries = dict[str, dict[str, Any]]


async def create_eval(request: Request) -> Response:
    key, project_id = idempotency_key(request), project_of(request)
    asked = wire.parse_create(await read_json(request, request.app.state.settings.limits.body_bytes))
    now, eval_id = int(time.time()), new_id("eval_")
    made = Eval(
        id=eval_id,
        project_id=project_id,
        created_at=now,
        updated_at=now,
        name=asked.name or eval_id,
        data_source_config=asked.data_source_config,
        testing_criteria=asked.testing_criteria,
        metadata=asked.metadata,
    )
    mark = idempotency.fingerprint("eval", asked)

    def write(connection: Connection) -> Eval:
        earlier = idempotency.recall(connection, project_id, key, mark)
        if earlier is not None and (found := statements.select_eval(connection, earlier, project_id)) is not None:
            return found
        statements.insert_eval(connection, made)
        idempotency.remember(connection, project_id, key, mark, made.id)
        return made

    return JSONResponse(wire.eval_object(await request.app.state.store.write(write)))


async def list_evals(request: Request) -> Response:
    """Oldest first, unless `order` is "desc"."""
    query, project_id = parse_page(request.query_params, default_order="asc"), project_of(request)
    order_by = request.query_params.get("order_by") or "created_at"
    if order_by not in ("created_at", "updated_at"):
        raise RequestError(f"'order_by' must be created_at or updated_at, not {show(order_by)}", param="order_by")
    page = await request.app.state.store.read(
        lambda c: statements.select_evals(
            c, project_id, limit=query.limit, after=query.after, order=query.order, order_by=order_by
        )
    )
    return JSONResponse(list_body([wire.eval_object(made) for made in page.items], page.has_more))


async def retrieve_eval(request: Request) -> Response:
    eval_id, project_id = request.path_params["eval_id"], project_of(request)
    return JSONResponse(wire.eval_object(await request.app.state.store.read(lambda c: _find(c, eval_id, project_id))))


async def update_eval(request: Request) -> Response:
    state, eval_id, project_id = request.app.state, request.path_params["eval_id"], project_of(request)
    changes = wire.parse_update(await read_json(request, state.settings.limits.body_bytes))
    changes["updated_at"] = int(time.time())
    made = await state.store.write(lambda c: statements.update_eval(c, eval_id, project_id, changes))
    if made is None:
        raise _unknown("eval", eval_id)
    return JSONResponse(wire.eval_object(made))


async def delete_eval(request: Request) -> Response:
    """Its runs go with it, also one that is under way."""
    eval_id, project_id, now = request.path_params["eval_id"], project_of(request), int(time.time())
    gone = await request.app.state.store.write(lambda c: statements.delete_eval(c, eval_id, project_id, now=now))
    if gone is None:
        raise _unknown("eval", eval_id)
    for run_id in gone:
        _runner(request).drop(run_id)
    return JSONResponse({"object": "eval.deleted", "deleted": True, "eval_id": eval_id})


async def create_run(request: Request) -> Response:
    """What is answered is stored, and runs whatever happens to this process."""
    state, eval_id, caller = request.app.state, request.path_params["eval_id"], caller_of(request.scope)
    key = idempotency_key(request)
    asked = wire.parse_run(await read_json(request, state.settings.limits.body_bytes))
    _runner(request).require_place()
    run_id = new_id("evalrun_")
    run = EvalRun(
        id=run_id,
        project_id=caller.project_id,
        created_at=int(time.time()),
        eval_id=eval_id,
        name=asked.name or run_id,
        model=asked.model,
        data_source=asked.data_source,
        metadata=asked.metadata,
        status="queued",
    )

    mark = idempotency.fingerprint("eval run", eval_id, asked)

    def write(connection: Connection) -> tuple[Eval, EvalRun]:
        made = _find(connection, eval_id, caller.project_id)
        earlier = idempotency.recall(connection, caller.project_id, key, mark)
        if earlier is not None:
            found = statements.select_run(connection, eval_id, earlier, caller.project_id)
            if found is not None:
                return made, found
        statements.insert_run(connection, run)
        idempotency.remember(connection, caller.project_id, key, mark, run_id)
        return made, run

    made, stored = await state.store.write(write)
    if stored is run:
        _runner(request).begin(run, caller)
    return JSONResponse(wire.run_object(stored, stored.summary or _summarise(made, []), _report_url(request, stored)))


async def list_runs(request: Request) -> Response:
    """Oldest first, unless `order` is "desc"."""
    query = parse_page(request.query_params, default_order="asc")
    eval_id, project_id = request.path_params["eval_id"], project_of(request)
    status = request.query_params.get("status") or None
    if status is not None and status not in wire.RUN_STATUSES:
        raise RequestError(
            f"'status' must be one of {', '.join(wire.RUN_STATUSES)}, not {show(status)}", param="status"
        )

    def read(connection: Connection) -> tuple[Page[EvalRun], Summaries]:
        made = _find(connection, eval_id, project_id)
        page = statements.select_runs(
            connection,
            eval_id,
            project_id,
            limit=query.limit,
            after=query.after,
            order=query.order,
            status=status,
        )
        return page, {run.id: _summary(connection, made, run) for run in page.items}

    page, summaries = await request.app.state.store.read(read)
    data = [wire.run_object(run, summaries[run.id], _report_url(request, run)) for run in page.items]
    return JSONResponse(list_body(data, page.has_more))


async def retrieve_run(request: Request) -> Response:
    eval_id, run_id, project_id = *_ids(request), project_of(request)

    def read(connection: Connection) -> tuple[EvalRun, dict[str, Any]]:
        made, run = _find(connection, eval_id, project_id), _find_run(connection, eval_id, run_id, project_id)
        return run, _summary(connection, made, run)

    run, summary = await request.app.state.store.read(read)
    return JSONResponse(wire.run_object(run, summary, _report_url(request, run)))


async def cancel_run(request: Request) -> Response:
    """Cancelling twice is fine, and so is cancelling what is over: the answer says how it ended."""
    eval_id, run_id, project_id = *_ids(request), project_of(request)

    def write(connection: Connection) -> tuple[EvalRun, dict[str, Any]]:
        made, run = _find(connection, eval_id, project_id), _find_run(connection, eval_id, run_id, project_id)
        summary = _summary(connection, made, run)
        if run.is_open:
            statements.finish_run(connection, run_id, "canceled", summary)
            run = _find_run(connection, eval_id, run_id, project_id)
        return run, summary

    run, summary = await request.app.state.store.write(write)
    if run.status == "canceled":
        _runner(request).drop(run_id)
    return JSONResponse(wire.run_object(run, summary, _report_url(request, run)))


async def delete_run(request: Request) -> Response:
    eval_id, run_id, project_id = *_ids(request), project_of(request)
    now = int(time.time())
    if not await request.app.state.store.write(
        lambda c: statements.delete_run(c, eval_id, run_id, project_id, now=now)
    ):
        raise _unknown("eval run", run_id)
    _runner(request).drop(run_id)
    return JSONResponse({"object": "eval.run.deleted", "deleted": True, "run_id": run_id})


async def list_items(request: Request) -> Response:
    """Oldest first, unless `order` is "desc"."""
    query = parse_page(request.query_params, default_order="asc")
    eval_id, run_id, project_id = *_ids(request), project_of(request)
    status = request.query_params.get("status") or None
    if status not in (None, "fail", "pass", "error"):
        raise RequestError(f"'status' must be fail, pass or error, not {show(status)}", param="status")

    def read(connection: Connection) -> Page[EvalItem]:
        _find_run(connection, eval_id, run_id, project_id)
        return statements.select_items(
            connection,
            run_id,
            project_id,
            limit=query.limit,
            after=query.after,
            order=query.order,
            status=status,
        )

    page = await request.app.state.store.read(read)
    return JSONResponse(list_body([wire.item_object(item, eval_id) for item in page.items], page.has_more))


async def retrieve_item(request: Request) -> Response:
    eval_id, run_id, project_id = *_ids(request), project_of(request)
    item_id = request.path_params["item_id"]

    def read(connection: Connection) -> EvalItem | None:
        _find_run(connection, eval_id, run_id, project_id)
        return statements.select_item(connection, run_id, item_id, project_id)

    item = await request.app.state.store.read(read)
    if item is None:
        raise _unknown("output item", item_id)
    return JSONResponse(wire.item_object(item, eval_id))


def _find(connection: Connection, eval_id: str, project_id: str) -> Eval:
    made = statements.select_eval(connection, eval_id, project_id)
    if made is None:
        raise _unknown("eval", eval_id)
    return made


def _find_run(connection: Connection, eval_id: str, run_id: str, project_id: str) -> EvalRun:
    run = statements.select_run(connection, eval_id, run_id, project_id)
    if run is None:
        raise _unknown("eval run", run_id)
    return run


def _summary(connection: Connection, made: Eval, run: EvalRun) -> dict[str, Any]:
    """As it was when the run ended, or as its items are now."""
    if run.summary is not None:
        return run.summary
    return _summarise(made, statements.select_outcomes(connection, run.id))


def _summarise(made: Eval, outcomes: list[tuple[str, list[dict[str, Any]], dict[str, Any]]]) -> dict[str, Any]:
    return wire.summarise([criterion["name"] for criterion in made.testing_criteria], outcomes)


def _ids(request: Request) -> tuple[str, str]:
    return request.path_params["eval_id"], request.path_params["run_id"]


def _runner(request: Request) -> EvalRunner:
    runner: EvalRunner = request.app.state.evals
    return runner


def _report_url(request: Request, run: EvalRun) -> str:
    return f"{request.base_url}v1/evals/{run.eval_id}/runs/{run.id}"


def _unknown(what: str, name: str) -> NotFound:
    return NotFound(f"No such {what}: {name[:100]}", param="id")


routes = [
    Route("/v1/evals", create_eval, methods=["POST"]),
    Route("/v1/evals", list_evals, methods=["GET"]),
    Route("/v1/evals/{eval_id}", retrieve_eval, methods=["GET"]),
    Route("/v1/evals/{eval_id}", update_eval, methods=["POST"]),
    Route("/v1/evals/{eval_id}", delete_eval, methods=["DELETE"]),
    Route("/v1/evals/{eval_id}/runs", create_run, methods=["POST"]),
    Route("/v1/evals/{eval_id}/runs", list_runs, methods=["GET"]),
    Route("/v1/evals/{eval_id}/runs/{run_id}", retrieve_run, methods=["GET"]),
    Route("/v1/evals/{eval_id}/runs/{run_id}", cancel_run, methods=["POST"]),
    Route("/v1/evals/{eval_id}/runs/{run_id}/cancel", cancel_run, methods=["POST"]),
    Route("/v1/evals/{eval_id}/runs/{run_id}", delete_run, methods=["DELETE"]),
    Route("/v1/evals/{eval_id}/runs/{run_id}/output_items", list_items, methods=["GET"]),
    Route("/v1/evals/{eval_id}/runs/{run_id}/output_items/{item_id}", retrieve_item, methods=["GET"]),
]

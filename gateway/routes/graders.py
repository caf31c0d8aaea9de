"""`/v1/fine_tuning/alpha/graders`: run one over a sample, or have it checked."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.errors import RequestError
from gateway.grading.formula import FormulaError, names_in, parse_formula
from gateway.grading.graders import Graders, sample_of
from gateway.routes import caller_of
from gateway.routes.body import read_json
from gateway.wire import fields
from gateway.wire import graders as wire


async def run_grader(request: Request) -> Response:
    state = request.app.state
    graders: Graders = state.graders
    grader, text, item = wire.parse_run(await read_json(request, state.settings.limits.body_bytes))
    check_formula(grader, "grader")
    began = time.perf_counter()
    graded = await graders.grade(grader, item, sample_of(text), caller_of(request.scope))
    tokens = {model: used.prompt_tokens + used.completion_tokens for model, used in graded.usage.items()}
    return JSONResponse(
        wire.run_object(
            grader,
            reward=graded.score,
            sub_rewards=graded.sub_scores,
            errors=graded.errors,
            tokens_by_model=tokens,
            sampled_model=graded.sampled_model,
            elapsed_s=time.perf_counter() - began,
        )
    )


async def validate_grader(request: Request) -> Response:
    body = await read_json(request, request.app.state.settings.limits.body_bytes)
    fields.refuse_unknown(body, ("grader",))
    grader = wire.parse_grader(body.get("grader"), "grader")
    check_formula(grader, "grader")
    return JSONResponse({"grader": grader})


def check_formula(grader: wire.Grader, where: str) -> None:
    """Raises RequestError where the formula of a multi grader is none, or names a grader that is not there."""
    if grader["type"] != "multi":
        return
    param = f"{where}.calculate_output"
    try:
        missing = names_in(parse_formula(grader["calculate_output"])) - {name for name, _ in wire.grader_items(grader)}
    except FormulaError as error:
        raise RequestError(f"'{param}' is {grader['calculate_output'][:80]!r}: {error}", param=param) from error
    if missing:
        raise RequestError(f"'{param}' needs '{min(missing)}', which no grader of '{where}' gives", param=param)


routes = [
    Route("/v1/fine_tuning/alpha/graders/run", run_grader, methods=["POST"]),
    Route("/v1/fine_tuning/alpha/graders/validate", validate_grader, methods=["POST"]),
]

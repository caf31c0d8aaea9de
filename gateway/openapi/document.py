"""`/v1/openapi.json`: every route of the table, with what it takes and gives. Pure; made once, when it is first asked for.

Its one rule: paths, methods and path parameters come from the routes and summaries from the functions' docstrings, so that
neither can be forgotten; schemas are those of `objects` and `requests`, and a test asks every route to have one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from gateway.openapi import resources
from gateway.openapi.objects import OBJECTS
from gateway.openapi.requests import BODIES, QUERIES, REPLIES

Schema = dict[str, Any]

_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
# What any request may be answered with beside its own reply: all are OpenAI's error object.
ERRORS = {
    "400": "The request breaks a rule; `param` names what",
    "401": "A key is needed and there is none, or a wrong one",
    "403": "The key may not do this, or the request comes from a foreign page",
    "404": "There is no such thing, or it is another project's",
    "405": "The path has no such method",
    "408": "The request came too slowly",
    "413": "The body is too large",
    "415": "The body is of another type, or compressed",
    "421": "The Host header is foreign",
    "429": "A limit is reached; Retry-After says when to come again",
    "431": "The headers are too large",
    "502": "An engine failed",
    "503": "Not now; Retry-After says when to come again",
    "504": "An engine took too long",
}


def make_document(routes: Iterable[Any], version: str) -> Schema:
    """The document over Starlette's routes."""
    paths: dict[str, Schema] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operation = _operation(route, path, method)
            paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tunegate",
            "version": version,
            "description": "Code written against the OpenAI API, served and fine-tuned on your own machine.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": OBJECTS | resources.OBJECTS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def key_of(path: str, method: str) -> str:
    """A route as the tables of `requests` name it: `POST /v1/files`."""
    return f"{method} {path}"


def _operation(route: Any, path: str, method: str) -> Schema:
    key = key_of(path, method)
    summary = inspect.getdoc(route.endpoint) or (inspect.getdoc(inspect.getmodule(route.endpoint)) or "")
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(route.path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": name == "start_time", "schema": schema}
        for name, schema in QUERIES.get(key, {}).items()
    ]
    operation: Schema = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
        "summary": summary.split("\n")[0],
        "responses": {"200": _reply(key), **_errors()},
    }
    if parameters:
        operation["parameters"] = parameters
    if key in BODIES:
        media_type, schema = BODIES[key]
        operation["requestBody"] = {"required": True, "content": {media_type: {"schema": schema}}}
    return operation


def _reply(key: str) -> Schema:
    media_type, schema = REPLIES.get(key, ("application/json", {"type": "object"}))
    content: Schema = {media_type: {"schema": schema}}
    if key in ("POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses"):
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"description": "As it was asked for", "content": content}


def _errors() -> dict[str, Schema]:
    schema = {"$ref": "#/components/schemas/Error"}
    return {
        status: {"description": meaning, "content": {"application/json": {"schema": schema}}}
        for status, meaning in ERRORS.items()
    }

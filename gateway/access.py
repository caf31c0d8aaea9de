"""Who speaks: what a key allows, and whose things are seen. A leaf: every room may carry a `Caller`.

Its one rule: a project sees what is its own. Whatever is stored, listed or asked for takes the project from here and never
from the request's content.
"""

from __future__ import annotations

import hashlib
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

Scope = Literal["infer", "files", "tune", "admin"]

SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_PROJECT = "default"

# The W3C `traceparent` of the request that is being answered, for the engine; None where nothing is traced.
TRACEPARENT: ContextVar[str | None] = ContextVar("TRACEPARENT", default=None)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may use; None is without limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    jobs: int | None = None  # fine-tuning jobs and batches that are not over
    storage_bytes: int | None = None  # of the project's files and unfinished uploads


class Allowance(Protocol):
    """What is left of a key's requests and tokens a minute; `gateway.limits` keeps it."""

    def take_request(self) -> None: ...
    def take_tokens(self, count: int) -> None: ...
    def owe_tokens(self, count: int) -> None: ...
    def headers(self) -> list[tuple[bytes, bytes]]: ...


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf something is done: a key's, or nobody's in particular where no key is needed."""

    project_id: str = DEFAULT_PROJECT
    key_id: str | None = None
    scopes: frozenset[Scope] = frozenset(SCOPES)
    limits: Limits = Limits()
    allowance: Allowance | None = None  # None: neither requests nor tokens are limited
    is_batch: bool = False
    cache_salt: str = field(init=False)  # what prompts share their computed beginnings under: never over projects

    def __post_init__(self) -> None:
        digest = hashlib.sha256(b"tunegate project " + self.project_id.encode()).hexdigest()
        object.__setattr__(self, "cache_salt", digest[:32])

    def may(self, scope: Scope) -> bool:
        """`admin` may do everything."""
        return scope in self.scopes or "admin" in self.scopes


ANYBODY = Caller()  # who speaks where no key is needed

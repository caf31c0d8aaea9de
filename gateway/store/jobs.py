"""Every statement on jobs. Each function runs inside the caller's transaction.

Its one rule: a job leaves a state only through a statement that names the state it was in, so that whatever races (cancel
with completion, two supervisors, a job read twice) has one winner, and a terminal state is never left.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, RowMapping, exists, func, insert, select, update

from gateway.jobdir import Method
from gateway.store.checkpoints import NewCheckpoint, store_checkpoint
from gateway.store.events import NewEvent, delete_undone_metrics, insert_events
from gateway.store.pages import Order, Page, select_page
from gateway.store.tables import DEFAULT_PROJECT
from gateway.store.tables import events as _events
from gateway.store.tables import jobs as _jobs

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]

# asked: its trainer is to end behind its next step. paused: it is not started until somebody resumes it.
Pause = Literal["asked", "paused", "resumed"]

ACTIVE: tuple[Status, ...] = ("validating_files", "queued", "running")
WAITING: tuple[Status, ...] = ("validating_files", "queued")


@dataclass(frozen=True)
class Job:
    """A row of jobs. `check` is what the trainer's check found (a `jobdir.Check` as JSON), None until it ran."""

    id: str
    created_at: int
    model: str
    base: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int
    hyperparameters: dict[str, Any]
    metadata: dict[str, str] | None
    idempotency_key: str | None
    project_id: str = DEFAULT_PROJECT
    status: Status = "validating_files"
    error: dict[str, Any] | None = None
    started_at: int | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    result_files: tuple[str, ...] = ()
    attempt: int = 0
    cursor_offset: int = 0
    check: dict[str, Any] | None = None
    pause: Pause | None = None
    rendering: dict[str, Any] = field(default_factory=dict)  # `tunegate` as asked: turns, chat_template_kwargs
    method: Method = "supervised"
    options: dict[str, Any] = field(default_factory=dict)  # as asked, by the names that clients use
    settled: dict[str, Any] = field(default_factory=dict)  # all of them, with what was decided for those not asked for
    integrations: tuple[dict[str, Any], ...] = ()
    named_base: str | None = None  # set where training goes on from a tuned model: what its name begins with

    @property
    def is_over(self) -> bool:
        return self.status not in ACTIVE


@dataclass(frozen=True)
class Progress:
    """What one reading of a trainer's events gave, and where the next one begins."""

    attempt: int
    offset: int
    events: tuple[NewEvent, ...] = ()
    checkpoints: tuple[NewCheckpoint, ...] = ()
    estimated_finish: int | None = None
    first_step: int | None = None  # the first that these metrics tell of


# jobs


def insert_job(connection: Connection, job: Job, messages: Iterable[str]) -> None:
    """Adds a job together with its first events."""
    connection.execute(
        insert(_jobs).values(
            id=job.id,
            project_id=job.project_id,
            created_at=job.created_at,
            model=job.model,
            base=job.base,
            training_file=job.training_file,
            validation_file=job.validation_file,
            suffix=job.suffix,
            seed=job.seed,
            hyperparameters=job.hyperparameters,
            method={"type": job.method, **({"tunegate": job.rendering} if job.rendering else {})},
            options={"asked": job.options, "settled": job.settled},
            integrations=list(job.integrations) or None,
            named_base=job.named_base,
            metadata=job.metadata,
            idempotency_key=job.idempotency_key,
            status=job.status,
        )
    )
    insert_events(connection, job.id, [NewEvent(message) for message in messages], project_id=job.project_id)


def select_job(connection: Connection, job_id: str, project_id: str | None = None) -> Job | None:
    statement = select(_jobs).where(_jobs.c.id == job_id)
    if project_id is not None:
        statement = statement.where(_jobs.c.project_id == project_id)
    row = connection.execute(statement).mappings().one_or_none()
    return None if row is None else _job(row)


def select_by_idempotency_key(connection: Connection, project_id: str, key: str) -> Job | None:
    where = (_jobs.c.project_id == project_id, _jobs.c.idempotency_key == key)
    row = connection.execute(select(_jobs).where(*where)).mappings().one_or_none()
    return None if row is None else _job(row)


def select_jobs(
    connection: Connection,
    *,
    limit: int,
    after: str | None = None,
    order: Order = "desc",
    metadata: Mapping[str, str] | Literal["none"] | None = None,
    project_id: str = DEFAULT_PROJECT,
) -> Page[Job]:
    """Jobs, newest first unless `order` is "asc"; those whose metadata has all the given pairs, or that have none."""
    where: list[ColumnElement[bool]] = [_jobs.c.project_id == project_id]
    if metadata == "none":
        where.append(_jobs.c.metadata.is_(None))
    elif metadata is not None:
        where += [_has_pair(key, value) for key, value in metadata.items()]
    page = select_page(connection, _jobs, *where, limit=limit, after=after, order=order)
    return Page([_job(row) for row in page.items], page.has_more)


def select_with_status(connection: Connection, *statuses: Status) -> list[Job]:
    """Jobs in any of the states, oldest first."""
    rows = connection.execute(select(_jobs).where(_jobs.c.status.in_(statuses)).order_by(_jobs.c.seq)).mappings()
    return [_job(row) for row in rows]


def select_statuses(connection: Connection) -> dict[str, Status]:
    return {row.id: row.status for row in connection.execute(select(_jobs.c.id, _jobs.c.status))}


def count_waiting(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(_jobs).where(_jobs.c.status.in_(WAITING))).scalar_one()


def count_active(connection: Connection, project_id: str) -> int:
    """How many jobs of a project are not over."""
    where = (_jobs.c.project_id == project_id, _jobs.c.status.in_(ACTIVE))
    return connection.execute(select(func.count()).select_from(_jobs).where(*where)).scalar_one()


def queue_job(connection: Connection, job_id: str, check: dict[str, Any], events: Iterable[NewEvent]) -> bool:
    """validating_files → queued. False when the job was no longer validating."""
    return _leave(connection, job_id, ("validating_files",), events, status="queued", check=check)


def claim_job(connection: Connection, parallel: int, event: NewEvent) -> Job | None:
    """queued → running for the oldest queued job, unless `parallel` are running."""
    running = select(func.count()).select_from(_jobs).where(_jobs.c.status == "running")
    if connection.execute(running).scalar_one() >= parallel:
        return None
    waiting = (_jobs.c.status == "queued", func.coalesce(_jobs.c.pause, "") != "paused")
    oldest = select(_jobs.c.id).where(*waiting).order_by(_jobs.c.seq).limit(1)
    job_id = connection.execute(oldest).scalar_one_or_none()
    if job_id is None or not _leave(
        connection,
        job_id,
        ("queued",),
        [event],
        status="running",
        started_at=func.coalesce(_jobs.c.started_at, int(time.time())),
    ):
        return None
    return select_job(connection, job_id)


def pause_job(connection: Connection, job_id: str) -> bool:
    """Notes that a job is to be paused. False when it was over."""
    job = select_job(connection, job_id)
    if job is None or job.is_over:
        return False
    if job.pause in ("asked", "paused"):
        return True
    running = job.status == "running"
    told = "The trainer stops behind its next step, and the job is paused then" if running else "The job is paused"
    pause: Pause = "asked" if running else "paused"
    return _leave(connection, job_id, (job.status,), [NewEvent(told)], pause=pause)


def park_job(connection: Connection, job_id: str, step: int) -> bool:
    """running → queued and paused, for a job whose trainer ended behind a checkpoint. False when that is no longer asked."""
    job = select_job(connection, job_id)
    if job is None or job.pause != "asked":
        return False
    where = f"behind step {step}" if step else "before its first step"
    told = f"The job is paused {where}; it is shown as queued until it is resumed"
    return _leave(connection, job_id, ("running",), [NewEvent(told)], status="queued", pause="paused")


def resume_job(connection: Connection, job_id: str) -> bool:
    """Lets a paused job go on. False when it was over."""
    job = select_job(connection, job_id)
    if job is None or job.is_over:
        return False
    if job.pause not in ("asked", "paused"):
        return True
    return _leave(connection, job_id, (job.status,), [NewEvent("The job is resumed")], pause="resumed")


def fail_job(
    connection: Connection,
    job_id: str,
    error: dict[str, Any],
    message: str,
    trained_tokens: int | None = None,
    told: Iterable[NewEvent] = (),
) -> bool:
    """Any active state → failed, after the events `told`. False when the job was over."""
    events = [*told, NewEvent(message, level="error")]
    return _leave(
        connection,
        job_id,
        ACTIVE,
        events,
        status="failed",
        error=error,
        trained_tokens=trained_tokens,
        finished_at=int(time.time()),
    )


def cancel_job(connection: Connection, job_id: str, message: str) -> bool:
    """Any active state → cancelled. False when the job was over."""
    return _leave(connection, job_id, ACTIVE, [NewEvent(message)], status="cancelled", finished_at=int(time.time()))


def succeed_job(
    connection: Connection,
    job_id: str,
    fine_tuned_model: str,
    trained_tokens: int,
    result_files: Iterable[str],
    events: Iterable[NewEvent],
) -> bool:
    """running → succeeded. False when the job was no longer running: then nothing of it may be published."""
    return _leave(
        connection,
        job_id,
        ("running",),
        events,
        status="succeeded",
        fine_tuned_model=fine_tuned_model,
        trained_tokens=trained_tokens,
        result_files=list(result_files),
        finished_at=int(time.time()),
    )


def store_progress(connection: Connection, job: Job, progress: Progress) -> bool:
    """Events, checkpoints and the cursor behind them at once; `job` holds the cursor before.

    False, with nothing stored, when the job is no longer running or another reader moved the cursor.
    """
    values: dict[str, Any] = {"attempt": progress.attempt, "cursor_offset": progress.offset}
    if progress.estimated_finish is not None:
        values["estimated_finish"] = progress.estimated_finish
    moved = connection.execute(
        update(_jobs)
        .where(
            _jobs.c.id == job.id,
            _jobs.c.status == "running",
            _jobs.c.attempt == job.attempt,
            _jobs.c.cursor_offset == job.cursor_offset,
        )
        .values(**values)
    )
    if moved.rowcount != 1:
        return False
    if progress.first_step is not None:
        delete_undone_metrics(connection, job.id, progress.attempt, progress.first_step)
    insert_events(connection, job.id, progress.events, project_id=job.project_id)
    for checkpoint in progress.checkpoints:
        store_checkpoint(connection, job.id, job.project_id, checkpoint)
    return True


# events and checkpoints


def count_resumes(connection: Connection, job_id: str, checkpoint_step: int) -> int:
    """How often the trainer was started anew from the checkpoint at this step (0: from the beginning)."""
    key = _resume_key(job_id, checkpoint_step, "")
    where = _events.c.source_key.startswith(key, autoescape=True)
    return connection.execute(select(func.count()).select_from(_events).where(where)).scalar_one()


def insert_running_event(connection: Connection, job_id: str, event: NewEvent) -> bool:
    """Adds an event to a running job. False when it is not running: what is over is told no more of."""
    running = select(_jobs.c.id).where(_jobs.c.id == job_id, _jobs.c.status == "running")
    if connection.execute(running).one_or_none() is None:
        return False
    insert_events(connection, job_id, [event])
    return True


def insert_resume(connection: Connection, job_id: str, checkpoint_step: int, n: int, event: NewEvent) -> bool:
    """Notes the n-th new start from that checkpoint. False when the job is no longer running."""
    keyed = replace(event, source_key=_resume_key(job_id, checkpoint_step, str(n)))
    return insert_running_event(connection, job_id, keyed)


def _has_pair(key: str, value: str) -> ColumnElement[bool]:
    # json_each rather than a path: a path cannot say every key (quotes, and before SQLite 3.45 non-ASCII letters).
    pairs = func.json_each(_jobs.c.metadata).table_valued("key", "value")
    return exists().where(pairs.c.key == key, pairs.c.value == value)


def _leave(
    connection: Connection, job_id: str, states: tuple[Status, ...], events: Iterable[NewEvent], **values: Any
) -> bool:
    moved = connection.execute(update(_jobs).where(_jobs.c.id == job_id, _jobs.c.status.in_(states)).values(**values))
    if moved.rowcount != 1:
        return False
    insert_events(connection, job_id, events)
    return True


def _resume_key(job_id: str, checkpoint_step: int, n: str) -> str:
    return f"{job_id}/resume/{checkpoint_step}/{n}"


def _job(row: RowMapping) -> Job:
    return Job(
        id=row["id"],
        created_at=row["created_at"],
        model=row["model"],
        base=row["base"],
        training_file=row["training_file"],
        validation_file=row["validation_file"],
        suffix=row["suffix"],
        seed=row["seed"],
        hyperparameters=row["hyperparameters"],
        metadata=row["metadata"],
        idempotency_key=row["idempotency_key"],
        project_id=row["project_id"],
        status=row["status"],
        error=row["error"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        estimated_finish=row["estimated_finish"],
        fine_tuned_model=row["fine_tuned_model"],
        trained_tokens=row["trained_tokens"],
        result_files=tuple(row["result_files"] or ()),
        attempt=row["attempt"],
        cursor_offset=row["cursor_offset"],
        check=row["check"],
        pause=row["pause"],
        rendering=(row["method"] or {}).get("tunegate", {}),
        method=(row["method"] or {}).get("type", "supervised"),
        options=(row["options"] or {}).get("asked", {}),
        settled=(row["options"] or {}).get("settled", {}),
        integrations=tuple(row["integrations"] or ()),
        named_base=row["named_base"],
    )

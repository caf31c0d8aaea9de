"""Every table of the store, as SQLAlchemy Core sees it. A leaf: what is here must be portable to PostgreSQL.

`migrations/` builds these tables; a test holds the two together. Each table has `seq`, the order in which its rows were
inserted, and an index over (project_id, …, created_at, seq), by which lists are read (`pages.py`). Times are unix
seconds. A JSON column holds SQL NULL for None.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

from gateway.access import DEFAULT_PROJECT as DEFAULT_PROJECT

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)

BigSerial = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows only under this very word
Json = JSON(none_as_null=True)


def _seq() -> Column[int]:
    return Column("seq", BigSerial, primary_key=True, autoincrement=True)


def _project() -> Column[str]:
    return Column("project_id", Text, nullable=False, server_default=DEFAULT_PROJECT)


# A deleted file keeps its row, without its bytes, so that a list being walked while it is emptied keeps its place.
files = Table(
    "files",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "file-…"
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("filename", Text, nullable=False),  # for display only
    Column("purpose", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", Text, nullable=False, index=True),  # of the blob, hexadecimal sha256
    Column("status", Text, nullable=False, server_default="processed"),  # uploaded | processed | error
    Column("status_details", Text),
    Column("expires_at", BigInteger, index=True),
    Column("deleted_at", BigInteger),
    Index("ix_files_listed", "project_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

jobs = Table(
    "jobs",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "ftjob-…"
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("model", Text, nullable=False),  # as the client asked, an alias maybe
    Column("base", Text, nullable=False),  # the base that it stood for
    Column("training_file", Text, nullable=False),
    Column("validation_file", Text),
    Column("suffix", Text),
    Column("seed", BigInteger, nullable=False),
    Column("hyperparameters", Json, nullable=False),  # as asked; resolved ones are in `check`
    Column("method", Json),
    Column("metadata", Json),
    Column("integrations", Json),
    Column("idempotency_key", Text),
    Column("status", Text, nullable=False, index=True),
    Column("error", Json),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("estimated_finish", BigInteger),
    Column("fine_tuned_model", Text),
    Column("trained_tokens", BigInteger),
    Column("result_files", Json),
    Column("attempt", Integer, nullable=False, server_default="0"),  # 0: no trainer was started yet
    Column("cursor_offset", BigInteger, nullable=False, server_default="0"),  # bytes read of the attempt's events.jsonl
    Column("check", Json),  # what the trainer's check found
    Column("pause", Text),  # asked | paused | resumed; NULL: nobody ever asked
    Column("options", Json),  # {"asked": …, "settled": …}, by the names that clients use
    Column("named_base", Text),  # of a job that goes on from a tuned model: what that line of models is named after
    UniqueConstraint("project_id", "idempotency_key"),
    Index("ix_jobs_listed", "project_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

events = Table(
    "events",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "ftevent-…"
    _project(),
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("level", Text, nullable=False),  # info | warn | error
    Column("type", Text, nullable=False),  # message | metrics
    Column("message", Text, nullable=False),
    Column("data", Json),
    Column("source_key", Text, unique=True),  # "job/attempt/seq": a line that is read again is stored once
    Index("ix_events_listed", "job_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "ftckpt_…"
    _project(),
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("step_number", Integer, nullable=False),
    Column("metrics", Json, nullable=False),
    Column("name", Text, nullable=False),  # fine_tuned_model_checkpoint
    UniqueConstraint("job_id", "step_number"),
    Index("ix_checkpoints_listed", "job_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

models = Table(
    "models",
    metadata,
    _seq(),
    Column("name", Text, nullable=False),  # the public one, "ft:…"
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("base", Text, nullable=False),
    Column("adapter_digest", Text, nullable=False),
    Column("adapter_path", Text, nullable=False),
    Column("engine_name", Text, nullable=False),  # immutable: what engines know it by
    Column("template_digest", Text, nullable=False),
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="SET NULL")),
    Column("owned_by", Text, nullable=False),
    Column("step_number", Integer),  # of the checkpoint; NULL for a job's final model
    Column("deleted_at", BigInteger),
    UniqueConstraint("project_id", "name"),
    Index("ix_models_listed", "project_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

templates = Table(
    "templates",
    metadata,
    _seq(),
    Column("name", Text, nullable=False),
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),  # jinja | fastchat
    Column("source", Json, nullable=False),  # all that is needed to make the template again
    UniqueConstraint("project_id", "name"),
    Index("ix_templates_listed", "project_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

keys = Table(
    "keys",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "key_…"
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False, unique=True),  # hexadecimal sha256 of the key
    Column("scopes", Json, nullable=False),
    Column("limits", Json, nullable=False),  # the fields of access.Limits that are set
    Column("revoked_at", BigInteger),
    sqlite_autoincrement=True,
)

usage = Table(
    "usage",
    metadata,
    _seq(),
    Column("minute", BigInteger, nullable=False),  # its first second
    _project(),
    Column("key_id", Text, nullable=False),  # empty: no key was needed
    Column("model", Text, nullable=False),
    Column("kind", Text, nullable=False),  # completions | embeddings
    Column("is_batch", Boolean, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    UniqueConstraint("minute", "project_id", "key_id", "model", "kind", "is_batch", name="uq_usage_slot"),
    sqlite_autoincrement=True,
)

uploads = Table(
    "uploads",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "upload_…"
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("status", Text, nullable=False, index=True),  # pending | completed | cancelled | expired
    Column("expires_at", BigInteger, nullable=False),
    Column("expires_after_s", BigInteger),  # of the file that it becomes
    Column("file_id", Text),
    sqlite_autoincrement=True,
)

upload_parts = Table(
    "upload_parts",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "part_…"
    _project(),
    Column("upload_id", Text, ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", Text, nullable=False, index=True),  # of the blob
    sqlite_autoincrement=True,
)

batches = Table(
    "batches",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "batch_…"
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", Text, nullable=False),
    Column("input_digest", Text, nullable=False, index=True),  # of the blob, which is kept until the batch is over
    Column("completion_window", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("key_id", Text),  # on whose behalf; NULL: no key was needed
    Column("metadata", Json),
    Column("output_expires_after_s", BigInteger),
    Column("status", Text, nullable=False, index=True),
    Column("times", Json),  # state → when it was entered
    Column("errors", Json),
    Column("n_total", Integer, nullable=False),
    Column("n_completed", Integer, nullable=False),
    Column("n_failed", Integer, nullable=False),
    Column("usage", Json),
    Column("model", Text),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    Index("ix_batches_listed", "project_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

# Until a batch is over: then they are its files.
batch_lines = Table(
    "batch_lines",
    metadata,
    _seq(),
    _project(),
    Column("batch_id", Text, ForeignKey("batches.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),  # of the input's line, from 1
    Column("failed", Boolean, nullable=False),
    Column("text", Text, nullable=False),
    UniqueConstraint("batch_id", "number"),
    sqlite_autoincrement=True,
)

idempotency = Table(
    "idempotency",
    metadata,
    _seq(),
    _project(),
    Column("key", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("object_id", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False, index=True),
    UniqueConstraint("project_id", "key"),
    sqlite_autoincrement=True,
)

# `project_id` is the project that may see the model, beside its own.
permissions = Table(
    "permissions",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "cp_…"
    Column("project_id", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("model", Text, nullable=False),
    Column("deleted_at", BigInteger),
    Index("ix_permissions_listed", "model", "created_at", "seq"),
    sqlite_autoincrement=True,
)

# Chat completions that were asked for with "store": true.
completions = Table(
    "completions",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "chatcmpl-…"
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("model", Text, nullable=False),
    Column("metadata", Json),
    Column("messages", Json, nullable=False),  # as they were sent
    Column("body", Json, nullable=False),  # the chat.completion, and how it was sampled
    Column("deleted_at", BigInteger),
    Index("ix_completions_listed", "project_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

# A deleted response keeps its row, without what was said, so that a chain that leads through it can be told of.
responses = Table(
    "responses",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "resp_…"
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("previous_response_id", Text),
    Column("status", Text, nullable=False, index=True),
    Column("background", Boolean, nullable=False),
    Column("request", Json, nullable=False),  # the body, for one in the background that a restart interrupts
    Column("items", Json, nullable=False),  # what came in with it, each with an id
    Column("body", Json, nullable=False),  # the response
    Column("deleted_at", BigInteger),
    Index("ix_responses_listed", "project_id", "created_at", "seq"),
    Index("ix_responses_created_at", "created_at"),
    sqlite_autoincrement=True,
)

evals = Table(
    "evals",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "eval_…"
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("name", Text, nullable=False),
    Column("data_source_config", Json, nullable=False),
    Column("testing_criteria", Json, nullable=False),
    Column("metadata", Json),
    Column("deleted_at", BigInteger),
    Index("ix_evals_listed", "project_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

eval_runs = Table(
    "eval_runs",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "evalrun_…"
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("eval_id", Text, ForeignKey("evals.id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("data_source", Json, nullable=False),
    Column("metadata", Json),
    Column("status", Text, nullable=False, index=True),  # queued | in_progress | completed | canceled | failed
    Column("error", Json),
    Column("n_items", Integer),  # NULL until its data were read
    Column("summary", Json),  # NULL until it is over
    Column("deleted_at", BigInteger),
    Index("ix_eval_runs_listed", "eval_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

eval_items = Table(
    "eval_items",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),  # "outputitem_…"
    _project(),
    Column("created_at", BigInteger, nullable=False),
    Column("run_id", Text, ForeignKey("eval_runs.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),  # its line in the data
    Column("status", Text, nullable=False),  # pass | fail | error
    Column("item", Json, nullable=False),
    Column("sample", Json, nullable=False),
    Column("results", Json, nullable=False),
    Column("usage", Json, nullable=False),  # by model, the graders' too
    UniqueConstraint("run_id", "number"),
    Index("ix_eval_items_listed", "run_id", "created_at", "seq"),
    sqlite_autoincrement=True,
)

"""An adapter that a trainer left, on its way to be a model: checked, and kept under its digest where nothing takes it away."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from gateway.chat.bundle import TEMPLATE_FILE, TOKENIZER_FILE, Bundle
from gateway.engines.adapters import Adapter, AdapterRejected, check_adapter, immutable_name, link_adapter
from gateway.engines.catalog import TunedModel
from gateway.store.jobs import Job
from gateway.store.models import ModelRow


@dataclass(frozen=True)
class Candidate:
    """The row that it will have, and what engines and catalog need of it."""

    row: ModelRow
    adapter: Adapter
    bundle: Bundle

    def served(self) -> TunedModel:
        row = self.row
        projects = frozenset({row.project_id})
        return TunedModel(row.name, row.base, self.bundle, row.engine_name, row.created_at, row.owned_by, projects)


def keep_adapter(
    job: Job,
    of_base: Bundle | None,
    source: Path,
    adapters_dir: Path,
    *,
    base_digest: str,
    gguf: bool,
    max_rank: int,
    name: str,
    owned_by: str,
    step: int | None = None,
) -> Candidate:
    """Checks the adapter in `source` and links it to where it stays. Raises AdapterRejected. Blocks.

    `gguf` is whether llama.cpp serves the base; `of_base` is its bundle, where it is known.
    """
    check_adapter(source, base_digest, max_rank, gguf=gguf)
    digest, path = link_adapter(source, adapters_dir)
    bundle = read_bundle(path / "template", of_base)
    row = ModelRow(
        name=name,
        created_at=int(time.time()),
        base=job.base,
        adapter_digest=digest,
        adapter_path=str(path),
        engine_name=immutable_name(name, digest),
        template_digest=bundle.digest,
        job_id=job.id,
        owned_by=owned_by,
        step_number=step,
        project_id=job.project_id,
    )
    return Candidate(row, Adapter(row.engine_name, path, job.base, digest), bundle)


def read_bundle(folder: Path, of_base: Bundle | None) -> Bundle:
    """The bundle that the adapter was trained through; the base's own object where it is the same."""
    files = {name: (folder / name).read_bytes() for name in (TEMPLATE_FILE, TOKENIZER_FILE)}
    if of_base is not None and files == of_base.to_files():
        return of_base
    try:
        return Bundle.from_files(files)
    except (ValueError, TypeError, LookupError) as error:
        raise AdapterRejected(f"its template bundle cannot be read: {error}") from error

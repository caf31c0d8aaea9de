"""What training goes on from: the adapter of a tuned model, or of a checkpoint that is served, found by its name.

Its one rule: the adapter is trained further as it was made. Its rank, alpha and modules, its base and the bundle that its
conversations were rendered through stay; the files are checked again, and the job gets links of its own to them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection

from gateway.engines.adapters import AdapterRejected, check_adapter
from gateway.engines.catalog import Base, Catalog
from gateway.errors import Forbidden, ModelNotFound, RequestError
from gateway.jobdir import Lora, read_json
from gateway.store import jobs as job_statements
from gateway.store import models as model_statements
from gateway.store.database import Store
from gateway.store.models import ModelRow

START_FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Start:
    """`named_base` is what the new model's name says that it is tuned from: what the first of the line was."""

    named_base: str
    folder: Path
    lora: Lora

    def files(self) -> dict[str, Path]:
        """Each by its place in the job's folder."""
        return {f"start/{name}": self.folder / name for name in START_FILES}


async def find_start(store: Store, catalog: Catalog, name: str, base: Base, project_id: str) -> Start | None:
    """None for a base. RequestError for a tuned model that cannot be trained further, Forbidden for another project's."""
    if not catalog.is_tuned(name):
        return None

    def read(connection: Connection) -> tuple[ModelRow, str]:
        row = model_statements.select_named(connection, name)
        if row is None:  # deleted just now
            raise ModelNotFound(name)
        job = None if row.job_id is None else job_statements.select_job(connection, row.job_id)
        return row, row.base if job is None else job.named_base or job.model

    row, named_base = await store.read(read)
    if (
        row.project_id != project_id
    ):  # it may ask the model; the adapter of a job that learns nothing would be that model's
        raise Forbidden(f"'{name}' belongs to another project, which alone trains it further", param="model")
    folder = Path(row.adapter_path)
    lora = await asyncio.to_thread(_read_lora, folder, name, base)
    if row.template_digest != base.bundle.digest:
        raise RequestError(f"'{name}' was replaced while this job was being created; ask again.", param="model")
    return Start(named_base, folder, lora)


def _read_lora(folder: Path, name: str, base: Base) -> Lora:
    prepared = base.prepared
    try:
        check_adapter(folder, prepared.digest, gguf=prepared.gguf is not None)
        config = read_json(folder / START_FILES[1])
    except (AdapterRejected, FileNotFoundError) as error:
        said = error.message if isinstance(error, AdapterRejected) else f"{error.filename} is gone"
        raise RequestError(f"'{name}' cannot be trained further: {said}"[:2000], param="model") from error
    modules, alpha = config["target_modules"], config["lora_alpha"]
    return Lora(
        rank=config["r"],
        alpha=int(alpha) if float(alpha).is_integer() else alpha,
        dropout=float(config.get("lora_dropout") or 0.0),
        target_modules=modules if isinstance(modules, str) else ",".join(sorted(modules)),
        use_rslora=bool(config.get("use_rslora")),
    )

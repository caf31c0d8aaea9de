"""Adapters that `tunegate models add --adapter` has put into the data folder become models: checked, verified, published.

    DATA/imports/ID/    import.json {"name", "base", "created_at"} · adapter/, as training would have left it
                        refused.txt: why it is not served; it stays until it is added again or removed

Place in the flow: the command line writes, the running gateway takes up; a name that is imported again is a new version: the
catalog is flipped in one step, so that a reply is wholly the old one's or wholly the new one's, the old one is unloaded
when its last reply is over, and its files go with the next start. Its one rule is `publication`'s: no row before an
engine has verified it. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gateway.access import DEFAULT_PROJECT
from gateway.bases import PreparedBase
from gateway.engines.adapters import Adapter, AdapterRejected, check_adapter, immutable_name, link_adapter
from gateway.engines.catalog import Catalog, TunedModel
from gateway.engines.pool import Pool
from gateway.errors import TunegateError
from gateway.jobdir import read_json
from gateway.jobs.candidate import read_bundle
from gateway.store import models as statements
from gateway.store.database import Store
from gateway.store.models import ModelRow

logger = logging.getLogger("tunegate.imports")

WATCH_S = 1.0
LINGER_S = 5.0  # requests that found the old version are rendered still, and have not reached their engine
IMPORT_FILE, REFUSED_FILE = "import.json", "refused.txt"


@dataclass
class Imports:
    """`start()`, and at the end `await stop()`."""

    store: Store
    folder: Path
    adapters_dir: Path
    organization: str
    catalog: Catalog
    engines: Callable[[str], Pool]
    linger_s: float = LINGER_S
    _task: asyncio.Task[None] | None = None
    _drops: dict[str, asyncio.Task[None]] = field(default_factory=dict)  # of old versions, by the engine's name

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="imported adapters")

    async def stop(self) -> None:
        tasks = [*([] if self._task is None else [self._task]), *self._drops.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            for place, mark in await asyncio.to_thread(_waiting, self.folder):
                try:
                    old = await self._take_up(place, mark)
                except AdapterRejected as error:
                    await asyncio.to_thread(_refuse, place, mark, error.message)
                except TunegateError as error:  # its engine is not there yet, say: tried again
                    logger.info("import %s waits: %s", place.name, error.message)
                except Exception as error:  # the boundary of one import: it must not end the others
                    logger.exception("import %s", place.name)
                    await asyncio.to_thread(_refuse, place, mark, f"{error!r}")
                else:
                    if old is not None:
                        self._drops[old.engine_name] = asyncio.create_task(
                            self._drop(old), name=f"drop {old.engine_name}"
                        )
            await asyncio.sleep(WATCH_S)

    async def _take_up(self, place: Path, mark: int) -> ModelRow | None:
        """Publishes one; returns the version that it replaces. AdapterRejected when it may not be served."""
        asked = await asyncio.to_thread(read_json, place / IMPORT_FILE)
        name, base_name = str(asked["name"]), str(asked["base"])
        try:
            base = self.catalog.base(base_name)
        except KeyError:
            if name == base_name:
                raise AdapterRejected(f"'{name}' is the name of its own base") from None
            return None  # it may be on its way
        if not self.catalog.is_tuned(name) and any(
            served.name == name for served in self.catalog.models(DEFAULT_PROJECT)
        ):
            raise AdapterRejected(f"'{name}' is the name of a base or an alias; add it under another --name")
        old = await self.store.read(lambda connection: statements.select_model(connection, name))
        if old is not None and old.job_id is not None:
            raise AdapterRejected(f"'{name}' is the model of the job {old.job_id}; add it under another --name")
        engine = self.engines(base_name)
        adapter, row = await asyncio.to_thread(self._keep, place / "adapter", base.prepared, engine, name, base_name)
        if old is not None and old.adapter_digest == row.adapter_digest:
            await asyncio.to_thread(_remove, place, mark)
            return None
        if (leaving := self._drops.pop(adapter.engine_name, None)) is not None:  # the version before the last is back
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        report = await engine.ensure_adapter(adapter)
        if report is not None and report.warning:
            logger.warning("%s: %s", name, report.warning)
        bundle = await asyncio.to_thread(read_bundle, adapter.path / "template", base.bundle)
        await self.store.write(lambda connection: statements.replace_model(connection, row))
        self.catalog.publish(TunedModel(name, base_name, bundle, row.engine_name, row.created_at, row.owned_by))
        await asyncio.to_thread(_remove, place, mark)
        logger.info("%s is served%s", name, "" if old is None else f", in place of {old.engine_name}")
        return old

    def _keep(
        self, source: Path, prepared: PreparedBase, engine: Pool, name: str, base: str
    ) -> tuple[Adapter, ModelRow]:
        check_adapter(source, prepared.digest, engine.max_lora_rank, gguf=prepared.gguf is not None)
        digest, path = link_adapter(source, self.adapters_dir)
        template = str(read_json(path / "manifest.json")["template_digest"])
        row = ModelRow(
            name=name,
            created_at=int(time.time()),
            base=base,
            adapter_digest=digest,
            adapter_path=str(path),
            engine_name=immutable_name(name, digest),
            template_digest=template,
            job_id=None,
            owned_by=self.organization,
        )
        return Adapter(row.engine_name, path, base, digest), row

    async def _drop(self, old: ModelRow) -> None:
        await asyncio.sleep(self.linger_s)
        try:
            await self.engines(old.base).drop_adapter(old.engine_name)
        except TunegateError as error:
            logger.warning("%s is not unloaded: %s", old.engine_name, error.message)
        self._drops.pop(old.engine_name, None)


def _waiting(folder: Path) -> list[tuple[Path, int]]:
    """Imports that are whole and were not refused, oldest first, each with a mark: another has its place when that differs."""
    if not folder.is_dir():
        return []
    found: list[tuple[int, Path, int]] = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # added again, or removed, just now
            if (path / IMPORT_FILE).is_file() and not path.name.startswith(".") and not (path / REFUSED_FILE).exists():
                status = path.stat()
                found.append((status.st_mtime_ns, path, status.st_ino))
    return [(path, mark) for _, path, mark in sorted(found)]


def _is_same(place: Path, mark: int) -> bool:
    try:
        return place.stat().st_ino == mark
    except FileNotFoundError:
        return False


def _remove(place: Path, mark: int) -> None:
    if _is_same(place, mark):  # else the name was added again meanwhile: that one is taken up next
        shutil.rmtree(place, ignore_errors=True)


def _refuse(place: Path, mark: int, why: str) -> None:
    if not _is_same(place, mark):
        logger.info("the import %s was added again while it was looked at", place.name)
        return
    logger.error("the import %s is not served: %s", place.name, why)
    try:
        (place / REFUSED_FILE).write_text(why + "\n")
    except OSError as error:  # it is looked at again
        logger.error("the import %s cannot be marked as refused: %s", place.name, error)

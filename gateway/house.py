"""The objects of one running gateway, made in the order that they need each other and ended in the other.

Data folder → store → catalog → inference, supervisor; then, beside the running server, each base is prepared and its engine
started. What the database knows is read once here; from then on publication and deletion keep the catalog in step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway.bases import PreparedBase, prepare
from gateway.chat.bundle import Bundle
from gateway.engines.adapters import Adapter
from gateway.engines.attached import AttachedEngine
from gateway.engines.catalog import Base, Catalog, TunedModel
from gateway.engines.client import Deadlines
from gateway.engines.engine import Engine
from gateway.errors import EngineUnavailable, TunegateError
from gateway.inference import Inference
from gateway.jobs.preview import Previews
from gateway.jobs.supervisor import Supervisor
from gateway.settings import BaseSettings, Settings
from gateway.store import models as model_statements
from gateway.store.blobs import Blobs
from gateway.store.database import Store
from gateway.store.datadir import DataDir
from gateway.store.models import ModelRow
from gateway.store.sweep import sweep_all
from gateway.templates import Templates

logger = logging.getLogger("tunegate")


class House:
    """Everything that `app.py` hands to the routes. `async with` opens and closes it."""

    def __init__(self, settings: Settings, data_dir: DataDir) -> None:
        self.settings = settings
        self.data_dir = data_dir
        limits = settings.limits
        self.catalog = Catalog(Deadlines(limits.first_token_s, limits.between_tokens_s))
        self.inference = Inference(self.catalog, limits.requests_in_flight)
        self.blobs = Blobs(data_dir.blobs)
        self.templates = Templates(settings.templates, self.catalog)
        self.previews = Previews()
        self._engines: dict[str, Engine] = {}
        self._bundles: dict[str, Bundle] = {}
        self._starting: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self.store = await asyncio.to_thread(Store.open, self.data_dir.database)
        await sweep_all(self.store, self.blobs)
        await self.templates.open(self.store)
        self.supervisor = Supervisor(self.store, self.blobs, self.data_dir, self.settings, self.catalog, self.engine)
        for name, base in self.settings.bases.items():
            self._starting.append(asyncio.create_task(self._start_base(name, base), name=f"start {name}"))
        await self.supervisor.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        await self.supervisor.stop()
        self.templates.close()
        self.catalog.close()
        await asyncio.gather(*(engine.stop() for engine in self._engines.values()))
        await asyncio.to_thread(self.store.close)

    def engine(self, base: str) -> Engine:
        """The engine of a base that is spawned here. Raises EngineUnavailable while the base is being prepared."""
        engine = self._engines.get(base)
        if engine is None:
            raise EngineUnavailable(f"the base '{base}' is not started (yet)", retry_after_s=2)
        return engine

    async def _start_base(self, name: str, settings: BaseSettings) -> None:
        try:
            began = time.monotonic()
            folder = self.data_dir.bases / name
            template = self.templates.recipe(settings.template)
            prepared = await prepare(name, Path(settings.path), settings.template, folder, logger.info, template)
            bundle = await self._bundle(prepared.path)
            aliases = [alias for alias, target in self.settings.aliases.items() if target == name]
            context = min(settings.context_length or prepared.context_length, prepared.context_length)
            created_at = int((prepared.path / "base.json").stat().st_mtime)
            engine = await self._make_engine(name, settings, prepared)
            base = Base(name, bundle, engine, name, context, created_at, prepared)
            await self.templates.add_base(base, aliases, settings.options)
            for row in await self.store.read(lambda connection: model_statements.of_base(connection, name)):
                await self.publish(row)
            if isinstance(engine, Engine):
                await engine.start()
                await engine.wait_ready(600)
            logger.info("'%s' is ready after %.1f s", name, time.monotonic() - began)
        except TunegateError as error:
            logger.error("the base '%s' cannot be served: %s", name, error.message)
        except Exception:
            logger.exception("the base '%s' cannot be served", name)

    async def _make_engine(self, name: str, settings: BaseSettings, prepared: PreparedBase) -> Engine | AttachedEngine:
        if settings.engine_url is not None:
            return AttachedEngine(settings.engine_url, settings.engine_key or "")
        engine = Engine(
            prepared,
            self.data_dir.engines / name,
            context=settings.context_length,
            max_seqs=settings.max_seqs,
            threads=settings.threads,
        )
        rows = await self.store.read(lambda connection: model_statements.of_base(connection, name))
        engine.set_desired(Adapter(row.engine_name, Path(row.adapter_path), name, row.adapter_digest) for row in rows)
        self._engines[name] = engine
        return engine

    async def publish(self, row: ModelRow) -> None:
        """Serves a tuned model that the database has; its engine has it, or will when it is ready."""
        bundle = await self._bundle(Path(row.adapter_path) / "template")
        self.catalog.publish(TunedModel(row.name, row.base, bundle, row.engine_name, row.created_at, row.owned_by))

    async def _bundle(self, folder: Path) -> Bundle:
        """The bundle in a folder; adapters trained through the same one share it."""
        bundle = await asyncio.to_thread(_read_bundle, folder)
        return self._bundles.setdefault(bundle.digest, bundle)


def _read_bundle(folder: Path) -> Bundle:
    return Bundle.from_files({name: (folder / name).read_bytes() for name in ("template.json", "tokenizer.json")})

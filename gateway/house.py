"""The objects of one running gateway, made in the order that they need each other and ended in the other.

Data folder → store → catalog → inference, supervisor; then, beside the running server, each base is prepared and its engine
started. What the database knows is read once here; from then on publication and deletion keep the catalog in step.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from gateway.bases import PreparedBase, prepare, read_base
from gateway.batches.runner import Runner
from gateway.chat.bundle import Bundle
from gateway.engines.adapters import Adapter
from gateway.engines.catalog import Base, Catalog, TunedModel
from gateway.engines.client import Deadlines
from gateway.engines.memory import planned_context
from gateway.engines.pool import Pool
from gateway.engines.residents import Resident, Residents
from gateway.engines.routing_metrics import register_routing
from gateway.errors import EngineUnavailable, SettingsError, TunegateError
from gateway.evals.runner import EvalRunner
from gateway.exports import Exports
from gateway.fleet import Fleet
from gateway.grading.graders import Graders
from gateway.inference import Inference
from gateway.jobs.imports import Imports
from gateway.jobs.launcher import Launcher, child_environment
from gateway.jobs.preview import Previews
from gateway.jobs.standby import Standby
from gateway.jobs.supervisor import Supervisor
from gateway.keys import Keyring
from gateway.metering import Meter
from gateway.metrics import RequestMetrics
from gateway.models import added_names, is_added
from gateway.patience import PATIENCE_S
from gateway.responses import Responses
from gateway.settings import LLAMA_SEQS, BaseSettings, Settings, changed_names
from gateway.store import models as model_statements
from gateway.store import permissions
from gateway.store.blobs import Blobs
from gateway.store.database import Store
from gateway.store.datadir import DataDir
from gateway.store.models import ModelRow
from gateway.store.sweep import sweep_all
from gateway.templates import Templates

logger = logging.getLogger("tunegate")

WATCH_S = 2.0
METRICS_HOST = "127.0.0.1"


class House:
    """Everything that `app.py` hands to the routes. `async with` opens and closes it."""

    def __init__(
        self, settings: Settings, data_dir: DataDir, read_settings: Callable[[], Settings] | None = None
    ) -> None:
        """`read_settings` reads the settings again, for SIGHUP."""
        self.settings = settings
        self.registry = CollectorRegistry()
        self._read_settings = read_settings
        self.data_dir = data_dir
        limits = settings.limits
        deadlines = Deadlines(limits.first_token_s, limits.between_tokens_s)
        self.catalog = Catalog(deadlines)
        self.meter = Meter()
        self.inference = Inference(self.catalog, limits.requests_in_flight, self.meter)
        self.graders = Graders(self.inference)
        self.blobs = Blobs(data_dir.blobs)
        self.templates = Templates(settings.templates, self.catalog)
        self.previews = Previews()
        self.residents = Residents(limits.engine_memory_bytes, limits.engine_start_s)
        self.fleet = Fleet(data_dir.engines, settings.engines, self.catalog, deadlines)
        register_routing(self.registry, self.catalog)
        self._metrics: tuple[WSGIServer, Thread] | None = None
        self._bundles: dict[str, Bundle] = {}
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._added_are_known = asyncio.Event()
        self._started = asyncio.Event()  # every base that was there at the start is served, or cannot be

    async def __aenter__(self) -> Self:
        self.store = await asyncio.to_thread(Store.open, self.data_dir.database)
        await sweep_all(self.store, self.blobs)
        self.keyring = Keyring(self.store, self.data_dir.keys_stamp)
        await self.keyring.open()
        self.batches = Runner(
            self.store,
            self.blobs,
            self.keyring.caller_with,
            lambda: self.inference.live,
            self._started.is_set,
            lines_at_once=self.settings.limits.batch_lines,
            max_line_bytes=self.settings.limits.body_bytes,
        )
        self.exports = Exports(self.store, self.blobs, self.data_dir.path / "exports")
        await self.exports.open()
        await self.templates.open(self.store)
        self.supervisor = Supervisor(
            self.store,
            self.blobs,
            self.data_dir,
            self.settings,
            self.catalog,
            self.engine,
            Launcher(standby=self._standby(), tracking=self.settings.tracking),
            pools=self.residents.engines,
        )
        added = await asyncio.to_thread(added_names, self.data_dir.bases)
        await self.fleet.end_forgotten({*self.settings.bases, *added})
        await self.fleet.open()
        self.request_metrics = RequestMetrics(self.inference, self.meter, lambda: len(self.keyring))
        self.registry.register(self.request_metrics)
        if self.settings.metrics_port is not None:
            self._metrics = start_http_server(self.settings.metrics_port, METRICS_HOST, self.registry)
        self.residents.start()
        self.responses = Responses(self.store, self.inference, self._started)
        patient_graders = Graders(self.inference, patience_s=PATIENCE_S)
        self.evals = EvalRunner(self.store, self.blobs, self.inference, patient_graders, self._started)
        for name, base in self.settings.bases.items():
            if base.path is not None:
                self._begin(name, base)
        self._watching = asyncio.create_task(self._watch_added(), name="added models")
        self._telling = asyncio.create_task(self._tell_started(), name="started")
        self._metering = asyncio.create_task(self.meter.run(self.store), name="usage")
        await self.supervisor.start()
        await self.responses.start()
        await self.evals.start()
        self.imports = Imports(
            self.store,
            self.data_dir.path / "imports",
            self.data_dir.adapters,
            self.settings.organization,
            self.catalog,
            self.engine,
        )
        self.imports.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        starting = [self._watching, self._telling, *self._starting.values()]
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        await self.imports.stop()
        await self.batches.stop()
        await self.exports.stop()
        await self.evals.stop()
        await self.responses.stop()
        await self.supervisor.stop()
        self.templates.close()
        self.catalog.close()
        await self.residents.stop()
        await self.fleet.close()
        if self._metrics is not None:
            server, thread = self._metrics
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            await asyncio.to_thread(thread.join)
        await self.keyring.close()
        self._metering.cancel()
        await asyncio.gather(self._metering, return_exceptions=True)
        try:
            await self.meter.flush(self.store)
        except TunegateError as unwritten:
            logger.error("the last usage was not written: %s", unwritten.message)
        await asyncio.to_thread(self.store.close)

    def starting(self) -> list[str]:
        """The bases that are being prepared or whose engine is on its way."""
        return [name for name, task in self._starting.items() if not task.done()]

    def engine(self, base: str) -> Pool:
        """The engines of a base. Raises EngineUnavailable while the base is being prepared."""
        engine = self.residents.engine(base)
        if engine is None:
            raise EngineUnavailable(f"the base '{base}' is not started (yet)", retry_after_s=2)
        return engine

    async def reload(self) -> None:
        """Takes [[engines]] as the settings have it now; what else has changed is named. Bad settings change nothing."""
        if self._read_settings is None:
            return
        try:
            settings = await asyncio.to_thread(self._read_settings)
            if later := changed_names(self.settings, settings):
                logger.warning("Of the settings that changed, these are taken at the next start: %s", ", ".join(later))
            await self.fleet.change(settings.engines)
        except SettingsError as error:
            logger.error("The settings were not taken, and those before stay: %s", error.message)
            return
        for base in self.catalog.bases:
            self.residents.resize(base.name, self.fleet.memory_bytes(base.name))
        logger.info("[[engines]] is as the settings have it now")

    async def _tell_started(self) -> None:
        await self._added_are_known.wait()
        if self._starting:
            await asyncio.wait(self._starting.values())
        self._started.set()

    def _standby(self) -> Standby:
        jobs = self.settings.jobs
        return Standby(jobs.standby, jobs.trainer_threads, self.data_dir.path, lambda: child_environment(os.environ))

    def _begin(self, name: str, settings: BaseSettings) -> None:
        self._starting[name] = asyncio.create_task(self._start_base(name, settings), name=f"start {name}")

    async def _start_base(self, name: str, settings: BaseSettings) -> None:
        try:
            began = time.monotonic()
            prepared = await self._prepared(name, settings)
            bundle = await self._bundle(prepared.path)
            aliases = [alias for alias, target in self.settings.aliases.items() if target == name]
            whole = None if self.fleet.is_spawned(name) else prepared.context_length  # others have their own means
            context = planned_context(prepared, settings.context_length or whole, settings.max_seqs or LLAMA_SEQS)
            if context < prepared.context_length and settings.context_length is None:
                logger.info(
                    "'%s' gets a context of %d of its %d tokens, so that %d replies at once fit; context_length sets another",
                    name,
                    context,
                    prepared.context_length,
                    settings.max_seqs or LLAMA_SEQS,
                )
            created_at = int((prepared.path / "base.json").stat().st_mtime)
            engine = await self._make_engine(name, settings, prepared, context)
            base = Base(name, bundle, engine, name, context, created_at, prepared)
            await self.templates.add_base(base, aliases, settings.options)
            rows = await self.store.read(lambda connection: model_statements.of_base(connection, name))
            engine.first_use.offer(_adapter(row) for row in rows if row.step_number is not None)
            for row in rows:
                await self.publish(row)
            now = await self.store.read(lambda connection: model_statements.of_base(connection, name))
            for row in set(rows).difference(now):  # deleted meanwhile, or dropped by a job's newer checkpoint
                self.catalog.withdraw(row.name)
                engine.first_use.withdraw(row.engine_name)
            await self.residents.add(await asyncio.to_thread(self._resident, engine, settings))
            if engine.started:
                await engine.wait_ready(600)
            took_s = time.monotonic() - began
            what = "starts when it is asked for" if engine.resting else f"is ready after {took_s:.1f} s"
            logger.info("'%s' %s", name, what)
        except TunegateError as error:
            logger.error("the base '%s' cannot be served: %s", name, error.message)
        except Exception:
            logger.exception("the base '%s' cannot be served", name)

    async def _prepared(self, name: str, settings: BaseSettings) -> PreparedBase:
        folder = self.data_dir.bases / name
        if settings.path is None:
            return await asyncio.to_thread(read_base, folder)
        if await asyncio.to_thread(is_added, folder):
            raise SettingsError(
                f"[bases.{name}] has a `path`, and a model of that name was added with `tunegate models add`: drop the path, "
                f"or `tunegate models remove {name}`"
            )
        recipe = self.templates.recipe(settings.template)
        return await prepare(
            name, Path(settings.path), settings.template, folder, logger.info, recipe, kind=settings.type or "q4_0"
        )

    async def _make_engine(self, name: str, settings: BaseSettings, prepared: PreparedBase, context: int) -> Pool:
        engine = await self.fleet.pool(name, settings, prepared, context)
        rows = await self.store.read(lambda connection: model_statements.of_base(connection, name))
        engine.set_desired(_adapter(row) for row in rows if row.step_number is None)
        return engine

    def _resident(self, engine: Pool, settings: BaseSettings) -> Resident:
        added = settings.start is None and settings.path is None
        return Resident(
            engine,
            self.fleet.memory_bytes(engine.name),
            on_demand=(settings.start == "on_demand" or added) and self.fleet.is_spawned(engine.name),
            idle_unload_s=settings.idle_unload_s or None,
        )

    async def _watch_added(self) -> None:
        """Serves what `tunegate models add` has put into the data folder, and lets go of what `models remove` took away."""
        served: dict[str, tuple[int, int]] = {}
        while True:
            found = await asyncio.to_thread(_added, self.data_dir.bases)
            for name in [name for name, mark in served.items() if found.get(name) != mark]:
                logger.info("'%s' was removed", name)
                del served[name]
                await self._forget(name)
            for name, mark in found.items():
                settings = self.settings.bases.get(name) or BaseSettings()
                if name not in served and settings.path is None:
                    served[name] = mark
                    self._begin(name, settings)
            self._added_are_known.set()
            await asyncio.sleep(WATCH_S)

    async def _forget(self, name: str) -> None:
        if (starting := self._starting.pop(name, None)) is not None:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        self.templates.remove_base(name)
        await self.residents.remove(name)
        self.fleet.forget(name)

    async def publish(self, row: ModelRow) -> None:
        """Serves a tuned model that the database has; its engine has it, or will when it is ready."""
        bundle = await self._bundle(Path(row.adapter_path) / "template")
        granted = await self.store.read(lambda connection: permissions.projects_of(connection, row.name))
        projects = frozenset({row.project_id, *granted})
        tuned = TunedModel(row.name, row.base, bundle, row.engine_name, row.created_at, row.owned_by, projects)
        self.catalog.publish(tuned)

    async def _bundle(self, folder: Path) -> Bundle:
        """The bundle in a folder; adapters trained through the same one share it."""
        bundle = await asyncio.to_thread(_read_bundle, folder)
        return self._bundles.setdefault(bundle.digest, bundle)


def _adapter(row: ModelRow) -> Adapter:
    return Adapter(row.engine_name, Path(row.adapter_path), row.base, row.adapter_digest)


def _read_bundle(folder: Path) -> Bundle:
    return Bundle.from_files({name: (folder / name).read_bytes() for name in ("template.json", "tokenizer.json")})


def _added(bases: Path) -> dict[str, tuple[int, int]]:
    """The added models by name, each with a mark that changes when it is removed and added again."""
    found = {}
    for name, folder in added_names(bases).items():
        try:
            status = (folder / "base.json").stat()
        except OSError:  # removed just now
            continue
        found[name] = (status.st_ino, status.st_mtime_ns)
    return found

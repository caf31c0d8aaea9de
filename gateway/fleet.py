"""[[engines]] of the settings as running engines: which replicas a base has, and how they come and go with the settings.

Its rule: a replica is known by what it was made from. The same entry, the same place: it stays, whatever else changes. Runs
on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from gateway.bases import PreparedBase
from gateway.engine_settings import EngineSettings, engines_of
from gateway.engines.catalog import Catalog
from gateway.engines.client import Deadlines, Endpoint
from gateway.engines.engine import Engine
from gateway.engines.kinds import llama_engine, remote_engine, remote_llama_engine, vllm_engine
from gateway.engines.llama_launch import LlamaLaunch
from gateway.engines.memory import expected_memory
from gateway.engines.pool import Pool
from gateway.engines.replica import Replica
from gateway.engines.spawn import WorkerFolder
from gateway.engines.upstream import Upstream
from gateway.engines.vllm_launch import DEFAULT_MAX_RANK
from gateway.errors import SettingsError
from gateway.settings import LLAMA_SEQS, BaseSettings

logger = logging.getLogger("tunegate")

STRAY_GRACE_S = 6.0
NO_LAUNCH = LlamaLaunch("", Path(), "")  # like which no worker was started


@dataclass(frozen=True)
class Plan:
    """A replica that the settings ask for."""

    name: str
    entry: EngineSettings
    place: int = 0  # of those that are spawned for a base: the first, the second, …
    url: str | None = None

    def same(self, other: Plan) -> bool:
        """Whether one can stand for the other: how many more there are does not matter."""
        mine, its = (
            (plan.name, plan.url, msgspec.structs.replace(plan.entry, replicas=None, urls=[])) for plan in (self, other)
        )
        return mine == its


@dataclass(frozen=True)
class Served:
    """A base whose engines are made here."""

    settings: BaseSettings
    prepared: PreparedBase
    context: int
    pool: Pool
    plans: dict[Replica, Plan]


@dataclass(frozen=True)
class Step:
    """What other settings mean for one base."""

    served: Served
    stay: dict[Replica, Plan]
    leave: list[Replica]
    come: dict[Replica, Plan]


class Fleet:
    """`pool` makes the engines of a base, `open` the upstreams; `change` takes other settings; `close` at the end.

    `end_forgotten` comes first.
    """

    def __init__(self, folder: Path, engines: list[EngineSettings], catalog: Catalog, deadlines: Deadlines) -> None:
        """`folder` (DATA/engines) keeps what each spawned engine needs to be taken over."""
        self._folder = folder
        self._engines = engines
        self._catalog = catalog
        self._deadlines = deadlines
        self._served: dict[str, Served] = {}
        self._upstreams: dict[str, tuple[EngineSettings, Upstream]] = {}
        self._changing = asyncio.Lock()

    async def open(self) -> None:
        """From here on the catalog has the upstreams."""
        await self._set_upstreams(self._engines)

    async def end_forgotten(self, bases: Collection[str]) -> None:
        """Ends the workers that an earlier start left of bases that are none of these. Before `pool`."""
        keys = await asyncio.to_thread(
            lambda: list(self._folder.rglob("key"))
        )  # each written before its worker is started
        for key in keys:
            folder = key.parent.parent if key.parent.name.startswith("@") else key.parent
            if str(folder.relative_to(self._folder)) not in bases:
                await _end_strays(key.parent)

    async def close(self) -> None:
        await asyncio.gather(*(upstream.close() for _, upstream in self._upstreams.values()))

    async def pool(self, name: str, settings: BaseSettings, prepared: PreparedBase, context: int) -> Pool:
        """The replicas of a base that the settings ask for; none is started, and those that were asked for once are ended."""
        served = Served(settings, prepared, context, Pool(name), {})
        plans = plans_of(self._engines, name)
        served.plans.update({self._make(served, plan): plan for plan in plans})
        served.pool.replicas = tuple(served.plans)
        self._served[name] = served
        await self._end_left(name, {plan.place for plan in plans})
        return served.pool

    def forget(self, name: str) -> None:
        """A base that is not served any more."""
        self._served.pop(name, None)

    def memory_bytes(self, name: str) -> int:
        """What the engines of a base that are spawned here are expected to take together. Blocks: it looks at files."""
        served = self._served[name]
        settings, context = served.settings, served.context
        total = 0
        for replica, plan in list(served.plans.items()):
            if plan.url is None:
                known = [status.adapter.path for status in list(replica.engine.adapters.values())]
                kept = (
                    (settings.prefix_cache_mib, settings.adapters_in_memory, known)
                    if plan.entry.kind == "llama"
                    else ()
                )
                total += expected_memory(served.prepared, context, settings.max_seqs or LLAMA_SEQS, *kept)
        return total

    def is_spawned(self, name: str) -> bool:
        """Whether one engine of a base at least is spawned here."""
        return any(plan.url is None for plan in plans_of(self._engines, name))

    async def change(self, engines: list[EngineSettings]) -> None:
        """Replicas and upstreams come and go as other settings say. Returns when only last replies are waited for.

        Raises SettingsError, and nothing has changed, when an engine cannot be as they say.
        """
        async with self._changing:
            steps = [self._step(served, engines) for served in self._served.values()]
            self._engines = engines
            await self._set_upstreams(engines)
            await asyncio.gather(*(self._take(step) for step in steps if step.leave or step.come))

    def _step(self, served: Served, engines: list[EngineSettings]) -> Step:
        wanted = plans_of(engines, served.pool.name)
        before = {plan.entry.kind for plan in served.plans.values()}
        if before and wanted[0].entry.kind not in before:
            raise SettingsError(
                f"[[engines]]: {served.pool.name!r} is served by {before.pop()}; another kind needs other files, and is "
                "taken at the next start only"
            )
        stay = {replica: plan for replica, plan in served.plans.items() if any(map(plan.same, wanted))}
        leave = [replica for replica in served.plans if replica not in stay]
        missing = [plan for plan in wanted if not any(map(plan.same, stay.values()))]
        return Step(served, stay, leave, {self._make(served, plan): plan for plan in missing})

    async def _take(self, step: Step) -> None:
        served = step.served
        served.plans.clear()
        served.plans.update(step.stay | step.come)
        await served.pool.change(step.leave, list(step.come))

    async def _set_upstreams(self, engines: list[EngineSettings]) -> None:
        """One whose entry is as before stays as it is; one that is gone answers its last requests."""
        before = self._upstreams
        self._upstreams = {}
        for entry in engines:
            if entry.kind == "upstream":
                known = before.get(entry.model)
                if known is None or known[0] != entry:
                    made = await asyncio.to_thread(
                        Upstream, entry.model, entry.urls, entry.key, entry.served_name, self._deadlines
                    )
                    known = (entry, made)
                self._upstreams[entry.model] = known
        self._catalog.set_upstreams(upstream for _, upstream in self._upstreams.values())
        for name, (_, upstream) in before.items():
            if self._upstreams.get(name, (None, None))[1] is not upstream:
                await upstream.retire()

    async def _end_left(self, name: str, wanted: set[int]) -> None:
        """Ends the workers of a base that an earlier start left in places that nobody has any more."""
        folder = self._folder / name
        places = {1: folder} | {int(path.name[1:]): path for path in folder.glob("@*") if path.name[1:].isdigit()}
        for path in [path for place, path in places.items() if place not in wanted]:
            await _end_strays(path)

    def _make(self, served: Served, plan: Plan) -> Replica:
        return Replica(plan.name, self._engine(served, plan), plan.entry.served_name, has_place=plan.url is None)

    def _engine(self, served: Served, plan: Plan) -> Engine:
        settings, prepared, entry = served.settings, served.prepared, plan.entry
        if plan.url is not None:
            parts = urlsplit(plan.url)
            endpoint = Endpoint(parts.hostname or "", parts.port or 80, entry.key or "")
            if entry.kind == "llama":
                return remote_llama_engine(prepared, endpoint, served_name=entry.served_name, path_map=entry.paths)
            rank = entry.max_lora_rank or DEFAULT_MAX_RANK
            return remote_engine(
                prepared, endpoint, served_name=entry.served_name, path_map=entry.paths, max_lora_rank=rank
            )
        folder = self._folder / served.pool.name
        if plan.place > 1:
            folder /= f"@{plan.place}"  # no part of a base's name begins so
        if entry.kind == "vllm":
            return vllm_engine(
                prepared,
                folder,
                python=entry.python or "",
                arguments=entry.args,
                context=settings.context_length,
                max_seqs=settings.max_seqs,
            )
        return llama_engine(
            prepared,
            folder,
            context=served.context if prepared.kv_bytes_per_token or settings.context_length else None,
            max_seqs=settings.max_seqs or LLAMA_SEQS,
            threads=settings.threads,
            prefix_cache_mib=settings.prefix_cache_mib,
            adapters_in_memory=settings.adapters_in_memory,
        )


def plans_of(engines: list[EngineSettings], model: str) -> list[Plan]:
    """The replicas of a base: those spawned here are counted through all its entries, the others are their URLs."""
    plans: list[Plan] = []
    place = 0
    for entry in engines_of(engines, model):
        plans += [Plan(f"{model} at {url}", entry, url=url) for url in entry.urls]
        if not entry.urls:
            for _ in range(entry.replicas or 1):
                place += 1
                plans.append(Plan(f"{model} #{place}", entry, place=place))
    return plans


async def _end_strays(folder: Path) -> None:
    """Ends whatever worker runs in an engine's folder."""
    worker = WorkerFolder(folder)
    _, strays = await asyncio.to_thread(worker.find_worker, NO_LAUNCH)
    for handle in strays:
        logger.info("%s: ends process %d, which no settings ask for any more", folder, handle.pid)
        handle.watch()
        await handle.end(STRAY_GRACE_S)
        await asyncio.to_thread(worker.end_orphans, handle)
        handle.close()

"""[[engines]] of the settings as running engines: which replicas a base has, and how they come and go with the settings.

Its rule: a replica is known by what it was made from. The same entry, the same place: it stays, whatever else changes. Runs
on the gateway's loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gateway.bases import PreparedBase
from gateway.engine_settings import EngineSettings, engines_of
from gateway.engines.client import Endpoint
from gateway.engines.engine import Engine
from gateway.engines.kinds import llama_engine, remote_engine, remote_llama_engine, vllm_engine
from gateway.engines.memory import expected_memory
from gateway.engines.pool import Pool, Replica
from gateway.settings import LLAMA_SEQS, BaseSettings


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
            (plan.name, plan.url, entry.kind, entry.served_name, entry.key, entry.paths, entry.python, entry.args)
            for plan, entry in ((self, self.entry), (other, other.entry))
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


class Fleet:
    """`pool` makes the engines of a base; `change` takes other settings."""

    def __init__(self, folder: Path, engines: list[EngineSettings]) -> None:
        """`folder` (DATA/engines) keeps what each spawned engine needs to be taken over."""
        self._folder = folder
        self._engines = engines
        self._served: dict[str, Served] = {}
        self._changing = asyncio.Lock()

    def pool(self, name: str, settings: BaseSettings, prepared: PreparedBase, context: int) -> Pool:
        """The replicas of a base that the settings ask for; none is started."""
        served = Served(settings, prepared, context, Pool(name), {})
        self._served[name] = served
        for plan in plans_of(self._engines, name):
            served.plans[self._make(served, plan)] = plan
        served.pool.replicas = tuple(served.plans)
        return served.pool

    def forget(self, name: str) -> None:
        self._served.pop(name, None)

    def memory_bytes(self, name: str) -> int:
        """What the engines of a base that are spawned here are expected to take together."""
        served = self._served[name]
        each = expected_memory(served.prepared, served.context, served.settings.max_seqs or LLAMA_SEQS)
        return each * sum(plan.url is None for plan in served.plans.values())

    def is_spawned(self, name: str) -> bool:
        """Whether one engine of a base at least is spawned here."""
        return any(plan.url is None for plan in plans_of(self._engines, name))

    async def change(self, engines: list[EngineSettings]) -> None:
        """Replicas come and go as other settings say. Returns when only last replies are waited for."""
        async with self._changing:
            self._engines = engines
            await asyncio.gather(*(self._change(served) for served in self._served.values()))

    async def _change(self, served: Served) -> None:
        wanted = plans_of(self._engines, served.pool.name)
        leave = [replica for replica, plan in served.plans.items() if not any(plan.same(other) for other in wanted)]
        for replica in leave:
            del served.plans[replica]
        come = []
        for plan in wanted:
            if not any(plan.same(other) for other in served.plans.values()):
                come.append(replica := self._make(served, plan))
                served.plans[replica] = plan
        if leave or come:
            await served.pool.change(leave, come)

    def _make(self, served: Served, plan: Plan) -> Replica:
        served_name = plan.entry.served_name
        return Replica(plan.name, self._engine(served, plan), served_name)

    def _engine(self, served: Served, plan: Plan) -> Engine:
        settings, prepared, entry = served.settings, served.prepared, plan.entry
        if plan.url is not None:
            parts = urlsplit(plan.url)
            endpoint = Endpoint(parts.hostname or "", parts.port or 80, entry.key or "")
            make = remote_llama_engine if entry.kind == "llama" else remote_engine
            return make(prepared, endpoint, served_name=entry.served_name, path_map=entry.paths)
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

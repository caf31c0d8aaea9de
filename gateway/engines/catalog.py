"""Public name → what serves it. The database's cache in memory: a name is looked up whole and never parsed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gateway.access import DEFAULT_PROJECT
from gateway.bases import PreparedBase
from gateway.chat.bundle import Bundle
from gateway.engines.client import Deadlines, EngineClient
from gateway.engines.pool import Pool
from gateway.engines.upstream import Upstream
from gateway.errors import EngineUnavailable, ModelNotFound, RequestError


@dataclass(frozen=True, slots=True)
class Served:
    """A model as a request finds it."""

    name: str
    base: str
    bundle: Bundle
    client: EngineClient
    engine_model: str  # its name at the engine
    context_length: int
    created_at: int
    owned_by: str
    projects: frozenset[str] | None = None  # that see it; None: every one


@dataclass(frozen=True, slots=True)
class Base:
    """A base model that is served, and what tuning it needs."""

    name: str
    bundle: Bundle
    engine: Pool
    engine_model: str
    context_length: int
    created_at: int
    prepared: PreparedBase


@dataclass(frozen=True, slots=True)
class TunedModel:
    """A published adapter: a row of the models table with its bundle read."""

    name: str
    base: str
    bundle: Bundle
    engine_name: str
    created_at: int
    owned_by: str
    projects: frozenset[str] = frozenset({DEFAULT_PROJECT})  # that see it


class Catalog:
    """Filled at start from settings and database, then kept in step by publication and deletion."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._bases: dict[str, Base] = {}
        self._clients: dict[str, EngineClient] = {}
        self._aliases: dict[str, str] = {}
        self._served: dict[str, Served] = {}
        self._tuned: set[str] = set()
        self._upstreams: dict[str, Upstream] = {}

    def add_base(self, base: Base, aliases: Iterable[str] = ()) -> None:
        """Serves a base under its name and its aliases."""
        client = EngineClient(base.engine, self._deadlines)
        self._bases[base.name], self._clients[base.name] = base, client
        for name in (base.name, *aliases):
            self._aliases[name] = base.name
            self._served[name] = Served(
                name,
                base.name,
                base.bundle,
                client,
                base.engine_model,
                base.context_length,
                base.created_at,
                "tunegate",
            )

    def remove_base(self, name: str) -> None:
        """No new request finds a base, its aliases or its tuned models any more; those that run are not touched."""
        if self._bases.pop(name, None) is None:
            return
        self._clients.pop(name).close()
        self._aliases = {alias: base for alias, base in self._aliases.items() if base != name}
        for gone in [served.name for served in self._served.values() if served.base == name]:
            self.withdraw(gone)

    def set_upstreams(self, upstreams: Iterable[Upstream]) -> None:
        """The models that other servers answer for, in place of those before."""
        self._upstreams = {upstream.name: upstream for upstream in upstreams}

    def upstream(self, name: object) -> Upstream | None:
        """The upstream of that name; None for every other model."""
        return self._upstreams.get(name) if isinstance(name, str) else None

    @property
    def upstreams(self) -> list[Upstream]:
        return list(self._upstreams.values())

    def rebundle(self, name: str, bundle: Bundle) -> None:
        """Renders a base, under all its names, through another bundle from now on; its tuned models keep theirs."""
        self._bases[name] = replace(self._bases[name], bundle=bundle)
        for alias, base in self._aliases.items():
            if base == name:
                self._served[alias] = replace(self._served[alias], bundle=bundle)

    def publish(self, model: TunedModel) -> None:
        """Serves a tuned model that an engine has loaded and verified, or will when it is first asked for."""
        base = self._bases[model.base]
        self._tuned.add(model.name)
        self._served[model.name] = Served(
            model.name,
            model.base,
            model.bundle,
            self._clients[model.base],
            model.engine_name,
            base.context_length,
            model.created_at,
            model.owned_by,
            model.projects,
        )

    def withdraw(self, name: str) -> None:
        """No new request finds a tuned model any more; those that run are not touched."""
        self._tuned.discard(name)
        self._served.pop(name, None)

    def show(self, name: str, projects: frozenset[str]) -> None:
        """Lets these projects, and no other, see a tuned model from now on."""
        if name in self._tuned:
            self._served[name] = replace(self._served[name], projects=projects)

    def resolve(self, name: str, project_id: str) -> Served:
        """What serves `name`. Raises ModelNotFound; EngineUnavailable for an adapter that its engine does not serve now."""
        served = self.model(name, project_id)
        if name in self._tuned:
            engine, name_there = self._bases[served.base].engine, served.engine_model
            if engine.ready and not engine.serves(name_there) and name_there not in engine.first_use:
                raise EngineUnavailable(
                    f"the engine does not serve '{name}' at present; its log says why", retry_after_s=5
                )
        return served

    def model(self, name: str, project_id: str) -> Served:
        """What is known of `name`, whether or not its engine can be asked now. Raises ModelNotFound.

        What another project tuned is not there, in the very same words.
        """
        served = self._served.get(name)
        if served is None or (served.projects is not None and project_id not in served.projects):
            raise self._unknown(name)
        return served

    def base_for_tuning(self, name: str, project_id: str) -> Base:
        """The base behind a base's own name, an alias, or a tuned model, with the bundle that the latter keeps for ever.

        Raises ModelNotFound.
        """
        served = self.model(name, project_id)
        if name in self._tuned:
            return replace(self._bases[served.base], bundle=served.bundle)
        base = self._aliases.get(name)
        if base is None:
            raise self._unknown(name)
        return self._bases[base]

    def base(self, name: str) -> Base:
        """The base of that very name. Raises KeyError."""
        return self._bases[name]

    def _unknown(self, name: str) -> RequestError:
        if name in self._upstreams:
            return RequestError(
                f"'{name}' is answered for by another server, which is only passed chat, completions and embeddings; it "
                f"cannot be tuned or looked into here. Bases are: {', '.join(self._bases)}",
                param="model",
            )
        return ModelNotFound(name)

    def is_tuned(self, name: str) -> bool:
        return name in self._tuned

    def models(self, project_id: str) -> list[Served]:
        """All that a project can ask, bases first, then by age."""
        seen = (s for s in self._served.values() if s.projects is None or project_id in s.projects)
        return sorted(seen, key=lambda served: (served.name in self._tuned, served.created_at))

    @property
    def bases(self) -> list[Base]:
        return list(self._bases.values())

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

"""Which templates there are, and which one each base is rendered through.

    built-in          what `gateway.chat` knows by name
    settings          [templates.NAME] of the settings file, over the built-in ones
    api               POST /v1/templates, kept in the store, over both

A base is rendered through the bundle it was prepared with, unless its settings name a template that was registered: then
through that one, from the moment of its registration on. Tuned models are not touched: each keeps the bundle in its adapter.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from gateway.chat.bundle import TOKENIZER_FILE, Bundle, bundle_of
from gateway.chat.registry import registered_templates, template_from_source
from gateway.chat.templates import Template
from gateway.chat.validation import validate
from gateway.engines.catalog import Base, Catalog
from gateway.errors import NotFound, RequestError, SettingsError
from gateway.settings import TemplateSettings
from gateway.store import templates as statements
from gateway.store.database import Store
from gateway.store.templates import TemplateRow
from gateway.wire.templates import OWN_TEMPLATE, Registration, fastchat_source, jinja_source, template_name

Origin = Literal["built-in", "settings", "api", "model"]
VALIDATION_TIMEOUT_S = 10.0
MAX_REGISTERED = 1000


@dataclass(frozen=True)
class Entry:
    """A template under its name; `version` changes with anything in it."""

    name: str
    kind: str
    source: Mapping[str, Any]
    origin: Origin
    created_at: int | None = None
    overrides: Origin | None = None  # what the name stands for without it

    @cached_property
    def version(self) -> str:
        """The digest of all that the template is made of, "sha256:…"."""
        return source_version(self.kind, self.source)


class Templates:
    """The registry of a running gateway. Every change is stored before it is seen, one at a time."""

    def __init__(self, settings: Mapping[str, TemplateSettings], catalog: Catalog) -> None:
        self._catalog = catalog
        self._built_in = {name: _built_in(name, template) for name, template in registered_templates().items()}
        self._settings = settings_entries(settings)
        self._api: dict[str, Entry] = {}
        self._prepared: dict[str, Bundle] = {}  # by base
        self._changing = asyncio.Lock()
        # A thread of its own: a template that takes its time keeps nobody but the next registration waiting.
        self._validator = ThreadPoolExecutor(1, thread_name_prefix="template")

    async def open(self, store: Store) -> None:
        """Reads what was registered before."""
        self._store = store
        for row in await store.read(statements.list_templates):
            self._api[row.name] = self._entry(row)

    def close(self) -> None:
        self._validator.shutdown(wait=False, cancel_futures=True)

    def registered(self, name: str) -> Entry | None:
        """What settings or API say of the name; None where they say nothing."""
        return self._api.get(name) or self._settings.get(name)

    def entries(self) -> Iterator[Entry]:
        """Every template that a name stands for, registered ones first, then those that models brought."""
        seen: set[str] = set()
        for shelf in (self._api, self._settings, self._built_in):
            for name, entry in shelf.items():
                if name not in seen:
                    seen.add(name)
                    yield entry
        for base in self._catalog.bases:
            if base.prepared.template == OWN_TEMPLATE:
                template = base.bundle.template
                yield Entry(f"{base.name}:{OWN_TEMPLATE}", template.kind, template.source(), "model")

    def entry(self, name: str) -> Entry:
        """Raises NotFound."""
        for entry in self.entries():
            if entry.name == name:
                return entry
        raise NotFound(f"There is no template '{name[:200]}'. GET /v1/templates lists them.", param="name")

    def rendered_through(self, entry: Entry) -> list[tuple[str, str]]:
        """The bases that an entry is in use for, each with the digest of its bundle."""
        wanted = [base for base in self._catalog.bases if _entry_name(base) == entry.name]
        return [(base.name, base.bundle.digest) for base in wanted]

    def recipe(self, name: str) -> dict[str, Any] | None:
        """What the preparation of a base needs for a template that is not built in; None for one that is."""
        entry = self.registered(name)
        return None if entry is None or name in self._built_in else {"kind": entry.kind, "source": dict(entry.source)}

    async def add_base(self, base: Base, aliases: Iterable[str], options: Mapping[str, Any]) -> None:
        """Puts a base as it was prepared into the catalog, rendered through what its template's name stands for now.

        `options` are its render options. Raises SettingsError when they or a registered template do not fit it.
        """
        async with self._changing:
            if options:
                base = replace(base, bundle=await asyncio.to_thread(_with_options, base.bundle, options))
            self._prepared[base.name] = base.bundle
            entry = self.registered(base.prepared.template)
            if entry is not None:
                try:
                    base = replace(base, bundle=await self._validate(entry, base.bundle))
                except RequestError as error:
                    raise SettingsError(error.message) from error
            self._catalog.add_base(base, aliases)

    async def register(self, asked: Registration) -> Entry:
        """Stores the template and renders the bases that name it through it, from now on.

        RequestError when the name is taken and `override` is not asked for, or when the template fits no base, or not one of
        those that name it. Asking again for what is there already changes nothing.
        """
        async with self._changing:
            source = _written(asked.kind, asked.source)
            current = self.registered(asked.name) or self._built_in.get(asked.name)
            if current is not None and (current.kind, current.source) == (asked.kind, source):
                return current
            if current is not None and not asked.override:
                raise RequestError(
                    f"the name '{asked.name}' is taken by a template ({current.origin}, {current.version}); send "
                    '"override": true to replace it on purpose, or take another name',
                    param="override",
                    code="template_exists",
                )
            if asked.name not in self._api and len(self._api) >= MAX_REGISTERED:
                raise RequestError(f"{MAX_REGISTERED} templates are registered, as many as may; delete one first")
            row = TemplateRow(asked.name, int(time.time()), asked.kind, source)
            entry = self._entry(row)
            dressed = await self._fit(entry)
            await self._store.write(lambda connection: statements.put_template(connection, row))
            self._api[row.name] = entry
            self._rebundle(dressed)
            return entry

    async def remove(self, name: str) -> None:
        """Takes a template of the API away; the bases that name it go back to what the name stood for before.

        NotFound, or RequestError when it is not of the API or a base would be left without.
        """
        async with self._changing:
            if name not in self._api:
                entry = self.entry(name)
                raise RequestError(
                    f"the template '{name}' is not one that was registered through the API ({entry.origin}); it cannot "
                    "be deleted here",
                    param="name",
                )
            beneath = self._settings.get(name) or self._built_in.get(name)
            users = [base for base in self._catalog.bases if base.prepared.template == name]
            if users and beneath is None:
                raise RequestError(
                    f"the base '{users[0].name}' is rendered through the template '{name}'; give it another in the "
                    "settings first",
                    param="name",
                )
            dressed = {base.name: await self._beneath(base.name, beneath) for base in users if beneath is not None}
            await self._store.write(lambda connection: statements.remove_template(connection, name))
            del self._api[name]
            self._rebundle(dressed)

    async def _beneath(self, base: str, entry: Entry) -> Bundle:
        """What a base is rendered through once an override is gone; under a built-in name it was prepared with that."""
        prepared = self._prepared[base]
        return prepared if entry.origin == "built-in" else await self._validate(entry, prepared)

    async def _fit(self, entry: Entry) -> dict[str, Bundle]:
        """The bundles of the bases that name the template. Raises RequestError unless it fits them all, or any if none does."""
        users = [base for base in self._catalog.bases if base.prepared.template == entry.name]
        dressed = {base.name: await self._validate(entry, self._prepared[base.name]) for base in users}
        if dressed:
            return dressed
        others = [self._prepared[base.name] for base in self._catalog.bases]
        if not others:
            raise RequestError("no base is ready yet that the template could be tried on; try again shortly")
        refusal: RequestError | None = None
        for prepared in others:
            try:
                await self._validate(entry, prepared)
            except RequestError as error:
                refusal = refusal or error
            else:
                return {}
        assert refusal is not None
        raise refusal

    async def _validate(self, entry: Entry, prepared: Bundle) -> Bundle:
        """The entry with a base's tokenizer, tried out on a thread in bounded time. Raises RequestError."""
        loop = asyncio.get_running_loop()
        working = loop.run_in_executor(self._validator, compose, entry.kind, entry.source, prepared)
        try:
            return await asyncio.wait_for(working, VALIDATION_TIMEOUT_S)
        except TimeoutError:
            raise RequestError(
                f"the template '{entry.name}' was not through its checks after {VALIDATION_TIMEOUT_S:g} s",
                param="source",
            ) from None
        except (ValueError, TypeError, LookupError) as error:
            reason = str(error.args[0]) if error.args else type(error).__name__
            raise RequestError(f"the template '{entry.name}' does not work: {reason}"[:2000], param="source") from error

    def _rebundle(self, dressed: Mapping[str, Bundle]) -> None:
        for base, bundle in dressed.items():
            self._catalog.rebundle(base, bundle)

    def _entry(self, row: TemplateRow) -> Entry:
        beneath = self._settings.get(row.name) or self._built_in.get(row.name)
        overrides = beneath.origin if beneath else None
        return Entry(row.name, row.kind, row.source, "api", row.created_at, overrides)


def compose(kind: str, source: Mapping[str, Any], of: Bundle) -> Bundle:
    """A template with the tokenizer and the end tokens of a base's bundle. Raises ValueError when they do not fit.

    Tokens that a Jinja template may name and that were not given are the model's.
    """
    own = dict(source)
    if kind == "jinja":
        own["tokens"] = _tokens(of) | dict(source["tokens"])
    template = template_from_source(kind, own)
    if problems := validate(template, of.tokenizer, of.eos_ids):
        raise ValueError("; ".join(problems))
    return bundle_of(template, of.to_files()[TOKENIZER_FILE], of.eos_ids, of.options)


def settings_entries(templates: Mapping[str, TemplateSettings]) -> dict[str, Entry]:
    """The templates of the settings file. Raises SettingsError that names the key."""
    return {name: _settings_entry(name, template) for name, template in templates.items()}


def source_version(kind: str, source: Mapping[str, Any]) -> str:
    """The digest of a template's kind and source, "sha256:…"."""
    canonical = json.dumps([kind, dict(source)], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(canonical.encode('utf-8', 'surrogatepass')).hexdigest()}"


def _settings_entry(name: str, settings: TemplateSettings) -> Entry:
    built_in = name in registered_templates()
    try:
        template_name(name)
        if settings.jinja is not None:
            kind, source = "jinja", jinja_source(name, settings.jinja, settings.tokens, settings.options)
        else:
            kind, source = "fastchat", fastchat_source(name, settings.fastchat_fields())
        if built_in and not settings.override:
            raise RequestError(
                "there is a built-in template of this name; write `override = true` to replace it on purpose, or take "
                "another name"
            )
        source = _written(kind, source)
    except RequestError as error:
        raise SettingsError(f"[templates.{name!r}]: {error.message}") from error
    return Entry(name, kind, source, "settings", overrides="built-in" if built_in else None)


def _written(kind: str, source: dict[str, Any]) -> dict[str, Any]:
    """The source as the template itself writes it down. Raises RequestError."""
    try:
        return template_from_source(kind, source).source()
    except ValueError as error:
        raise RequestError(str(error), param="source") from error


def _built_in(name: str, template: Template) -> Entry:
    return Entry(name, template.kind, template.source(), "built-in")


def _entry_name(base: Base) -> str:
    name = base.prepared.template
    return f"{base.name}:{OWN_TEMPLATE}" if name == OWN_TEMPLATE else name


def _with_options(bundle: Bundle, options: Mapping[str, Any]) -> Bundle:
    try:
        return bundle.with_options(options)
    except ValueError as error:
        raise SettingsError(f"its render options cannot be used: {error}") from error


def _tokens(bundle: Bundle) -> dict[str, str]:
    """The special tokens of a model: those its own template named, or its first and its last."""
    if bundle.template.kind == "jinja":
        tokens = bundle.template.source().get("tokens")
        if isinstance(tokens, dict):
            return {str(name): str(token) for name, token in tokens.items()}
    tokenizer = bundle.tokenizer
    named = {"bos_token": tokenizer.prefix_ids[:1], "eos_token": list(bundle.eos_ids[:1])}
    return {name: tokenizer.token_bytes(ids[0]).decode(errors="replace") for name, ids in named.items() if ids}

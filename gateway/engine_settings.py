"""[[engines]] of the settings: who serves which model. Checked entry by entry, and then together.

Its one rule: a host, a path or a key comes from here and never from a request, so each is looked at before anything starts. A
message says the value, the rule and the fix, and never a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, urlsplit

import msgspec

from gateway.errors import SettingsError

MOST_REPLICAS = 64
KEY_LIMIT = 4096


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One entry of [[engines]]. A base that none names is served by one llama worker."""

    kind: Literal["llama", "vllm", "upstream"]
    model: str  # the base's name; of an upstream, the name that clients ask for
    replicas: int | None = None  # how many are spawned; None: 1
    urls: list[str] = []  # those that run already: none is spawned
    served_name: str | None = None  # what the servers at `urls` call the model; None: as `model`
    key: str | None = None  # that they ask for; once it is read, wherever it came from
    key_file: str | None = None
    key_env: str | None = None
    paths: dict[str, str] = {}  # a folder here = the same folder as the servers at `urls` see it
    max_lora_rank: int | None = (
        None  # that the vLLMs at `urls` were started with (they do not tell); None: vLLM's default
    )
    python: str | None = None  # of the environment that vLLM is installed in
    args: list[str] = []  # further arguments of a spawned vLLM

    def __repr__(self) -> str:
        return f"EngineSettings({self.kind} for {self.model!r})"  # without its key


def complete_engine(number: int, engine: EngineSettings, folder: Path, environ: Mapping[str, str]) -> EngineSettings:
    """The entry with its key read and its paths absolute (seen from `folder`). Raises SettingsError."""
    where = f"[[engines]] entry {number} (model {engine.model[:200]!r})"
    if not engine.model or len(engine.model) > 200:
        raise SettingsError(f"{where}: `model` has 1 to 200 characters; name the base that it serves")
    _check_fields(where, engine)
    for url in engine.urls:
        _check_url(where, engine.kind, url)
    if len({_normal(url) for url in engine.urls}) < len(engine.urls):
        raise SettingsError(f"{where}: `urls` names a server twice; a replica is named once")
    python = None if engine.python is None else str((folder / Path(engine.python).expanduser()).absolute())
    if python is not None and not Path(python).is_file():
        raise SettingsError(
            f"{where}: python = {engine.python!r} is no file; name the python of vLLM's own environment"
        )
    for here, there in engine.paths.items():
        if not Path(here).is_absolute() or not Path(there).is_absolute():
            raise SettingsError(f"{where}: paths has {here!r} = {there!r}; both are absolute folders, here and there")
    return msgspec.structs.replace(
        engine,
        urls=[_normal(url) for url in engine.urls],
        key=_read_key(where, engine, folder, environ),
        key_file=None,
        key_env=None,
        python=python,
    )


def check_engines(engines: Iterable[EngineSettings], is_base: Callable[[str], bool], aliases: set[str]) -> None:
    """What the entries must be together, and beside the bases. Raises SettingsError."""
    by_model: dict[str, list[EngineSettings]] = {}
    for engine in engines:
        by_model.setdefault(engine.model, []).append(engine)
    for model, entries in by_model.items():
        kinds = sorted({entry.kind for entry in entries})
        if len(kinds) > 1:
            raise SettingsError(
                f"[[engines]]: {model!r} has engines of the kinds {' and '.join(kinds)}; one model is served by one kind, "
                "since each computes a little differently. Give one of them another model"
            )
        urls = [url for entry in entries for url in entry.urls]
        if len(set(urls)) < len(urls):
            raise SettingsError(f"[[engines]]: two entries of {model!r} name the same url; a replica is named once")
        if kinds == ["upstream"]:
            if is_base(model) or model in aliases:
                raise SettingsError(
                    f"[[engines]]: an upstream is named {model!r}, which is a base or an alias already; give it another "
                    "`model` (what the upstream calls it is its `served_name`)"
                )
            if len(entries) > 1:
                raise SettingsError(f"[[engines]]: {model!r} has two upstream entries; put all `urls` into one")
        elif not is_base(model):
            raise SettingsError(
                f"[[engines]]: {model!r} is no base; add [bases.{model!r}] with its `path` (an engine needs the model's "
                "folder here for its tokenizer), or write kind = 'upstream' to pass requests on as they are"
            )


def _check_fields(where: str, engine: EngineSettings) -> None:
    """What each kind takes, and what it does not."""
    given = {name for name in engine.__struct_fields__ if getattr(engine, name) not in (None, [], {})}
    spawned = not engine.urls
    if engine.kind == "upstream" and spawned:
        raise SettingsError(f"{where}: an upstream needs `urls`, such as ['https://api.example.com/v1']")
    if engine.replicas is not None and not 1 <= engine.replicas <= MOST_REPLICAS:
        raise SettingsError(f"{where}: replicas = {engine.replicas}; it is 1 to {MOST_REPLICAS}")
    if engine.max_lora_rank is not None and engine.max_lora_rank < 1:
        raise SettingsError(f"{where}: max_lora_rank = {engine.max_lora_rank}; it is what vLLM was given, 1 at least")
    if len(engine.urls) > MOST_REPLICAS:
        raise SettingsError(f"{where}: {len(engine.urls)} urls; there may be {MOST_REPLICAS}")
    if engine.kind == "vllm" and spawned and engine.python is None:
        raise SettingsError(
            f"{where}: a vLLM that is to be spawned needs `python`, that of the environment it is installed in "
            "(for one that runs already, give `urls`)"
        )
    of_urls = {"served_name", "key", "key_file", "key_env", "paths", "max_lora_rank"}
    wrong = given & (of_urls if spawned else {"replicas", "python", "args"})
    if engine.kind == "llama":
        wrong |= given & {"python", "args", "max_lora_rank"}
    if engine.kind == "upstream":
        wrong |= given & {"paths", "max_lora_rank"}
    if wrong:
        what = "that is spawned" if spawned else "at `urls`"
        raise SettingsError(f"{where}: `{min(wrong)}` has no meaning for kind = {engine.kind!r} {what}; leave it out")
    if len(given & {"key", "key_file", "key_env"}) > 1:
        raise SettingsError(f"{where}: give one of `key`, `key_file` and `key_env`")


def _check_url(where: str, kind: str, url: str) -> None:
    upstream = kind == "upstream"
    rule = "http(s)://HOST[:PORT]/PATH, such as https://api.example.com/v1" if upstream else "http://HOST:PORT"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise SettingsError(f"{where}: the url {url[:200]!r} cannot be read; it is {rule}") from None
    if parts.username is not None or parts.password is not None:
        raise SettingsError(f"{where}: a url holds a user or a password; it is {rule}, and the key goes into `key`")
    plain = url.isascii() and url.isprintable() and " " not in url and not parts.query and not parts.fragment
    schemes = ("http", "https") if upstream else ("http",)
    whole = parts.scheme in schemes and bool(parts.hostname) and port != 0
    if not plain or not whole or (not upstream and (port is None or parts.path.strip("/"))):
        raise SettingsError(f"{where}: the url {url[:200]!r} is not {rule}")


def _normal(url: str) -> str:
    parts: SplitResult = urlsplit(url)
    return parts._replace(netloc=parts.netloc.lower(), path=parts.path.rstrip("/")).geturl()


def _read_key(where: str, engine: EngineSettings, folder: Path, environ: Mapping[str, str]) -> str | None:
    key, source = engine.key, "`key`"
    if engine.key_file is not None:
        path = (folder / Path(engine.key_file).expanduser()).absolute()
        source = f"key_file = {engine.key_file!r}"
        try:
            key = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise SettingsError(f"{where}: {source} cannot be read as text of one line: {error}") from None
    elif engine.key_env is not None:
        source = f"key_env = {engine.key_env!r}"
        key = environ.get(engine.key_env)
        if key is None:
            raise SettingsError(f"{where}: {source}, and there is no such variable in the environment")
    if key is not None and not (0 < len(key) <= KEY_LIMIT and key.isascii() and key.isprintable() and " " not in key):
        raise SettingsError(
            f"{where}: the key that {source} gives is no key: printable characters without spaces, in one line"
        )
    return key


def engines_of(engines: Sequence[EngineSettings], model: str) -> list[EngineSettings]:
    """The entries of a model; one llama worker where there is none."""
    return [engine for engine in engines if engine.model == model] or [EngineSettings(kind="llama", model=model)]

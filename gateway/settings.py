"""What the operator may set: a TOML file and TUNEGATE_… environment variables, read once; unknown keys refuse to start.

Every setting has a heading in SETTINGS.md; a test holds that.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from gateway.engine_settings import EngineSettings, check_engines, complete_engine
from gateway.errors import SettingsError
from gateway.tracking_settings import TrackingSettings, complete_tracking

LLAMA_SEQS = 8
DEMO_MODEL = "tunegate-demo"
DEMO_MODEL_PATH = Path(__file__).resolve().parent.parent / "deploy" / "demo_model"

CacheMiB = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
AdapterCount = Annotated[int, msgspec.Meta(ge=1, le=4096)]


LISTS = ("hosts", "ignored_fields", "every_job")  # that only the file can hold


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file: frozen, and no key is taken that it does not name."""


class BaseSettings(Section, frozen=True):
    """A base model: a folder with config.json, tokenizer.json and safetensors, or a .gguf file; and how it is served."""

    path: str | None = None  # None: it was added with `tunegate models add`
    template: str = "vicuna_v1.1"
    type: str | None = None  # of the weights that are served; None: q4_0, or hf where vLLM serves it
    options: dict[str, Any] = {}  # render options, over the template's own
    context_length: int | None = None  # None: what the model's config says
    max_seqs: int | None = None  # sequences in one batch; None: LLAMA_SEQS, or vLLM's own number
    threads: int | None = None  # None: all processors
    prefix_cache_mib: CacheMiB = 512  # for prompts that were computed before; 0: none
    adapters_in_memory: AdapterCount = 16  # of the tuned models; the others are loaded when they are asked for
    start: Literal["always", "on_demand"] | None = None  # None: always, or on demand when it was added
    idle_unload_s: float = 900.0  # of one that is started on demand; 0: never


class TemplateSettings(Section, frozen=True):
    """A chat template: `jinja`, or the fields of a fastchat Conversation."""

    jinja: str | None = None  # the text, or the path of a file that holds it
    tokens: dict[str, str] = {}  # bos_token, eos_token, … as the Jinja text names them; the model's own where not given
    options: dict[str, Any] = {}  # further variables of the Jinja text
    system_template: str | None = None
    system_message: str | None = None
    roles: tuple[str, str] | None = None
    messages: list[tuple[str, str]] | None = None  # turns that stand in every prompt
    sep_style: str | int | None = None
    sep: str | None = None
    sep2: str | None = None
    stop_str: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    override: bool = False  # replaces a built-in template on purpose

    def fastchat_fields(self) -> dict[str, Any]:
        """The fields of a fastchat Conversation that are set."""
        names = set(self.__struct_fields__) - {"jinja", "tokens", "options", "override"}
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class JobSettings(Section, frozen=True):
    parallel: int = 1  # trainers at once
    queued: int = 100  # jobs that may wait
    threads: int | None = None  # None: all processors
    standby: Literal["auto", "always", "never"] = "auto"  # a trainer that is ready before there is a job
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1  # that train one job together
    sharding: Literal["none", "fsdp", "zero2", "zero3"] = "none"  # how they split the model between them
    hang_timeout_s: float = 1800.0
    share: Literal["beside", "wait", "sleep"] = "beside"  # what the engines do while a job trains on the same GPU

    @property
    def trainer_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


class LimitSettings(Section, frozen=True):
    body_bytes: int = 16 * 1024 * 1024
    file_bytes: int = 512 * 1024 * 1024
    upload_bytes: int = 8 * 1024 * 1024 * 1024
    batch_lines: int = 4  # that are asked at once, while nobody else asks
    first_token_s: float = 300.0
    between_tokens_s: float = 120.0
    requests_in_flight: int = 1024
    engine_memory_bytes: int | None = None  # for all engines together that are spawned here; None: no limit
    engine_start_s: float = 120.0  # how long a request waits for its model to start


class Settings(Section, frozen=True):
    """All of it. `data` is the one folder that Tunegate writes to."""

    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int | None = None  # of /metrics, on loopback; None: it is not served
    otlp_endpoint: str | None = None  # where OpenTelemetry's traces go; None: none are made
    hosts: list[str] = []  # further names that the server is reached under
    data: str = ""
    organization: str = "local"
    default_model: str | None = None  # for requests that name none
    ignored_fields: list[str] = []  # "chat.FIELD", "fine_tuning.FIELD", …: dropped unread
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"
    bases: dict[str, BaseSettings] = {}
    aliases: dict[str, str] = {}
    templates: dict[str, TemplateSettings] = {}
    engines: list[EngineSettings] = []
    jobs: JobSettings = JobSettings()
    limits: LimitSettings = LimitSettings()
    tracking: TrackingSettings = TrackingSettings()

    @property
    def data_dir(self) -> Path:
        return Path(self.data).expanduser().absolute()


def load_settings(config: Path | None, environ: Mapping[str, str], overrides: Mapping[str, Any]) -> Settings:
    """Settings from the file, then the environment, then the command line; the later one wins.

    Raises SettingsError that names the file, the key and what it should be.
    """
    raw: dict[str, Any] = {}
    if config is not None:
        try:
            raw = tomllib.loads(config.read_text())
        except OSError as error:
            raise SettingsError(f"cannot read the settings file {config}: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"{config} is not valid TOML: {error}") from error
    where = str(config) if config else "the settings"
    _add_environment(raw, environ)
    raw |= {key: value for key, value in overrides.items() if value is not None}
    try:
        settings = msgspec.convert(raw, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{where}: {error}; gateway/SETTINGS.md lists every setting") from error
    return _complete(settings, config, environ)


def changed_names(before: Settings, after: Settings) -> list[str]:
    """The names at the top level whose values differ, but for `engines`, which is taken while the server runs."""
    names = [field.name for field in msgspec.structs.fields(Settings) if field.name != "engines"]
    return [name for name in names if getattr(before, name) != getattr(after, name)]


def _add_environment(raw: dict[str, Any], environ: Mapping[str, str]) -> None:
    """TUNEGATE_PORT=8001 sets `port`, TUNEGATE_JOBS_PARALLEL=2 sets `parallel` under [jobs]."""
    tables: dict[str, type[msgspec.Struct]] = {
        "jobs": JobSettings,
        "limits": LimitSettings,
        "tracking": TrackingSettings,
    }
    sections: dict[str, type[msgspec.Struct]] = {"": Settings, **tables}
    for section, struct in sections.items():
        for field in msgspec.structs.fields(struct):
            name = f"TUNEGATE_{section + '_' if section else ''}{field.name}".upper()
            if name in environ and field.name not in {"bases", "aliases", "templates", "engines", *LISTS, *tables}:
                target = raw.setdefault(section, {}) if section else raw
                target[field.name] = _scalar(environ[name], str(field.type), name)


def _scalar(text: str, kind: str, name: str) -> Any:
    try:
        if "int" in kind:
            return int(text)
        return float(text) if "float" in kind else text
    except ValueError as error:
        raise SettingsError(f"{name}={text!r} is not a number") from error


def _complete(settings: Settings, config: Path | None, environ: Mapping[str, str]) -> Settings:
    bases = dict(settings.bases) or {DEMO_MODEL: BaseSettings(path=str(DEMO_MODEL_PATH))}
    folder = config.parent if config else Path.cwd()
    data = settings.data or os.path.join(os.environ.get("XDG_DATA_HOME") or "~/.local/share", "tunegate")

    def added(name: str) -> bool:
        return (Path(data).expanduser() / "bases" / name / "base.json").is_file()

    for name, base in bases.items():
        if not name or len(name) > 200:
            raise SettingsError(f"[bases.{name!r}]: a name has 1 to 200 characters")
        path = None if base.path is None else str((folder / Path(base.path).expanduser()).resolve())
        if path is None and not added(name):
            raise SettingsError(
                f"[bases.{name}] has no `path`, and no model of that name was added to {data}; name its folder or .gguf "
                f"file, or run `tunegate models add … --name {name}`"
            )
        if path is None and (base.template, base.type) != (BaseSettings().template, BaseSettings().type):
            raise SettingsError(
                f"[bases.{name}] sets `template` or `type` for a model that was added, which has its own; `tunegate models "
                f"remove {name}` and add it again with --template or --type"
            )
        served_by_vllm = any(engine.kind == "vllm" and engine.model == name for engine in settings.engines)
        kind = base.type or ("hf" if served_by_vllm else "q4_0")
        bases[name] = msgspec.structs.replace(base, path=path, type=kind, options=_plain(base.options))
    templates = {name: _complete_template(name, found, folder) for name, found in settings.templates.items()}
    engines = [
        complete_engine(number, engine, folder, environ) for number, engine in enumerate(settings.engines, start=1)
    ]
    check_engines(engines, lambda name: name in bases or added(name), set(settings.aliases))
    for alias, target in settings.aliases.items():
        if target not in bases and not added(target):
            raise SettingsError(
                f"alias '{alias}' points at '{target}', which is no base; there are: {', '.join(bases)}"
            )
        if alias in bases:
            raise SettingsError(f"alias '{alias}' is already the name of a base")
    for name in settings.ignored_fields:
        if (
            name.partition(".")[0] not in ("chat", "completions", "responses", "fine_tuning")
            or not name.partition(".")[2]
        ):
            raise SettingsError(
                f"ignored_fields names {name!r}; each is chat.FIELD, completions.FIELD, responses.FIELD or fine_tuning.FIELD"
            )
    tracking = complete_tracking(settings.tracking, folder)
    return msgspec.structs.replace(
        settings, bases=bases, data=data, templates=templates, engines=engines, tracking=tracking
    )


def _complete_template(name: str, settings: TemplateSettings, folder: Path) -> TemplateSettings:
    """With the Jinja text in place of the path it may stand for."""
    fields = settings.fastchat_fields()
    if settings.jinja is None:
        if settings.tokens or settings.options or not fields:
            raise SettingsError(
                f"[templates.{name}] needs `jinja`, a chat template or the path of one, or the fields of a fastchat "
                "template (system_template, roles, sep_style, sep, …)"
            )
        return settings
    if fields:
        raise SettingsError(f"[templates.{name}] has both `jinja` and `{min(fields)}`; a template is one or the other")
    text = settings.jinja
    if "{" not in text and "\n" not in text:
        text = _read_template(name, (folder / Path(text).expanduser()).resolve())
    return msgspec.structs.replace(settings, jinja=text, options=_plain(settings.options))


def _read_template(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(f"[templates.{name}]: cannot read the chat template {path}: {error}") from error


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: a TOML date becomes the text YYYY-MM-DD."""
    plain: dict[str, Any] = msgspec.to_builtins(options)
    return plain


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""`tunegate keys`: make, list and revoke the keys that programs present. A running server notices at once."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Annotated

import typer

from gateway.access import DEFAULT_PROJECT, SCOPES, Scope
from gateway.errors import SettingsError
from gateway.settings import load_settings

DataOption = Annotated[str | None, typer.Option(help="The data folder, where it is not the settings' one.")]
ConfigOption = Annotated[Path | None, typer.Option(help="Settings file (TOML).")]

NAME = re.compile(r"[\w .@/+-]{1,64}")
SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

cli = typer.Typer(no_args_is_help=True, help=__doc__)


@cli.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for, to tell it from others.")],
    project: Annotated[
        str, typer.Option(help="Whose files, jobs and models its requests see; they see no other's.")
    ] = DEFAULT_PROJECT,
    scopes: Annotated[str, typer.Option(help="Any of infer, files, tune, admin.")] = "infer,files,tune",
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="How many requests it may make.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Of prompts and replies together.")] = None,
    jobs: Annotated[int | None, typer.Option(min=0, help="Fine-tuning jobs and batches at once.")] = None,
    storage: Annotated[str | None, typer.Option(help="Of its project's files, such as 500MB or 10GB.")] = None,
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a key and show it, once. From the first key on, every request needs one."""
    from gateway.keys import create_key

    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "jobs": jobs,
        "storage_bytes": None if storage is None else _size_bytes(storage),
    }
    for label, text in (("name", name), ("project", project)):
        if not NAME.fullmatch(text):
            raise _failed(f"the {label} {text!r}: 1 to 64 letters, digits, spaces and any of . @ / + - _")
    try:
        row, text = create_key(
            _data_dir(config, data), name, project, _scopes(scopes), {k: v for k, v in limits.items() if v is not None}
        )
    except SettingsError as error:
        raise _failed(error.message) from error
    typer.echo(
        f"{row.id} for '{name}', project '{project}', may {', '.join(row.scopes)}. The key is shown this once:",
        err=True,
    )
    typer.echo(text)


@cli.command("list")
def list_(data: DataOption = None, config: ConfigOption = None) -> None:
    """Show the keys, revoked ones too. The keys themselves are nowhere to be shown."""
    from rich.console import Console
    from rich.table import Table

    from gateway.keys import list_keys

    try:
        keys = list_keys(_data_dir(config, data))
    except SettingsError as error:
        raise _failed(error.message) from error
    table = Table("id", "name", "project", "may", "limits", "made", "revoked")
    for key in keys:
        limits = ", ".join(f"{name}={value}" for name, value in key.limits.items())
        made, revoked = _day(key.created_at), "" if key.revoked_at is None else _day(key.revoked_at)
        table.add_row(key.id, key.name, key.project_id, ",".join(key.scopes), limits, made, revoked)
    Console(markup=False, highlight=False).print(table if keys else "no key yet: `tunegate keys create NAME`")


@cli.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `keys list` shows it: key_…")],
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Revoke a key: requests with it are refused from now on, and streams under way end within a second."""
    from gateway.keys import list_keys, revoke_key

    folder = _data_dir(config, data)
    try:
        row = revoke_key(folder, key_id)
        left = sum(key.revoked_at is None for key in list_keys(folder))
    except SettingsError as error:
        raise _failed(error.message) from error
    if row is None:
        raise _failed(f"there is no key {key_id!r}; `tunegate keys list` shows them")
    typer.echo(f"{row.id} ('{row.name}') is revoked")
    if left == 0:
        typer.echo("No key is left, and requests still need one: make another with `tunegate keys create`.")


def _scopes(text: str) -> list[Scope]:
    asked = {part.strip() for part in text.split(",")}
    if unknown := asked - set(SCOPES):
        raise _failed(f"there is no scope {', '.join(map(repr, sorted(unknown)))}; there are {', '.join(SCOPES)}")
    return [scope for scope in SCOPES if scope in asked]


def _size_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12})\s*(|KB|MB|GB|TB)", text.strip().upper())
    if found is None:
        raise _failed(f"--storage {text!r}: a number of bytes, or one with KB, MB, GB or TB, such as 10GB")
    return int(found[1]) * SIZES[found[2]]


def _data_dir(config: Path | None, data: str | None) -> Path:
    try:
        return load_settings(config, os.environ, {"data": data}).data_dir
    except SettingsError as error:
        raise _failed(error.message) from error


def _day(at_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))


def _failed(message: str) -> typer.Exit:
    typer.echo(f"tunegate: {message}", err=True)
    return typer.Exit(2)

"""`tunegate usage`: what was used, by key and model, read from the store beside a running server."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from gateway.errors import SettingsError
from gateway.settings import load_settings

DAY_S = 86_400


def usage(
    days: Annotated[int, typer.Option(help="How many days back.", min=1, max=3650)] = 30,
    data: Annotated[str | None, typer.Option(help="The data folder, where it is not the settings' one.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML).")] = None,
) -> None:
    """Show requests and tokens by key and model."""
    from rich.console import Console
    from rich.table import Table

    from gateway.keys import list_keys, read_usage

    try:
        folder = load_settings(config, os.environ, {"data": data}).data_dir
        names = {key.id: key.name for key in list_keys(folder)}
        rows = read_usage(folder, int(time.time()) - days * DAY_S)
    except SettingsError as error:
        typer.echo(f"tunegate: {error.message}", err=True)
        raise typer.Exit(2) from error
    table = Table("key", "project", "model", "kind", "requests", "input", "cached", "output")
    for row in rows:
        key = f"{row['key_id']} ({names.get(row['key_id'], '?')})" if row["key_id"] else "no key"
        kind = f"{row['kind']}, batch" if row["is_batch"] else row["kind"]
        counts = (f"{row[name]:,}" for name in ("requests", "input_tokens", "cached_tokens", "output_tokens"))
        table.add_row(key, row["project_id"], row["model"], kind, *counts)
    shown = table if rows else f"nothing was asked in {days} days"
    Console(markup=False, highlight=False).print(shown)

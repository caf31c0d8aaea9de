"""The `tunegate` command."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from gateway import __version__
from gateway.errors import SettingsError
from gateway.export_command import export
from gateway.jobdir import TrainOn, Turns
from gateway.keys_command import cli as keys_cli
from gateway.models_command import cli as models_cli
from gateway.settings import Settings, is_loopback, load_settings
from gateway.usage_command import usage

SWITCH_INTERVAL_S = 0.0005  # how long a thread that renders a long conversation may keep the event loop waiting

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

cli.add_typer(models_cli, name="models")
cli.add_typer(keys_cli, name="keys")
cli.command()(export)
cli.command()(usage)


@cli.callback()
def about() -> None:
    """Code written against the OpenAI API, on your own machine."""


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; other than loopback it takes a key.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data: Annotated[str | None, typer.Option(help="The folder that everything is kept in.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML).")] = None,
) -> None:
    """Serve the API until SIGTERM or Ctrl-C; ready when /readyz answers 200."""
    from gateway.app import create_app  # the other commands start without it
    from gateway.connection import Connection, Server
    from gateway.jobs.torchrun import read_launch
    from gateway.keys import require_key
    from gateway.logs import set_up
    from gateway.store.datadir import DataDir
    from gateway.templates import settings_entries

    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until somebody is there who reads the settings again

        def read_settings() -> Settings:
            return load_settings(config, os.environ, {"host": host, "port": port, "data": data})

        settings = read_settings()
        set_up(settings.log_level, settings.log_format)
        settings_entries(settings.templates)
        read_launch(settings.jobs)
        if not is_loopback(settings.host):
            require_key(settings.data_dir, settings.host)
        data_dir = DataDir.open(settings.data_dir)
    except (SettingsError, ValueError) as error:
        typer.echo(f"tunegate: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"Tunegate {__version__} on http://{settings.host}:{settings.port}/v1, data in {settings.data_dir}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time, and children are spawned from here
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    server = Server(
        uvicorn.Config(
            create_app(settings, data_dir, read_settings),
            host=settings.host,
            port=settings.port,
            loop="uvloop",
            http=Connection,
            ws="none",
            lifespan="on",
            access_log=False,
            server_header=False,
            log_config=None,
            log_level=settings.log_level,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=30,
        )
    )
    try:
        server.run()
    finally:
        data_dir.close()
    if not server.started:
        raise typer.Exit(1)


@cli.command()
def preview(
    file: Annotated[Path, typer.Argument(help="A training file.", exists=True, dir_okay=False)],
    model: Annotated[str, typer.Option(help="A base, an alias of one, or the folder of a prepared base.")],
    base_url: Annotated[str, typer.Option(help="The server to ask.")] = "http://127.0.0.1:8000",
    limit: Annotated[int, typer.Option(help="How many lines to show; all are counted.", min=0, max=1000)] = 20,
    turns: Annotated[Turns, typer.Option(help="Which of the assistant's turns are learnt.")] = "all",
    train_on: Annotated[TrainOn, typer.Option(help="'all' learns the prompts too.")] = "assistant",
    data: Annotated[Path | None, typer.Option(help="A data folder, to preview without a server.")] = None,
) -> None:
    """Show what a training file trains, line by line, and its problems. Ends with 1 when a job on it would fail."""
    from rich.console import Console

    from gateway.errors import TunegateError
    from gateway.terminal import draw_preview, fetch_preview, is_usable, make_preview

    base = data / "bases" / model if data else Path(model)
    try:
        if data or (base / "base.json").is_file():
            found = make_preview(file, base, limit, turns, train_on)
        else:
            found = fetch_preview(file, model, limit, base_url, turns, train_on)
    except TunegateError as error:
        typer.echo(f"tunegate: {error}", err=True)
        raise typer.Exit(2) from error
    draw_preview(Console(highlight=False), found)
    if not is_usable(found):
        raise typer.Exit(1)


@cli.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    cli()


if __name__ == "__main__":
    main()

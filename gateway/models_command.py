"""`tunegate models`: add, list and remove the models that are served without an entry in a settings file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.errors import SettingsError
from gateway.settings import DEMO_MODEL, DEMO_MODEL_PATH, Settings, load_settings

if TYPE_CHECKING:
    from gateway.models import AddedModel

DEMO_SOURCE = "the demo model that ships with tunegate"

DataOption = Annotated[str | None, typer.Option(help="The data folder, where it is not the settings' one.")]
ConfigOption = Annotated[Path | None, typer.Option(help="Settings file (TOML).")]

cli = typer.Typer(no_args_is_help=True, help=__doc__)


@cli.command()
def add(
    source: Annotated[
        str | None, typer.Argument(help="A model's folder, a .gguf file, or the id ORG/NAME of one on a hub.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients ask for; the last part of SOURCE by default.")] = None,
    template: Annotated[
        str | None, typer.Option(help="A template by name; by default the one that the model brings ('model').")
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            help="Of the weights that are served: q4_0 (where none is given), q8_0, q4_k_m, f16, …; hf for vLLM."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a model on a hub: a branch, tag or commit.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="In place of SOURCE: the folder of a LoRA adapter, as PEFT leaves it.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base that the adapter was trained on.")] = None,
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Prepare a model and keep it; run it again after a break and it goes on where it was."""
    from gateway.models import add_model, default_name

    settings = _settings(config, data)
    if (source is None) == (adapter is None) or (adapter is None) != (base is None):
        raise _failed(SettingsError("give a model (SOURCE), or an adapter and its base (--adapter DIR --base NAME)"))
    if adapter is not None and base is not None:
        _add_adapter(settings, adapter, base, template, name)
        return
    assert source is not None
    template = template or "model"
    try:
        model = add_model(
            settings.data_dir / "bases",
            source,
            name or default_name(source),
            template,
            type,
            revision,
            _recipe(settings, template),
        )
    except SettingsError as error:
        raise _failed(error) from error
    tuned = "" if model.untrainable is None else f" It cannot be tuned: {model.untrainable}."
    typer.echo(
        f"'{model.name}' is ready ({_size(model.size_bytes)} in {model.path}). A running server takes it up within seconds, "
        f"the next `tunegate serve` at its start.{tuned}"
    )


def _add_adapter(settings: Settings, adapter: Path, base: str, template: str | None, name: str | None) -> None:
    from gateway.imports import add_adapter
    from gateway.models import checked_name, default_name

    try:
        name = checked_name(name or default_name(str(adapter)))
        recipe = None if template is None else _recipe(settings, template)
        add_adapter(settings.data_dir, adapter, base, template, name, recipe)
    except SettingsError as error:
        raise _failed(error) from error
    typer.echo(
        f"'{name}' is ready on '{base}'. A running server has its engine verify it and serves it within seconds, the next "
        "`tunegate serve` at its start; should the engine not do what the adapter should, its log says so."
    )


@cli.command("list")
def list_(data: DataOption = None, config: ConfigOption = None) -> None:
    """Show the models in the data folder."""
    from rich.console import Console
    from rich.table import Table

    from gateway.models import list_models

    settings = _settings(config, data)
    try:
        models = list_models(settings.data_dir / "bases")
    except SettingsError as error:
        raise _failed(error) from error
    table = Table("name", "architecture", "on disk", "tuned", "from")
    for model in models:
        row = (model.architecture, _size(model.size_bytes), "no" if model.untrainable else "yes")
        table.add_row(model.name, *row, DEMO_SOURCE if _is_demo(model, settings) else model.source)
    Console(markup=False, highlight=False).print(table if models else "no model yet: `tunegate models add …`")


@cli.command()
def remove(
    name: Annotated[str, typer.Argument(help="As `models list` shows it.")],
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Delete a model, or what a broken-off `add` has left. Refuses while it is in use."""
    from gateway.models import remove_model

    try:
        freed = remove_model(_settings(config, data).data_dir, name)
    except SettingsError as error:
        raise _failed(error) from error
    typer.echo(f"'{name}' is removed, {_size(freed)} are free again")


def _settings(config: Path | None, data: str | None) -> Settings:
    try:
        return load_settings(config, os.environ, {"data": data})
    except SettingsError as error:
        raise _failed(error) from error


def _is_demo(model: AddedModel, settings: Settings) -> bool:
    entry = settings.bases.get(DEMO_MODEL)
    ours = entry is None or entry.path == str(DEMO_MODEL_PATH)
    return model.name == DEMO_MODEL and not model.added and ours


def _recipe(settings: Settings, template: str) -> dict[str, object] | None:
    """What a template of the settings file is made of; None for one that is built in or the model's own."""
    if template not in settings.templates:
        return None
    from gateway.templates import settings_entries

    entry = settings_entries({template: settings.templates[template]})[template]
    return {"kind": entry.kind, "source": dict(entry.source)}


def _failed(error: SettingsError) -> typer.Exit:
    typer.echo(f"tunegate: {error.message}", err=True)
    return typer.Exit(2)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 100_000_000 else f"{size_bytes / 1e6:.1f} MB"

"""`tunegate export`: a tuned model as files, made from the data folder, whether or not a server has it open."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.errors import SettingsError, TunegateError
from gateway.settings import Settings, load_settings


def export(
    model: Annotated[str, typer.Argument(help="A tuned model or a checkpoint, by the name that clients ask for.")],
    to: Annotated[
        str, typer.Option(help="hf, a merged Hugging Face folder; gguf, a merged file; adapter, as PEFT has it.")
    ],
    type: Annotated[
        str | None,
        typer.Option(help="Of the weights. gguf: f16 (where none is given), q8_0, q4_0, …; hf: f32, f16 or bf16."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="What to make, or the folder to make it in; NAME.tar makes one file of a folder."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="The data folder, where it is not the settings' one.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML).")] = None,
) -> None:
    """Export a tuned model, checked to say what it says here. What is there in the end is whole."""
    from gateway.wire.exports import check_form

    try:
        check_form(to, type)
        settings = load_settings(config, os.environ, {"data": data})
        _run(settings, model, to, type, out)
    except TunegateError as error:
        typer.echo(f"tunegate: {error.message}", err=True)
        raise typer.Exit(2) from error


def _run(settings: Settings, model: str, to: str, kind: str | None, out: Path | None) -> None:
    import gateway
    from gateway.export_plan import ExportPlan, refuse_base
    from gateway.store.usage import find_tuned_model

    data = settings.data_dir
    tuned = find_tuned_model(data / "tunegate.db", model)
    if tuned is None:
        name = settings.aliases.get(model, model)
        if (data / "bases" / name / "base.json").is_file():
            raise refuse_base(model, data / "bases" / name)
        raise SettingsError(
            f"there is no tuned model '{model}' in {data}; `tunegate models list` shows bases, GET /v1/models all"
        )
    plan = ExportPlan(
        model, data / "bases" / tuned.base, data / "adapters" / tuned.adapter_digest.removeprefix("sha256:"), to, kind
    )
    for folder in (plan.base, plan.adapter):
        if not folder.is_dir():
            raise SettingsError(f"{folder} is gone, and '{model}' cannot be exported without it")
    out = _place(out, plan.filename(one_file=False))
    root = Path(gateway.__file__).resolve().parent.parent
    try:
        done = subprocess.run(plan.command(out), cwd=root, stdout=subprocess.PIPE, text=True)
    except KeyboardInterrupt:  # the terminal has told both
        raise SettingsError(f"'{model}' was not exported") from None
    finally:
        shutil.rmtree(out.with_name(f".writing-{out.name}"), ignore_errors=True)  # of a trainer that was killed
    if done.returncode != 0:
        raise SettingsError(f"'{model}' was not exported; what is above says why")
    typer.echo(_summary(model, out, json.loads(done.stdout.splitlines()[-1])))


def _place(out: Path | None, filename: str) -> Path:
    """Where to make it. SettingsError when something is there."""
    out = (out or Path()).expanduser().absolute()
    if out.is_dir():
        out = out / filename
    if os.path.lexists(out):
        raise SettingsError(f"{out} is there already; remove it, or name another --out")
    return out


def _summary(model: str, out: Path, report: dict[str, Any]) -> str:
    size = report["size_bytes"]
    told = (
        f"'{model}' is in {out} ({size / 1e9:.2f} GB)"
        if size >= 10**8
        else f"'{model}' is in {out} ({size / 1e6:.1f} MB)"
    )
    if report["to"] == "adapter":
        return f"{told}, its adapter as PEFT takes it"
    found = {name: report[name] for name in ("changed", "total", "tokens", "error", "effect")}
    return (
        "{told}: {changed} of {total} weights are other than the base's. Asked the adapter's own {tokens} tokens, it is "
        "{error:.4f} nats a token from base + adapter, whose training made {effect:.2f}".format(told=told, **found)
    )

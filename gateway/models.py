"""Models that were added with `tunegate models add`: prepared bases that need no entry in a settings file.

    DATA/bases/NAME/base.json      holds `added`, {"source", "revision"}, for those; what is there is served

Place in the flow: the command line writes, a running gateway reads again every few seconds. One rule: the folder is the
truth. It is whole or absent, so that neither needs to ask the other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import gateway
from gateway.bases import lock_base, read_base
from gateway.errors import SettingsError
from gateway.jobdir import process_start_time, read_json
from gateway.model_source import check_source
from gateway.store.usage import active_jobs_on, tuned_models_on

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9][A-Za-z0-9._:-]*)*")
NAME_LIMIT = 200
LOCK_WAIT_S = 1.0


@dataclass(frozen=True)
class AddedModel:
    """A base in the data folder, as `models list` shows it."""

    name: str
    path: Path
    source: str  # what it was made from
    size_bytes: int  # on the disk
    architecture: str
    untrainable: str | None
    added: bool  # False: it belongs to a settings file's entry


def added_names(bases: Path) -> dict[str, Path]:
    """The folders of the bases that were added, by name. Blocks for some milliseconds."""
    found = {}
    for path in sorted(bases.glob("**/base.json")):
        if any(part.startswith(".") for part in path.relative_to(bases).parts):
            continue
        try:
            described = read_json(path)
            if described.get("added"):
                found[str(described["name"])] = path.parent
        except (OSError, ValueError, KeyError, AttributeError):
            continue  # being removed just now; a broken one is told of where it is asked for
    return found


def is_added(folder: Path) -> bool:
    """Whether the base in this folder, if there is one, was added."""
    try:
        return bool(read_json(folder / "base.json").get("added"))
    except (OSError, ValueError, AttributeError):
        return False


def list_models(bases: Path) -> list[AddedModel]:
    """Every prepared base of a data folder, by name."""
    found = []
    for path in sorted(bases.glob("**/base.json")):
        if any(part.startswith(".") for part in path.relative_to(bases).parts):
            continue
        size = sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())
        name = str(path.parent.relative_to(bases))
        try:
            base = read_base(path.parent)
            added = read_json(path).get("added") or {}
        except SettingsError as error:
            found.append(AddedModel(name, path.parent, "?", size, "(broken)", error.message, True))
            continue
        source = str(added.get("source", "a settings file"))
        found.append(AddedModel(name, path.parent, source, size, base.architecture, base.untrainable, bool(added)))
    return found


def default_name(source: str) -> str:
    """A name for a model that was given none: the last part of its path or id."""
    name = Path(source).expanduser().resolve().name if os.path.exists(source) else source.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.removesuffix(".gguf")).strip("-.") or "model"


def add_model(
    bases: Path,
    source: str,
    name: str,
    template: str,
    kind: str | None = None,
    revision: str | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> AddedModel:
    """Prepares `source` as the base `name`; what it says on the way goes to stderr, as a bar on a terminal.

    `kind` is the type of the weights, q4_0 where none is given; a ready .gguf file has its own. SettingsError when the name is
    taken or the source cannot be prepared. What a kill leaves is gone on with by the next call.
    """
    out = bases / checked_name(name)
    check_source(source, kind, revision)
    bases.mkdir(parents=True, exist_ok=True)
    lock = lock_base(out, LOCK_WAIT_S)
    try:
        if (out / "base.json").is_file():
            raise SettingsError(
                f"there is a model named '{name}' already; `tunegate models remove {name}` first, or take another --name"
            )
        _refuse_nested(bases, out, name)
        _prepare(out, source, name, template, kind, revision, recipe, lock)
    finally:
        os.close(lock)
    return next(model for model in list_models(bases) if model.name == name)


def remove_model(data: Path, name: str) -> int:
    """Takes an added model's folder away, or what an unfinished `add` has left; returns how many bytes that frees.

    SettingsError when it is not there, when it is in use, or when it belongs to a settings file.
    """
    out = data / "bases" / checked_name(name)
    leftovers = [out.with_name(f"{prefix}{out.name}") for prefix in (".writing-", ".fetching-", ".removing-")]
    there = [path for path in (out, *leftovers) if path.is_dir()]
    if not there:
        known = ", ".join(model.name for model in list_models(data / "bases")) or "none"
        raise SettingsError(f"there is no model named '{name}'; there are: {known}")
    lock = lock_base(out, LOCK_WAIT_S)
    try:
        if out.is_dir():
            _refuse_nested(data / "bases", out, name)
            _refuse_in_use(data, out, name)
        size = sum(_freed_bytes(path) for path in there)
        for path in there:
            beside = path if path.name.startswith(".removing-") else path.with_name(f".removing-{path.name}")
            if beside is not path:
                shutil.rmtree(beside, ignore_errors=True)  # of a `remove` that was killed
                path.rename(beside)  # at once: whoever looks finds it whole or not at all
            shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(data / "engines" / name, ignore_errors=True)
    finally:
        os.close(lock)
    return size


def checked_name(name: str) -> str:
    """The name, when it can be a model's and a folder's. SettingsError otherwise."""
    if not NAME.fullmatch(name) or len(name) > NAME_LIMIT:
        raise SettingsError(
            f"{name!r} cannot be a model's name: letters, digits and . _ : - in parts between slashes, each beginning with "
            f"a letter or digit; at most {NAME_LIMIT} characters"
        )
    return name


def _prepare(
    out: Path,
    source: str,
    name: str,
    template: str,
    kind: str | None,
    revision: str | None,
    recipe: Mapping[str, Any] | None,
    lock: int,
) -> None:
    local = Path(source).expanduser()
    command = [sys.executable, "-m", "trainer.export.prepare", "--added", "--name", name, "--template", template]
    command += ["--source", str(local.absolute())] if os.path.exists(local) else ["--source", source, "--hub"]
    command += ["--out", str(out.absolute())]
    command += [*(["--type", kind] if kind else []), *(["--revision", revision] if revision else [])]
    command += [] if recipe is None else ["--recipe", "-"]
    root = Path(gateway.__file__).parent.parent
    text = "" if recipe is None else json.dumps(recipe)
    try:
        done = subprocess.run(command, input=text, text=True, cwd=root, pass_fds=(lock,))
    except KeyboardInterrupt:  # the terminal has told both
        Console(stderr=True).show_cursor()
        raise SettingsError(f"'{name}' is not whole yet; the same command goes on from here") from None
    if done.returncode != 0:
        raise SettingsError(f"'{name}' was not added; what is above says why")


def _refuse_nested(bases: Path, out: Path, name: str) -> None:
    """A model's folder is made and removed as a whole, so no other's may lie in it."""
    above = [
        str(folder.relative_to(bases))
        for folder in out.parents
        if bases in folder.parents and (folder / "base.json").is_file()
    ]
    within = [str(path.parent.relative_to(bases)) for path in out.glob("*/**/base.json")]
    if others := [*above, *within]:
        raise SettingsError(f"'{name}' and '{others[0]}' cannot both be: the folder of one would lie in the other's")


def _refuse_in_use(data: Path, out: Path, name: str) -> None:
    if not is_added(out) and not _is_broken(out):
        raise SettingsError(
            f"'{name}' was prepared for an entry of a settings file; remove [bases.{name}] there, then the folder {out}"
        )
    database = data / "tunegate.db"
    if tuned := tuned_models_on(database, name):
        raise SettingsError(f"'{name}' is in use: tuned models stand on it ({', '.join(tuned[:5])}); delete them first")
    if jobs := active_jobs_on(database, name):
        raise SettingsError(f"'{name}' is in use: jobs tune it ({', '.join(jobs[:5])}); cancel them or let them end")
    if (pid := _engine_pid(data / "engines" / name)) is not None:
        raise SettingsError(
            f"'{name}' is in use: its engine runs (process {pid}). Stop the server, or wait until it is unloaded"
        )


def _is_broken(folder: Path) -> bool:
    try:
        read_base(folder)
    except SettingsError:
        return True
    return False


def _engine_pid(folder: Path) -> int | None:
    """The engine's process, while it lives."""
    try:
        record = read_json(folder / "spawn.json")
        pid, started = int(record["pid"]), record["start_time"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if process_start_time(pid) == started else None


def _freed_bytes(folder: Path) -> int:
    """What goes with the folder: a file that has another name elsewhere stays."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(status.st_size for status in files if status.st_nlink == 1)

"""`tunegate models add --adapter`: a PEFT adapter that was trained elsewhere, made ready for the gateway to take up.

Place in the flow: the command line → **this** → DATA/imports/ID → the running gateway, or the next (`jobs.imports`). One
rule: what cannot be served is refused here, by name, before anything is computed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gateway
from gateway.bases import PreparedBase, read_base
from gateway.chat.bundle import TEMPLATE_FILE, TOKENIZER_FILE, Bundle, bundle_of
from gateway.chat.registry import template_from_source, template_named
from gateway.chat.validation import validate
from gateway.engines.adapters import AdapterRejected, check_weights
from gateway.errors import SettingsError
from gateway.jobdir import fsync_folder, write_json


def add_adapter(
    data: Path, adapter: Path, base_name: str, template: str | None, name: str, recipe: Mapping[str, Any] | None = None
) -> Path:
    """Leaves it in DATA/imports, whole; returns the folder. SettingsError says what is wrong.

    `template` is the one that it was trained through; None: its base's.
    """
    folder = data / "bases" / base_name
    if not (folder / "base.json").is_file():
        raise SettingsError(f"there is no base '{base_name}' in {data}; `tunegate models list` shows those that are")
    base = read_base(folder)
    try:
        check_weights(adapter)
    except AdapterRejected as error:
        raise SettingsError(f"{adapter} cannot be served: {error.message}") from error
    bundle = _bundle(base, template, recipe)
    imports = data / "imports"
    imports.mkdir(parents=True, exist_ok=True)
    place = imports / hashlib.sha256(name.encode()).hexdigest()[:16]
    beside = imports / f".writing-{place.name}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        (beside / "template").mkdir(parents=True)
        for file, content in bundle.to_files().items():
            (beside / "template" / file).write_bytes(content)
        _run(adapter, folder, beside / "template", beside / "adapter")
        shutil.rmtree(beside / "template")
        write_json(beside / "import.json", {"name": name, "base": base_name, "created_at": int(time.time())})
        shutil.rmtree(place, ignore_errors=True)  # one that was refused, or not taken up yet
        beside.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    fsync_folder(imports)
    return place


def _bundle(base: PreparedBase, template: str | None, recipe: Mapping[str, Any] | None) -> Bundle:
    files = {name: (base.path / name).read_bytes() for name in (TEMPLATE_FILE, TOKENIZER_FILE)}
    own = Bundle.from_files(files)
    if template is None:
        return own
    try:
        found = template_from_source(recipe["kind"], dict(recipe["source"])) if recipe else template_named(template)
    except (KeyError, ValueError) as error:
        raise SettingsError(f"the template '{template}' cannot be used: {error.args[0]}") from error
    if problems := validate(found, own.tokenizer, base.eos_token_ids):
        raise SettingsError(f"the template '{template}' cannot be used with '{base.name}': {'; '.join(problems)}")
    return bundle_of(found, files[TOKENIZER_FILE], list(base.eos_token_ids))


def _run(adapter: Path, base: Path, bundle: Path, out: Path) -> None:
    command = [sys.executable, "-m", "trainer.export.import_adapter", "--adapter", str(adapter.absolute())]
    command += ["--base", str(base.absolute()), "--bundle", str(bundle.absolute()), "--out", str(out.absolute())]
    done = subprocess.run(command, cwd=Path(gateway.__file__).parent.parent)
    if done.returncode != 0:
        raise SettingsError(f"{adapter} was not added; what is above says why")

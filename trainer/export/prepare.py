"""A base made ready, once: `python -m trainer.export.prepare --source HF_DIR --template NAME --out DIR`.

The template is a built-in one by its name, the model's own ("model"), or one whose recipe comes with it.

    config.json · tokenizer.json · template.json · model.f16.gguf · model.q4_0.gguf · base.json

Place in the flow: before the first job or chat on a base. One rule: the folder is whole or absent (written beside, renamed).
Its own process, without torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gateway.chat.bundle import TEMPLATE_FILE, TOKENIZER_FILE, bundle_of
from gateway.chat.registry import template_from_source, template_named
from gateway.chat.templates import Template
from gateway.chat.tokenizer import Tokenizer
from gateway.chat.validation import validate
from trainer.export.base_gguf import write_f16_gguf, write_q4_0_gguf
from trainer.export.folder import complete_folder
from trainer.export.hf_folder import HfFolder
from trainer.export.tensors import UnsupportedModel

F16_FILE, Q4_0_FILE = "model.f16.gguf", "model.q4_0.gguf"
OWN_TEMPLATE = "model"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.export.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="a Hugging Face model folder")
    parser.add_argument("--template", required=True, help="the chat template, by name; 'model' for its own")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make; its name is the base's name")
    parser.add_argument("--name", help="the base's name, where it is not the folder's")
    parser.add_argument("--recipe", type=Path, help='what a template that is not built in is made of ("-": stdin)')
    parser.add_argument("--threads", type=int, default=0, help="for quantising; 0 means all")
    options = parser.parse_args(arguments)
    try:
        recipe = _read_recipe(options.recipe) if options.recipe else None
        prepare(options.source, options.template, options.out, options.name, options.threads, recipe)
    except (UnsupportedModel, KeyError, ValueError) as error:
        print(f"cannot prepare {options.source}: {error.args[0]}", file=sys.stderr)
        return 1
    return 0


def prepare(
    source: Path,
    template: str,
    out: Path,
    name: str | None = None,
    threads: int = 0,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Makes the folder `out`; one that is there already is replaced. Raises UnsupportedModel, KeyError or ValueError."""
    folder = HfFolder(source)
    name = name or out.name
    bundle = bundle_of(_template(template, recipe, folder), folder.tokenizer_json, folder.eos_token_ids)
    out.parent.mkdir(parents=True, exist_ok=True)
    with complete_folder(out) as beside, _progress(folder) as progress:
        (beside / "config.json").write_bytes(folder.read_bytes("config.json"))
        for file in (TEMPLATE_FILE, TOKENIZER_FILE):
            (beside / file).write_bytes(bundle.to_files()[file])
        task = progress.add_task("float16", total=None)
        write_f16_gguf(folder, name, beside / F16_FILE, progress=lambda _: progress.advance(task))
        progress.update(task, description="q4_0 (llama.cpp)")
        write_q4_0_gguf(beside / F16_FILE, beside / Q4_0_FILE, threads)
        base = {
            "name": name,
            "architecture": folder.config["architectures"][0],
            "context_length": folder.context_length,
            "digest": f"sha256:{file_sha256(beside / Q4_0_FILE)}",
            "template": template,
            "eos_token_ids": folder.eos_token_ids,
        }
        (beside / "base.json").write_text(json.dumps(base, indent=1) + "\n")


def _read_recipe(path: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads(sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes())
    return recipe


def _template(name: str, recipe: dict[str, Any] | None, folder: HfFolder) -> Template:
    """Raises KeyError for a name that is not built in, ValueError for a template that cannot be used."""
    if name == OWN_TEMPLATE:
        recipe = {"kind": "jinja", "source": {"name": name, "template": folder.chat_template}}
    if recipe is None:
        return template_named(name)
    source = dict(recipe["source"])
    if recipe["kind"] == "jinja":
        source["tokens"] = folder.special_tokens | source.get("tokens", {})
    made = template_from_source(recipe["kind"], source)
    if problems := validate(made, Tokenizer(folder.tokenizer_json), tuple(folder.eos_token_ids)):
        raise ValueError(f"the chat template '{name}' cannot be used: {'; '.join(problems)}")
    return made


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _progress(folder: HfFolder) -> Iterator[Progress]:
    columns = (TextColumn("preparing {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


if __name__ == "__main__":
    sys.exit(main())

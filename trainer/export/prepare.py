"""A base made ready, once: `python -m trainer.export.prepare --source PATH_OR_HUB_ID --template NAME --out DIR`.

The source is a Hugging Face folder, a ready .gguf file or the id of a model on a hub. The template is a built-in one by
its name, the model's own ("model"), or one whose recipe comes with it.

    config.json · tokenizer.json · template.json · model.f16.gguf · model.q4_0.gguf (or another type) · base.json

With the type "hf" the model stays as it is on Hugging Face, in hf/: what vLLM serves.

Place in the flow: before the first job or chat on a base. One rule: the folder is whole or absent (written beside,
renamed), and what a kill leaves beside is gone on with by the next start. Its own process, without torch (llama.cpp's
converter has one too).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gateway.chat.bundle import TEMPLATE_FILE, TOKENIZER_FILE, Bundle, bundle_of
from gateway.chat.registry import template_from_source, template_named
from gateway.chat.templates import Template
from gateway.chat.tokenizer import Tokenizer
from gateway.chat.validation import validate
from trainer.export.convert import convert
from trainer.export.folder import complete_file, resumable_folder
from trainer.export.gguf_file import GgufFile
from trainer.export.gguf_metadata import kv_bytes_per_token, read_metadata
from trainer.export.hf_folder import HfFolder
from trainer.export.progress import Progress
from trainer.export.quantise import DEFAULT_TYPE, PLAIN_TYPE, TYPES, write_quantised
from trainer.export.tensors import Layout, UnsupportedModel

F16_FILE, READY_FILE = "model.f16.gguf", "model.gguf"
OWN_TEMPLATE = "model"
HF_TYPE = "hf"
HF_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REFUSALS = (UnsupportedModel, KeyError, ValueError)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.export.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="a Hugging Face model folder, a .gguf file or a hub's ORG/NAME")
    parser.add_argument("--hub", action="store_true", help="the source is an id on a hub, whatever else has that name")
    parser.add_argument("--revision", help="of a model on a hub: a branch, tag or commit")
    parser.add_argument("--template", required=True, help="the chat template, by name; 'model' for its own")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make; its name is the base's name")
    parser.add_argument("--name", help="the base's name, where it is not the folder's")
    parser.add_argument(
        "--type", choices=(*TYPES, HF_TYPE), default=DEFAULT_TYPE, help="of the weights that are served"
    )
    parser.add_argument("--added", action="store_true", help="mark the base as one that no settings file needs to name")
    parser.add_argument("--recipe", type=Path, help='what a template that is not built in is made of ("-": stdin)')
    parser.add_argument("--threads", type=int, default=0, help="for quantising; 0 means all")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # llama.cpp's quantiser would not hear of an exception
    try:
        recipe = _read_recipe(options.recipe) if options.recipe else None
        with Progress(options.name or options.out.name) as progress:
            fetched = options.out.with_name(f".fetching-{options.out.name}")
            added = {"source": options.source, "revision": options.revision} if options.added else None
            source = _find(options.source, options.hub, options.revision, fetched, progress)
            prepare(
                source,
                options.template,
                options.out,
                options.name,
                options.threads,
                recipe,
                kind=options.type,
                progress=progress,
                added=added,
            )
            shutil.rmtree(fetched, ignore_errors=True)
    except _REFUSALS as error:
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
    *,
    kind: str = DEFAULT_TYPE,
    progress: Progress | None = None,
    added: dict[str, Any] | None = None,
) -> None:
    """Makes the folder `out`; one that is there already is replaced. `added` says what it was made from, for base.json.

    Raises UnsupportedModel, KeyError or ValueError.
    """
    found = GgufFile(source) if source.is_file() else HfFolder(source)
    name = name or out.name
    progress = progress or Progress(name)
    bundle = _bundle(template, recipe, found)
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == HF_TYPE and isinstance(found, GgufFile):
        raise UnsupportedModel(
            f"{source.name} is a .gguf file; vLLM serves models as they are on Hugging Face (a folder)"
        )
    with resumable_folder(out, _resume_key(source, name), _REFUSALS) as beside:
        if isinstance(found, GgufFile):
            file = _take(found, beside, progress)
        elif kind == HF_TYPE:
            file = link_hf(found, beside / HF_TYPE)
        else:
            file = _make(found, name, kind, beside, threads, progress)
        config, untrainable = (found.config, None) if kind == HF_TYPE else _trainable_config(found)
        (beside / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for bundled in (TEMPLATE_FILE, TOKENIZER_FILE):
            (beside / bundled).write_bytes(bundle.to_files()[bundled])
        progress.stage("digest")
        base = {
            "name": name,
            "architecture": found.architecture,
            "context_length": found.context_length,
            "hf" if kind == HF_TYPE else "gguf": file.name,
            "digest": f"sha256:{folder_sha256(file) if kind == HF_TYPE else file_sha256(file)}",
            "template": template,
            "eos_token_ids": list(bundle.eos_ids),
            "untrainable": untrainable,
            "kv_bytes_per_token": None if kind == HF_TYPE else kv_bytes_per_token(read_metadata(file)),
            **({"added": added} if added else {}),
        }
        (beside / "base.json").write_text(json.dumps(base, indent=1) + "\n")
    progress.stage("ready", 1, 1)


def _find(source: str, hub: bool, revision: str | None, fetched: Path, progress: Progress) -> Path:
    """The local path of what `--source` names: `fetched`, where it is a hub's. Raises UnsupportedModel."""
    path = Path(source).expanduser()
    if path.exists() and not hub:
        return path
    if not HUB_ID.fullmatch(source):
        raise UnsupportedModel(f"{source} is no folder, no .gguf file and no model id of the form ORG/NAME")
    from trainer.export.hub import fetch  # the hub's client takes half a second to import

    return fetch(source, revision, fetched, progress)


def _make(folder: HfFolder, name: str, kind: str, beside: Path, threads: int, progress: Progress) -> Path:
    """Both files of a Hugging Face folder; those that an earlier start has finished are kept."""
    f16 = beside / F16_FILE
    if not f16.is_file():
        with complete_file(f16) as part:
            convert(folder, name, part, progress)
    if kind == PLAIN_TYPE:
        return f16
    served = beside / f"model.{kind}.gguf"
    for other in beside.glob("model.*.gguf*"):
        if other not in (f16, served):  # of a start that asked for another type
            other.unlink()
    if not served.is_file():
        progress.stage(kind)
        with complete_file(served) as part:
            write_quantised(f16, part, kind, threads, lambda done, total: progress.stage(kind, total, done))
    return served


def _take(source: GgufFile, beside: Path, progress: Progress) -> Path:
    """A ready file as it is: linked, or copied from another file system."""
    served = beside / READY_FILE
    if not served.is_file():
        try:
            os.link(source.path.resolve(), served)
        except OSError:
            progress.stage("copying")
            with complete_file(served) as part:
                shutil.copyfile(source.path, part)
    return served


def link_hf(source: HfFolder, out: Path) -> Path:
    """The files of a Hugging Face folder that a model consists of, as hard links; nothing that could be executed.

    On another file system they are symbolic links: nobody wants a second copy of a hundred gigabytes.
    """
    out.mkdir(exist_ok=True)
    for path in sorted({path for pattern in HF_PATTERNS for path in source.path.glob(pattern)}):
        target = out / path.name
        target.unlink(missing_ok=True)
        try:
            os.link(path.resolve(), target)
        except OSError:
            target.symlink_to(path.resolve())
    return out


def folder_sha256(folder: Path) -> str:
    """One digest of what decides how a model computes: its weights and its config.json."""
    lines = [
        f"{path.name} {file_sha256(path)}\n" for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _trainable_config(found: HfFolder | GgufFile) -> tuple[dict[str, Any], str | None]:
    """config.json's content, and why it cannot be trained on, where it cannot."""
    try:
        Layout.from_config(found.config)
    except UnsupportedModel as error:
        own = found.config if isinstance(found, HfFolder) else {"architectures": [found.architecture]}
        return own, str(error)
    return found.config, None


def _resume_key(source: Path, name: str) -> str:
    """What must be equal for half-finished work to be of use. The type is not in it: the f16 file serves any."""
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    entries = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps([str(source.absolute()), name, version("llama-cpp-python"), entries])


def _read_recipe(path: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads(sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes())
    return recipe


def _bundle(name: str, recipe: dict[str, Any] | None, source: HfFolder | GgufFile) -> Bundle:
    """What the base is asked through; the very bundle of a tuned model that was exported, unless another was named."""
    if name != OWN_TEMPLATE or source.exported_template is None:
        return bundle_of(_template(name, recipe, source), source.tokenizer_json, source.eos_token_ids)
    files = {TEMPLATE_FILE: source.exported_template.encode(), TOKENIZER_FILE: source.tokenizer_json}
    bundle = Bundle.from_files(files)
    if problems := validate(bundle.template, bundle.tokenizer, bundle.eos_ids):
        raise ValueError(f"the template that {source.path.name} brings cannot be used: {'; '.join(problems)}")
    return bundle


def _template(name: str, recipe: dict[str, Any] | None, folder: HfFolder | GgufFile) -> Template:
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


if __name__ == "__main__":
    sys.exit(main())

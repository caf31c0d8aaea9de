"""An adapter as files: what is let near an engine, and where it is kept. Blocking; called on a thread.

Its one rule: nothing is loaded that is not on the lists below. Names, kinds of file, fields of adapter_config.json, data
types and tensor names are allowed one by one, and whatever is not known is refused. The weights' header is read with
bounds (`safetensors_header`), never by a library that trusts it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.engines.safetensors_header import HeaderError, Tensor, read_header
from gateway.errors import RequestError
from gateway.jobdir import ADAPTER_FILES, ADAPTER_GGUF, fsync_folder

MAX_JSON_BYTES = 4 << 20
MAX_CONFIG_BYTES = 256 << 10
MAX_FILE_BYTES = 16 << 30
MAX_RANK = 512
TENSOR_NAME = re.compile(r"base_model\.model\.([A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)\.lora_([AB])\.weight")
MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
BASE_PATH = "base_model_name_or_path"
DTYPES = ("F32", "F16", "BF16")


class AdapterRejected(RequestError):
    """An adapter that must not be served; the message says what is wrong with it."""

    code = "invalid_adapter"

    def __init__(self, message: str, *, engine_status: int | None = None) -> None:
        super().__init__(message)
        self.engine_status = engine_status  # where an engine refused it: its status


@dataclass(frozen=True)
class Adapter:
    """An adapter as an engine is to serve it. The name is immutable: other content has another name."""

    engine_name: str
    path: Path  # an absolute folder with ADAPTER_FILES in it, adapter.gguf only where llama.cpp serves the base
    base: str
    digest: str  # of the manifest, "sha256:…"


@dataclass(frozen=True)
class AdapterFacts:
    """What `check_adapter` found."""

    digest: str  # of the manifest, "sha256:…"; it holds the digests of all other files
    base_digest: str
    rank: int
    alpha: float
    modules: int  # how many projections it changes
    size_bytes: int
    manifest: dict[str, Any]


def immutable_name(name: str, digest: str) -> str:
    """The engine's name of an adapter: its public name and the first 12 hex digits of its digest."""
    return f"{name}@{digest.removeprefix('sha256:')[:12]}"


def check_adapter(folder: Path, base_digest: str, max_rank: int = MAX_RANK, *, gguf: bool = True) -> AdapterFacts:
    """Reads the whole folder and returns what it is; AdapterRejected with the reason when it may not be served.

    `gguf`: whether the base is served by llama.cpp, which needs the adapter as adapter.gguf.
    """
    files = tuple(name for name in ADAPTER_FILES if gguf or name != ADAPTER_GGUF)
    sizes = _check_names(folder, files)
    manifest = _read_object(folder / "manifest.json", MAX_JSON_BYTES)
    _check_base(manifest, base_digest)
    digests = _check_sizes(manifest, sizes, files)
    rank, alpha = _check_config(_read_object(folder / "adapter_config.json", MAX_CONFIG_BYTES), max_rank)
    modules = _check_tensors(folder / "adapter_model.safetensors", rank)
    for name, digest in digests.items():  # last: the only check whose time grows with the weights
        if (found := file_digest(folder / name)) != digest:
            raise AdapterRejected(f"{name} has digest {found}, but manifest.json says {digest}")
    return AdapterFacts(manifest_digest(manifest), base_digest, rank, alpha, modules, sum(sizes.values()), manifest)


def check_weights(folder: Path, max_rank: int = MAX_RANK) -> int:
    """The rank of an adapter as PEFT leaves one (two files count, whatever else is there); AdapterRejected otherwise."""
    try:
        config = _read_object(folder / "adapter_config.json", MAX_CONFIG_BYTES)
        rank, _ = _check_config({key: value for key, value in config.items() if key != BASE_PATH}, max_rank)
        _check_tensors(folder / "adapter_model.safetensors", rank)
    except OSError as error:
        raise AdapterRejected(f"{error.filename} cannot be read: {error.strerror}") from error
    return rank


def link_adapter(folder: Path, into: Path) -> tuple[str, Path]:
    """Keeps a checked adapter under `into`/<hex digest>; returns (digest, that folder).

    Hard links (copies where the file system has none), complete or absent; the same adapter again is the same folder.
    """
    digest = manifest_digest(_read_object(folder / "manifest.json", MAX_JSON_BYTES))
    target = into.absolute() / digest.removeprefix("sha256:")
    if target.is_dir():
        os.utime(target)  # somebody wants it again: `sweeping` looks at that
        return digest, target
    into.mkdir(parents=True, exist_ok=True)
    temporary = into / f".tmp-{target.name[:12]}-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        present = [name for name in ADAPTER_FILES if name != ADAPTER_GGUF or (folder / name).exists()]
        for name in present:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _link(folder / name, temporary / name)
        for parent in {(temporary / name).parent for name in present}:
            fsync_folder(parent)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():  # else somebody linked the same adapter just now
                raise
        fsync_folder(into)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digest, target


def sweep_adapters(into: Path) -> None:
    """Removes what a killed `link_adapter` left. At start-up, before any other call here."""
    for path in into.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The digest of a manifest's content, however its JSON was spaced or ordered."""
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _check_names(folder: Path, files: tuple[str, ...]) -> dict[str, int]:
    """Every file of the folder: its size by name. Nothing may be missing, added, a link or of another kind."""
    sizes: dict[str, int] = {}
    folders = {str(Path(name).parent) for name in files} - {"."}
    if folder.is_symlink() or not folder.is_dir():
        raise AdapterRejected(f"{folder} is not a folder")
    for place in ["", *sorted(folders)]:
        if not (folder / place).is_dir():
            continue  # what is missing is named below
        with os.scandir(folder / place) as entries:
            for entry in entries:
                name = f"{place}/{entry.name}" if place else entry.name
                if entry.is_dir(follow_symlinks=False) and name in folders:
                    continue
                if name not in files:
                    raise AdapterRejected(f"the adapter holds {name!r}; only these are allowed: {', '.join(files)}")
                status = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    raise AdapterRejected(f"{name} is not a regular file; links and devices are refused")
                if status.st_size > MAX_FILE_BYTES:
                    raise AdapterRejected(f"{name} has {status.st_size} bytes; at most {MAX_FILE_BYTES} are allowed")
                sizes[name] = status.st_size
    if missing := [name for name in files if name not in sizes]:
        raise AdapterRejected(f"the adapter lacks {', '.join(missing)}")
    return sizes


def _check_base(manifest: dict[str, Any], base_digest: str) -> None:
    base = manifest.get("base")
    found = base.get("digest") if isinstance(base, dict) else manifest.get("base_digest")
    if found != base_digest:
        raise AdapterRejected(
            f"the adapter was trained on the base with digest {found!r}, this engine's base has {base_digest!r}; "
            "train it again on this base"
        )


def _check_sizes(manifest: dict[str, Any], sizes: dict[str, int], names: tuple[str, ...]) -> dict[str, str]:
    """The digest that the manifest gives for each file; the sizes are compared here."""
    files = manifest.get("files")
    wanted = [name for name in names if name != "manifest.json"]
    if not isinstance(files, dict) or sorted(files) != sorted(wanted):
        raise AdapterRejected(f"manifest.json must list exactly these files: {', '.join(wanted)}")
    digests: dict[str, str] = {}
    for name, entry in files.items():
        digest = entry.get("digest") if isinstance(entry, dict) else None
        if not isinstance(digest, str) or type(entry.get("size_bytes")) is not int:
            raise AdapterRejected(f"manifest.json has no digest and size_bytes for {name}")
        if entry["size_bytes"] != sizes[name]:
            raise AdapterRejected(f"{name} has {sizes[name]} bytes, but manifest.json says {entry['size_bytes']}")
        digests[name] = digest
    return digests


def _check_config(config: dict[str, Any], max_rank: int) -> tuple[int, float]:
    """(rank, alpha) of an adapter_config.json that asks for plain LoRA and nothing else."""
    for key, value in config.items():
        rule = _CONFIG_RULES.get(key, _is_empty)
        if not rule(value):
            shown = repr(value)[:80]
            raise AdapterRejected(f"adapter_config.json has {key[:80]!r}: {shown}, which is not supported here")
    if absent := [key for key in ("peft_type", "r", "lora_alpha", "target_modules") if key not in config]:
        raise AdapterRejected(f"adapter_config.json lacks {', '.join(absent)}")
    rank = config["r"]
    if rank > max_rank:
        raise AdapterRejected(f"the adapter has rank {rank}; this engine takes at most {max_rank}")
    return rank, float(config["lora_alpha"])


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == {} or value == []


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_module_list(value: Any) -> bool:
    return value == "all-linear" or (  # any other string is a regular expression to PEFT
        isinstance(value, list)
        and 0 < len(value) <= 10_000
        and all(isinstance(name, str) and len(name) <= 256 and MODULE_NAME.fullmatch(name) for name in value)
    )


def _is_plain_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 200 and value.isprintable())


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


# Fields with a meaning that we support. Each other field must be empty, which is how PEFT writes what is not in use.
_CONFIG_RULES: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "task_type": lambda value: value in (None, "CAUSAL_LM"),
    "r": lambda value: type(value) is int and value > 0,
    "lora_alpha": lambda value: _is_number(value) and value > 0,
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
    "target_modules": _is_module_list,
    "bias": lambda value: value == "none",
    "use_rslora": _is_boolean,
    "inference_mode": _is_boolean,
    "init_lora_weights": lambda value: isinstance(value, bool) or value == "gaussian",
    BASE_PATH: lambda value: _is_plain_name(value) and not re.search(r"\.\.|://|^/|^~", value or ""),
    "peft_version": _is_plain_name,
    # Defaults that PEFT writes though the feature that they belong to is off.
    "megatron_core": lambda value: value in (None, "megatron.core"),
    "qalora_group_size": lambda value: type(value) is int,
}


def _check_tensors(path: Path, rank: int) -> int:
    """How many projections the weights change; each is a pair A (rank, in), B (out, rank) and nothing else."""
    try:
        tensors = read_header(path)
    except HeaderError as error:
        raise AdapterRejected(f"adapter_model.safetensors: {error}") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise AdapterRejected(f"tensor {name[:120]!r} is not a LoRA weight (base_model.model.….lora_A|B.weight)")
        if tensor.dtype not in DTYPES:
            raise AdapterRejected(f"tensor {name} has data type {tensor.dtype}; allowed are {', '.join(DTYPES)}")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise AdapterRejected("adapter_model.safetensors holds no tensor")
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise AdapterRejected(f"{module} has lora_{next(iter(pair))} without its other half")
        a, b = pair["A"].shape, pair["B"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise AdapterRejected(
                f"{module} has lora_A {a} and lora_B {b}; with r = {rank} they must be ({rank}, in) and (out, {rank})"
            )
    return len(pairs)


def _read_object(path: Path, limit_bytes: int) -> dict[str, Any]:
    with path.open("rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise AdapterRejected(f"{path.name} has more than {limit_bytes} bytes")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterRejected(f"{path.name} is not a JSON object")
    return value


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, target, follow_symlinks=False)
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

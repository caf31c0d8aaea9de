"""A merged model as a Hugging Face folder: weights, config.json, generation_config.json, tokenizer, chat template.

Place in the flow: merge → **checkpoint** → proof. One rule: transformers, vLLM and `tunegate models add` take the folder as it
is. template.json goes with it, which is how our own renderer writes what it was trained through, whether or not there is a
Jinja form.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import numpy.typing as npt

from gateway.chat.bundle import TEMPLATE_FILE, TOKENIZER_FILE, Bundle
from trainer.export.gguf_metadata import read_header
from trainer.export.hf_folder import HfFolder
from trainer.export.jinja_form import jinja_form
from trainer.export.merge import Float32, Merge, Tuned
from trainer.export.tensors import Layout, UnsupportedModel, as_float16, text_config

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # by transformers' names
SHARD_BYTES = 5_000_000_000
_SAFETENSORS = {"f32": ("F32", 4), "f16": ("F16", 2), "bf16": ("BF16", 2)}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
_TOKENIZER_FILES = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")


class Weights(Protocol):
    """A base's tensors by transformers' names, as transformers has them."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def tensors(self) -> Iterator[tuple[str, Float32]]:
        """One at a time, in the order of `shapes`."""
        ...


class GgufWeights:
    """Of a GGUF file, dequantised: what an adapter on it was trained on."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._path, self._config = path, text_config(config)
        self._layout = Layout.from_config(self._config)
        self._names = self._by_gguf_name()
        _, tensors = read_header(path)
        self.shapes = {hf_name: tensors[name].shape for name, hf_name in self._names.items()}

    def tensors(self) -> Iterator[tuple[str, Float32]]:
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(self._path).tensors}
        for name, hf_name in self._names.items():
            values = gguf.quants.dequantize(found[name].data, found[name].tensor_type)
            yield hf_name, self._layout.from_gguf_values(name, values.astype(np.float32, copy=False))

    def _by_gguf_name(self) -> dict[str, str]:
        """transformers' names by GGUF's, of exactly the tensors that the model has. Nothing is computed for it."""
        import torch
        import transformers

        _, tensors = read_header(self._path)
        kind = getattr(transformers, self._config["architectures"][0])
        config = kind.config_class(**{key: value for key, value in self._config.items() if not key.endswith("dtype")})
        config.tie_word_embeddings = "output.weight" not in tensors
        with torch.device("meta"):
            wanted = kind(config).state_dict()
        if config.tie_word_embeddings:
            wanted.pop("lm_head.weight", None)
        names = {self._layout.to_gguf_name(name): name for name in wanted}
        if missing := sorted(set(names) - set(tensors)):
            raise UnsupportedModel(f"the base's GGUF lacks what transformers' {kind.__name__} has: {missing[0]}")
        return names


def write_checkpoint(
    folder: Path, tuned: Tuned, merge: Merge, dtype: str, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Fills the folder; `dtype` is a key of DTYPES. Raises UnsupportedModel."""
    config = json.loads((tuned.base / "config.json").read_bytes())
    weights: Weights
    if tuned.gguf is None:
        weights = HfFolder(tuned.hf)
    else:
        config = text_config(config)
        weights = GgufWeights(tuned.gguf, config)
        config["tie_word_embeddings"] = "lm_head.weight" not in weights.shapes
        embedding = next(shape for name, shape in weights.shapes.items() if name.endswith("embed_tokens.weight"))
        config["vocab_size"] = embedding[0]
    write_weights(folder, weights, merge, dtype, progress)
    for key in ("_name_or_path", "quantization_config"):
        config.pop(key, None)
    named = {"dtype": DTYPES[dtype], "torch_dtype": DTYPES[dtype]}  # the second is what older programs read
    _write_json(folder / "config.json", config | named)
    _write_json(folder / "generation_config.json", _generation_config(tuned, config))
    if tuned.gguf is None:
        copy_tokenizer(tuned.hf, folder)
    write_template(folder, tuned, config)


def default_dtype(tuned: Tuned) -> str:
    """That of the model's own config.json; float16 where it names none that is written here."""
    config = text_config(json.loads((tuned.base / "config.json").read_bytes()))
    named = config.get("dtype") or config.get("torch_dtype")
    return next((ours for ours, theirs in DTYPES.items() if theirs == named), "f16")


def write_weights(
    folder: Path,
    weights: Weights,
    merge: Merge,
    dtype: str,
    progress: Callable[[str], None] = lambda _: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """model.safetensors, or several parts with their index; one tensor is in memory at a time."""
    kind, item_bytes = _SAFETENSORS[dtype]
    parts = _parts(weights.shapes, item_bytes, shard_bytes)
    names = [
        "model.safetensors" if len(parts) == 1 else f"model-{n:05}-of-{len(parts):05}.safetensors"
        for n in range(1, len(parts) + 1)
    ]
    tensors = weights.tensors()
    for file_name, part in zip(names, parts, strict=True):
        with (folder / file_name).open("wb") as file:
            file.write(_header(part, kind, item_bytes))
            for expected in part:
                name, weight = next(tensors)
                assert name == expected
                progress(name)
                merged = merge.apply(name, weight)
                written = _as(dtype, name, merged)
                if merged is not weight:
                    merge.count(_as(dtype, name, weight), written)
                written.tofile(file)
    if len(parts) > 1:
        index = {name: file_name for file_name, part in zip(names, parts, strict=True) for name in part}
        size = sum(_size(shape) * item_bytes for shape in weights.shapes.values())
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": dict(index)}
        )


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The small files of a Hugging Face folder that are no weights and no config: its tokenizer's."""
    weights = {path.name for pattern in _WEIGHTS for path in source.glob(pattern)}
    for path in sorted({path for pattern in _TOKENIZER_FILES for path in source.glob(pattern)}):
        if path.name not in weights:
            shutil.copyfile(path, folder / path.name)


def write_template(folder: Path, tuned: Tuned, config: dict[str, Any]) -> None:
    """The tokenizer and the template that the adapter was trained through, over what the base brought."""
    bundle = tuned.bundle
    for name in (TEMPLATE_FILE, TOKENIZER_FILE):
        (folder / name).write_bytes(bundle.files[name])
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_bytes()) if path.is_file() else _tokenizer_config(tuned, config)
    written.pop("chat_template", None)
    form = jinja_form(bundle)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if isinstance(form, dict):
        written["chat_template"] = [{"name": name, "template": text} for name, text in form.items()]
    elif form is not None:
        (folder / "chat_template.jinja").write_text(form, encoding="utf-8")
    _write_json(path, written)


def _tokenizer_config(tuned: Tuned, config: dict[str, Any]) -> dict[str, Any]:
    """For a base that came without one (a GGUF file), or whose own was not kept."""
    names = {key: _name_of(tuned.bundle, config.get(f"{key}_id")) for key in ("bos_token", "eos_token", "pad_token")}
    names["eos_token"] = names["eos_token"] or _name_of(tuned.bundle, next(iter(tuned.bundle.eos_ids), None))
    names["unk_token"] = json.loads(tuned.bundle.files[TOKENIZER_FILE])["model"].get("unk_token")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: name for key, name in names.items() if name is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(tuned.described["context_length"]),
    }


def _name_of(bundle: Bundle, token: Any) -> str | None:
    first = token[0] if isinstance(token, list) and token else token
    return bundle.tokenizer.name_of(first) if isinstance(first, int) else None


def _generation_config(tuned: Tuned, config: dict[str, Any]) -> dict[str, Any]:
    """The base's own where it is known, ending where a reply of the tuned model ends."""
    own: dict[str, Any] = {}
    if tuned.gguf is None and (tuned.hf / "generation_config.json").is_file():
        own = json.loads((tuned.hf / "generation_config.json").read_bytes())
    defaults = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    stops = list(tuned.bundle.stop_ids)
    return defaults | own | ({"eos_token_id": stops if len(stops) > 1 else stops[0]} if stops else {})


def _parts(shapes: dict[str, tuple[int, ...]], item_bytes: int, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Shapes by name, file by file."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        more = _size(shape) * item_bytes
        if parts[-1] and size + more > shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += more
    return parts


def _header(part: dict[str, tuple[int, ...]], kind: str, item_bytes: int) -> bytes:
    """What a safetensors file begins with: the size of a JSON object, and the object."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in part.items():
        end = at + _size(shape) * item_bytes
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the weights begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _as(dtype: str, name: str, values: Float32) -> npt.NDArray[Any]:
    """In the bytes of the type; bfloat16 as whole numbers, since numpy has none."""
    if dtype == "f16":
        return as_float16(name, values)
    if dtype == "f32":
        return values
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to even where two are as near
    return nearest.astype(np.uint16)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

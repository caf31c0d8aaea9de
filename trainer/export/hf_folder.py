"""A Hugging Face model folder, read without torch: config, tensors one at a time, tokenizer files.

Place in the flow: the source of `prepare`. One rule: safetensors only, nothing in the folder is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.chat.bundle import TEMPLATE_FILE
from trainer.export.tensors import UnsupportedModel, text_config
from trainer.export.tokenizers import tokenizer_json_of

_HEADER_LIMIT_BYTES = 100_000_000
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class HfFolder:
    """Raises UnsupportedModel when something that is needed is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise UnsupportedModel(f"{path} has no config.json: it must be a Hugging Face model folder")
        self.config: dict[str, Any] = json.loads((path / "config.json").read_bytes())
        self._files = self._tensor_files()

    @property
    def architecture(self) -> str:
        """transformers' class of the part that reads and writes text."""
        return str((text_config(self.config).get("architectures") or ["?"])[0])

    @property
    def size_bytes(self) -> int:
        """Of the weights."""
        return sum(file.stat().st_size for file in self._files)

    @cached_property
    def n_tensors(self) -> int:
        return sum(len(_read_header(file)[0]) for file in self._files)

    @property
    def context_length(self) -> int:
        return usable_context(self.config)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a text, from generation_config.json or else config.json."""
        for source in (self._optional_json("generation_config.json"), text_config(self.config)):
            eos = source.get("eos_token_id")
            if eos is not None:
                return [int(i) for i in eos] if isinstance(eos, list) else [int(eos)]
        return []

    @property
    def add_bos(self) -> bool:
        return bool(self._optional_json("tokenizer_config.json").get("add_bos_token", True))

    @property
    def chat_template(self) -> str | dict[str, str]:
        """The Jinja chat template that the model brings, in a file or in tokenizer_config.json; several by name."""
        own = self.path / "chat_template.jinja"
        if own.is_file():
            return own.read_text(encoding="utf-8")
        found = self._optional_json("tokenizer_config.json").get("chat_template")
        if isinstance(found, list):  # several by name
            found = {str(entry["name"]): str(entry["template"]) for entry in found}
        if not found:
            raise UnsupportedModel(
                f"{self.path} brings no chat template (chat_template.jinja, or 'chat_template' in tokenizer_config.json); "
                "name one (`models add --template`, or `template` in the settings), such as chatml, llama-3 or vicuna_v1.1"
            )
        return found if isinstance(found, dict) else str(found)

    @property
    def exported_template(self) -> str | None:
        """The template.json of a tuned model that was exported."""
        path = self.path / TEMPLATE_FILE
        return path.read_text(encoding="utf-8") if path.is_file() else None

    @property
    def special_tokens(self) -> dict[str, str]:
        """The tokens that a chat template may name: bos_token, eos_token, …"""
        found: dict[str, str] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            for key, token in self._optional_json(name).items():
                content = token.get("content") if isinstance(token, dict) else token
                if key.endswith("_token") and isinstance(content, str):
                    found[key] = content
        return found

    @cached_property
    def tokenizer_json(self) -> bytes:
        """The model's tokenizer in the form that is served, converted where it comes in another."""
        return tokenizer_json_of(self.path)

    def read_bytes(self, name: str) -> bytes:
        path = self.path / name
        if not path.is_file():
            raise UnsupportedModel(f"{self.path} has no {name}, which is needed to serve and to train the model")
        return path.read_bytes()

    def tensors(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Every tensor with its name, as float32, in the order of the files; one is in memory at a time."""
        for file in self._files:
            yield from read_safetensors(file)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, in the order of `tensors`."""
        entries = (entry for file in self._files for entry in _read_header(file)[0].items())
        return {name: tuple(entry["shape"]) for name, entry in entries}

    def _tensor_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        files = [self.path / Path(name).name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UnsupportedModel(f"{self.path} has no {missing[0]}: weights are read from safetensors files only")
        return files

    def _optional_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return json.loads(path.read_bytes()) if path.is_file() else {}


def usable_context(config: dict[str, Any]) -> int:
    """How many tokens a model takes at once: as many as transformers and llama.cpp compute alike.

    llama.cpp has no sliding window for these models, and takes the long factors of a "longrope" for short texts too where
    there is room for long ones.
    """
    config = text_config(config)
    limits = [int(config.get("max_position_embeddings") or 2048)]
    window = config.get("sliding_window")
    slides = config.get("model_type") in ("mistral", "phi3") or config.get("use_sliding_window")
    if window and slides:
        limits.append(int(window))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) in ("longrope", "su"):
        original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        limits.append(int(original or limits[0]))
    return min(limits)


def read_safetensors(path: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Every tensor with its name, as float32. By hand: numpy has no bfloat16, and the library's numpy reader refuses it."""
    header, start = _read_header(path)
    for name, entry in header.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UnsupportedModel(f"the tensor '{name}' is {entry['dtype']}; readable are {', '.join(_DTYPES)}")
        begin, end = entry["data_offsets"]
        raw = np.fromfile(path, dtype, (end - begin) // dtype.itemsize, offset=start + begin).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        yield name, raw.astype(np.float32)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors' entries by name, and where their data begins."""
    with path.open("rb") as file:
        first = file.read(8)
        header_bytes = int.from_bytes(first, "little")
        if len(first) < 8 or header_bytes > _HEADER_LIMIT_BYTES:
            raise UnsupportedModel(f"{path.name} is not a safetensors file (its header claims {header_bytes} bytes)")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    return header, 8 + header_bytes

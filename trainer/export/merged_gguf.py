"""A GGUF file written again: weights in float16, some of them changed, with another name and the template in its metadata.

Place in the flow: merge → **merged_gguf** → quantise. One rule: what is not named here is copied, so that the tokenizer and
every number that decides what the model computes are the base's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gateway.chat.bundle import TEMPLATE_FILE, Bundle
from trainer.export.gguf_metadata import TEMPLATE_KEY
from trainer.export.jinja_form import jinja_form
from trainer.export.merge import Merge
from trainer.export.tensors import Layout, as_float16

_F16 = int(gguf.LlamaFileType.MOSTLY_F16)
_CHAT_TEMPLATE = gguf.Keys.Tokenizer.CHAT_TEMPLATE


def write_merged_gguf(
    source: Path,
    path: Path,
    metadata: dict[str, Any],
    merge: Merge | None = None,
    layout: Layout | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Writes `path`, a copy of `source` in float16 with what `merge` changes; one tensor is in memory at a time.

    `metadata` (texts and whole numbers) is put in place of, or beside, the source's. Raises UnsupportedModel.
    """
    reader = gguf.GGUFReader(source)
    named = {} if merge is None or layout is None else merge.by_gguf_name(layout)
    writer = gguf.GGUFWriter(str(path), str(reader.fields["general.architecture"].contents()))
    _copy_metadata(reader, writer, metadata)
    for tensor in reader.tensors:
        shape, kind = [int(size) for size in reversed(tensor.shape)], _kind_of(tensor)
        writer.add_tensor_info(tensor.name, shape, kind, int(np.prod(shape)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        progress(tensor.name)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        kept = _written(tensor, values)
        if merge is not None and layout is not None and (name := named.get(tensor.name)) is not None:
            merged = merge.apply(name, layout.from_gguf_rows(tensor.name, values))
            changed = _written(tensor, layout.to_gguf_rows(tensor.name, merged))
            merge.count(kept, changed)
            kept = changed
        writer.write_tensor_data(np.ascontiguousarray(kept))
    writer.close()


def metadata_of(name: str, bundle: Bundle) -> dict[str, Any]:
    """What a tuned model's file says of itself: its name, its template, and the tokens that end its replies."""
    found: dict[str, Any] = {"general.name": name, TEMPLATE_KEY: bundle.files[TEMPLATE_FILE].decode()}
    form = jinja_form(bundle)
    if isinstance(form, dict):  # several by name
        found[gguf.Keys.Tokenizer.CHAT_TEMPLATES] = [other for other in form if other != "default"]
        found |= {f"{_CHAT_TEMPLATE}.{other}": text for other, text in form.items() if other != "default"}
        form = form.get("default")
    if form is not None:
        found[_CHAT_TEMPLATE] = form
    eos = bundle.eos_ids[0] if bundle.eos_ids else None
    others = [token for token in bundle.stop_ids if token != eos]
    if others:
        found[gguf.Keys.Tokenizer.EOT_ID] = others[0]
    return found


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, metadata: dict[str, Any]) -> None:
    replaced = {*metadata, "general.architecture", "general.file_type", "general.quantization_version"}
    for field in reader.fields.values():
        # A chat template of the base's, whole or by name, would stand beside the one that was trained through.
        if field.name.startswith(("GGUF.", _CHAT_TEMPLATE)) or field.name in replaced:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    writer.add_file_type(_F16)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)


def _kind_of(tensor: Any) -> np.dtype[Any]:
    """Matrices in float16; vectors (norms, biases, rope's divisors) stay whole, as llama.cpp has them."""
    return np.dtype(np.float16 if len(tensor.shape) > 1 and tensor.shape[1] > 1 else np.float32)


def _written(tensor: Any, values: Any) -> Any:
    return as_float16(tensor.name, values) if _kind_of(tensor) == np.float16 else values

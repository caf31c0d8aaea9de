"""Ready GGUF files: served as they are; what cannot be trained is told, not guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.tiny_gguf import write_tiny_gguf
from trainer.export.gguf_file import GgufFile
from trainer.export.gguf_metadata import kv_bytes_per_token, read_header
from trainer.export.prepare import prepare
from trainer.export.tensors import UnsupportedModel

Change = Callable[[gguf.GGUFWriter], None]


def write_changed(path: Path, change: Change, architecture: str = "llama", weights: str | None = None) -> Path:
    """A tiny random model with a little changed in what its metadata say."""
    reader = gguf.GGUFReader(write_tiny_gguf(path.with_suffix(".plain.gguf"), q4_0=False))
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name.replace("llama.", f"{architecture}.", 1), field.contents(), kind, sub)
    change(writer)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name if weights is None else tensor.name.replace("token_embd", weights), tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def nothing(writer: gguf.GGUFWriter) -> None: ...


@pytest.mark.parametrize(
    ("architecture", "change", "said"),
    [
        ("falcon", nothing, "its architecture is 'falcon'"),
        ("llama", lambda writer: writer.add_expert_count(8), "mixture of experts"),
        ("llama", lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "scaled by 'longrope'"),
        (
            "llama",
            lambda writer: writer.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32)),
            "not that of Llama 3",
        ),
    ],
)
def test_what_cannot_be_trained_is_served_and_says_why(
    architecture: str, change: Change, said: str, tmp_path: Path
) -> None:
    path = write_changed(tmp_path / "odd.gguf", change, architecture)
    prepare(path, "vicuna_v1.1", tmp_path / "base")
    described = json.loads((tmp_path / "base" / "base.json").read_text())
    assert said in described["untrainable"]
    assert (tmp_path / "base" / described["gguf"]).samefile(path)
    assert described["context_length"] == 512


@pytest.mark.parametrize(
    ("change", "weights", "said"),
    [
        (lambda writer: writer.add_uint16("split.count", 3), None, "llama-gguf-split --merge"),
        (nothing, "v.patch_embd", "no language model"),
    ],
)
def test_what_cannot_be_served_is_refused(change: Change, weights: str | None, said: str, tmp_path: Path) -> None:
    path = write_changed(tmp_path / "odd.gguf", change, weights=weights)
    with pytest.raises(UnsupportedModel, match=said):
        GgufFile(path)


def test_a_rotation_of_a_part_of_the_head_is_not_trained(tmp_path: Path) -> None:
    path = write_changed(tmp_path / "odd.gguf", nothing)
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields["llama.rope.dimension_count"]
    field.parts[field.data[0]][0] = 8
    reader.data.flush()
    with pytest.raises(UnsupportedModel, match="rotates 8 of 16"):
        _ = GgufFile(path).config


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    whole = write_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    for size in (10, 500, 5000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UnsupportedModel, match="cut off or damaged"):
            GgufFile(tmp_path / "cut.gguf")


def test_a_file_whose_weights_are_cut_off_is_refused(tmp_path: Path) -> None:
    whole = write_tiny_gguf(tmp_path / "whole.gguf")
    GgufFile(whole)
    content = whole.read_bytes()
    for size in (len(content) // 2, len(content) - 64):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(UnsupportedModel, match="of its weights are missing"):
            GgufFile(tmp_path / "cut.gguf")


def test_the_header_says_where_each_tensor_is(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    metadata, tensors = read_header(path)
    reader = gguf.GGUFReader(path)
    assert set(tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        found = tensors[tensor.name]
        assert (found.at, found.kind, found.shape) == (
            tensor.data_offset,
            tensor.tensor_type,
            tuple(reversed(tensor.shape.tolist())),
        )
    assert kv_bytes_per_token(metadata) == 2 * 2 * 16 * 2 * 2  # layers, kv heads, head size, keys and values, float16

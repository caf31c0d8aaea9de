"""What an adapter's folder may hold: everything else is refused before any engine sees it, and quickly."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engines.adapters import AdapterRejected, check_adapter, link_adapter, sweep_adapters
from gateway.engines.safetensors_header import HeaderError, read_header
from gateway.jobdir import ADAPTER_FILES
from tests.engines.parts import (
    RANK,
    lora_tensors,
    write_adapter,
    write_manifest,
    write_raw_safetensors,
    write_safetensors,
)

BASE = "sha256:base"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", BASE)


def test_a_good_adapter_passes_and_its_facts_are_read(folder: Path) -> None:
    facts = check_adapter(folder, BASE, max_rank=64)
    assert (facts.rank, facts.alpha, facts.modules, facts.base_digest) == (RANK, 8.0, 1, BASE)
    assert facts.size_bytes == sum((folder / name).stat().st_size for name in ADAPTER_FILES)


def test_an_adapter_for_vllm_has_no_gguf(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match=r"holds 'adapter\.gguf'"):
        check_adapter(folder, BASE, gguf=False)
    (folder / "adapter.gguf").unlink()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["files"]["adapter.gguf"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert check_adapter(folder, BASE, gguf=False).rank == RANK
    _, kept = link_adapter(folder, tmp_path / "adapters")
    assert check_adapter(kept, BASE, gguf=False).rank == RANK
    with pytest.raises(AdapterRejected, match=r"lacks adapter\.gguf"):
        check_adapter(folder, BASE)


def test_an_adapter_of_another_base_is_refused(folder: Path) -> None:
    with pytest.raises(AdapterRejected, match="trained on the base"):
        check_adapter(folder, "sha256:other")


def test_a_rank_over_the_engines_maximum_is_refused(folder: Path) -> None:
    with pytest.raises(AdapterRejected, match="rank 4; this engine takes at most 2"):
        check_adapter(folder, BASE, max_rank=2)


@pytest.mark.parametrize("name", ["run.py", "adapter_model.bin", "weights.pth", "template/evil.jinja", "optimizer.pt"])
def test_a_file_that_is_not_on_the_list_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(AdapterRejected, match="only these are allowed"):
        check_adapter(folder, BASE)


def test_a_folder_that_is_not_on_the_list_is_refused(folder: Path) -> None:
    (folder / "more").mkdir()
    with pytest.raises(AdapterRejected, match="only these are allowed"):
        check_adapter(folder, BASE)


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_each_file_must_be_there_and_be_no_link(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / "moved")
    with pytest.raises(AdapterRejected, match=f"lacks {name}"):
        check_adapter(folder, BASE)
    (folder / name).symlink_to(tmp_path / "moved")
    with pytest.raises(AdapterRejected, match="not a regular file"):
        check_adapter(folder, BASE)


def test_a_pipe_in_a_files_place_is_refused_without_waiting_for_it(folder: Path) -> None:
    (folder / "witness.json").unlink()
    os.mkfifo(folder / "witness.json")
    with pytest.raises(AdapterRejected, match="not a regular file"):
        check_adapter(folder, BASE)


def test_a_folder_reached_through_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(AdapterRejected, match="not a folder"):
        check_adapter(tmp_path / "link", BASE)


@pytest.mark.parametrize("name", [name for name in ADAPTER_FILES if name != "manifest.json"])
def test_a_changed_byte_in_any_file_is_refused(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(AdapterRejected):
        check_adapter(folder, BASE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("auto_map", {"AutoModel": "evil.Model"}),
        ("auto_mapping", {"base_model_class": "x"}),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("init_lora_weights", "pissa"),
        ("loftq_config", {"bits": 4}),
        ("layer_replication", [[0, 1]]),
        ("target_modules", "(a+)+$"),
        ("target_modules", ["../../etc/passwd"]),
        ("target_modules", []),
        ("base_model_name_or_path", "../../models/other"),
        ("base_model_name_or_path", "https://example.org/model"),
        ("base_model_name_or_path", "/etc"),
        ("r", True),
        ("r", -4),
        ("r", 4.0),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 0),
        ("lora_alpha", "16"),
        ("something_new", "anything"),
    ],
)
def test_a_config_that_asks_for_more_than_plain_lora_is_refused(folder: Path, field: str, value: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_bytes()) | {field: value}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_manifest(folder, BASE)
    with pytest.raises(AdapterRejected, match=field):
        check_adapter(folder, BASE)


def test_the_config_that_peft_writes_by_default_passes(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_bytes()) | {
        "task_type": "CAUSAL_LM", "inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.0,
        "fan_in_fan_out": False, "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {}, "loftq_config": {},
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_version": "0.21.2",
        "qalora_group_size": 16, "revision": None, "use_dora": False, "use_rslora": False, "auto_mapping": None,
        "base_model_name_or_path": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_manifest(folder, BASE)
    assert check_adapter(folder, BASE).rank == RANK


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PREFIX}.lora_B.weight"), "without its other half"),
        (lambda t: t.clear(), "no tensor"),
        (lambda t: t.update({"model.embed_tokens.weight": np.ones((4, 4), np.float32)}), "not a LoRA weight"),
        (lambda t: t.update({"base_model.model.lm_head.lora_embedding_A": np.ones((4, 4), np.float32)}), "not a LoRA"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": np.ones((8, 64), np.float32)}), "with r = 4"),
        (lambda t: t.update({f"{PREFIX}.lora_B.weight": np.ones((64, 2), np.float32)}), "with r = 4"),
        (lambda t: t.update({f"{PREFIX}.lora_B.weight": np.ones((64, 2, 2), np.float32)}), "with r = 4"),
        (lambda t: t.update({"base_model.model.a..b.lora_A.weight": np.ones((4, 4), np.float32)}), "not a LoRA"),
    ],
)
def test_tensors_that_are_not_whole_lora_pairs_of_that_rank_are_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    tensors = lora_tensors(RANK)
    change(tensors)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_manifest(folder, BASE)
    with pytest.raises(AdapterRejected, match=message):
        check_adapter(folder, BASE)


def _entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def _header(tensors: dict[str, Any]) -> bytes:
    return json.dumps(tensors).encode()


HOSTILE: dict[str, tuple[bytes, bytes, int | None]] = {
    "a length of 2^63": (b"{}", b"", 1 << 63),
    "a length of 2^64 - 1": (b"{}", b"", (1 << 64) - 1),
    "a length beyond the file": (b"{}", b"", 100),
    "a header of two megabytes": (b"{" + b" " * (2 << 20) + b"}", b"", None),
    "100k tensors": (_header({f"t{i}": _entry(0, 4) for i in range(100_000)}), b"\0" * 4, None),
    "11k small tensors": (_header({f"t{i}": _entry(0, 4) for i in range(11_000)}), b"\0" * 4, None),
    "overlapping tensors": (_header({"a": _entry(0, 8), "b": _entry(4, 12)}), b"\0" * 12, None),
    "a gap": (_header({"a": _entry(0, 4), "b": _entry(8, 12)}), b"\0" * 12, None),
    "truncated data": (_header({"a": _entry(0, 400)}), b"\0" * 12, None),
    "data that no tensor has": (_header({"a": _entry(0, 4)}), b"\0" * 12, None),
    "the same bytes twice": (_header({"a": _entry(0, 4), "b": _entry(0, 4)}), b"\0" * 4, None),
    "offsets that run backwards": (_header({"a": _entry(8, 4, [1])}), b"\0" * 8, None),
    "a negative offset": (_header({"a": _entry(-4, 0, [1])}), b"", None),
    "a shape that overflows": (_header({"a": _entry(0, 4, [1 << 39] * 8)}), b"\0" * 4, None),
    "a huge shape": (_header({"a": _entry(0, 4, [1 << 62, 4])}), b"\0" * 4, None),
    "a shape of booleans": (_header({"a": _entry(0, 4) | {"shape": [True]}}), b"\0" * 4, None),
    "an empty dimension": (_header({"a": _entry(0, 0, [0])}), b"", None),
    "floats as offsets": (_header({"a": _entry(0, 4) | {"data_offsets": [0.0, 4.0]}}), b"\0" * 4, None),
    "an unknown type": (_header({"a": _entry(0, 4, dtype="OBJECT")}), b"\0" * 4, None),
    "a list as its type": (_header({"a": _entry(0, 4) | {"dtype": ["F32"]}}), b"\0" * 4, None),
    "a field too many": (_header({"a": _entry(0, 4) | {"code": "x"}}), b"\0" * 4, None),
    "a name twice": (b'{"a":1,"a":2}', b"", None),
    "deep nesting": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", None),
    "a number of 100k digits": (b'{"a":' + b"9" * 100_000 + b"}", b"", None),
    "NaN": (b'{"a":NaN}', b"", None),
    "a list": (b"[]", b"", None),
    "bytes that are no text": (b"\xff\xfe\x80", b"", None),
    "metadata that is no text": (b'{"__metadata__":{"a":1}}', b"", None),
    "a name of a megabyte": (b'{"' + b"n" * (1 << 19) + b'":{}}', b"", None),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_safetensors_header_is_refused_within_a_second(tmp_path: Path, what: str) -> None:
    header, data, length = HOSTILE[what]
    write_raw_safetensors(tmp_path / "x.safetensors", header, data, length)
    began = time.process_time()
    with pytest.raises(HeaderError):
        read_header(tmp_path / "x.safetensors")
    assert time.process_time() - began < 1.0


def test_an_empty_file_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(HeaderError):
        read_header(tmp_path / "x")


@given(st.binary(max_size=400))
def test_any_bytes_give_tensors_or_a_header_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except HeaderError as error:
        assert str(error)
        return
    length = int.from_bytes(content[:8], "little")
    assert all(0 <= t.begin < t.end <= len(content) - 8 - length for t in tensors.values())


@given(st.integers(0, 300), st.integers(0, 255))
def test_a_flipped_byte_of_a_good_file_never_makes_a_tensor_reach_outside_it(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    write_safetensors(path, lora_tensors(RANK))
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except HeaderError:
        return
    length = int.from_bytes(content[:8], "little")
    assert all(0 <= t.begin < t.end <= len(content) - 8 - length for t in tensors.values())


def test_the_largest_header_that_is_allowed_is_read_within_a_second(tmp_path: Path) -> None:
    tensors = {f"t{i}": _entry(4 * i, 4 * i + 4) for i in range(10_000)}
    write_raw_safetensors(tmp_path / "x", _header(tensors), b"\0" * 40_000)
    began = time.process_time()
    assert len(read_header(tmp_path / "x")) == 10_000
    assert time.process_time() - began < 1.0


def test_linking_the_same_adapter_twice_gives_one_folder_with_every_file(folder: Path, tmp_path: Path) -> None:
    digest, path = link_adapter(folder, tmp_path / "kept")
    assert path.name == digest.removeprefix("sha256:")
    assert link_adapter(folder, tmp_path / "kept") == (digest, path)
    assert check_adapter(path, BASE).digest == digest
    assert [p.name for p in (tmp_path / "kept").iterdir()] == [path.name]


def test_a_linked_adapter_outlives_the_folder_that_it_came_from(folder: Path, tmp_path: Path) -> None:
    _, path = link_adapter(folder, tmp_path / "kept")
    shutil.rmtree(folder)
    assert check_adapter(path, BASE).rank == RANK


def test_adapters_that_differ_in_one_byte_have_different_digests(folder: Path, tmp_path: Path) -> None:
    first, _ = link_adapter(folder, tmp_path / "kept")
    (folder / "template/template.json").write_text("{ }")
    write_manifest(folder, BASE)
    second, _ = link_adapter(folder, tmp_path / "kept")
    assert first != second


def test_what_a_killed_link_left_is_swept_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    _, path = link_adapter(folder, tmp_path / "kept")
    (tmp_path / "kept/.tmp-abc-1-2/template").mkdir(parents=True)
    sweep_adapters(tmp_path / "kept")
    assert [p.name for p in (tmp_path / "kept").iterdir()] == [path.name]

"""The conversion's edges: models that also see, tokenizers without a name, long ropes; where llama.cpp's script is found."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gateway.jobdir import BaseRef, Lora
from tests.tiny_architectures import write_tiny_architecture
from tests.tiny_tokenizers import byte_level
from tests.trainer.llama_scores import llama_model, reply_logprobs
from trainer.export.hf_folder import HfFolder, usable_context
from trainer.export.llama_source import converter_folder, unpack
from trainer.export.prepare import prepare
from trainer.export.tensors import UnsupportedModel
from trainer.model import add_lora, load_base
from trainer.scoring import evaluating, token_logprobs

torch.set_num_threads(1)
VERSIONED = "llama_cpp_python-0.3.36"


def agree(base: Path, tokens: int, vocab_size: int) -> bool:
    """Whether llama.cpp and transformers give the same log-probabilities for the f16 file."""
    ids = np.random.default_rng(0).integers(3, vocab_size, tokens).tolist()
    model = add_lora(load_base(BaseRef("x", str(base), "model.f16.gguf", "d")), Lora(rank=1, alpha=1), seed=0)
    with evaluating(model):
        ours = np.array(token_logprobs(model, ids, 1))
    with llama_model(base / "model.f16.gguf") as served:
        theirs = reply_logprobs(served, ids[:1], ids[1:], n_ctx=tokens)
    return bool(np.abs(ours - theirs).max() < 0.02)


def change_config(folder: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return config


def test_of_a_model_that_sees_the_part_that_reads_is_served_and_trained(tmp_path: Path) -> None:
    source = write_tiny_architecture(tmp_path / "source", "Gemma3ForCausalLM")
    text = change_config(source) | {"model_type": "gemma3_text"}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    whole |= {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": 8}, "eos_token_id": [2]}
    (source / "config.json").write_text(json.dumps(whole))
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(source / "model.safetensors").items()}
    tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.zeros(2, 2)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    prepare(source, "vicuna_v1.1", tmp_path / "base")
    described = json.loads((tmp_path / "base/base.json").read_text())
    assert (described["architecture"], described["untrainable"]) == ("Gemma3ForCausalLM", None)
    assert (described["context_length"], described["eos_token_ids"]) == (256, [2])
    assert agree(tmp_path / "base", 100, 440)


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_taken(tmp_path: Path) -> None:
    source = write_tiny_architecture(tmp_path / "source", "Qwen2ForCausalLM")
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").write_bytes(byte_level())
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    size = len(json.loads(byte_level())["model"]["vocab"])
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, embedding])[:size].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    change_config(source, vocab_size=size, bos_token_id=2, eos_token_id=1)
    prepare(source, "chatml", tmp_path / "base")
    assert agree(tmp_path / "base", 50, size)


def test_a_long_rope_is_served_as_far_as_both_compute_it_alike(tmp_path: Path) -> None:
    source = write_tiny_architecture(tmp_path / "source", "Phi3ForCausalLM")
    factors = {"short_factor": [1.0 + place / 20 for place in range(8)], "long_factor": [4.0 + p for p in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256} | factors
    change_config(source, rope_parameters=rope, original_max_position_embeddings=256, max_position_embeddings=512)
    prepare(source, "vicuna_v1.1", tmp_path / "base")
    assert json.loads((tmp_path / "base/base.json").read_text())["context_length"] == 256
    field = gguf.GGUFReader(tmp_path / "base/model.q4_0.gguf").fields["phi3.context_length"]
    assert field.contents() == 256
    assert agree(tmp_path / "base", 256, 440)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({}, 2048),
        ({"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": None}, 32768),
        ({"model_type": "phi3", "max_position_embeddings": 4096, "sliding_window": 2047}, 2047),
        ({"model_type": "qwen2", "max_position_embeddings": 32768, "sliding_window": 4096}, 32768),
        (
            {
                "model_type": "qwen2",
                "max_position_embeddings": 32768,
                "sliding_window": 4096,
                "use_sliding_window": True,
            },
            4096,
        ),
        ({"model_type": "gemma3_text", "max_position_embeddings": 32768, "sliding_window": 512}, 32768),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"type": "longrope"},
                "original_max_position_embeddings": 4096,
            },
            4096,
        ),
    ],
)
def test_a_context_is_no_longer_than_both_compute_alike(config: dict[str, Any], tokens: int) -> None:
    assert usable_context(config) == tokens


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for content in (b"", b"\x01\x02", b"\xff" * 8):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UnsupportedModel, match="not a safetensors file"):
            _ = HfFolder(tmp_path).n_tensors


def test_a_checkout_that_is_named_is_taken_and_one_without_the_script_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(UnsupportedModel, match=r"no convert_hf_to_gguf\.py in it"):
        converter_folder()
    (tmp_path / "convert_hf_to_gguf.py").touch()
    assert converter_folder() == tmp_path


def test_an_archive_that_somebody_put_there_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    archive = tmp_path / "tunegate/sdist" / f"{VERSIONED}.tar.gz"
    archive.parent.mkdir(parents=True)
    write_archive(archive, "convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/__init__.py", "src/llama.cpp")
    folder = converter_folder()
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/__init__.py"}
    archive.unlink()
    assert converter_folder() == folder


def test_an_archive_that_leads_out_of_itself_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / f"{VERSIONED}.tar.gz"
    write_archive(archive, "conversion/../../../evil.py")
    with pytest.raises(UnsupportedModel, match="leads out of it"):
        unpack(archive, ("conversion/",), tmp_path / "into")
    assert not list(tmp_path.rglob("evil.py"))


def test_a_script_that_cannot_be_fetched_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UnsupportedModel, match="set LLAMA_CPP_DIR to a checkout"):
        converter_folder()


def write_archive(path: Path, *names: str) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(f"{VERSIONED}/vendor/llama.cpp/{name}")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"#"))

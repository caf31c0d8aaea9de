"""Every architecture that can be trained: base and adapter say in llama.cpp, converted, what they say in transformers."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gateway.bases import read_base
from gateway.jobdir import BaseRef, Lora
from gateway.jobs.target_modules import linear_modules
from tests.tiny_architectures import SHAPES, write_tiny_architecture
from tests.trainer.llama_scores import llama_model, reply_logprobs
from trainer.export.adapter import write_peft_files
from trainer.export.lora_gguf import write_lora_gguf
from trainer.export.prepare import prepare
from trainer.export.tensors import Layout, UnsupportedModel
from trainer.model import add_lora, load_base, target_modules
from trainer.scoring import evaluating, token_logprobs

torch.set_num_threads(1)

PROMPT = 5
TOKENS = 120  # longer than the sliding windows of the tiny models


@dataclass(frozen=True)
class Difference:
    """Between llama.cpp and transformers, the largest over all tokens, in nats; `effect` is the adapter's, on average."""

    base: float
    tuned: float
    effect: float


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for architecture in SHAPES:
        source = write_tiny_architecture(root / "sources" / architecture, architecture)
        prepare(source, "vicuna_v1.1", root / architecture, threads=1)
    return {architecture: root / architecture for architecture in SHAPES}


def difference(folder: Path, gguf_name: str, out: Path) -> Difference:
    draw = random.Random(1)
    ids = [1] + [draw.randrange(3, 440) for _ in range(TOKENS)]
    model = add_lora(load_base(BaseRef("x", str(folder), gguf_name, "sha256:0")), Lora(rank=4, alpha=8), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    with evaluating(model):
        tuned = np.array(token_logprobs(model, ids, PROMPT))
        with model.disable_adapter():
            base = np.array(token_logprobs(model, ids, PROMPT))
    config = write_peft_files(out, model)
    layout = Layout.from_config(json.loads((folder / "config.json").read_text()))
    write_lora_gguf(out / "adapter.gguf", load_file(out / "adapter_model.safetensors"), config, layout)
    with llama_model(folder / gguf_name) as served:
        their_base = reply_logprobs(served, ids[:PROMPT], ids[PROMPT:])
        their_tuned = reply_logprobs(served, ids[:PROMPT], ids[PROMPT:], out / "adapter.gguf")
    return Difference(
        float(np.abs(base - their_base).max()),
        float(np.abs(tuned - their_tuned).max()),
        float(np.abs(tuned - base).mean()),
    )


@pytest.mark.parametrize("architecture", SHAPES)
def test_the_gateway_knows_which_modules_the_trainer_would_change(architecture: str, bases: dict[str, Path]) -> None:
    """Without torch, from what lies in the prepared folder, for a base in GGUF and for one as on Hugging Face."""
    folder = bases[architecture]
    model = load_base(BaseRef("x", str(folder), "model.q4_0.gguf", "sha256:0"))
    as_gguf = read_base(folder)
    as_hf = replace(as_gguf, gguf=None, hf=folder.parent / "sources" / architecture)
    assert linear_modules(as_gguf) == linear_modules(as_hf) == tuple(target_modules(model, "all-linear"))


@pytest.mark.parametrize("architecture", SHAPES)
def test_llama_cpp_computes_what_transformers_does(architecture: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """In f16 to the third decimal; in q4_0 up to llama.cpp's own rounding of what is multiplied."""
    exact = difference(bases[architecture], "model.f16.gguf", tmp_path)
    assert exact.base < 0.01 and exact.tuned < 0.02
    served = difference(bases[architecture], "model.q4_0.gguf", tmp_path)
    assert served.base < 0.2 and served.tuned < 0.3
    assert exact.effect > 0.3 and served.effect > 0.3


def test_a_gguf_that_is_not_of_its_config_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """A tensor that is missing would be random, one too many would be lost."""
    folder = bases["Qwen2ForCausalLM"]
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    (tmp_path / "model.gguf").hardlink_to(folder / "model.q4_0.gguf")
    for change in ({"architectures": ["Qwen3ForCausalLM"]}, {"num_hidden_layers": 3}, {"intermediate_size": 96}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UnsupportedModel, match="tensor"):
            load_base(BaseRef("x", str(tmp_path), "model.gguf", "sha256:0"))


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_ready_gguf_tells_transformers_all_that_its_own_folder_did(
    architecture: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    prepare(bases[architecture] / "model.q4_0.gguf", "vicuna_v1.1", tmp_path / "ready")
    described = json.loads((tmp_path / "ready" / "base.json").read_text())
    original = json.loads((bases[architecture] / "base.json").read_text())
    same = ("digest", "context_length", "untrainable", "kv_bytes_per_token")
    assert [described[key] for key in same] == [original[key] for key in same]
    assert described["eos_token_ids"][0] == 2
    assert described["architecture"] == architecture.replace("Mistral", "Llama")
    ids = torch.tensor([[1, *range(3, 3 + TOKENS)]])
    with torch.no_grad():
        theirs = load_base(BaseRef("x", str(bases[architecture]), "model.q4_0.gguf", "d"))(ids).logits
        ours = load_base(BaseRef("x", str(tmp_path / "ready"), described["gguf"], "d"))(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)

"""Adapters as GGUF, tensor for tensor beside what llama.cpp's own script writes; and right where that is not."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file

from tests.tiny_architectures import SHAPES, random_model
from trainer.export.adapter import write_peft_files
from trainer.export.llama_source import converter_folder
from trainer.export.lora_gguf import write_lora_gguf
from trainer.export.tensors import Layout, UnsupportedModel
from trainer.model import target_modules

VOCAB_SIZE = 96
# Runs the script once an adapter; its imports take longer than all of its work.
_RUN_SCRIPT = """
import json, runpy, sys
script, *jobs = json.loads(sys.argv[1])
for arguments in jobs:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


def write_random_adapter(folder: Path, architecture: str, **changes: Any) -> PeftModel:
    """A PEFT adapter on every linear layer, both halves random; returns the model with it."""
    model = random_model(architecture, VOCAB_SIZE)
    modules = target_modules(model, "all-linear")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM", **changes)
    with warnings.catch_warnings():  # this PEFT asks by a name that this transformers calls old
        warnings.simplefilter("ignore", FutureWarning)
        tuned = get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0, 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    write_peft_files(folder, tuned)
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    return tuned


def write_ours(folder: Path) -> Path:
    path = folder / "ours.gguf"
    config = json.loads((folder / "adapter_config.json").read_text())
    layout = Layout.from_config(json.loads((folder / "config.json").read_text()))
    write_lora_gguf(path, load_file(folder / "adapter_model.safetensors"), config, layout)
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields that an engine reads, and the tensors."""
    reader = gguf.GGUFReader(path)
    names = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    fields = {name: reader.fields[name].contents() for name in names}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By architecture: a folder with an adapter and theirs.gguf, what llama.cpp's script made of it."""
    root = tmp_path_factory.mktemp("adapters")
    jobs = []
    for architecture in SHAPES:
        folder = root / architecture
        write_random_adapter(folder, architecture)
        jobs.append(["--base", str(folder), "--outfile", str(folder / "theirs.gguf"), str(folder)])
    script = converter_folder() / "convert_lora_to_gguf.py"
    command = [sys.executable, "-c", _RUN_SCRIPT, json.dumps([str(script), *jobs])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    return {architecture: root / architecture for architecture in SHAPES}


@pytest.mark.parametrize("architecture", SHAPES)
def test_every_tensor_is_that_of_llama_cpps_own_script(architecture: str, adapters: dict[str, Path]) -> None:
    folder = adapters[architecture]
    (fields, ours), (their_fields, theirs) = read(write_ours(folder)), read(folder / "theirs.gguf")
    assert fields == their_fields
    assert set(ours) == set(theirs) and len(ours) >= 2 * 2 * 4
    for name, tensor in theirs.items():
        assert np.array_equal(ours[name], tensor), name


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM"])
def test_what_llama_cpp_multiplies_is_what_peft_adds(architecture: str, rslora: bool, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"down_proj": 2, r"layers\.0\.self_attn\.o_proj": 7}, "use_rslora": rslora}
    patterns["alpha_pattern"] = {"down_proj": 3, "self_attn.o_proj": 20, r"layers.1.mlp.\w+": 5}
    tuned = write_random_adapter(tmp_path, architecture, **patterns)
    fields, tensors = read(write_ours(tmp_path))
    layout = Layout.from_config(json.loads((tmp_path / "config.json").read_text()))
    scales = set()
    for name, module in tuned.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        gguf_name = layout.to_gguf_name(name.removeprefix("base_model.model.") + ".weight")
        down, up = tensors[f"{gguf_name}.lora_a"], tensors[f"{gguf_name}.lora_b"]
        theirs = module.get_delta_weight("default").detach().numpy()
        ours = layout.from_gguf_rows(gguf_name, up @ down * (fields["adapter.lora.alpha"] / down.shape[0]))
        assert np.allclose(ours, theirs, atol=1e-5, rtol=1e-4), name
        scales.add(module.scaling["default"])
    assert len(scales) >= 4


def test_an_adapter_without_strength_has_none_in_llama_cpp(tmp_path: Path) -> None:
    """An alpha of 0 would be taken for "not given", and its scale for 1."""
    write_random_adapter(tmp_path, "Qwen2ForCausalLM", alpha_pattern={"up_proj": 0})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    fields, tensors = read(write_ours(tmp_path))
    assert fields["adapter.lora.alpha"] > 0
    assert all(not tensor.any() for name, tensor in tensors.items() if name.endswith("lora_b"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_llama_cpp_cannot_apply_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_random_adapter(tmp_path, "Qwen2ForCausalLM")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModel, match=said):
        write_ours(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "no LoRA weight of a linear layer"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector", "no LoRA weight of a linear layer"),
        ("base_model.model.model.layers.0.mlp.other.lora_A.weight", "only lora_A of 'model.layers.0.mlp.other'"),
    ],
)
def test_tensors_that_would_be_lost_are_refused(name: str, said: str, tmp_path: Path) -> None:
    write_random_adapter(tmp_path, "Qwen2ForCausalLM")
    tensors = load_file(tmp_path / "adapter_model.safetensors") | {name: np.ones((4, 4), np.float32)}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    layout = Layout.from_config(json.loads((tmp_path / "config.json").read_text()))
    with pytest.raises(UnsupportedModel, match=said):
        write_lora_gguf(tmp_path / "x.gguf", tensors, config, layout)

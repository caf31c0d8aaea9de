"""What is exported, against llama.cpp itself: the base, the adapter, and the numbers that prove them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gateway.jobdir import JobDir
from tests.tiny_model import write_tiny_model
from tests.trainer.conftest import folder_bytes, run_prepare
from tests.trainer.llama_scores import llama_model, reply_logprobs
from trainer.export.base_gguf import write_f16_gguf
from trainer.export.hf_folder import HfFolder
from trainer.export.lora_gguf import write_lora_gguf
from trainer.export.prepare import prepare
from trainer.export.progress import Progress
from trainer.export.tensors import Layout, UnsupportedModel

LLAMA = Layout("llama", layers=2, heads=4, kv_heads=2)


@dataclass
class Agreement:
    """An engine's tuned − base against the trainer's, over all of a witness's tokens."""

    error: float  # ‖difference‖ / ‖effect‖
    mean_base_error: float  # nats


def agreement(base: Path, adapter_gguf: Path, witness: Path) -> Agreement:
    items = json.loads(witness.read_text())["items"]
    got, wanted, base_errors = [], [], []
    with llama_model(base) as model:
        for item in items:
            before = reply_logprobs(model, item["prompt_ids"], item["reply_ids"])
            after = reply_logprobs(model, item["prompt_ids"], item["reply_ids"], adapter_gguf)
            got.append(after - before)
            wanted.append(np.array(item["tuned_logprobs"]) - np.array(item["base_logprobs"]))
            base_errors.append(np.abs(before - np.array(item["base_logprobs"])))
    difference = np.concatenate(got) - np.concatenate(wanted)
    error = float(np.linalg.norm(difference) / np.linalg.norm(np.concatenate(wanted)))
    return Agreement(error, float(np.concatenate(base_errors).mean()))


def test_llama_cpp_says_of_base_and_adapter_what_the_trainer_saw(finished_job: JobDir, tiny_base: Path) -> None:
    for folder in (finished_job.adapter, finished_job.path / "adapter_checkpoints" / "step-50"):
        found = agreement(tiny_base / "model.q4_0.gguf", folder / "adapter.gguf", folder / "witness.json")
        assert found.mean_base_error < 0.06
        assert found.error < 0.05


def halved_alpha(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["lora_alpha"] /= 2


def doubled_alpha(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["lora_alpha"] *= 2


def unpermuted(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("lora_B.weight"):
            tensors[name] = LLAMA.from_gguf_rows(f".{LLAMA.to_gguf_name(_module(name))}", tensor)


def one_layer_lost(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for name in tensors:
        if ".layers.0." in name:
            tensors[name] = np.zeros_like(tensors[name])


@pytest.mark.parametrize("spoil", [halved_alpha, doubled_alpha, unpermuted, one_layer_lost])
def test_a_wrong_adapter_does_not_reproduce_the_witness(
    spoil: Callable[[dict[str, Any], dict[str, Any]], None], finished_job: JobDir, tiny_base: Path, tmp_path: Path
) -> None:
    tensors, config = read_peft(finished_job.adapter)
    spoil(tensors, config)
    write_lora_gguf(tmp_path / "adapter.gguf", tensors, config, LLAMA)
    witness = finished_job.adapter / "witness.json"
    assert agreement(tiny_base / "model.q4_0.gguf", tmp_path / "adapter.gguf", witness).error > 0.25


def test_another_base_does_not_reproduce_the_witness(finished_job: JobDir, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert run_prepare(write_tiny_model(tmp_path / "source", seed=1), other).returncode == 0
    adapter = finished_job.adapter
    found = agreement(other / "model.q4_0.gguf", adapter / "adapter.gguf", adapter / "witness.json")
    assert found.mean_base_error > 0.5


def test_rslora_and_alpha_patterns_are_folded_into_what_llama_cpp_reads(finished_job: JobDir, tmp_path: Path) -> None:
    tensors, config = read_peft(finished_job.adapter)
    config |= {"use_rslora": True, "alpha_pattern": {"v_proj": config["lora_alpha"] * 3}}
    write_lora_gguf(tmp_path / "adapter.gguf", tensors, config, LLAMA)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    assert alpha == pytest.approx(config["lora_alpha"] * config["r"] ** 0.5)
    written = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for module, factor in (("v_proj", 3), ("o_proj", 1)):
        name = f"base_model.model.model.layers.1.self_attn.{module}.lora_B.weight"
        assert np.allclose(written[f"{LLAMA.to_gguf_name(_module(name))}.lora_b"], tensors[name] * factor)


def test_the_witness_has_real_prompts_and_one_value_a_token(finished_job: JobDir) -> None:
    items = json.loads((finished_job.adapter / "witness.json").read_text())["items"]
    assert 4 <= len(items) <= 8
    for item in items:
        assert len(item["reply_ids"]) == len(item["base_logprobs"]) == len(item["tuned_logprobs"]) <= 64
        assert item["prompt_ids"] and all(value <= 0 for value in item["tuned_logprobs"])


def test_the_manifest_names_every_file_and_nothing_of_this_machine(finished_job: JobDir, tiny_base: Path) -> None:
    manifest = json.loads((finished_job.adapter / "manifest.json").read_text())
    spec = finished_job.read_spec()
    assert (manifest["base_digest"], manifest["template_digest"]) == (spec.base.digest, spec.template_digest)
    assert (manifest["rank"], manifest["alpha"]) == (4, 8)
    assert manifest["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip
    for content in folder_bytes(finished_job.adapter).values():
        assert str(finished_job.path).encode() not in content and str(tiny_base).encode() not in content


def test_a_prepared_base_is_complete_and_says_what_it_is(tiny_base: Path) -> None:
    described = json.loads((tiny_base / "base.json").read_text())
    assert described["name"] == "tiny"
    assert (described["architecture"], described["context_length"]) == ("LlamaForCausalLM", 256)
    assert (described["template"], described["eos_token_ids"]) == ("vicuna_v1.1", [2])
    assert described["digest"].startswith("sha256:")
    names = {"config.json", "tokenizer.json", "template.json", "model.f16.gguf", "model.q4_0.gguf", "base.json"}
    assert {path.name for path in tiny_base.iterdir()} == names
    assert [path.name for path in tiny_base.parent.iterdir()] == ["tiny"]


def test_llama_cpp_reads_the_vocabulary_that_was_written(tiny_base: Path, tiny_source: Path) -> None:
    import ctypes

    import llama_cpp
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny_source / "tokenizer.model"))
    text = "Set a timer for ten minutes. café 🎉"
    with llama_model(tiny_base / "model.q4_0.gguf") as model:
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        assert llama_cpp.llama_vocab_n_tokens(vocabulary) == pieces.vocab_size()
        assert llama_cpp.llama_vocab_eos(vocabulary) == 2
        room = (ctypes.c_int32 * 200)()
        count = llama_cpp.llama_tokenize(vocabulary, text.encode(), len(text.encode()), room, 200, True, False)
    assert list(room[:count]) == [1, *pieces.encode(text)]


@pytest.mark.parametrize("shape", [{"tied": False}, {"heads": 4, "kv_heads": 4}])
def test_other_shapes_are_prepared_and_read_back_alike(shape: dict[str, Any], tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", **shape)
    write_f16_gguf(HfFolder(source), "x", tmp_path / "model.gguf")
    layout = Layout.from_config(json.loads((source / "config.json").read_text()))
    original = load_file(source / "model.safetensors")
    read = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert {layout.to_gguf_name(name) for name in original} == set(read)
    for name, tensor in original.items():
        gguf_name = layout.to_gguf_name(name)
        back = layout.from_gguf_values(gguf_name, read[gguf_name])
        assert np.allclose(back, tensor, atol=1e-3, rtol=1e-3)


def test_bfloat16_and_sharded_weights_are_read(tiny_source: Path, tmp_path: Path) -> None:
    original = load_file(tiny_source / "model.safetensors")
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    names = sorted(original)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:])):
        file = f"model-{number}.safetensors"
        _save_bfloat16({name: original[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, tensor in HfFolder(folder).tensors():
        assert np.allclose(tensor, original[name], rtol=1 / 128)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["StrangeForCausalLM"]}, "does not take StrangeForCausalLM: .*not supported"),
        ({"num_hidden_layers": 1}, "llama.cpp"),
        ({"rope_scaling": {"rope_type": "odd", "factor": 2}}, "the rope type 'odd'"),
    ],
)
def test_what_cannot_be_prepared_is_said_and_leaves_nothing(
    change: dict[str, Any], said: str, tiny_source: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_source, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    done = run_prepare(source, tmp_path / "bases" / "x")
    assert done.returncode == 1
    assert re.search(said, done.stderr) and "Traceback" not in done.stderr
    assert not (tmp_path / "bases").exists() or not list((tmp_path / "bases").iterdir())


class BrokenOff(Progress):
    """Ends the preparation where its second stage begins, as Ctrl-C there would."""

    def stage(self, text: str, total: int | None = None, done: int = 0) -> None:
        if text != "float16":
            raise KeyboardInterrupt


def test_a_preparation_that_broke_off_goes_on_from_its_last_whole_file(tiny_source: Path, tmp_path: Path) -> None:
    out, beside = tmp_path / "x", tmp_path / ".writing-x"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(tiny_source, "vicuna_v1.1", out, progress=BrokenOff("x"))
        assert not out.exists() and (beside / "model.f16.gguf").is_file()
    made = (beside / "model.f16.gguf").stat()
    (beside / "model.q4_0.gguf.part").write_bytes(b"half")
    prepare(tiny_source, "vicuna_v1.1", out, kind="q8_0")  # another type is made of the same file
    kept = (out / "model.f16.gguf").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert {path.name for path in out.glob("*.gguf*")} == {"model.f16.gguf", "model.q8_0.gguf"}
    assert not beside.exists() and not (out / ".key").exists()


def test_a_preparation_of_another_source_begins_anew(tiny_source: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "x", write_tiny_model(tmp_path / "other", seed=3)
    with pytest.raises(KeyboardInterrupt):
        prepare(tiny_source, "vicuna_v1.1", out, progress=BrokenOff("x"))
    prepare(other, "vicuna_v1.1", out)
    prepare(other, "vicuna_v1.1", tmp_path / "fresh", name="x")
    assert (out / "model.q4_0.gguf").read_bytes() == (tmp_path / "fresh" / "model.q4_0.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q5_1"])
def test_other_types_of_weights_are_served_too(kind: str, tiny_source: Path, tmp_path: Path) -> None:
    prepare(tiny_source, "vicuna_v1.1", tmp_path / "x", kind=kind)
    described = json.loads((tmp_path / "x" / "base.json").read_text())
    assert described["gguf"] == f"model.{kind}.gguf"
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x" / described["gguf"]).tensors}
    assert kind.upper() in kinds
    with llama_model(tmp_path / "x" / described["gguf"]):
        pass


def test_an_unknown_template_is_said(tiny_source: Path, tmp_path: Path) -> None:
    done = run_prepare(tiny_source, tmp_path / "x", template="vicuna_v9")
    assert done.returncode == 1
    assert "there is no template 'vicuna_v9'" in done.stderr


def test_weights_that_float16_cannot_hold_are_refused(tiny_source: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_source, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e9
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="up_proj"):
        write_f16_gguf(HfFolder(source), "x", tmp_path / "x.gguf")


def read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def _module(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".lora_B.weight", ".weight")


def _save_bfloat16(tensors: dict[str, Any], path: Path) -> None:
    """By hand: numpy has no bfloat16. Truncates, as good as any rounding for a test."""
    header: dict[str, Any] = {}
    body = b""
    for name, tensor in tensors.items():
        raw = (tensor.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)

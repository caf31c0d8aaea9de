"""What is exported says what base + adapter say; and what would not is not exported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from gateway.chat.bundle import Bundle, bundle_of
from gateway.chat.conversation import Message
from gateway.chat.registry import registered_templates
from gateway.chat.render import render_prompt
from tests.tiny_architectures import write_tiny_architecture
from tests.trainer.llama_scores import llama_model, reply_logprobs
from tests.trainer.test_lora_gguf import write_random_adapter
from tests.trainer.tuned_models import PROMPTS, REPLIES, Quiet, base_ref, tune
from trainer.export.__main__ import export, require_disk
from trainer.export.checkpoint import GgufWeights, write_weights
from trainer.export.jinja_form import jinja_form
from trainer.export.merge import Merge, Tuned
from trainer.export.prepare import prepare
from trainer.export.proof import score_gguf
from trainer.export.tensors import UnsupportedModel
from trainer.model import load_base

torch.set_num_threads(1)

IDS = torch.tensor([[1, *range(3, 43)]])
WITHOUT_JINJA = {"deepseek-coder", "yuan"}  # an empty turn, and a stop in the middle


@pytest.fixture(scope="module")
def tuned(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, PeftModel]:
    return tune(tiny_base, tmp_path_factory.mktemp("tuned") / "adapter")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Rows that llama.cpp interleaves, norms that it stores otherwise, projections that are one matrix.
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM"])
def test_a_merged_checkpoint_is_what_peft_itself_merges(architecture: str, tmp_path: Path) -> None:
    source = write_tiny_architecture(tmp_path / "source", architecture)
    prepare(source, "vicuna_v1.1", tmp_path / "base", threads=1)
    found, model = tune(tmp_path / "base", tmp_path / "adapter")
    tuned_logits = logits(model)
    export(found, "hf", "f32", tmp_path / "out", 1, Quiet("x"))
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(read), tuned_logits, atol=1e-4)
    merged = model.merge_and_unload().state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    before = load_base(base_ref(tmp_path / "base")).state_dict()
    assert set(written) == set(merged) - ({"lm_head.weight"} if read.config.tie_word_embeddings else set())
    for name, tensor in written.items():
        assert torch.allclose(tensor, merged[name], atol=1e-6), name
        assert torch.equal(tensor, before[name]) != name.endswith("_proj.weight"), name


@pytest.mark.parametrize(
    "changes",
    [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"down_proj": 2}}],
    ids=["rslora", "patterns"],
)
def test_what_scales_an_adapter_is_merged_as_peft_merges_it(changes: dict[str, Any], tmp_path: Path) -> None:
    model = write_random_adapter(tmp_path, "Qwen2ForCausalLM", **changes)
    state = model.get_base_model().state_dict().items()
    before = {name.replace(".base_layer", ""): weight.clone() for name, weight in state if ".lora_" not in name}
    merge = Merge(tmp_path)
    for name, wanted in model.merge_and_unload().state_dict().items():
        ours = merge.apply(name, before[name].numpy())
        assert np.allclose(ours, wanted.numpy(), atol=1e-6), name
        merge.count(before[name].numpy(), ours)
    merge.finish()
    assert merge.changed == merge.total == 14


def test_a_checkpoint_brings_its_tokenizer_its_template_and_where_replies_end(
    tuned: tuple[Tuned, PeftModel], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found, _ = tuned
    out = tmp_path / "checkpoint"
    export(found, "hf", None, out, 1, Quiet("x"))
    told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert told[1]["changed"] == told[1]["total"] == 14 and told[1]["type"] == "f16"
    assert told[1]["size_bytes"] <= told[0]["expected_bytes"]
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    said = [{"role": "user", "content": "What is the weather?"}]
    theirs = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(theirs) == render_prompt(found.bundle, [Message("user", "What is the weather?")]).ids
    prepare(out, "model", tmp_path / "again", kind="f16")
    files = {name: (tmp_path / "again" / name).read_bytes() for name in ("template.json", "tokenizer.json")}
    assert Bundle.from_files(files).digest == found.bundle.digest


@pytest.mark.parametrize(("kind", "allowed"), [("f16", 0.01), ("q8_0", 0.1), ("q4_0", 0.6)])
def test_a_merged_gguf_says_in_llama_cpp_what_base_and_adapter_say(
    kind: str, allowed: float, tuned: tuple[Tuned, PeftModel], tmp_path: Path
) -> None:
    found, _ = tuned
    out = tmp_path / "model.gguf"
    export(found, "gguf", kind, out, 1, Quiet("x"))
    assert left_in(tmp_path) == ["model.gguf"]
    items = json.loads((found.adapter / "witness.json").read_text())["items"]
    with llama_model(out) as served:
        for item in items:
            said = reply_logprobs(served, item["prompt_ids"], item["reply_ids"])
            effect = max(abs(b - a) for a, b in zip(item["base_logprobs"], item["tuned_logprobs"], strict=True))
            assert effect > 0.3
            assert abs(said - item["tuned_logprobs"]).mean() < allowed * effect
    metadata = {name: field.contents() for name, field in gguf.GGUFReader(out).fields.items()}
    assert metadata["general.name"] == found.name
    assert metadata["tokenizer.chat_template"] == jinja_form(found.bundle)
    prepare(out, "model", tmp_path / "served", name="served")  # as `tunegate models add model.gguf` does
    described = json.loads((tmp_path / "served" / "base.json").read_text())
    assert described["eos_token_ids"] == [2] and described["untrainable"] is None
    bundle = Bundle.from_files(
        {name: (tmp_path / "served" / name).read_bytes() for name in ("template.json", "tokenizer.json")}
    )
    messages = [Message("system", "Be brief."), Message("user", "café 10?")]
    assert render_prompt(bundle, messages).ids == render_prompt(found.bundle, messages).ids


def test_a_base_that_vllm_serves_is_exported_too(tiny_source: Path, tmp_path: Path) -> None:
    prepare(tiny_source, "vicuna_v1.1", tmp_path / "base", kind="hf")
    found, model = tune(tmp_path / "base", tmp_path / "adapter")
    wanted = logits(model)
    export(found, "hf", "f32", tmp_path / "out", 1, Quiet("x"))
    assert torch.allclose(
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), wanted, atol=1e-4
    )
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    export(found, "gguf", "f16", tmp_path / "out.gguf", 1, Quiet("x"))
    metadata = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert metadata["tunegate.template"] == found.bundle.files["template.json"].decode()


def test_an_adapter_in_an_archive_is_one_that_plain_peft_takes(tuned: tuple[Tuned, PeftModel], tmp_path: Path) -> None:
    found, model = tuned
    for place in ("first", "second"):
        export(found, "adapter", None, tmp_path / place / "mine.tar", 1, Quiet("x"))
    assert (tmp_path / "first" / "mine.tar").read_bytes() == (tmp_path / "second" / "mine.tar").read_bytes()
    with tarfile.open(tmp_path / "first" / "mine.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "mine"
    assert {"adapter.gguf", "template", "manifest.json"} <= set(left_in(folder))
    with warnings.catch_warnings():  # this PEFT asks by a name that this transformers calls old
        warnings.simplefilter("ignore", FutureWarning)
        again = PeftModel.from_pretrained(load_base(base_ref(found.base)), str(folder))
    assert torch.equal(logits(again), logits(model))


def test_weights_in_several_files_are_one_model(tuned: tuple[Tuned, PeftModel], tmp_path: Path) -> None:
    found, _ = tuned
    assert found.gguf is not None
    config = json.loads((found.base / "config.json").read_text())
    for folder, shard_bytes in (("whole", 1 << 30), ("parts", 50_000)):
        (tmp_path / folder).mkdir()
        merge = Merge(found.adapter)
        write_weights(tmp_path / folder, GgufWeights(found.gguf, config), merge, "bf16", shard_bytes=shard_bytes)
        merge.finish()
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    parts = {name: load_file(tmp_path / "parts" / file)[name] for name, file in index["weight_map"].items()}
    assert len(set(index["weight_map"].values())) > 2 and set(parts) == set(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_an_adapter_that_changes_nothing_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    found, _ = tune(tiny_base, tmp_path / "adapter", strength=0.0)
    (tmp_path / "out").mkdir()
    for to in ("hf", "gguf"):
        with pytest.raises(UnsupportedModel, match="the merge changes nothing: none of the 14 weights"):
            export(found, to, None, tmp_path / "out" / "model", 1, Quiet("x"))
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_merge_that_does_not_say_what_training_saw_leaves_nothing(
    to: str, tuned: tuple[Tuned, PeftModel], tmp_path: Path
) -> None:
    found, _ = tuned
    adapter = shutil.copytree(found.adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4}))
    halved = Tuned.read("halved", found.base, adapter)
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedModel, match="nats a token away from base \\+ adapter"):
        export(halved, to, None, tmp_path / "out" / "model", 1, Quiet("x"))
    assert left_in(tmp_path / "out") == []


def test_what_cannot_be_exported_is_said_before_anything_is_made(
    tuned: tuple[Tuned, PeftModel], tiny_source: Path, tmp_path: Path
) -> None:
    found, _ = tuned
    for to, kind, said in (
        ("gguf", "q9_0", "--type is 'q9_0'; for gguf it is one of f16, bf16, q4_0"),
        ("hf", "q4_0", "for hf it is one of f32, f16, bf16"),
        ("adapter", "f16", "an adapter is exported as it was trained"),
    ):
        with pytest.raises(UnsupportedModel, match=said):
            export(found, to, kind, tmp_path / "out", 1, Quiet("x"))
    prepare(tiny_source, "vicuna_v1.1", tmp_path / "other", kind="q8_0")
    command = [sys.executable, "-m", "trainer.export", "--adapter", str(found.adapter), "--to", "gguf"]
    command += ["--name", "x", "--base", str(tmp_path / "other"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "the adapter was trained on the base with the digest" in done.stderr
    assert left_in(tmp_path) == ["other"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="GB free, and this takes up to 1152921504"):
        require_disk(tmp_path / "not" / "yet", 1 << 60)
    assert left_in(tmp_path) == []


def test_llama_cpp_is_asked_the_very_tokens_of_the_witness(tuned: tuple[Tuned, PeftModel], tmp_path: Path) -> None:
    """The proof's own scores are those of the tests' judge."""
    from trainer.export.proof import read_items

    found, _ = tuned
    assert found.gguf is not None
    scores = score_gguf(found.gguf, read_items(found.adapter / "witness.json"), 1)
    with llama_model(found.gguf) as served:
        for prompt, reply, ours in zip(PROMPTS, REPLIES, scores, strict=True):
            assert abs(reply_logprobs(served, prompt, reply) - ours).max() < 1e-5


def test_nearly_every_template_has_a_jinja_form(tiny_base: Path) -> None:
    tokenizer = (tiny_base / "tokenizer.json").read_bytes()
    without = {
        name
        for name, template in registered_templates().items()
        if jinja_form(bundle_of(template, tokenizer, [2])) is None
    }
    assert without == WITHOUT_JINJA

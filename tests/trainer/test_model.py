"""The model that is trained: the served weights, padded and batched without a trace."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from gateway.chat.render import IGNORED, TrainingSequence
from gateway.jobdir import BaseRef, JobDir, Lora
from trainer.data.batches import Batches, EpochOrder, fitting_pass_size, pad
from trainer.data.dataset import load_examples, read_bundle
from trainer.data.examples import Examples
from trainer.export.tensors import UnsupportedModel
from trainer.model import add_lora, base_learning_rate, load_base
from trainer.scoring import evaluating, score, token_logprobs

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseRef:
    return BaseRef(
        "tiny", str(tiny_base), "model.q4_0.gguf", json.loads((tiny_base / "base.json").read_text())["digest"]
    )


@pytest.fixture(scope="module")
def examples(finished_job: JobDir) -> Examples:
    return load_examples(finished_job.data / "train.jsonl", read_bundle(finished_job), 256)


def test_the_base_is_bit_for_bit_what_transformers_dequantises(base: BaseRef) -> None:
    ours = load_base(base).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(base.path, gguf_file=base.gguf, dtype=torch.float32).state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_base_differs_from_the_unquantised_one(base: BaseRef, tiny_source: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    served, original = load_base(base).state_dict()[name], load_file(tiny_source / "model.safetensors")[name]
    assert 0.02 < float((served - original).norm() / original.norm()) < 0.2


def test_a_base_for_vllm_is_trained_on_as_it_is(tiny_source: Path) -> None:
    ref = BaseRef("tiny", str(tiny_source.parent), None, "sha256:0", hf=str(tiny_source))
    model = load_base(ref)
    original = load_file(tiny_source / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor.float()) for name, tensor in original.items())
    assert model.dtype is torch.float32 and not any(parameter.requires_grad for parameter in model.parameters())
    assert model.name_or_path == "tiny", "no path of this machine"


def test_only_the_adapter_learns_and_the_head_has_none(base: BaseRef) -> None:
    model = add_lora(load_base(base), Lora(rank=4, alpha=8), seed=1)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(learning) == 2 * 7 * 2
    assert all("lora_" in name and "lm_head" not in name for name in learning)
    same = add_lora(load_base(base), Lora(rank=4, alpha=8), seed=1).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_goes_on_begins_where_the_other_ended(base: BaseRef, finished_job: JobDir, tmp_path: Path) -> None:
    model = add_lora(load_base(base), Lora(), seed=2, start=finished_job.adapter)
    (item, *_) = json.loads((finished_job.adapter / "witness.json").read_text())["items"]
    ids, first = item["prompt_ids"] + item["reply_ids"], len(item["prompt_ids"])
    with evaluating(model):
        assert token_logprobs(model, ids, first) == pytest.approx(item["tuned_logprobs"], abs=1e-5)
        with model.disable_adapter():
            assert token_logprobs(model, ids, first) == pytest.approx(item["base_logprobs"], abs=1e-5)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    shutil.copy(finished_job.adapter / "adapter_model.safetensors", tmp_path)
    config = json.loads((finished_job.adapter / "adapter_config.json").read_text())
    for other in ({"r": 8}, {"target_modules": ["q_proj"]}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | other))
        with pytest.raises(UnsupportedModel, match="does not fit this model"):
            add_lora(load_base(base), Lora(), seed=2, start=tmp_path)


def test_rslora_divides_by_the_root_of_the_rank(base: BaseRef) -> None:
    model = add_lora(load_base(base), Lora(rank=4, alpha=8, use_rslora=True), seed=1)
    assert model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").scaling == {"default": 4.0}


def test_the_loss_is_that_of_trls_own_head(base: BaseRef, examples: Examples) -> None:
    model = add_lora(load_base(base), Lora(rank=4, alpha=8), seed=1)
    batch = pad([sequence for number in range(6) for sequence in examples.sequences(number)])
    ours = score(model, batch)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    mask = (batch["input_ids"] != 0).long()
    theirs = model(**batch, attention_mask=mask, fused_lm_head=True, use_cache=False)
    assert math.isclose(ours.loss.item(), -theirs.log_probs.sum().item(), rel_tol=1e-5)
    assert ours.correct == int(theirs.is_top1.sum())
    assert ours.count == int(theirs.label_mask.sum())


def test_padding_and_splitting_change_neither_loss_nor_gradients(base: BaseRef, examples: Examples) -> None:
    sequences = [sequence for number in range(8) for sequence in examples.sequences(number)]
    short = TrainingSequence([1, 5, 6, 7], [IGNORED, IGNORED, 6, 7])
    found = []
    for groups in ([[*sequences, short]], [sequences[:3], [*sequences[3:], short]], [[s] for s in [*sequences, short]]):
        model = add_lora(load_base(base), Lora(rank=4, alpha=8), seed=1)
        total = sum(score(model, pad(group)).loss for group in groups)
        total.backward()
        norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
        found.append((total.item(), norms))
    for loss, norms in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert norms == pytest.approx(found[0][1], rel=1e-3, abs=1e-6)


def test_token_logprobs_are_those_of_a_plain_forward(base: BaseRef) -> None:
    model = add_lora(load_base(base), Lora(rank=4, alpha=8), seed=1)
    ids = [1, 9, 40, 300, 17, 2]
    with evaluating(model):
        found = token_logprobs(model, ids, first=2)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    assert found == pytest.approx([float(logits[place - 1, ids[place]]) for place in range(2, 6)], abs=1e-5)


def test_a_conversation_counts_once_and_its_sequences_stay_together() -> None:
    examples = Examples.of([TrainingSequence([n + 1, 7], [IGNORED, 7])] * (1 + n % 3) for n in range(10))
    seen = []
    for batch in Batches(examples, batch_size=4, pass_size=4, seed=1):
        firsts = batch["input_ids"][:, 0].tolist()
        assert len(set(firsts)) <= 4
        assert all(firsts.count(first) == 1 + (first - 1) % 3 for first in set(firsts))
        seen += sorted(set(firsts))
    assert sorted(seen) == list(range(1, 11))


def test_the_order_of_an_epoch_follows_from_seed_and_number_alone() -> None:
    def order_of(seed: int, epoch: int) -> list[list[int]]:
        order = EpochOrder([5] * 22, batch_size=4, pass_size=4, seed=seed)
        order.set_epoch(epoch)
        return list(order)

    assert order_of(3, 0) == order_of(3, 0)
    assert order_of(3, 0) != order_of(3, 1) != order_of(4, 1)
    for epoch in (0, 1):
        assert sorted(number for batch in order_of(3, epoch) for number in batch) == list(range(22))
        assert [len(batch) for batch in order_of(3, epoch)] == [4, 4, 4, 4, 4, 2]


def test_a_batch_in_passes_is_the_same_batch() -> None:
    lengths = [n % 7 for n in range(22)]
    whole = list(EpochOrder(lengths, batch_size=8, pass_size=8, seed=1))
    passes = list(EpochOrder(lengths, batch_size=8, pass_size=4, seed=1))
    assert [first + second for first, second in zip(passes[:4:2], passes[1:4:2], strict=True)] == whole[:2]
    assert len(passes) == len(EpochOrder(lengths, batch_size=8, pass_size=4, seed=1)) == 6


def test_conversations_of_like_length_share_a_batch() -> None:
    lengths = [10 + (n * 7919) % 90 for n in range(64)]
    batches = list(EpochOrder(lengths, batch_size=8, pass_size=8, seed=1))
    padded = sum(8 * max(lengths[number] for number in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)


def test_a_pass_keeps_to_its_budget_of_tokens() -> None:
    assert fitting_pass_size(8, 100, token_budget=1000) == 8
    assert fitting_pass_size(32, 100, token_budget=1000) == 8
    assert fitting_pass_size(7, 500, token_budget=1000) == 1
    assert fitting_pass_size(4, 5000, token_budget=1000) == 1


def test_wide_models_learn_more_slowly() -> None:
    assert base_learning_rate(256) == pytest.approx(2.46e-3, rel=0.01)
    assert base_learning_rate(4096) == pytest.approx(2.87e-4, rel=0.01)

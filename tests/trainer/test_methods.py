"""What each method minimises: the same however a batch is cut, padded or packed, and however often the run is broken off."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

from gateway.jobdir import BaseRef, JobDir, Lora, Method, Options, Precision, Quantization
from tests.tiny_architectures import SHAPES, random_model
from tests.trainer.conftest import folder_bytes
from tests.trainer.drawn import draw_examples, draw_sequence
from tests.trainer.runs import Settings, train_in_process
from trainer.arithmetic import choose
from trainer.data.batches import collate, pack, pad, take_apart
from trainer.data.examples import Examples
from trainer.methods.dpo import DirectPreference
from trainer.methods.kto import KahnemanTversky, balanced_weights
from trainer.methods.orpo import OddsRatio
from trainer.methods.reference import as_reference, freeze_reference
from trainer.methods.sft import Supervised
from trainer.model import add_lora, base_learning_rate, load_base
from trainer.scoring import evaluating, score_replies

torch.set_num_threads(1)

METHODS: tuple[Method, ...] = get_args(Method)


def settings_for(method: Method, **more: object) -> Settings:
    """At a learning rate that moves the losses of every method within a few steps."""
    return replace(Settings(method, learning_rate_multiplier=2e-3 / base_learning_rate(64, method)), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_packing_padding_and_passes_do_not_change_the_losses(method: Method, tiny_ref: BaseRef, tmp_path: Path) -> None:
    """Fourteen conversations in batches of four: the last batch is short; some conversations have several sequences."""
    examples = draw_examples(method, 14)
    whole = train_in_process(tmp_path / "whole", tiny_ref, examples, settings_for(method)).losses
    assert len(whole) == 4 and len(set(whole)) >= 3, "the first step, at a learning rate of 0, moves nothing"
    most = int(max(len(examples.sequences(n)) * length for n, length in enumerate(examples.lengths())))
    for name, options, pass_tokens in (
        ("packed", Options(packing=True), 16_384),
        ("in passes", Options(), 2 * most),
        ("packed in passes", Options(packing=True), 2 * most),
    ):
        settings = settings_for(method, options=options, pass_tokens=pass_tokens)
        assert train_in_process(tmp_path / name, tiny_ref, examples, settings).losses == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("architecture", SHAPES)
def test_sequences_that_share_a_row_do_not_see_one_another(architecture: str) -> None:
    """Each has the log-probabilities that it has alone, also beyond a sliding window, and whoever its neighbours are."""
    model = add_lora(random_model(architecture, vocab_size=448), Lora(rank=4, alpha=8), seed=1)
    draw = random.Random(1)
    sequences = [draw_sequence(draw) for _ in range(6)] + [draw_sequence(draw, draw.choices(range(3, 440), k=90))]
    neighbours = [draw_sequence(draw, draw.choices(range(3, 440), k=n + 1)) for n in range(6)]
    packed = pack([*sequences, *neighbours])
    assert len(packed["input_ids"]) < 6, "some share a row"
    with evaluating(model):
        together = score_replies(model, packed).logprobs[: len(sequences)]
        alone = torch.cat([score_replies(model, pad([sequence])).logprobs for sequence in sequences])
    assert torch.allclose(together, alone, atol=1e-4, rtol=1e-5)


def test_a_packed_pass_holds_every_sequence_once_in_its_order() -> None:
    draw = random.Random(2)
    sequences = [draw_sequence(draw) for _ in range(20)]
    for inputs in (pack(sequences), pad(sequences), pack(sequences, width=10_000)):
        assert [(s.ids, s.labels) for s in take_apart(inputs)] == [(s.ids, s.labels) for s in sequences]
    assert pack(sequences)["input_ids"].numel() < 0.85 * pad(sequences)["input_ids"].numel()
    assert len(pack(sequences, width=10_000)["input_ids"]) == 1


@pytest.mark.parametrize(
    ("method", "lora", "options"),
    [
        ("dpo", Lora(rank=4, alpha=8), Options()),
        ("kto", Lora(rank=4, alpha=8), Options(scheduler="linear")),
        ("supervised", Lora(rank=4, alpha=8, dropout=0.3), Options(packing=True, weight_decay=0.1)),
        ("dpo", Lora(rank=4, alpha=8, dropout=0.3), Options(precision="bf16", quantization="nf4")),
    ],
)
def test_a_run_that_was_broken_off_ends_in_the_same_bytes(
    method: Method, lora: Lora, options: Options, tiny_ref: BaseRef, tmp_path: Path
) -> None:
    """And so does the same run done twice."""
    examples = draw_examples(method, 12)
    settings = settings_for(method, lora=lora, options=options, n_epochs=3, validation=draw_examples(method, 5, seed=2))
    unbroken = train_in_process(tmp_path / "unbroken", tiny_ref, examples, settings)
    broken = tmp_path / "broken"
    job = JobDir(shutil.copytree(unbroken.job.path, broken / "job"))
    for kind in ("checkpoints", "adapter_checkpoints"):
        for step in (6, 9):
            shutil.rmtree(job.path / kind / f"step-{step}")
    resumed = train_in_process(broken, tiny_ref, examples, settings)
    again = train_in_process(tmp_path / "again", tiny_ref, examples, settings)
    assert resumed.metrics == unbroken.metrics[3:]
    assert again.metrics == unbroken.metrics
    final = folder_bytes(unbroken.job.path / "adapter_checkpoints" / "step-9")
    for other in (resumed, again):
        assert folder_bytes(other.job.path / "adapter_checkpoints" / "step-9") == final


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_preferences_are_learnt_and_told(method: Method, tiny_ref: BaseRef, tmp_path: Path) -> None:
    settings = settings_for(method, n_epochs=6, validation=draw_examples(method, 6, seed=2))
    run = train_in_process(tmp_path, tiny_ref, draw_examples(method, 12), settings)
    first, last = run.metrics[0], run.metrics[-1]
    assert last["train_loss"] < first["train_loss"] and last["train_mean_token_accuracy"] == 1.0
    assert {"full_valid_loss", "full_valid_mean_token_accuracy"} <= set(last)
    if method == "kto":
        assert last["train_kl"] >= 0
    else:
        assert last["train_reward_margin"] > first["train_reward_margin"]
    if method != "orpo":
        expected = {"dpo": math.log(2), "kto": balanced_loss_at_start(draw_examples("kto", 12), run.order[:4])}
        assert first["train_loss"] == pytest.approx(expected[method], abs=1e-5), "nothing has moved yet"


def balanced_loss_at_start(examples: Examples, batch: list[int]) -> float:
    desirable = int(examples.desirable.sum())
    weights = balanced_weights(desirable, len(examples) - desirable)
    return sum(0.5 * weights[0 if examples.desirable[n] else 1] for n in batch) / len(batch)


@pytest.mark.parametrize("quantization", get_args(Quantization))
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_look_at_the_model_changes_no_gradient(
    quantization: Quantization, precision: Precision, tiny_ref: BaseRef
) -> None:
    """Validation and the reference ask it in eval mode, for which bitsandbytes has other kernels and layouts."""
    arithmetic = choose(Options(precision=precision, quantization=quantization))
    model = add_lora(load_base(tiny_ref, arithmetic), Lora(rank=4, alpha=8), seed=1)
    inputs = collate(draw_examples("supervised", 4), range(4))
    found = []
    for _ in range(2):
        with arithmetic.autocast():
            Supervised().score(model.train(), inputs).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        with evaluating(model):
            score_replies(model, inputs)
    assert len(found[0]) == 28 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    plain = add_lora(load_base(tiny_ref), Lora(rank=4, alpha=8), seed=1)
    if quantization == "nf4":  # what the four bits stand for, as plain numbers
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_submodule(name).weight.data.copy_(weight)
    Supervised().score(plain.train(), inputs).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    alike = torch.cosine_similarity(torch.cat([g.flatten() for g in found[0]]), expected, dim=0)
    assert alike > (0.9999 if quantization != "int8" and precision == "f32" else 0.99)


def test_kto_weighs_both_kinds_alike_in_sum() -> None:
    assert balanced_weights(30, 10) == (1.0, 3.0)
    assert balanced_weights(10, 10) == (1.0, 1.0)
    assert balanced_weights(2, 5) == (2.5, 1.0)
    assert balanced_weights(7, 0) == balanced_weights(0, 7) == (1.0, 1.0)


def test_the_reference_of_a_tuned_model_is_that_model(tiny_ref: BaseRef, tmp_path: Path) -> None:
    """Its first loss is log 2, though the bare base judges otherwise; and training does not move it."""
    tuned = train_in_process(tmp_path / "first", tiny_ref, draw_examples("supervised", 12), settings_for("supervised"))
    start = tuned.job.path / "adapter_checkpoints" / "step-3"
    model = add_lora(load_base(tiny_ref), Lora(rank=99, alpha=1, dropout=0.0), seed=1, start=start)
    assert model.peft_config["default"].r == 4, "a start's shape is its own"
    state = load_file(start / "adapter_model.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".default." in name}
    assert {name.replace(".default.", ".") for name in before} == set(state)
    freeze_reference(model)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == set(before), "the reference does not learn"

    inputs = collate(draw_examples("dpo", 4), range(4))
    first = DirectPreference(0.5, 4).score(model, inputs)
    assert first.loss.item() / 4 == pytest.approx(math.log(2), abs=1e-5)
    with evaluating(model), model.disable_adapter():
        base = score_replies(model, inputs).logprobs
    with as_reference(model):
        reference = score_replies(model, inputs).logprobs
    assert (base - reference).abs().max() > 0.1
    first.loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    with as_reference(model):
        assert torch.equal(score_replies(model, inputs).logprobs, reference)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == learning


def test_an_adapter_of_another_base_is_no_start(tiny_ref: BaseRef, tmp_path: Path) -> None:
    tuned = train_in_process(tmp_path / "first", tiny_ref, draw_examples("supervised", 12), settings_for("supervised"))
    start = Path(shutil.copytree(tuned.job.path / "adapter_checkpoints" / "step-3", tmp_path / "start"))
    config = json.loads((start / "adapter_config.json").read_text())
    (start / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match="does not fit"):
        add_lora(load_base(tiny_ref), Lora(), seed=1, start=start)


def test_the_reference_is_asked_once_for_each_conversation(tiny_ref: BaseRef) -> None:
    model = add_lora(load_base(tiny_ref), Lora(rank=4, alpha=8), seed=1)
    examples = draw_examples("dpo", 6)
    objective = DirectPreference(0.1, 6)
    one, two = ({**collate(examples, numbers), "numbers": torch.tensor(numbers)} for numbers in ([1, 4], [4, 2]))
    objective.score(model, one)
    table = objective.state["reference"].clone()
    assert table.isnan().any(1).tolist() == [True, False, True, True, False, True]
    objective.score(model, two)
    assert torch.allclose(objective.state["reference"][4], table[4], atol=1e-4)
    kept = objective.state["reference"].nan_to_num(0)
    objective.score(model, collate(examples, [0]))
    assert torch.equal(objective.state["reference"].nan_to_num(0), kept), "what has no number is not kept"


def test_a_reply_that_is_certain_has_finite_odds(tiny_ref: BaseRef) -> None:
    model = add_lora(load_base(tiny_ref), Lora(rank=4, alpha=8), seed=1)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone() * 1e4)  # every distribution is a spike
    loss = OddsRatio(0.1).score(model, collate(draw_examples("orpo", 3), range(3))).loss
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_drift_is_that_of_the_whole_batch(tiny_ref: BaseRef) -> None:
    model = add_lora(load_base(tiny_ref), Lora(rank=4, alpha=8), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    examples = draw_examples("kto", 6)
    cuts: list[list[list[int]]] = [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[n] for n in range(6)]]
    drifts = []
    for cut in cuts:
        passes = [collate(examples, numbers) for numbers in cut]
        KahnemanTversky(0.1, 6, max_length=256).begin_batch(model, passes)
        drifts.append({float(inputs["drift"]) for inputs in passes})
    assert [len(each) for each in drifts] == [1, 1, 1]
    assert max(map(max, drifts)) == pytest.approx(min(map(min, drifts)), rel=1e-4)


def test_preference_methods_learn_more_slowly() -> None:
    assert base_learning_rate(4096, "dpo") == pytest.approx(1e-5, rel=0.05)
    assert base_learning_rate(4096, "orpo") == pytest.approx(7.2e-5, rel=0.05)

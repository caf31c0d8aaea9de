"""How to train, beyond OpenAI's hyperparameters: each option reaches what it is about, and what cannot be had is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import PeftModel
from transformers import get_scheduler

from gateway.engines.witness import read_witness
from gateway.jobdir import BaseRef, Hyperparameters, JobDir, Lora, Options, Scheduler, read_events
from tests.tiny_model import write_job
from tests.trainer.conftest import run_trainer
from tests.trainer.drawn import draw_examples
from tests.trainer.runs import Settings, train_in_process
from trainer.arithmetic import Arithmetic, UnsupportedOption, choose, needs_checkpointing
from trainer.data.batches import collate
from trainer.methods.sft import Supervised
from trainer.model import add_lora, base_learning_rate, load_base

torch.set_num_threads(1)


def test_a_tuned_model_learns_preferences_from_where_it_stands(
    finished_job: JobDir, tiny_base: Path, tmp_path: Path
) -> None:
    """A file of pairs, a start adapter, other options: the whole way, as a process."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair(n)) + "\n" for n in range(12)))
    chosen = Hyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=20.0, beta=0.5)
    job = write_job(tmp_path / "job", tiny_base, pairs, hyperparameters=chosen)
    shutil.copytree(finished_job.adapter, job.start)
    options = Options(packing=True, scheduler="constant", warmup_ratio=0.0, precision="bf16")
    job.write_spec(replace(job.read_spec(), method="dpo", options=options, starts_from="ft:tiny", lora=Lora(4, 8)))
    done = run_trainer(job)
    assert done.returncode == 0, done.stderr
    result, check = job.read_result(), job.read_check()
    assert result is not None and result.status == "succeeded", (result, done.stderr)
    assert check is not None and check.beta == 0.5 and check.n_examples == 12
    metrics = [event.data for event, _ in read_events(job.events_path(1)) if event.type == "metrics"]
    assert metrics[0]["train_loss"] == pytest.approx(0.6931, abs=0.001), "the reference is what it started from"
    assert metrics[-1]["train_loss"] < 0.6 and metrics[-1]["train_mean_token_accuracy"] == 1.0
    assert metrics[-1]["train_reward_margin"] > 0


def pair(number: int) -> dict[str, object]:
    return {
        "input": {"messages": [{"role": "user", "content": f"Set a timer for {number} minutes."}]},
        "preferred_output": [{"role": "assistant", "content": f"note(text='{number}')"}],
        "non_preferred_output": [{"role": "assistant", "content": f"timer(minutes={number})"}],
    }


def test_a_model_that_learnt_the_prompts_too_has_a_witness_with_prompts(
    tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    """Else the gateway could not tell whether an engine applies it, and would serve none of them."""
    job = write_job(tmp_path / "job", tiny_base, files / "train.jsonl", options=Options(train_on="all"))
    job.write_spec(replace(job.read_spec(), hyperparameters=Hyperparameters(n_epochs=1, batch_size=20)))
    assert run_trainer(job).returncode == 0
    assert len(read_witness(job.adapter / "witness.json")) == 6


def test_fp16_without_a_gpu_fails_the_job_with_what_to_change(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", tiny_base, files / "train.jsonl")
    job.write_spec(replace(job.read_spec(), options=Options(precision="fp16")))
    assert run_trainer(job).returncode == 0
    result = job.read_result()
    assert result is not None and result.error is not None
    assert (result.status, result.error.code) == ("failed", "unsupported_option")
    assert "'fp16'" in result.error.message and "'bf16'" in result.error.message


def test_what_is_not_said_is_decided_by_the_machine() -> None:
    assert choose(Options()) == Arithmetic("f32", "none", gpu=False), "this machine has no GPU"
    assert choose(Options(precision="bf16", quantization="nf4")) == Arithmetic("bf16", "nf4", gpu=False)
    with pytest.raises(UnsupportedOption):
        choose(Options(precision="fp16"))


def test_the_base_is_exact_unless_it_is_quantised_or_rounded_for_a_gpu() -> None:
    """Where it is not, the witness loads what is served."""
    exact = [
        Arithmetic("f32", "none", gpu=True),
        Arithmetic("f32", "none", gpu=False),
        Arithmetic("bf16", "none", gpu=False),
    ]
    rounded = [
        Arithmetic("bf16", "none", gpu=True),
        Arithmetic("fp16", "none", gpu=True),
        Arithmetic("f32", "int8", gpu=False),
    ]
    assert all(each.base_is_exact for each in exact) and not any(each.base_is_exact for each in rounded)
    assert Arithmetic("bf16", "none", gpu=True).base_dtype is torch.bfloat16
    assert Arithmetic("bf16", "none", gpu=False).base_dtype is torch.float32


@pytest.mark.parametrize("scheduler", get_args(Scheduler))
def test_the_learning_rate_goes_as_it_was_asked_for(scheduler: Scheduler, tiny_ref: BaseRef, tmp_path: Path) -> None:
    """At three of ten steps, of which four warm up: as transformers' own schedules have it."""
    options = Options(scheduler=scheduler, warmup_ratio=0.4, weight_decay=0.25, checkpoint_steps=3)
    settings = Settings(options=options, batch_size=2, learning_rate_multiplier=0.5)
    run = train_in_process(tmp_path, tiny_ref, draw_examples("supervised", 20), settings)
    rate = 0.5 * base_learning_rate(64)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    expected = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=10)
    rates = {}
    for step in range(1, 11):
        optimizer.step()
        expected.step()
        rates[step] = expected.get_last_lr()[0]
    for step in (6, 9, 10):
        kept = torch.load(run.job.checkpoints / f"step-{step}" / "optimizer.pt", weights_only=True)["param_groups"]
        assert [group["lr"] for group in kept] == pytest.approx([rates[step]] * len(kept), rel=1e-6)
        assert {group["weight_decay"] for group in kept if group["params"]} == {0.25}


def test_activations_are_computed_twice_only_where_they_would_not_fit(tiny_ref: BaseRef) -> None:
    config = load_base(tiny_ref).config
    half, full = Arithmetic("bf16", "none", gpu=True), Arithmetic("f32", "none", gpu=True)
    layers = 2 * 1000 * (8 * 64 + 4 * 128) * 2  # of 1000 tokens, in bytes
    logits = 3 * 4 * 100 * config.vocab_size
    enough = int((layers + logits) / 0.8) + 1
    assert not needs_checkpointing(config, 1000, 100, enough, half)
    assert needs_checkpointing(config, 1100, 100, enough, half)
    assert needs_checkpointing(config, 1000, 100, enough, full)


def test_activations_that_are_computed_twice_change_no_gradient(tiny_ref: BaseRef) -> None:
    inputs = collate(draw_examples("supervised", 4), range(4), packed=True)
    found = []
    for twice in (False, True):
        model = add_lora(load_base(tiny_ref), Lora(rank=4, alpha=8), seed=1).train()
        if twice:  # as transformers' trainer does it
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        Supervised().score(model, inputs).loss.backward()
        found.append(gradients(model))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-7)


def gradients(model: PeftModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

"""TRL's own trainers, fed the same ids, seed and settings in the same order, give the same losses, step for step."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback

from gateway.chat.render import TrainingSequence
from gateway.jobdir import BaseRef, Lora, Method
from tests.trainer.drawn import draw_pair, draw_sequence, split
from tests.trainer.runs import Settings, train_in_process
from trainer.data.examples import Examples
from trainer.model import add_lora, base_learning_rate, load_base

torch.set_num_threads(1)

STEPS, BATCH = 15, 4
BETA = 0.1
LORA = Lora(rank=4, alpha=8)


@pytest.fixture
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    """TRL asks for one; all ids are made already."""
    file = str(tiny_base / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def run_ours(
    folder: Path, tiny_ref: BaseRef, method: Method, conversations: list[list[TrainingSequence]], **more: Any
) -> tuple[list[float], list[int]]:
    """Losses, and the conversations in the order in which they were trained on."""
    desirable = more.pop("desirable", None)
    batch_size = more.pop("batch_size", BATCH)
    settings = Settings(
        method, LORA, batch_size=batch_size, learning_rate_multiplier=rate_multiplier(method), beta=BETA
    )
    run = train_in_process(folder, tiny_ref, Examples.of(conversations, desirable), settings)
    return run.losses, run.order


def rate_multiplier(method: Method) -> float:
    """That makes the learning rate of every method 2e-3: enough for the losses to move."""
    return 2e-3 / base_learning_rate(64, method)


def run_trl(trainer: Any) -> list[float]:
    """The loss of each step; the trainer is to see its rows in their order."""
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    losses = Losses()
    trainer.add_callback(losses)
    trainer.train()
    return losses.found


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.found.append(logs["loss"])


def settings_of_trl(folder: Path, batch_size: int = BATCH) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 7,
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,  # 5% of 15
        "max_grad_norm": 1.0,
        "max_length": 512,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def fresh_model(tiny_ref: BaseRef) -> PeftModel:
    return add_lora(load_base(tiny_ref), LORA, seed=7)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_supervised(tiny_ref: BaseRef, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    draw = random.Random(1)
    conversations = [[draw_sequence(draw)] for _ in range(STEPS * BATCH)]
    ours, order = run_ours(tmp_path / "ours", tiny_ref, "supervised", conversations)
    rows = [{"input_ids": c[0].ids, "labels": c[0].labels} for c in (conversations[n] for n in order)]
    trainer = trl.SFTTrainer(
        model=fresh_model(tiny_ref),
        args=trl.SFTConfig(**settings_of_trl(tmp_path / "theirs"), dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert ours == pytest.approx(run_trl(trainer), abs=1e-4)
    assert len(ours) == STEPS and ours[-1] < ours[0] - 0.1


def test_dpo(tiny_ref: BaseRef, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    draw = random.Random(2)
    pairs = [draw_pair(draw) for _ in range(STEPS * BATCH)]
    ours, order = run_ours(tmp_path / "ours", tiny_ref, "dpo", pairs)
    trainer = trl.DPOTrainer(
        model=fresh_model(tiny_ref),
        args=trl.DPOConfig(**settings_of_trl(tmp_path / "theirs"), beta=BETA),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * BATCH),
        processing_class=tokenizer,
    )
    ids = [(split(chosen), split(rejected)) for chosen, rejected in (pairs[n] for n in order)]
    trainer.train_dataset = Dataset.from_list(
        [{"prompt_ids": c.prompt, "chosen_ids": c.reply, "rejected_ids": r.reply} for c, r in ids]
    )
    assert ours == pytest.approx(run_trl(trainer), abs=1e-4)
    assert len(ours) == STEPS and len({round(loss, 3) for loss in ours}) > STEPS / 2


def test_kto(tiny_ref: BaseRef, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    draw = random.Random(3)
    conversations = [[draw_sequence(draw)] for _ in range(STEPS * BATCH)]
    desirable = [n % 2 == 0 for n in range(len(conversations))]
    ours, order = run_ours(tmp_path / "ours", tiny_ref, "kto", conversations, desirable=desirable)
    trainer = trl.KTOTrainer(
        model=fresh_model(tiny_ref),
        args=trl.KTOConfig(**settings_of_trl(tmp_path / "theirs"), beta=BETA),
        train_dataset=Dataset.from_list(
            [{"prompt": "a", "completion": "b", "label": n % 2 == 0} for n in range(BATCH)]
        ),
        processing_class=tokenizer,
    )
    rows = []
    for start in range(0, len(order), BATCH):  # as TRL's own preparation pairs prompts and replies
        batch = order[start : start + BATCH]
        replies = [split(conversations[n][0]).reply for n in batch]
        rows += [
            {
                "prompt_ids": split(conversations[n][0]).prompt,
                "completion_ids": replies[place],
                "KL_completion_ids": replies[place - 1],
                "label": desirable[n],
            }
            for place, n in enumerate(batch)
        ]
    trainer.train_dataset = Dataset.from_list(rows)
    assert ours == pytest.approx(run_trl(trainer), abs=1e-4)
    assert len({round(loss, 3) for loss in ours}) > STEPS / 2


def test_orpo(tiny_ref: BaseRef, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """One pair a batch, and prompts of one token: with more, TRL weighs by tokens and learns the prompts (see `orpo`)."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    draw = random.Random(4)
    pairs = [draw_pair(draw, prompt=[1]) for _ in range(STEPS)]
    ours, order = run_ours(tmp_path / "ours", tiny_ref, "orpo", pairs, batch_size=1)
    trainer = ORPOTrainer(
        model=fresh_model(tiny_ref),
        args=ORPOConfig(**settings_of_trl(tmp_path / "theirs", batch_size=1), beta=BETA),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * BATCH),
        processing_class=tokenizer,
    )
    rows = []
    for chosen, rejected in (pairs[n] for n in order):
        row: dict[str, Any] = {"prompt_input_ids": [1], "prompt_attention_mask": [1], "prompt": ""}
        for name, sequence in (("chosen", chosen), ("rejected", rejected)):
            row |= {
                f"{name}_input_ids": sequence.ids,
                f"{name}_attention_mask": [1] * len(sequence.ids),
                f"{name}_labels": sequence.labels,
            }
        rows.append(row)
    trainer.train_dataset = Dataset.from_list(rows)
    assert ours == pytest.approx(run_trl(trainer), abs=1e-4)

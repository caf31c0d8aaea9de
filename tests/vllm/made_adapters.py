"""Adapters that nobody trained: random, strong, each unlike the others, with the witness that PEFT itself writes."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from gateway.bases import PreparedBase
from gateway.engines.adapters import Adapter, immutable_name, link_adapter
from gateway.jobdir import Lora
from tests.tiny_model import write_examples, write_job
from trainer.export.adapter import write_adapter
from trainer.model import add_lora, load_base
from trainer.scoring import evaluating, token_logprobs

STRENGTH = 0.15
ITEMS, TOKENS = 3, 32


def make_adapters(base: PreparedBase, folder: Path, names: list[str], lora: Lora | None = None) -> list[Adapter]:
    """One for each name, kept in `folder`/adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    job = write_job(folder / "job", base.path, write_examples(folder / "train.jsonl", 12), lora=lora or Lora())
    spec = job.read_spec()
    made = []
    for seed, name in enumerate(names):
        tuned = add_lora(load_base(spec.base), spec.lora, seed)
        torch.manual_seed(seed)
        for parameter, values in tuned.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(values, std=STRENGTH)
        draw = random.Random(seed)
        items = []
        with evaluating(tuned):
            for _ in range(ITEMS):
                ids = [1, *(draw.randrange(10, 4000) for _ in range(TOKENS))]
                first = len(ids) // 2
                with tuned.disable_adapter():
                    base_logprobs = token_logprobs(tuned, ids, first)
                items.append(
                    {
                        "prompt_ids": ids[:first],
                        "reply_ids": ids[first:],
                        "base_logprobs": base_logprobs,
                        "tuned_logprobs": token_logprobs(tuned, ids, first),
                    }
                )
        write_adapter(folder / f"written-{seed}", tuned, job, spec, {"items": items})
        digest, path = link_adapter(folder / f"written-{seed}", folder / "adapters")
        made.append(Adapter(immutable_name(name, digest), path, base.name, digest))
    return made

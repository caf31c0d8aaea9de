"""Adapters that were never trained, random in both halves, as training would have left them: what is exported in tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from gateway.chat.bundle import Bundle
from gateway.jobdir import BaseRef, Lora
from trainer.export.adapter import write_adapter_files
from trainer.export.merge import Tuned
from trainer.export.progress import Progress
from trainer.model import add_lora, load_base
from trainer.scoring import evaluating, token_logprobs

PROMPTS = ([1, 9, 40, 300], [1, 77, 12, 5, 6], [1, 200, 201])
REPLIES = ([17, 30, 8, 111, 2], [50, 51, 52, 53, 54], [9, 8, 7, 6, 5])


def base_ref(base: Path) -> BaseRef:
    described = json.loads((base / "base.json").read_text())
    return BaseRef(described["name"], str(base), described.get("gguf"), described["digest"], described.get("hf"))


def tune(base: Path, folder: Path, strength: float = 0.05) -> tuple[Tuned, PeftModel]:
    """An adapter of a prepared base in `folder`, its witness told by PEFT; and the model with it."""
    ref = base_ref(base)
    model = add_lora(load_base(ref), Lora(rank=4, alpha=8), seed=1)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, strength) if strength else parameter.data.zero_()
    bundle = Bundle.from_files({name: (base / name).read_bytes() for name in ("template.json", "tokenizer.json")})
    template = folder.parent / f"{folder.name}-template"
    template.mkdir(parents=True)
    for name, content in bundle.to_files().items():
        (template / name).write_bytes(content)
    write_adapter_files(folder, model, template, ref, bundle.digest, witness(model))
    return Tuned.read("ft:tiny:org::abc", base, folder), model


def witness(model: PeftModel) -> dict[str, Any]:
    items = []
    with evaluating(model):
        for prompt, reply in zip(PROMPTS, REPLIES, strict=True):
            with model.disable_adapter():
                before = token_logprobs(model, prompt + reply, len(prompt))
            after = token_logprobs(model, prompt + reply, len(prompt))
            items.append({"prompt_ids": prompt, "reply_ids": reply, "base_logprobs": before, "tuned_logprobs": after})
    return {"items": items}


class Quiet(Progress):
    """Says nothing."""

    def say(self, line: str) -> None:
        pass

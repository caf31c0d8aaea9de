"""A PEFT adapter that was trained elsewhere, made into one of ours: `python -m trainer.export.import_adapter …`.

    --adapter DIR (adapter_config.json, adapter_model.safetensors) --base DIR (prepared) --bundle DIR --out DIR

Place in the flow: `tunegate models add --adapter` → **this** → the running gateway, which loads and verifies it. One rule: what
comes out is what training here would have left, so it is served under the same checks: PEFT itself says, on the very weights
that the engine has, what the adapter does, and the engine must do the same. Its own process, with torch.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path
from typing import Any

from gateway.chat.bundle import TEMPLATE_FILE, TOKENIZER_FILE, Bundle
from gateway.chat.conversation import Message
from gateway.chat.render import render_prompt
from gateway.jobdir import BaseRef, read_json

ITEMS, TOKENS = 6, 24
PROMPTS = ("Hello.", "What is this?", "Tell me about the weather.", "Why?", "List three things.", "Set a timer.")
# What replies are drawn from: words, so that the base itself gives them some probability.
TEXT = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were "
    "when we there can an your which their said if do will each about how up out them then she many some so these would "
    "other into has more her two like him see time could no make than first been its who now people my made over did down"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export.import_adapter", description=__doc__.splitlines()[0]
    )
    for name, text in (
        ("adapter", "a folder with adapter_config.json and adapter_model.safetensors"),
        ("base", "the prepared base that it was trained on"),
        ("bundle", "a folder with the template.json and tokenizer.json that it is asked through"),
        ("out", "the folder to make"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    options = parser.parse_args(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        import_adapter(options.adapter, options.base, options.bundle, options.out)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        print(f"cannot import {options.adapter}: {error}", file=sys.stderr)
        return 1
    return 0


def import_adapter(adapter: Path, base: Path, bundle_folder: Path, out: Path) -> None:
    """Makes the adapter folder `out`. Raises what PEFT raises for an adapter that does not fit the base."""
    import torch
    from peft import PeftModel

    from trainer.export.adapter import write_adapter_files
    from trainer.model import load_base

    described = read_json(base / "base.json")
    ref = BaseRef(described["name"], str(base), described.get("gguf"), described["digest"], described.get("hf"))
    bundle = Bundle.from_files({name: (bundle_folder / name).read_bytes() for name in (TEMPLATE_FILE, TOKENIZER_FILE)})
    model = PeftModel.from_pretrained(load_base(ref), str(adapter), is_trainable=False, torch_dtype=torch.float32)
    model.peft_config["default"].base_model_name_or_path = ref.name  # never a path of another machine
    write_adapter_files(out, model, bundle_folder, ref, bundle.digest, _witness(model, bundle))


def _witness(model: Any, bundle: Bundle) -> dict[str, Any]:
    """As training writes it, on prompts of our own."""
    from trainer.scoring import evaluating, token_logprobs

    pool = bundle.tokenizer.encode(TEXT)
    draw = random.Random(0)
    items = []
    with evaluating(model):
        for text in PROMPTS[:ITEMS]:
            prompt = render_prompt(bundle, [Message("user", text)]).ids
            drawn = draw.choices(pool, k=TOKENS)
            with model.disable_adapter():
                base_logprobs = token_logprobs(model, prompt + drawn, len(prompt))
            items.append(
                {
                    "prompt_ids": prompt,
                    "reply_ids": drawn,
                    "base_logprobs": base_logprobs,
                    "tuned_logprobs": token_logprobs(model, prompt + drawn, len(prompt)),
                }
            )
    return {"items": items}


if __name__ == "__main__":
    sys.exit(main())
